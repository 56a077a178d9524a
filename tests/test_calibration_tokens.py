"""Tokens that do not count, such as padding, and tokens that are not the same ones in two networks."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from streaming import both_ways, check, shrink, whole_model_inputs
from test_evaluation import checkpoint
from test_side_by_side import both, check_paired
from test_updates import direct
from torch import Tensor, nn

from maskllm4v import current_masks, dense_weight, prune, update_weights_
from maskllm4v.evaluation.layer_errors import layer_diagnostics
from maskllm4v.oneshot.activations.paired import layer_statistics
from maskllm4v.oneshot.activations.sequential import part_statistics
from maskllm4v.oneshot.activations.statistics import Hessian, InputNorm
from maskllm4v.sparsity.calibration import Calibration
from maskllm4v.sparsity.survey import prunable_matrices
from maskllm4v.utils.errors import ConfigError, DataError

Batch = tuple[Tensor, Tensor]  # tokens [B, L, 8]; how many of each sample are no padding [B]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, number: int) -> Tensor:
        return x + torch.tanh(self.fc(x))


class Reader(nn.Module):
    """Reads each token for itself, and at last the mean of those that are no padding: whatever padding holds.

    With ``chain`` its blocks feed one another, so that one is run after the other.
    """

    def __init__(self, *, chain: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.chain = chain

    def forward(self, batch: Batch) -> Tensor:
        x, lengths = self.embed(batch[0]), batch[1]
        for i, block in enumerate(self.blocks):
            x = block(x, 0 if self.chain else i)
        inside = torch.arange(x.shape[1]) < lengths[:, None]
        return self.head((x * inside[..., None]).sum(1) / lengths[:, None])


NAMES = ("embed", *(f"blocks.{i}.fc" for i in range(3)), "head")


def run(model: nn.Module, batch: Any) -> Tensor:
    return model(batch)


def inside(name: str, shape: torch.Size, batch: Batch) -> Tensor | None:
    return None if name == "head" else torch.arange(shape[1]) < batch[1][:, None]


def padded_and_plain() -> tuple[list[Batch], list[Batch]]:
    """Three batches whose samples are padded by large values; the same samples alone, without padding."""
    padded, plain = [], []
    for lengths in ([5, 2, 3], [1], [4, 4]):
        samples = [torch.randn(1, length, 8) for length in lengths]
        whole = torch.full((len(lengths), 6, 8), 50.0)
        for i, sample in enumerate(samples):
            whole[i, : lengths[i]] = sample
        padded.append((whole, torch.tensor(lengths)))
        plain += [(sample, torch.tensor([sample.shape[1]])) for sample in samples]
    return padded, plain


chained = pytest.mark.parametrize("chain", [True, False], ids=["chain", "whole"])


@both_ways
@chained
@pytest.mark.parametrize("statistic", [InputNorm, Hessian])
def test_padding_is_no_part_of_statistics(statistic: type, chain: bool, propagate: Any) -> None:
    model = Reader(chain=chain).eval()
    untouched, (padded, plain), seen = copy.deepcopy(model), padded_and_plain(), []
    part = Calibration(iter(padded), run, tokens=inside)
    for unit in part_statistics(model, prunable_matrices(model), [part], statistic, propagate=propagate):
        expected = whole_model_inputs(untouched if propagate == "dense" else model, unit, plain, run)
        for name, found in unit.items():
            check(found, expected[name])
        for name in unit:
            shrink(model.get_submodule(name))
        seen += unit
    assert tuple(seen) == NAMES


@both
@chained
def test_padding_is_no_part_of_statistics_layer_by_layer(chain: bool, paired: bool) -> None:
    model = Reader(chain=chain).eval()
    dense, (padded, plain), seen = copy.deepcopy(model), padded_and_plain(), []
    part = Calibration(iter(padded), run, tokens=inside)
    for unit in layer_statistics(model, prunable_matrices(model), [part], dense=dense if paired else None):
        for name, found in unit.items():
            rows, twins = (whole_model_inputs(one, [name], plain, run)[name] for one in (model, dense))
            if paired:
                check_paired(found, rows, twins)
            else:
                check(found, rows)
            shrink(model.get_submodule(name))
        seen += unit
    assert tuple(seen) == NAMES


@both
def test_padding_is_no_part_of_an_independent_part(paired: bool) -> None:
    model = Reader(chain=True).eval()
    padded, plain = padded_and_plain()
    layers = {"embed": prunable_matrices(model)["embed"]}
    rows = whole_model_inputs(model, layers, plain, run)["embed"]
    part = Calibration(iter(padded), run, independent=True, tokens=inside)
    (unit,) = layer_statistics(model, layers, [part], dense=copy.deepcopy(model) if paired else None)
    if paired:
        check_paired(unit["embed"], rows, rows)
    else:
        check(unit["embed"], rows)
    (unit,) = part_statistics(
        model, layers, [Calibration(iter(padded), run, independent=True, tokens=inside)], Hessian, propagate="dense"
    )
    check(unit["embed"], rows)


def test_padding_is_no_part_of_layer_errors() -> None:
    model = Reader(chain=True).eval()
    padded, plain = padded_and_plain()
    masks = prune(copy.deepcopy(model), "magnitude")
    diagnosed = partial(layer_diagnostics, model, checkpoint(dict(masks)))
    found, wanted, other = (
        [float(line[3]) for line in diagnosed([part])]
        for part in (Calibration(padded, run, tokens=inside), Calibration(plain, run), Calibration(padded, run))
    )
    assert found == pytest.approx(wanted, rel=1e-5)
    assert other[0] != pytest.approx(wanted[0], rel=1e-2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.ones(3, 6), r"torch\.float32 \(3, 6\)"),
        (torch.ones(6, dtype=torch.bool), r"torch\.bool \(6,\)"),
        (torch.ones(3, 6, 1, dtype=torch.bool), r"torch\.bool \(3, 6, 1\)"),
    ],
)
def test_what_is_no_mask_of_tokens(given: Tensor, said: str) -> None:
    model = Reader(chain=True).eval()
    padded, _ = padded_and_plain()
    part = Calibration(padded, run, tokens=lambda *_: given)
    wanted = rf"tokens gives {said} for layer 'embed', whose inputs are \(3, 6, 8\); allowed: torch\.bool \(3, 6\)"
    with pytest.raises(ConfigError, match=wanted):
        list(part_statistics(model, prunable_matrices(model), [part], InputNorm, propagate="dense"))
    with pytest.raises(ConfigError, match=wanted):
        layer_diagnostics(model, checkpoint(dict(prune(copy.deepcopy(model), "magnitude"))), [part])


def test_layer_none_of_whose_tokens_count() -> None:
    model = Reader(chain=True).eval()
    padded, _ = padded_and_plain()
    part = Calibration(padded, run, tokens=lambda name, shape, batch: torch.full(shape, name != "blocks.1.fc"))
    with pytest.raises(DataError, match=r"'blocks\.1\.fc' saw no input"):
        list(part_statistics(model, prunable_matrices(model), [part], InputNorm, propagate="pruned"))


# Tokens that are not the same


class Picker(nn.Module):
    """A detector's way with queries: of what the encoder makes, the decoder sees the three tokens that score best."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.score, self.decoder = nn.Linear(8, 8), nn.Linear(8, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        chosen = self.score(x).squeeze(-1).topk(3, 1).indices
        return self.decoder(torch.tanh(x.gather(1, chosen[..., None].expand(-1, -1, 8))))


