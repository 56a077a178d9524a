"""DiT's classic checkpoints against a DiT that is written here from the paper, in float64; their faults; files."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from maskllm4v.errors import CheckpointError
from maskllm4v.patterns import NMPattern

pytest.importorskip("diffusers")

from diffusers import DiTTransformer2DModel

from maskllm4v.tasks.diffusion.classic import (
    classic_config,
    from_classic,
    is_classic,
    read_classic,
    set_freq_shift,
    to_classic,
)

State = dict[str, Tensor]


@dataclass(frozen=True)
class Size:
    width: int
    heads: int
    blocks: int
    patch: int
    sample: int
    channels: int
    classes: int
    sigma: bool

    def __str__(self) -> str:
        return f"{self.width}w{self.blocks}b{self.patch}p{'-sigma' * self.sigma}"


SMALL = Size(24, 2, 2, 2, 8, 4, 5, True)
SIZES = [
    SMALL,
    Size(24, 3, 2, 2, 8, 4, 5, False),
    Size(48, 4, 3, 1, 6, 3, 1, True),
    Size(64, 2, 1, 4, 16, 1, 10, False),
    Size(256, 4, 1, 2, 4, 4, 3, True),  # as wide as the waves of a timestep
]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)


def positions(side: int, width: int) -> Tensor:
    """The paper's (after ViT, MAE) table: a quarter each of sin x, cos x, sin y, cos y, x the column; float32."""
    quarter = width // 4
    rows = []
    for y in range(side):
        for x in range(side):
            angles = [[place / 10000 ** (k / quarter) for k in range(quarter)] for place in (x, y)]
            rows.append([wave(angle) for some in angles for wave in (math.sin, math.cos) for angle in some])
    return torch.tensor(rows, dtype=torch.float64).float()[None]


def classic(size: Size, seed: int = 0) -> State:
    """Random weights, those of the modulation among them, which adaLN-Zero starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {"pos_embed": positions(size.sample // size.patch, size.width).double()}

    def layer(name: str, *shape: int, bias: bool = True) -> None:
        state[f"{name}.weight"] = torch.randn(shape, generator=generator, dtype=torch.float64)
        state[f"{name}.weight"] /= math.sqrt(math.prod(shape[1:])) if bias else 1
        if bias:
            state[f"{name}.bias"] = 0.3 * torch.randn(shape[0], generator=generator, dtype=torch.float64)

    d, p = size.width, size.patch
    layer("x_embedder.proj", d, size.channels, p, p)
    layer("t_embedder.mlp.0", d, 256)
    layer("t_embedder.mlp.2", d, d)
    layer("y_embedder.embedding_table", size.classes + 1, d, bias=False)
    for i in range(size.blocks):
        layer(f"blocks.{i}.attn.qkv", 3 * d, d)
        layer(f"blocks.{i}.attn.proj", d, d)
        layer(f"blocks.{i}.mlp.fc1", 4 * d, d)
        layer(f"blocks.{i}.mlp.fc2", d, 4 * d)
        layer(f"blocks.{i}.adaLN_modulation.1", 6 * d, d)
    layer("final_layer.adaLN_modulation.1", 2 * d, d)
    layer("final_layer.linear", p * p * size.channels * (1 + size.sigma), d)
    return state


def paper(state: State, size: Size, latents: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    """DiT with adaLN-Zero, section 3 of the paper. ``[B, C, S, S]`` to ``[B, C or 2 C, S, S]``."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].flatten(1).T + state[f"{name}.bias"]

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * (1 + scale[:, None]) + shift[:, None]

    def attention(name: str, x: Tensor) -> Tensor:
        q, k, v = linear(f"{name}.qkv", x).reshape(*x.shape[:2], 3, size.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return linear(f"{name}.proj", (scores @ v).transpose(1, 2).flatten(2))

    p, side, batch = size.patch, size.sample // size.patch, len(latents)
    patches = latents.reshape(batch, -1, side, p, side, p).permute(0, 2, 4, 1, 3, 5).reshape(batch, side**2, -1)
    x = linear("x_embedder.proj", patches) + state["pos_embed"]

    # Of single precision, as in both implementations: an angle of 999 has no more than 4 digits behind the point in it.
    angles = times[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    waves = torch.cat([angles.cos(), angles.sin()], 1).double()
    c = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", waves)))
    c = F.silu(c + state["y_embedder.embedding_table.weight"][labels])
    for i in range(size.blocks):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(f"{block}.adaLN_modulation.1", c).chunk(6, 1)
        x = x + gate1[:, None] * attention(f"{block}.attn", modulated(x, shift1, scale1))
        hidden = F.gelu(linear(f"{block}.mlp.fc1", modulated(x, shift2, scale2)), approximate="tanh")
        x = x + gate2[:, None] * linear(f"{block}.mlp.fc2", hidden)
    shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, 1)
    x = linear("final_layer.linear", modulated(x, shift, scale))
    x = x.reshape(batch, side, side, p, p, -1).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, -1, size.sample, size.sample)


