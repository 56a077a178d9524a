"""Hidden channels found in models of timm and diffusers, and permuted without a change of any output."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from small_diffusion import dit
from timm.layers import GatedMlp, GluMlp, Mlp, SwiGLU
from timm.models import VisionTransformer
from timm.models.mlp_mixer import SpatialGatingUnit
from torch import Tensor, nn

from maskllm4v import apply_masks_, apply_permutations_, invert_permutations, permute_channels_
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.permutation import find_channels
from maskllm4v.sparsity.survey import prunable_linears
from maskllm4v.utils.errors import ConfigError

Permutations = dict[str, Tensor]


def vit(**args: Any) -> nn.Module:
    sizes = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_classes": 10}
    return VisionTransformer(**{**sizes, "num_heads": 3, "mlp_ratio": 2, **args})


def of_timm(name: str, size: int = 64, **args: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, img_size=size, num_classes=10, **args)


def convnext() -> nn.Module:
    return timm.create_model("convnext_tiny", dims=(16, 32, 32, 64), depths=(1, 1, 2, 1), num_classes=10)


SWIN = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 2}
EVA = {"patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}
# (model, shape of its images, readers of hidden units, readers of values)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int]] = {
    "plain": (vit, (1, 8, 8), 2, 2),
    "no bias of q, k, v": (lambda: vit(qkv_bias=False), (1, 8, 8), 2, 2),
    "no bias at all": (lambda: vit(qkv_bias=False, proj_bias=False), (1, 8, 8), 2, 2),
    "norms of q and k": (lambda: vit(qk_norm=True), (1, 8, 8), 2, 2),
    "norms over hidden channels": (lambda: vit(scale_attn_norm=True, scale_mlp_norm=True), (1, 8, 8), 2, 2),
    "layer scale": (lambda: vit(init_values=0.3), (1, 8, 8), 2, 2),
    "one head": (lambda: vit(num_heads=1), (1, 8, 8), 2, 2),
    "as many heads as channels": (lambda: vit(num_heads=24), (1, 8, 8), 2, 2),
    "gate and value in one": (lambda: vit(mlp_layer=GluMlp), (1, 8, 8), 2, 2),
    "gate and value apart": (lambda: vit(mlp_layer=SwiGLU), (1, 8, 8), 2, 2),
    "swin": (of_timm("swin_tiny_patch4_window7_224", **SWIN), (3, 64, 64), 5, 5),
    "swin, second version": (of_timm("swinv2_tiny_window8_256", **SWIN), (3, 64, 64), 5, 5),
    "beit": (of_timm("beit_base_patch16_224", 32, **EVA), (3, 32, 32), 2, 2),
    "eva": (of_timm("eva02_tiny_patch14_224", 32, **EVA), (3, 32, 32), 2, 2),
    "convnext": (convnext, (3, 64, 64), 5, 0),
}


def randomised(model: nn.Module) -> nn.Module:
    """In float64, evaluating, and no weight zero or one."""
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def shuffled(model: nn.Module) -> Permutations:
    """A random order of every layer's input channels that may be permuted."""
    found = find_channels(model, prunable_linears(model))
    return {name: random_order(channels.count, channels.parts) for name, channels in found.items()}