def pruned_picker() -> nn.Module:
    torch.manual_seed(0)
    model = Picker().eval()
    prune(model, "magnitude", exclude=["score"])
    return model


def picker_parts(*, paired: bool) -> list[Calibration]:
    batches = [torch.randn(20, 30, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    return [Calibration(iter(batches), layers=("encoder",)), Calibration(iter(batches), paired=paired)]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: dense_weight(model.get_submodule(name)).detach().clone() for name in current_masks(model)}


UNPAIRED = r"layer 'decoder': not the same tokens in the dense and in the pruned network \(paired=False\)"


def test_layers_without_pairs_get_the_symmetric_target() -> None:
    model, before = pruned_picker(), weights_of(pruned_picker())
    with pytest.warns(UserWarning, match=f"{UNPAIRED}; updated by the symmetric target"):
        update_weights_(model, calibration=picker_parts(paired=False))
    found = weights_of(model)
    as_if_paired = weights_of(update_weights_(pruned_picker(), calibration=picker_parts(paired=True)))
    assert torch.equal(found["encoder"], as_if_paired["encoder"])
    rows = whole_model_inputs(model, ["decoder"], picker_parts(paired=True)[1].batches, run)["decoder"]
    wanted = direct(before["decoder"], current_masks(model)["decoder"], rows, rows, 0.1)
    torch.testing.assert_close(found["decoder"].double(), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max()))
    # That is what is at stake: pairs of queries that have nothing to do with one another.
    assert float((as_if_paired["decoder"] - wanted).abs().max()) > 0.02


def test_asymmetric_target_asked_for_without_pairs() -> None:
    model = pruned_picker()
    before = weights_of(model)
    with pytest.raises(ConfigError, match=f"target is 'asymmetric', but {UNPAIRED}; allowed: 'symmetric', or none"):
        update_weights_(model, calibration=picker_parts(paired=False), target="asymmetric")
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


@pytest.mark.parametrize("method", ["least_squares", "sparsegpt"])
def test_symmetric_target_needs_no_pairs(method: str) -> None:
    """And no warning: those are errors here."""

    def updated(paired: bool) -> dict[str, Tensor]:
        parts = picker_parts(paired=paired)
        return weights_of(update_weights_(pruned_picker(), method, calibration=parts, target="symmetric"))

    assert all(torch.equal(weight, updated(True)[name]) for name, weight in updated(False).items())