def batch(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps from the first to the last, and labels with that of none among them."""
    times = torch.tensor([0, 1, 7, 250, 500, 731, 999])
    labels = torch.arange(size.classes, size.classes + len(times)) % (size.classes + 1)
    latents = torch.randn(len(times), size.channels, size.sample, size.sample, dtype=torch.float64)
    return latents, times, labels


def loaded(state: State, size: Size, **options: Any) -> DiTTransformer2DModel:
    model = DiTTransformer2DModel(**classic_config(state, size.heads) | options).double().eval()
    model.load_state_dict(from_classic(state), strict=True)
    return model


@torch.no_grad()
def outputs(model: DiTTransformer2DModel, latents: Tensor, times: Tensor, labels: Tensor) -> Tensor:
    return model(latents, timestep=times, class_labels=labels).sample


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(CheckpointError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


@sizes
def test_diffusers_computes_the_paper_s_model(size: Size) -> None:
    state, inputs = classic(size), batch(size)
    expected = paper(state, size, *inputs)
    assert expected.shape[1] == size.channels * (1 + size.sigma)
    model = loaded(state, size)
    set_freq_shift(model, 0)
    assert (outputs(model, *inputs) - expected).abs().max() < 1e-10
    set_freq_shift(model, 1)
    assert (outputs(model, *inputs) - expected).abs().max() > 1e-3


def test_freq_shift_of_diffusers_is_one() -> None:
    model, inputs = loaded(classic(SMALL), SMALL), batch(SMALL)
    expected = outputs(model, *inputs)
    set_freq_shift(model, 1)
    assert torch.equal(outputs(model, *inputs), expected)


def test_epsilon_of_diffusers_is_another() -> None:
    state, inputs = classic(SMALL), batch(SMALL)
    model = loaded(state, SMALL, norm_eps=1e-5)
    set_freq_shift(model, 0)
    assert 1e-8 < (outputs(model, *inputs) - paper(state, SMALL, *inputs)).abs().max() < 1e-3


def test_label_of_none_is_the_last() -> None:
    """The pipeline asks for it by its number; the training drops labels to it."""
    model, (latents, times, labels) = loaded(classic(SMALL), SMALL), batch(SMALL)
    none = torch.full_like(labels, SMALL.classes)
    expected = outputs(model, latents, times, none)
    assert not torch.allclose(outputs(model, latents, times, torch.zeros_like(labels)), expected, atol=1e-3)
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.dropout_prob = 1.0
    assert torch.equal(outputs(model.train(), latents, times, labels), expected)


@sizes
def test_config(size: Size) -> None:
    config = loaded(classic(size), size).config
    found = [config[key] for key in ("in_channels", "sample_size", "patch_size", "num_layers", "num_embeds_ada_norm")]
    assert found == [size.channels, size.sample, size.patch, size.blocks, size.classes]
    assert config["out_channels"] == size.channels * (1 + size.sigma)
    assert (config["num_attention_heads"], config["attention_head_dim"]) == (size.heads, size.width // size.heads)


@pytest.mark.parametrize("heads", [0, -2, 5])
def test_heads_that_do_not_fit(heads: int) -> None:
    message = refusal(lambda: classic_config(classic(SMALL), heads, "x.pt"))
    assert message == f"x.pt: {heads} heads do not divide the width 24"


@sizes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trips(size: Size, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in classic(size).items()}
    own = from_classic(state)
    assert own.keys() == loaded(classic(size), size).state_dict().keys()
    back = to_classic(own, size.sample)
    assert same(back, state)
    assert same(from_classic(back), own)


def test_copies_take_no_memory() -> None:
    state = classic(SMALL)
    before = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert {tensor.untyped_storage().data_ptr() for tensor in from_classic(state).values()} < before


def test_pruned_weights_pass() -> None:
    state = classic(SMALL)
    for layer in ("blocks.0.attn.qkv", "blocks.1.mlp.fc1"):
        state[f"{layer}.weight"] *= NMPattern(2, 4).topn_mask(state[f"{layer}.weight"].float())
    own = from_classic(state)
    for layer in ("0.attn1.to_q", "0.attn1.to_k", "0.attn1.to_v", "1.ff.net.0.proj"):
        NMPattern(2, 4).validate(own[f"transformer_blocks.{layer}.weight"] != 0, layer)
    assert same(to_classic(own, SMALL.sample), state)


def test_which_is_classic() -> None:
    state = classic(SMALL)
    assert is_classic(state)
    assert all(is_classic({name: t for name, t in state.items() if name != without}) for without in state)
    assert not is_classic(from_classic(state))
    assert not is_classic({})
    assert not is_classic({"blocks.0.attn.qkv.weight": torch.zeros(3, 1), "pos_embed": torch.zeros(1)})  # timm's ViT


NAMES = list(classic(SMALL))
OWN_NAMES = list(from_classic(classic(SMALL)))
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "narrower": lambda t: t[..., :-1],
    "wider": lambda t: torch.cat([t, t[..., :1]], -1),
    "deeper": lambda t: t[None],
    "flat": lambda t: t.flatten(),
    "number": torch.sum,
    "empty": lambda t: t[:0],
}


def damaged(state: State, name: str, changed: Callable[[], Any], origin: str) -> None:
    """``changed`` converts ``state``, whose tensor of this name is then missing, renamed and misshapen."""
    tensor = state.pop(name)
    assert refusal(changed).startswith(f"{origin} is not a DiT's: it lacks {name}")
    state["x." + name] = tensor
    assert refusal(changed) == f"{origin} is not a DiT's: it lacks {name} and has unknown x.{name}"
    del state["x." + name]
    for kind, change in CHANGES.items():
        if change(tensor).shape != tensor.shape:
            state[name] = change(tensor)
            message = refusal(changed)
            assert message.startswith(f"{origin}: "), kind
            assert name in message, kind


@pytest.mark.parametrize("name", NAMES)
def test_damaged_classic(name: str) -> None:
    state = classic(SMALL)
    damaged(state, name, lambda: from_classic(state, "x.pt"), "x.pt")


@pytest.mark.parametrize("name", NAMES)
def test_no_config_of_a_damaged_classic(name: str) -> None:
    state = classic(SMALL)
    damaged(state, name, lambda: classic_config(state, 2), "the classic state dict")


@pytest.mark.parametrize("name", OWN_NAMES)
def test_damaged_state_of_diffusers(name: str) -> None:
    state = from_classic(classic(SMALL))
    damaged(state, name, lambda: to_classic(state, SMALL.sample, "y.pt"), "y.pt")


@pytest.mark.parametrize("name", [name for name in OWN_NAMES if ".emb." in name])
def test_embedders_that_differ(name: str) -> None:
    state = from_classic(classic(SMALL))
    state[name] = state[name].clone()
    assert to_classic(state, SMALL.sample)
    state[name].view(-1)[-1] += 1e-12
    first = name.replace("blocks.1", "blocks.0")
    assert f"blocks.1{name.partition('blocks.')[2][1:]} differs from {first}" in refusal(
        lambda: to_classic(state, SMALL.sample)
    )


def test_model_from_scratch_has_embedders_in_every_block() -> None:
    model = DiTTransformer2DModel(**classic_config(classic(SMALL), 2))
    assert "but a classic DiT has one t_embedder.mlp.0.weight" in refusal(lambda: to_classic(model.state_dict(), 8))


def test_latents_smaller_than_a_patch() -> None:
    message = refusal(lambda: to_classic(from_classic(classic(SMALL)), 1, "y.pt"))
    assert message == "y.pt: latents of 1 × 1 hold no patch of 2"


def test_messages_are_short() -> None:
    assert refusal(lambda: from_classic({"a": torch.zeros(1)})) == (
        "the classic state dict is not a DiT's: it lacks blocks.0.adaLN_modulation.1.bias, "
        "blocks.0.adaLN_modulation.1.weight, blocks.0.attn.proj.bias and 19 more and has unknown a"
    )
    state = classic(SMALL)
    state["blocks.1.attn.qkv.bias"] = torch.zeros(24)
    assert refusal(lambda: from_classic(state, "x.pt")) == (
        "x.pt: blocks.1.attn.qkv.bias is 24, not 72, with patches of 4 × 2 × 2 in x_embedder.proj.weight"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t + 1e-6, "is off the sine-cosine table, which diffusers has, by 1e-06"),
        (lambda t: t * math.nan, "is off the sine-cosine table, which diffusers has, by nan"),
        (lambda t: t.reshape(1, 4, 4, 24).mT.reshape(1, 16, 24), "is off the sine-cosine table"),
        (lambda t: t.reshape(1, 4, 4, 24).transpose(1, 2).flatten(1, 2), "is off the sine-cosine table"),
        (lambda t: t.flip(1), "is off the sine-cosine table"),
        (lambda t: (t + 0.02).bfloat16(), "is off the sine-cosine table"),
        (lambda t: t.int(), "is of type torch.int32"),
        (lambda t: t[:, :15], "is 1×15×24, not 1×n²×24"),
        (lambda t: t[:, :0], "is 1×0×24, not 1×n²×24"),
    ],
)
def test_other_positions(change: Callable[[Tensor], Tensor], message: str) -> None:
    state = classic(SMALL)
    state["pos_embed"] = change(state["pos_embed"])
    assert f"x.pt: pos_embed {message}" in refusal(lambda: from_classic(state, "x.pt"))


def test_rounding_of_positions_is_no_fault() -> None:
    state = classic(SMALL)
    table = state["pos_embed"].float()
    for other in (table + 1e-7, table.nextafter(torch.tensor(9.0)), table.bfloat16(), table.half()):
        from_classic(state | {"pos_embed": other})


def test_width_that_no_table_has() -> None:
    size = Size(10, 1, 1, 2, 4, 1, 2, False)
    state = classic(size) | {"pos_embed": torch.zeros(1, 4, 10)}
    assert refusal(lambda: from_classic(state)) == (
        "the classic state dict: pos_embed is 1×4×10, not 1×n²×10, the width a multiple of 4"
    )


def test_files(tmp_path: Path) -> None:
    state = {name: tensor.float() for name, tensor in classic(SMALL).items()}
    other = {name: tensor + 1 for name, tensor in state.items()}
    optimiser = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}]}
    arguments = argparse.Namespace(model="DiT-XL/2", image_size=256)
    whole: dict[str, dict[str, Any]] = {
        "plain": state,
        "ema": {"ema": state},
        "model": {"model": state, "args": arguments},
        "both": {"model": other, "ema": state, "opt": optimiser, "args": arguments},
        "wrapped": {"model": {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}},
    }
    for name, content in whole.items():
        for zipped in (True, False):
            torch.save(content, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=zipped)
            assert same(read_classic(tmp_path / f"{name}.pt"), state), name
    save_file(state, tmp_path / "m.safetensors")
    assert same(read_classic(tmp_path / "m.safetensors"), state)

    model = loaded(read_classic(tmp_path / "both.pt"), SMALL)  # a state dict of double, of values of float
    torch.save(to_classic(model.float().state_dict(), SMALL.sample), tmp_path / "back.pth")
    assert same(read_classic(tmp_path / "back.pth"), state)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_not_run(zipped: bool, tmp_path: Path) -> None:
    evil = Evil(tmp_path / "ran")
    for content in (evil, {"ema": classic(SMALL), "args": evil}, classic(SMALL) | {"pos_embed": evil}):
        torch.save(content, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
        assert "m.pt holds code (" in refusal(lambda: read_classic(tmp_path / "m.pt"))
    assert not evil.path.exists()
    torch.load(tmp_path / "m.pt", weights_only=False)
    assert evil.path.exists()  # so it would have run


def test_other_files(tmp_path: Path) -> None:
    def said(name: str, content: Any = None) -> str:
        if content is not None:
            torch.save(content, tmp_path / name)
        return refusal(lambda: read_classic(tmp_path / name)).removeprefix(f"{tmp_path}/")

    assert said("absent.pt") == "absent.pt is missing"
    assert "absent.safetensors is missing" in said("absent.safetensors")
    assert "holds no DiT in its classic names" in said("own.pt", from_classic(classic(SMALL)))
    assert "holds no DiT in its classic names" in said("ema.pt", {"ema": {"a": torch.zeros(1)}})
    assert said("list.pt", [torch.zeros(1)]) == "list.pt holds a list, not a state dict"
    assert said("int.pt", {"x_embedder.a": 3}) == "int.pt: 'x_embedder.a' is a int, not a tensor of a state dict"
    (tmp_path / "text.pt").write_text("just some words, no tensors\n")
    assert "text.pt is damaged" in said("text.pt")
    (tmp_path / "text.safetensors").write_text("just some words, no tensors\n")
    assert "text.safetensors is damaged" in said("text.safetensors")
    assert f"cannot read {tmp_path}" in refusal(lambda: read_classic(tmp_path))
    torch.save(classic(SMALL), tmp_path / "half.pt")
    whole = (tmp_path / "half.pt").read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "half.pt").write_bytes(whole[:length])
        assert "half.pt is damaged" in said("half.pt")
