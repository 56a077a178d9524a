"""Outputs under masks are those of the folded model, or the first layer is named that reads past its mask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import DENSE, MODEL, make_project, run, well
from torch import Tensor, nn

from maskllm4v import dense_weight, make_learnable, prune
from maskllm4v.export.folding import check_folded, difference
from maskllm4v.utils.errors import ConfigError, PatternError


class Block(nn.Module):
    def __init__(self, past: bool) -> None:
        super().__init__()
        self.fc, self.out, self.past = nn.Linear(16, 32), nn.Linear(32, 16), past

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = torch.tanh(self.fc(x))
        weight = self.out.weight
        if self.past:
            weight = dense_weight(self.out)
        return {"x": x + F.linear(hidden, weight, self.out.bias), "n": 1}


class Net(nn.Module):
    def __init__(self, past: int | None = None) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(i == past) for i in range(3)), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        for block in self.blocks:
            x = block(x)["x"]
        return self.head(x), [x]


X = torch.randn(5, 16)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_same_outputs_pass_and_nothing_changes(dtype: torch.dtype, learned: bool) -> None:
    model = Net().to(dtype)
    if learned:
        make_learnable(model, None, pattern="2:4")
    else:
        prune(model, "magnitude")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    check_folded(model, X.to(dtype))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in (model.head, *model.blocks))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("past", [0, 2])
def test_the_first_layer_that_reads_past_its_mask_is_named(past: int) -> None:
    model = Net(past)
    prune(model, "magnitude")
    with pytest.raises(PatternError, match=rf"^layer 'blocks\.{past}': other outputs under masks than folded"):
        check_folded(model, (X, torch.zeros(5)))


def test_masks_that_nothing_reads_are_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(16, 4), "idle": nn.Linear(16, 4)})
    prune(model, "magnitude")
    with pytest.raises(ConfigError, match="'idle': nothing read the masked weight"):
        check_folded(model, X, forward=lambda model, batch: model["used"](batch))
    with pytest.raises(ConfigError, match="no masks"):
        check_folded(Net(), X)


def test_differences_are_in_rounding_errors() -> None:
    one = torch.tensor([4.0, 0.0, float("nan"), float("inf")])
    eps = torch.finfo(torch.float32).eps
    assert difference([one], [one.clone()]) == 0
    assert difference([one[:2]], [torch.tensor([4.0, 12 * eps])]) == pytest.approx(3)
    assert difference(one[:2], torch.tensor([float("nan"), 0.0])) > 1e6
    assert difference(one, one[:3]) == float("inf")
    assert difference({"a": one, "b": 3}, {"a": one, "b": 4}) == 0


def test_the_command_compares_where_it_is_given_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    well("prune", *MODEL, *DENSE, "--save-model", "m.safetensors")
    quiet, compared = well("verify", "m.safetensors"), well("verify", "m.safetensors", *MODEL[:6])
    assert compared.out == quiet.out
    assert compared.err.endswith("test_vit: the same outputs under the masks as with the masks folded in\n")

    def past(self: nn.Linear, x: Tensor) -> Tensor:
        return F.linear(x, dense_weight(self) + 0 * self.weight, self.bias)

    monkeypatch.setattr(nn.Linear, "forward", past)
    done = run("verify", "m.safetensors", *MODEL[:6])
    assert (done.code, done.out) == (1, quiet.out)
    assert "layer 'blocks.0.attn" in done.err