def random_order(count: int, parts: int) -> Tensor:
    size = count // parts
    return torch.cat([torch.randperm(size) + i * size for i in range(parts)])


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def check(model: nn.Module, run: Callable[[nn.Module], Tensor], permutations: Permutations) -> None:
    """Permuted, the outputs are the same; permuted back, the weights are."""
    wanted, before = run(model), state(model)
    assert apply_permutations_(model, permutations) is model
    for name, order in permutations.items():
        assert torch.equal(model.get_submodule(name).weight, before[f"{name}.weight"][:, order])
    assert float((run(model) - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())
    apply_permutations_(model, invert_permutations(permutations))
    assert same_bits(state(model), before)


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_of_timm_models_stay(kind: str) -> None:
    build, shape, hidden, values = MODELS[kind]
    model = randomised(build())
    permutations = shuffled(model)
    assert len([name for name in permutations if name.endswith("mlp.fc2")]) == hidden
    assert len([name for name in permutations if name.endswith("attn.proj")]) == values
    assert len(permutations) == hidden + values
    images = torch.randn(2, *shape, dtype=torch.float64)
    check(model, lambda model: model(images), permutations)


@pytest.mark.parametrize("activation", ["gelu-approximate", "geglu"])
def test_outputs_of_a_dit_stay(activation: str) -> None:
    model = randomised(dit(activation_fn=activation))
    permutations = shuffled(model)
    blocks = [f"transformer_blocks.{i}." for i in range(2)]
    assert list(permutations) == [block + reader for block in blocks for reader in ("attn1.to_out.0", "ff.net.2")]
    batch = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([5, 600, 30]), torch.tensor([1, 2, 10])
    check(model, lambda model: model(*batch, return_dict=False)[0], permutations)


def test_channels_of_a_norm_between_move_along() -> None:
    """They have to, for the outputs to stay."""
    model = randomised(vit(scale_mlp_norm=True))
    before = model.blocks[0].mlp.norm.weight.detach().clone()
    order = torch.randperm(48)
    apply_permutations_(model, {"blocks.0.mlp.fc2": order})
    assert torch.equal(model.blocks[0].mlp.norm.weight, before[order])


def test_values_move_within_heads_only() -> None:
    model = vit()
    swapped = torch.arange(24)
    swapped[[7, 8]] = swapped[[8, 7]]  # heads have 8 channels
    with pytest.raises(ConfigError, match=r"'blocks.0.attn.proj': .* moves channels between its 3 heads"):
        apply_permutations_(model, {"blocks.0.attn.proj": swapped})


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (torch.zeros(48, dtype=torch.long), "not a permutation of its 48 input channels"),
        (torch.arange(1, 49), "not a permutation"),
        (torch.arange(47), "not a permutation"),
        (torch.arange(48.0), "not a permutation"),
        (torch.arange(48)[None], "not a permutation"),
    ],
)
def test_what_is_no_permutation_changes_nothing(order: Tensor, said: str) -> None:
    model = vit()
    before = state(model)
    with pytest.raises(ConfigError, match=f"'blocks.1.mlp.fc2': {said}"):
        apply_permutations_(model, {"blocks.0.mlp.fc2": torch.randperm(48), "blocks.1.mlp.fc2": order})
    assert same_bits(state(model), before)


@pytest.mark.parametrize("layer", ["blocks.0.mlp.fc1", "blocks.0.attn.qkv", "head", "nowhere"])
def test_layers_that_read_no_hidden_channels_are_refused(layer: str) -> None:
    model = vit()
    before = state(model)
    with pytest.raises(ConfigError, match=f"layer '{layer}': no channels of the model that can be permuted"):
        apply_permutations_(model, {"blocks.0.mlp.fc2": torch.randperm(48), layer: torch.randperm(24)})
    assert same_bits(state(model), before)


def test_a_model_with_masks_is_refused() -> None:
    model = vit()
    mask = NMPattern("2:4").topn_mask(model.blocks[0].mlp.fc1.weight.detach().abs())
    apply_masks_(model, {"blocks.0.mlp.fc1": mask}, "2:4")
    with pytest.raises(ConfigError, match=r"'blocks.0.mlp.fc1' has a mask already; channels are permuted before"):
        find_channels(model, ["blocks.0.mlp.fc2"])


class Ordered(nn.Module):
    """What it computes depends on the order of its hidden units: by their place, or in one of many entries."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.kind = nn.Linear(8, 16), nn.Linear(16, 8), kind
        self.register_buffer("scale", torch.ones(16))
        self.register_buffer("offset", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x)
        if self.kind == "sum of neighbours":
            hidden = hidden + hidden.roll(1, -1)
        elif self.kind == "a scale that happens to be one":
            hidden = hidden * self.scale
        elif self.kind == "an offset that happens to be zero":
            hidden = hidden + self.offset
        elif self.kind == "one other":
            hidden = torch.cat([hidden[..., :-1].relu(), hidden[..., -1:]], -1)
        else:
            raise RuntimeError("not like this\nat all")
        return self.fc2(hidden)


@pytest.mark.parametrize(
    "kind",
    ["sum of neighbours", "a scale that happens to be one", "an offset that happens to be zero", "one other"],
)
def test_blocks_whose_outputs_depend_on_the_order_are_left_alone(kind: str) -> None:
    model = nn.ModuleDict({"mlp": Ordered(kind)})
    nn.init.zeros_(model["mlp"].fc2.weight)  # as an untrained block may be: then nothing depends on anything
    before = state(model)
    with pytest.warns(UserWarning, match=r"'mlp.fc2': .* stay where they are: the outputs of its Ordered depend on"):
        assert find_channels(model, ["mlp.fc2"]) == {}
    assert same_bits(state(model), before)


class Joint(nn.Module):
    """Reads its hidden units a second time, and makes them a second time, if it is given more than one input."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.more, self.again = (nn.Linear(*size) for size in ((8, 16), (16, 8), (8, 16), (16, 8)))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = self.fc1(x)
        if context is None:
            return self.fc2(hidden.relu())
        return self.fc2((hidden + self.more(context)).relu()) + self.again(hidden)


