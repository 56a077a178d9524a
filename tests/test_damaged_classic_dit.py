"""Faults of DiT's classic checkpoints, and their files."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

pytest.importorskip("diffusers")

from classic_dit import SMALL, Size, State, classic, loaded, refusal, same
from diffusers import DiTTransformer2DModel

from maskllm4v.tasks.diffusion.classic import (
    classic_config,
    from_classic,
    read_classic,
    to_classic,
)

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
