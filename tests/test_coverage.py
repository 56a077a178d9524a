"""What of a model is under masks, what stays dense and why, and that somebody is told."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maskllm4v import LearnableMaskedLinear, make_learnable, prune, replace_linear_with_
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.survey import survey


class Zoo(nn.Module):
    """One of each kind of weights; runs nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4)
        self.position = nn.Parameter(torch.zeros(1, 9, 16))
        self.embedding, self.norm = nn.Embedding(24, 16), nn.LayerNorm((4, 16))
        self.body = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 8, bias=False)])
        self.mixer = nn.LSTM(16, 16)
        self.odd, self.scale = nn.Linear(6, 4), nn.Parameter(torch.zeros(16, 1, 1))
        self.projection = nn.Parameter(torch.zeros(16, 8))
        self.head = nn.Linear(16, 24)
        self.head.weight = self.embedding.weight
        self.last = nn.Linear(16, 2)


P24 = NMPattern("2:4")


def test_every_weight_that_may_multiply_is_told_once() -> None:
    found = survey(Zoo(), P24, exclude=["last"], on_misfit="skip")
    assert list(found.prunable) == ["body.0", "body.1"]
    assert {name: (one.weights, one.reason) for name, one in found.dense.items()} == {
        "head": (384, "shared with Embedding (an option)"),
        "odd": (24, "6 inputs, no multiple of 4"),
        "last": (32, "excluded"),
        "patches": (768, "convolution"),
        "projection": (128, "no kind that can be pruned (Zoo)"),
        "mixer.weight_ih_l0": (1024, "no kind that can be pruned (LSTM)"),
        "mixer.weight_hh_l0": (1024, "no kind that can be pruned (LSTM)"),
    }


def test_masks_of_a_model_are_no_weights() -> None:
    model = Zoo()
    before = survey(model, P24, on_misfit="skip", exclude=["last"]).coverage
    make_learnable(model, {"body.0": torch.tensor([1, 1, 0, 0]).bool().repeat(16, 4)}, pattern="2:4")
    assert survey(model, P24, on_misfit="skip", exclude=["last"]).coverage == before


def test_a_report_names_reasons_by_weight() -> None:
    found = survey(Zoo(), P24, exclude=["last"], on_misfit="skip").coverage
    assert found.share == 384 / 3768
    assert str(found).splitlines() == [
        "masks on 2 of 9 matrices, 10.2 % of their 3,768 weights",
        "dense, no kind that can be pruned (LSTM): 'mixer.weight_ih_l0' and 'mixer.weight_hh_l0' (54.4 %)",
        "dense, convolution: 'patches' (20.4 %)",
        "dense, shared with Embedding (an option): 'head' (10.2 %)",
        "dense, no kind that can be pruned (Zoo): 'projection' (3.4 %)",
        "dense, excluded: 'last' (0.8 %)",
        "dense, 6 inputs, no multiple of 4: 'odd' (0.6 %)",
    ]


@pytest.mark.parametrize(
    "use",
    [
        lambda model, how: prune(model, "magnitude", **how),
        lambda model, how: make_learnable(model, None, pattern="2:4", **how),
        lambda model, how: replace_linear_with_(model, LearnableMaskedLinear, **how),
    ],
    ids=["prune", "make_learnable", "replace_linear_with_"],
)
def test_less_than_half_is_warned_of(use: Any) -> None:
    body, convolution = nn.Linear(16, 16), nn.Conv2d(1, 16, 4)
    use(nn.ModuleList([copy.deepcopy(body), convolution]), {})  # a half
    with pytest.warns(
        UserWarning, match=r"only 47\.1 % of the weights.*; dense: convolution: '1' \(52\.9 %\)$"
    ) as seen:
        use(nn.ModuleList([copy.deepcopy(body), nn.Conv2d(1, 18, 4)]), {})
    assert seen[0].filename == __file__
    use(nn.ModuleList([body, nn.Linear(16, 64)]), {"exclude": ["1"]})  # as was asked for


def test_prune_returns_and_tells_its_coverage(tiny_vit: nn.Module) -> None:
    told: list[str] = []
    masks = prune(tiny_vit, "magnitude", exclude=["head"], tell=told.append)
    assert told == [str(masks.coverage)]
    assert list(masks.coverage.sparse) == list(masks)
    assert masks.coverage.sparse == {name: mask.numel() for name, mask in masks.items()}
    assert set(masks.coverage.dense) == {"patch_embed.proj", "head"}
    again = pickle.loads(pickle.dumps(masks))
    assert again.coverage == masks.coverage
    assert all(again[name].equal(mask) for name, mask in masks.items())


def test_a_terminal_shows_it(
    tiny_vit: nn.Module, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = copy.deepcopy(tiny_vit)
    prune(other, "magnitude")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    masks = prune(tiny_vit, "magnitude")
    assert capsys.readouterr().err == f"{masks.coverage}\n"


def test_nothing_is_told_after_an_error(tiny_vit: nn.Module, tmp_path: Path) -> None:
    told: list[str] = []
    with torch.no_grad():
        tiny_vit.blocks[1].attn.qkv.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        prune(tiny_vit, "magnitude", tell=told.append)
    assert not told