def test_blocks_that_may_do_more_than_is_seen_are_left_alone() -> None:
    model = nn.ModuleDict({"mlp": Joint()})
    with pytest.warns(UserWarning, match=r"its Joint does not use 'more.weight' when it is tried out alone$"):
        assert find_channels(model, ["mlp.fc2"]) == {}


def test_joint_attention_is_left_alone() -> None:
    joint = {"added_kv_proj_dim": 16, "context_pre_only": False, "processor": JointAttnProcessor2_0()}
    attention = Attention(query_dim=16, heads=2, dim_head=8, **joint)
    with pytest.warns(UserWarning, match="its input channels stay where they are"):
        assert find_channels(nn.ModuleDict({"attn": attention}), ["attn.to_out.0"]) == {}


class Grouped(nn.Module):
    """Attention of four heads, of which several may share keys and values; width 32."""

    def __init__(self, kv_heads: int, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.sizes = 4, kv_heads, [32, 8 * kv_heads, 8 * kv_heads]
        self.qkv = nn.Linear(32, sum(self.sizes)) if fused else None
        if not fused:
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(32, size) for size in self.sizes)
        self.proj = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        made = self.qkv(x).split(self.sizes, -1) if self.qkv else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in made)  # [batch, heads, tokens, 8]
        k, v = (part.repeat_interleave(self.num_heads // self.kv_heads, 1) for part in (k, v))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_values_that_heads_share_stay(kv_heads: int, fused: bool) -> None:
    """Grouped and multi-query attention. Sizes alone do not tell two of four, in one layer, from ungrouped ones."""
    model = randomised(nn.Sequential(OrderedDict(attn=Grouped(kv_heads, fused), mlp=Mlp(32, 64))))
    x, before = torch.randn(2, 5, 32, dtype=torch.float64), state(model)
    with torch.no_grad():
        wanted = model(x)
    looks_alike = fused and kv_heads == 2
    said = pytest.warns(UserWarning, match="'attn.proj': .* the outputs of its Grouped depend on their order")
    with said if looks_alike else contextlib.nullcontext():
        permutations = permute_channels_(model, "2:4")
    assert sorted(permutations) == (["attn.proj", "mlp.fc2"] if kv_heads == 4 else ["mlp.fc2"])
    with torch.no_grad():
        assert float((model(x) - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())
    unchanged = [name for name in before if name.startswith("attn.") and kv_heads < 4]
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in unchanged)


def test_blocks_that_cannot_be_tried_out_are_left_alone() -> None:
    model = nn.ModuleDict({"mlp": Ordered("fails")})
    with pytest.warns(UserWarning, match=r"its Ordered cannot be tried out alone \(not like this\)$"):
        assert find_channels(model, ["mlp.fc2"]) == {}


def test_blocks_of_timm_that_mix_channels_are_left_alone() -> None:
    gated = nn.ModuleDict({"mlp": GatedMlp(8, 16, gate_layer=partial(SpatialGatingUnit, seq_len=4))})
    with pytest.warns(UserWarning, match="the outputs of its GatedMlp depend"):
        assert find_channels(gated, ["mlp.fc2"]) == {}
    channels = timm.create_model("xcit_nano_12_p16_224", embed_dim=32, depth=1, num_heads=2, cls_attn_layers=1)
    with pytest.warns(UserWarning, match="the outputs of its XCA depend"):
        assert "blocks.0.attn.proj" not in find_channels(channels, ["blocks.0.attn.proj", "blocks.0.mlp.fc2"])


@pytest.mark.parametrize("shared", ["layer", "weight"])
def test_shared_weights_stay(shared: str) -> None:
    first, second = Mlp(8, 16), Mlp(8, 16)
    if shared == "layer":
        second.fc1 = first.fc1
    else:
        second.fc1.weight = first.fc1.weight
    model = nn.Sequential(first, second)
    with pytest.warns(UserWarning, match="stay where they are: weights are shared with another layer"):
        assert find_channels(model, ["0.fc2", "1.fc2"]) == {}


def test_a_block_that_is_used_twice_is_permuted_once() -> None:
    block = Mlp(8, 16)
    model = randomised(nn.Sequential(block, nn.LayerNorm(8), block))
    permutations = {"0.fc2": torch.randperm(16)}
    assert list(find_channels(model, ["0.fc2", "2.fc2"])) == ["0.fc2"]
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    check(model, lambda model: model(x), permutations)


def test_finding_changes_no_model_and_no_random_state() -> None:
    model = vit().train()
    before, twin, random = state(model), copy.deepcopy(model), torch.get_rng_state()
    find_channels(model, prunable_linears(model))
    assert same_bits(state(model), before)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(a.training == b.training for a, b in zip(model.modules(), twin.modules(), strict=True))
