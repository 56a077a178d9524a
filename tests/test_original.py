"""Checkpoints of the original and of timm, in the layouts that they have; and files that are not what they say."""

from __future__ import annotations

import argparse
import itertools
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from maskllm4v.checkpoints import MaskCheckpoint, save_dense, save_masks
from maskllm4v.errors import CheckpointError
from maskllm4v.evaluation import install
from maskllm4v.original import State, dense_state, load_any
from maskllm4v.patterns import NMPattern
from maskllm4v.sealed import tensors_digest
from maskllm4v.surgery import prunable_linears

PAIRS = list(itertools.combinations(range(4), 2))  # the original's candidates of 2:4, in its order
LAYERS = {"blocks.0.fc": (8, 16), "blocks.1.fc": (6, 8)}
FIRST, SECOND = LAYERS


def weights() -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for name, shape in {**LAYERS, "head": (3, 6)}.items():
        state |= {f"{name}.weight": torch.randn(shape), f"{name}.bias": torch.randn(shape[0])}
    return {**state, "norm.weight": torch.randn(6)}


def winners(count: int = 6) -> dict[str, Tensor]:
    """A candidate's number for each group of 4."""
    return {name: torch.randint(count, (out * wide // 4,)) for name, (out, wide) in LAYERS.items()}


def mask_of(chosen: Tensor, shape: tuple[int, int]) -> Tensor:
    """Element by element, groups row after row."""
    mask = torch.zeros(shape, dtype=torch.bool)
    groups = shape[1] // 4
    for number, candidate in enumerate(chosen.tolist()):
        for place in PAIRS[candidate]:
            mask[number // groups, number % groups * 4 + place] = True
    return mask


def masks_of(chosen: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask_of(chosen[name], shape) for name, shape in LAYERS.items()}


def gates_of(chosen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits ``[groups, 6]`` whose largest are the chosen ones."""
    return {name: torch.randn(len(c), 6).clamp(-3, 3) + 7 * F.one_hot(c, 6) for name, c in chosen.items()}


def pruned(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the pruning script saves it."""
    return weights() | {f"{name}.mask": mask for name, mask in masks.items()}


def gated(gates: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the training saves it, with masks that are not those of the logits."""
    stale = {f"{name}.mask": torch.ones(LAYERS[name]) for name in gates}
    return pruned({}) | stale | {f"{name}.gate": gate for name, gate in gates.items()}


def timm_file(path: Path, state: dict[str, Tensor], **others: Any) -> Path:
    """As timm's ``CheckpointSaver`` writes it."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    arguments = argparse.Namespace(model="vit", lr=1e-3, mean=[0.5], tau_range=[4.0, 0.05], opt_betas=None)
    whole = {"epoch": 3, "arch": "vit", "state_dict": OrderedDict(state), "optimizer": optimizer.state_dict()}
    torch.save({**whole, "version": 2, "args": arguments, "metric": 79.4, **others}, path)
    return path


def saved(path: Path, state: Any, **options: Any) -> Path:
    torch.save(state, path, **options)
    return path


def state_at(path: Path, **options: Any) -> State:
    found = load_any(path, **options)
    assert isinstance(found, State)
    return found


def same(found: Any, expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


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


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("layout", ["zip", "legacy", "pickle", "arguments"])
def test_code_in_a_file_is_not_run(layout: str, tmp_path: Path) -> None:
    path, evil = tmp_path / "m.pt", Malicious(tmp_path / "owned")
    if layout == "pickle":
        path.write_bytes(pickle.dumps({"x": evil}, protocol=4))
    elif layout == "arguments":
        timm_file(path, weights(), args=argparse.Namespace(evil=evil))
    else:
        torch.save({"state_dict": weights(), "x": evil}, path, _use_new_zipfile_serialization=layout == "zip")
    with pytest.raises(
        CheckpointError, match=r"m\.pt (holds code \(\w+\.mkdir\), which is not run|is damaged)"
    ) as error:
        load_any(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()
    pickle.loads(path.read_bytes()) if layout == "pickle" else torch.load(path, weights_only=False)
    assert (tmp_path / "owned").exists()  # unguarded, it is run


def test_whole_model_is_code(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.pt", nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(CheckpointError, match=r"holds code \(torch\.nn\.modules\.container\.Sequential\)"):
        load_any(path)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("m.safetensors" if kind == "safetensors" else "m.pt")
    if kind == "safetensors":
        save_file(weights(), path)
    else:
        torch.save(pruned(masks_of(winners())), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in [*range(20), *range(20, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"m\.\w+ (is damaged|holds code \(\w+\.\w*\))") as error:
            load_any(path)
        assert "\n" not in str(error.value)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.pt is missing"):
        load_any(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match=r"cannot read .*: Is a directory"):
        load_any(tmp_path)
    (tmp_path / "text.pt").write_text("just some words, no tensors\n")
    with pytest.raises(CheckpointError, match=r"text\.pt is damaged"):
        load_any(tmp_path / "text.pt")
    with pytest.raises(CheckpointError, match="holds a list, not a state dict"):
        load_any(saved(tmp_path / "list.pt", [torch.zeros(2)]))
    with pytest.raises(CheckpointError, match="'epoch' is a int, not a tensor of a state dict"):
        load_any(saved(tmp_path / "epoch.pt", {"epoch": 3}))


OPTIONS = NMPattern(2, 4).candidates()
NOT_CANDIDATES = "layer 'blocks.0.fc': mask_options are not the candidates of a pattern"


def three_kept(mask: Tensor) -> Tensor:
    mask[2, 4:8] = torch.tensor([True, True, True, False])
    return mask


@pytest.mark.parametrize(
    ("learned", "key", "change", "message"),
    [
        (False, f"{SECOND}.mask", three_kept, "layer 'blocks.1.fc': group 1 of row 2 keeps 3 of 4 weights, not 2"),
        (False, f"{FIRST}.mask", torch.ones_like, "layer 'blocks.0.fc': group 0 of row 0 keeps 4 of 4 weights, not 2"),
        (False, f"{FIRST}.mask", lambda t: 0.9 * t, "layer 'blocks.0.fc': a mask holds values other than 0 and 1"),
        (False, f"{FIRST}.mask", lambda t: t[:4], "layer 'blocks.0.fc' has a mask 4×16 for a weight 8×16"),
        (False, f"{SECOND}.weight", None, "layer 'blocks.1.fc' has a mask, but no weight of a linear layer"),
        (True, f"{SECOND}.weight", None, "layer 'blocks.1.fc' has a mask, but no weight of a linear layer"),
        (True, f"{SECOND}.gate", None, "layer 'blocks.1.fc' has a mask, but no logits (.gate) as 'blocks.0.fc' has"),
        (True, f"{FIRST}.gate", lambda t: t[:5], "layer 'blocks.0.fc' has logits 5×6 for a weight 8×16"),
        (True, f"{FIRST}.gate", torch.t, "layer 'blocks.0.fc' has 32 logits a group, but 2:4 has 6 candidates"),
        (True, f"{FIRST}.gate", torch.sum, "layer 'blocks.0.fc' has 0 logits a group, but 2:4 has 6 candidates"),
        (True, f"{SECOND}.gate", lambda t: t / 0, "layer 'blocks.1.fc' has logits that are not finite"),
        (True, f"{FIRST}.mask_options", lambda _: OPTIONS[[0, 1, 2, 3, 4, 4]], NOT_CANDIDATES),
        (True, f"{FIRST}.mask_options", lambda _: OPTIONS[:5], NOT_CANDIDATES),
        (True, f"{FIRST}.mask_options", lambda _: torch.ones(6, 4), NOT_CANDIDATES),
        (True, f"{FIRST}.mask_options", lambda _: torch.zeros(0, 4), NOT_CANDIDATES),
        (True, f"{FIRST}.mask_options", lambda _: torch.tensor(1.0), NOT_CANDIDATES),
        (True, f"{FIRST}.mask_options", lambda _: OPTIONS[None], NOT_CANDIDATES),
        (
            True,
            f"{SECOND}.mask_options",
            lambda _: NMPattern(1, 4).candidates(),
            "layer 'blocks.1.fc': mask_options are not the candidates of 2:4",
        ),
    ],
)
def test_faults_are_named(
    learned: bool, key: str, change: Callable[[Any], Tensor] | None, message: str, tmp_path: Path
) -> None:
    state = gated(gates_of(winners())) if learned else pruned(masks_of(winners()))
    load_any(saved(tmp_path / "whole.pt", state))
    if change is None:
        del state[key]
    else:
        state[key] = change(state.get(key))
    path = saved(tmp_path / "m.pt", state)
    with pytest.raises(CheckpointError) as error:
        load_any(path)
    assert str(error.value) == f"{path}: {message}"


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
