"""Checkpoints of others that are not what they say: code in them, cut short, masks and logits at fault."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from original_files import (
    FIRST,
    SECOND,
    gated,
    gates_of,
    masks_of,
    pruned,
    saved,
    timm_file,
    weights,
    winners,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from maskllm4v.checkpoints.third_party import load_any
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import CheckpointError


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
