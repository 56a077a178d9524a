"""The models that tests run: each way of using a weight that the sweep knows, once, in the fewest seconds."""

from __future__ import annotations

COVERING: dict[str, str] = {
    "timm beit": "qkv is read by F.linear, its bias put together of two parameters and a buffer",
    "timm eva 02": "query, key and value apart, gated MLPs, rotary positions",
    "timm swin_transformer_v2": "window attention with cosine scores; an MLP makes the position bias, norms come last",
    "timm convnext": "a convolutional network whose MLPs are linear layers",
    "timm mlp_mixer": "products along tokens, not channels",
    "timm vision_transformer features": "features only: a list of maps, and blocks that are run by somebody else",
    "timm vision_transformer pooling": "a learned query attends to all tokens, keys and values in one matrix",
    "timm vision_transformer parallel": "attention and MLP side by side, whose first matrix is one for both",
    "timm xcit": "attention between channels, class attention at the end",
    "timm gemma4_vit": "linear layers wrapped in modules of their own, grouped queries",
    "timm deepseek_vit": "a classifier around an encoder: names one level deeper, gated MLPs",
    "timm vision_transformer_sam": "windows, decomposed relative positions, outputs are a map of features",
    "torchvision vit": "nn.MultiheadAttention's in-projection, three matrices in one parameter",
    "torchvision swin v2": "qkv is read by a function, with a changed copy of its bias",
    "torchvision maxvit": "windows and grids, convolutions in between",
    "torch encoder": "the fast path of nn.TransformerEncoder in evaluation",
    "torch transformer": "cross-attention, whose in-projection is used in slices",
    "transformers clip": "two towers; a loss that needs both; embeddings of text",
    "transformers beit": "query, key and value apart, with a table of relative positions; no classes",
    "transformers gpt2": "Conv1D, transposed; a head tied to the embedding",
    "transformers qwen2 moe, eager": "experts in stacks, one product after the other; a shared expert; a router",
    "transformers qwen3 moe, grouped_mm": "experts by one grouped product",
    "transformers qwen3 moe, batched_mm": "experts by copies of their matrices, one for each token",
}
