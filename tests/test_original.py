"""Checkpoints of the original and of timm, in the layouts that they have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from original_files import (
    FIRST,
    LAYERS,
    SECOND,
    gated,
    gates_of,
    masks_of,
    pruned,
    same,
    saved,
    state_at,
    timm_file,
    weights,
    winners,
)
from safetensors.torch import save_file
from torch import nn

from maskllm4v.checkpoints.apply import install
from maskllm4v.checkpoints.format import tensors_digest
from maskllm4v.checkpoints.masks import MaskCheckpoint, save_dense, save_masks
from maskllm4v.checkpoints.third_party import dense_state, load_any
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.survey import prunable_linears
from maskllm4v.utils.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.uint8])
@pytest.mark.parametrize("zipped", [True, False])
def test_pruned_file(dtype: torch.dtype, zipped: bool, tmp_path: Path) -> None:
    masks = masks_of(winners())
    state = pruned({name: mask.to(dtype) for name, mask in masks.items()})
    found = state_at(saved(tmp_path / "m.pt", state, _use_new_zipfile_serialization=zipped))
    assert same(found.masks, masks)
    assert same(found.weights, {name: t for name, t in state.items() if not name.endswith(".mask")})
    assert (found.pattern, found.learned, found.averaged) == (NMPattern(2, 4), False, False)


@pytest.mark.parametrize("rowwise", [False, True])
def test_logits_become_masks_in_the_candidates_order(rowwise: bool, tmp_path: Path) -> None:
    """``[groups, 6]`` as the original has it, and ``[out, in / 4, 6]``: the same numbers in the same order."""
    chosen = winners()
    gates = gates_of(chosen)
    if rowwise:
        gates = {name: gate.reshape(LAYERS[name][0], -1, 6) for name, gate in gates.items()}
    found = state_at(timm_file(tmp_path / "m.pth.tar", gated(gates)))
    assert same(found.masks, masks_of(chosen))
    assert found.weights.keys() == weights().keys()
    assert (found.pattern, found.learned, found.averaged) == (NMPattern(2, 4), True, False)


def test_mask_options_say_another_order(tmp_path: Path) -> None:
    chosen, order = winners(), [3, 0, 5, 1, 4, 2]
    places = torch.tensor([order.index(number) for number in range(6)])
    options = NMPattern(2, 4).candidates()[order].float() * 0.9999999  # an average of equal numbers
    state = gated(gates_of({name: places[c] for name, c in chosen.items()}))
    state |= {f"{name}.mask_options": options for name in LAYERS}
    found = state_at(timm_file(tmp_path / "m.pth.tar", state))
    assert same(found.masks, masks_of(chosen))
    assert found.weights.keys() == weights().keys()


def test_equal_logits_give_the_first_candidate(tmp_path: Path) -> None:
    gates = {name: torch.zeros(out * wide // 4, 6) for name, (out, wide) in LAYERS.items()}
    found = state_at(saved(tmp_path / "m.pt", gated(gates)))
    assert same(found.masks, masks_of({name: torch.zeros(len(gate), dtype=torch.long) for name, gate in gates.items()}))


@pytest.mark.parametrize("told", [None, "1:4"])
def test_other_patterns(told: str | None, tmp_path: Path) -> None:
    """Of logits ``mask_options`` may say it; of masks somebody has to."""
    pattern = NMPattern(1, 4)
    masks = {name: pattern.topn_mask(torch.randn(shape)) for name, shape in LAYERS.items()}
    gates = {name: pattern.similarity(mask).t().contiguous() for name, mask in masks.items()}
    options = {} if told else {f"{name}.mask_options": pattern.candidates() for name in LAYERS}
    found = state_at(saved(tmp_path / "m.pt", gated(gates) | options), pattern=told)
    assert same(found.masks, masks)
    assert found.pattern == pattern
    plain = saved(tmp_path / "plain.pt", pruned(masks))
    assert state_at(plain, pattern="1:4").pattern == pattern
    with pytest.raises(CheckpointError, match=r"'blocks\.0\.fc': group 0 of row 0 keeps 1 of 4 weights, not 2"):
        load_any(plain)


@pytest.mark.parametrize(("key", "other"), [("state_dict_ema", "state_dict"), ("model_ema", "model")])
def test_averaged_logits_or_plain_ones(key: str, other: str, tmp_path: Path) -> None:
    plain, averaged = winners(), winners()
    state = gated(gates_of(averaged))
    state |= {f"{name}.mask": torch.rand(shape) for name, shape in LAYERS.items()}  # averaged masks: none at all
    path = saved(tmp_path / "m.pth.tar", {other: gated(gates_of(plain)), key: state})
    for ema, expected in ((None, averaged), (True, averaged), (False, plain)):
        found = state_at(path, ema=ema)
        assert same(found.masks, masks_of(expected))
        assert found.averaged == (expected is averaged)


def test_average_that_is_not_there(tmp_path: Path) -> None:
    both = gated(gates_of(winners()))
    for path in (timm_file(tmp_path / "m.pth.tar", both), saved(tmp_path / "m.pt", both)):
        assert not state_at(path, ema=False).averaged
        with pytest.raises(CheckpointError, match=r"holds no averaged weights \(EMA\)"):
            load_any(path, ema=True)
    save_file(weights(), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="holds no averaged"):
        load_any(tmp_path / "m.safetensors", ema=True)
    with pytest.raises(CheckpointError, match="nothing but averaged"):
        load_any(saved(tmp_path / "m.pt", {"state_dict_ema": both}), ema=False)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers(prefix: str, tmp_path: Path) -> None:
    chosen = winners()
    state = gated(gates_of(chosen))
    found = state_at(timm_file(tmp_path / "m.pth.tar", {prefix + name: tensor for name, tensor in state.items()}))
    assert same(found.masks, masks_of(chosen))
    assert found.weights.keys() == weights().keys()


def test_prefix_of_some_names_is_a_name(tmp_path: Path) -> None:
    state = {"module.weight": torch.zeros(2), "head.weight": torch.zeros(2)}
    assert state_at(saved(tmp_path / "m.pt", state)).weights.keys() == state.keys()


def test_pattern_that_is_not_the_file_s(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", gated(gates_of(winners())))
    with pytest.raises(CheckpointError, match="6 logits a group, but 1:4 has 4 candidates"):
        load_any(path, pattern="1:4")


def test_dense_weights_of_any_file(tmp_path: Path) -> None:
    state, chosen = weights(), winners()
    save_file(state, tmp_path / "others.safetensors")
    average = {name: tensor + 1 for name, tensor in state.items()}
    logits = {f"{name}.gate": gate for name, gate in gates_of(chosen).items()}
    masks = {f"{name}.mask": mask for name, mask in masks_of(chosen).items()}
    assert same(dense_state(saved(tmp_path / "plain.pt", state)), state)
    assert same(dense_state(tmp_path / "others.safetensors"), state)
    assert same(dense_state(saved(tmp_path / "masked.pt", state | masks)), state)
    assert same(dense_state(timm_file(tmp_path / "m.pth.tar", state | logits)), state)
    assert same(dense_state(timm_file(tmp_path / "ema.pth.tar", state, state_dict_ema=average)), average)


def test_pruned_weights_are_not_dense(tmp_path: Path) -> None:
    masks = masks_of(winners())
    state = pruned(masks)
    state[f"{SECOND}.weight"] *= masks[SECOND]
    path = saved(tmp_path / "m.pt", state)
    assert state_at(path).zeroed
    with pytest.raises(CheckpointError, match="pruned weights are zero in it, so the dense ones are lost"):
        dense_state(path)
    state[f"{SECOND}.weight"] *= 0  # a layer that starts at zero has lost nothing
    assert not state_at(saved(path, state)).zeroed


def test_updated_layers_are_found(tmp_path: Path) -> None:
    masks = masks_of(winners())
    state = pruned(masks)
    dense = {name: tensor.clone() for name, tensor in state.items() if not name.endswith(".mask")}
    path = saved(tmp_path / "m.pt", state)
    dense[f"{FIRST}.weight"][~masks[FIRST]] += 1  # what is pruned does not count
    assert state_at(path).updated(dense) == []
    dense[f"{SECOND}.weight"][masks[SECOND]] += 1
    assert state_at(path).updated(dense) == [SECOND]
    del dense[f"{FIRST}.weight"]
    assert state_at(path).updated(dense) == [FIRST, SECOND]


def test_files_of_ours(tmp_path: Path, tiny_vit: nn.Module) -> None:
    pattern, masks = NMPattern(2, 4), masks_of(winners())
    base = save_dense(tmp_path / "dense.safetensors", tiny_vit, "tiny")
    save_masks(tmp_path / "masks.safetensors", MaskCheckpoint(pattern, masks, base, "wanda", {}, {}))
    found = load_any(tmp_path / "masks.safetensors")
    assert isinstance(found, MaskCheckpoint)
    assert same(found.masks, masks)
    with pytest.raises(CheckpointError, match="holds 2:4 masks, not 1:4 ones"):
        load_any(tmp_path / "masks.safetensors", pattern="1:4")
    with pytest.raises(CheckpointError, match="holds masks, not dense weights"):
        dense_state(tmp_path / "masks.safetensors")
    assert tensors_digest(dense_state(tmp_path / "dense.safetensors")) == base


def test_model_computes_what_the_original_computes(tmp_path: Path, tiny_vit: nn.Module) -> None:
    """The original multiplies mask and weight in every forward of a layer."""
    layers = prunable_linears(tiny_vit, exclude=["head"])
    masks = {name: NMPattern(2, 4).topn_mask(torch.randn(layer.weight.shape)) for name, layer in layers.items()}
    images = torch.randn(3, 1, 8, 8)
    state = {name: tensor.clone() for name, tensor in tiny_vit.state_dict().items()}
    products = {f"{name}.weight": state[f"{name}.weight"] * mask for name, mask in masks.items()}
    expected = torch.func.functional_call(tiny_vit, products, (images,))
    assert not torch.equal(expected, tiny_vit(images))
    found = state_at(saved(tmp_path / "m.pt", state | {f"{name}.mask": mask.float() for name, mask in masks.items()}))
    assert torch.equal(install(tiny_vit, found.checkpoint("base"), "m.pt")(images), expected)
