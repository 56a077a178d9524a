"""Models of the sweep that are not timm's: torchvision's transformers, torch's own, and transformers' in tiny."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from scripts.sweep.models import BATCH, Subject

TOKENS, WIDTH = 12, 32


def images(size: int, channels: int = 3) -> Callable[[], Tensor]:
    return lambda: torch.randn(BATCH, channels, size, size)


# torchvision


def vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=WIDTH, mlp_dim=64, num_classes=5
    )


def swin(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as module

    sizes: dict[str, Any] = {"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 2]}
    kinds: dict[str, Any] = {"block": module.SwinTransformerBlockV2, "downsample_layer": module.PatchMergingV2}
    return module.SwinTransformer(window_size=[4, 4], num_classes=5, **sizes, **(kinds if version == 2 else {}))


def maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit(
        input_size=(32, 32),
        stem_channels=16,
        partition_size=4,
        block_channels=[16, 32],
        block_layers=[1, 1],
        head_dim=8,
        stochastic_depth_prob=0.0,
        num_classes=5,
    )


# torch


class Sequence(nn.Module):
    """Images to classes by torch's encoder, which has a fast path of its own in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 64, batch_first=True)
        self.body, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class Translation(nn.Module):
    """torch's encoder and decoder, with self-attention and cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Transformer(WIDTH, 2, 2, 2, 64, batch_first=True)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x, x.flip(1)))


def tokens() -> Tensor:
    return torch.randn(BATCH, TOKENS, WIDTH)


# transformers

TINY: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION: dict[str, Any] = {**TINY, "image_size": 32, "patch_size": 8}
WORDS = 64


def _transformer(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**settings))
        return model

    return make


def _pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(BATCH, 3, 32, 32)}


def _words() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, WORDS, (BATCH, TOKENS)), "use_cache": False}


def _both() -> dict[str, Tensor]:
    ids = torch.randint(3, WORDS, (BATCH, TOKENS))
    ids[:, -1] = WORDS - 1  # the end, where CLIP reads
    return {**_pictures(), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


TEXT: dict[str, Any] = {**TINY, "vocab_size": WORDS, "max_position_embeddings": 16}
END: dict[str, Any] = {"eos_token_id": WORDS - 1, "bos_token_id": 1, "pad_token_id": 0}
EXPERTS: dict[str, Any] = {
    **TINY,
    "vocab_size": WORDS,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
SHARED: dict[str, Any] = {"shared_expert_intermediate_size": 32}
STAGES: dict[str, Any] = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 2]}

OTHERS = (
    Subject("torchvision vit", vit, images(32), "ViT of width 32"),
    Subject("torchvision swin", lambda: swin(1), images(32), "Swin of two stages"),
    Subject("torchvision swin v2", lambda: swin(2), images(32), "Swin v2 of two stages"),
    Subject("torchvision maxvit", maxvit, images(32), "MaxViT of two stages"),
    Subject("torch encoder", Sequence, tokens, "nn.TransformerEncoder"),
    Subject("torch transformer", Translation, tokens, "nn.Transformer"),
    Subject(
        "transformers clip",
        _transformer("CLIPModel", "CLIPConfig", text_config={**TEXT, **END}, vision_config=VISION, projection_dim=16),
        _both,
        "CLIPModel",
    ),
    Subject(
        "transformers siglip",
        _transformer("SiglipModel", "SiglipConfig", text_config=TEXT, vision_config=VISION),
        _both,
        "SiglipModel",
    ),
    Subject("transformers vit", _transformer("ViTModel", "ViTConfig", **VISION), _pictures, "ViTModel"),
    Subject("transformers dinov2", _transformer("Dinov2Model", "Dinov2Config", **VISION), _pictures, "Dinov2Model"),
    Subject(
        "transformers dinov3", _transformer("DINOv3ViTModel", "DINOv3ViTConfig", **VISION), _pictures, "DINOv3ViTModel"
    ),
    Subject(
        "transformers dinov3 convnext",
        _transformer("DINOv3ConvNextModel", "DINOv3ConvNextConfig", hidden_sizes=[16, 32, 32, 64], depths=[1, 1, 2, 1]),
        lambda: {"pixel_values": torch.randn(BATCH, 3, 64, 64)},
        "DINOv3ConvNextModel",
    ),
    Subject("transformers beit", _transformer("BeitModel", "BeitConfig", **VISION), _pictures, "BeitModel"),
    Subject(
        "transformers swin",
        _transformer("SwinModel", "SwinConfig", window_size=4, **STAGES),
        _pictures,
        "SwinModel",
    ),
    Subject(
        "transformers gpt2",
        _transformer(
            "GPT2LMHeadModel", "GPT2Config", n_embd=WIDTH, n_layer=2, n_head=2, n_positions=16, vocab_size=WORDS
        ),
        _words,
        "GPT2LMHeadModel",
    ),
    *(
        Subject(
            f"transformers qwen{version} moe, {how}",
            _transformer(
                f"Qwen{version}MoeForCausalLM",
                f"Qwen{version}MoeConfig",
                experts_implementation=how,
                **EXPERTS,
                **(SHARED if version == 2 else {}),
            ),
            _words,
            f"Qwen{version}MoeForCausalLM",
        )
        for version, how in ((2, "eager"), (3, "grouped_mm"), (3, "batched_mm"))
    ),
)
