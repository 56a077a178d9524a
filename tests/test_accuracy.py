"""Accuracy, cross-entropy, calibration error and agreement against NumPy, a sample at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from maskllm4v.tasks.classification.accuracy import BINS, ClassificationMetrics

CPU = torch.device("cpu")


def samples(count: int, classes: int = 10, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of a sparse and a dense model that mostly agree, and labels that mostly are the likeliest class."""
    logits = torch.randn(count, classes) * spread
    labels = torch.where(torch.rand(count) < 0.6, logits.argmax(1), torch.randint(classes, (count,)))
    return logits, labels, logits + torch.randn(count, classes)


def by_hand(logits: Tensor, labels: Tensor, dense: Tensor) -> dict[str, float]:
    top1 = top5 = nll = same = 0.0
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(15)]
    for row, label, other in zip(logits.double().numpy(), labels.tolist(), dense.numpy(), strict=True):
        chances = np.exp(row) / np.exp(row).sum()
        rank = int((row > row[label]).sum())
        top1, top5 = top1 + (rank < 1), top5 + (rank < 5)
        nll -= np.log(chances[label])
        same += row.argmax() == other.argmax()
        number = next(k for k in range(15) if chances.max() <= (k + 1) / 15)
        bins[number].append((chances.max(), rank < 1))
    count, ece = len(labels), 0.0
    for members in bins:
        if members:
            confidence, hits = (np.mean(values) for values in zip(*members, strict=True))
            ece += len(members) / count * abs(confidence - hits)
    shares = {"top1": top1, "top5": top5, "ece": ece * count, "agreement": same}
    return {"nll": nll / count, **{name: 100 * value / count for name, value in shares.items()}}


def tallied(logits: Tensor, labels: Tensor, dense: Tensor | None, sizes: list[int]) -> dict[str, float]:
    tally = ClassificationMetrics(CPU)
    parts = zip(*(x.split(sizes) for x in (logits, labels, logits if dense is None else dense)), strict=True)
    for own, wanted, other in parts:
        tally.add(own, wanted, None if dense is None else other)
    return tally.metrics()


@pytest.mark.parametrize("spread", [0.1, 2.0, 30.0])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_metrics_are_those_of_the_formulas(classes: int, spread: float) -> None:
    given = samples(300, classes, spread)
    found, wanted = tallied(*given, [300]), by_hand(*given)
    assert BINS == 15
    assert found.keys() == wanted.keys()
    for name in ("top1", "top5", "agreement"):
        assert found[name] == pytest.approx(wanted[name], abs=1e-12), name
    for name in ("nll", "ece"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-5), name
    assert (found["top5"] == 100) == (classes == 2)


@pytest.mark.parametrize("sizes", [[1] * 60, [59, 1], [7, 0, 13, 40]])
def test_division_into_batches_changes_nothing(sizes: list[int]) -> None:
    given = samples(60)
    assert tallied(*given, sizes) == pytest.approx(tallied(*given, [60]), rel=1e-6)


@pytest.mark.parametrize(("number", "confidence"), [(k, (k + 0.5) / 15) for k in range(8, 15)])
def test_each_bin_stands_for_itself(number: int, confidence: float) -> None:
    """Two classes, one confidence, three of four right: the error is the distance between the two."""
    logits = torch.tensor([[confidence, 1 - confidence]]).log().repeat(4, 1)
    tally = ClassificationMetrics(CPU)
    tally.add(logits, torch.tensor([0, 0, 0, 1]))
    assert tally.metrics()["ece"] == pytest.approx(100 * abs(confidence - 0.75), rel=1e-5)
    assert tally._bins[0].tolist() == [4.0 * (k == number) for k in range(15)]


def test_errors_of_one_bin_cancel_and_those_of_two_do_not() -> None:
    def error(first: float, second: float) -> float:
        rows = torch.tensor([[first, 1 - first], [second, 1 - second]], dtype=torch.float64)
        tally = ClassificationMetrics(CPU)
        tally.add(rows.log(), torch.tensor([0, 1]))  # the first is right, the second wrong
        return tally.metrics()["ece"]

    assert error(0.61, 0.65) == pytest.approx(100 * abs(0.63 - 0.5), rel=1e-5)
    assert error(0.61, 0.71) == pytest.approx(100 * (0.39 + 0.71) / 2, rel=1e-5)


def test_certain_answers_lie_in_the_last_bin() -> None:
    tally = ClassificationMetrics(CPU)
    tally.add(torch.tensor([[1000.0, 0.0]]), torch.tensor([0]))
    assert tally._bins[0].tolist() == [0.0] * 14 + [1.0]
    assert tally.metrics()["ece"] == 0


def test_nobody_compared_no_agreement() -> None:
    logits, labels, _ = samples(10)
    assert set(tallied(logits, labels, None, [10])) == {"top1", "top5", "nll", "ece"}


@pytest.mark.parametrize("classes", [3, 10, 1000])
def test_ties_do_not_count_as_disagreement(classes: int) -> None:
    """Half precision makes many; which class goes first is then no matter of the model."""
    logits = torch.randn(200, classes).round()
    found = tallied(logits, torch.zeros(200, dtype=torch.int64), logits.clone(), [200])
    assert found["agreement"] == 100


def test_half_precision_is_counted_in_full() -> None:
    logits, labels, dense = samples(300)
    halves = logits.bfloat16()
    wanted = by_hand(halves.float(), labels, dense)
    found = tallied(halves, labels, dense.bfloat16(), [300])
    assert found["nll"] == pytest.approx(wanted["nll"], rel=1e-5)


def test_sums_of_all_processes_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here: of one other process, which has seen the other half."""
    given = samples(100)
    wanted = tallied(*given, [100])
    here, there = ClassificationMetrics(CPU), ClassificationMetrics(CPU)
    for tally, half in ((here, slice(0, 37)), (there, slice(37, None))):
        tally.add(*(tensor[half] for tensor in given))

    def add(*tensors: Tensor) -> None:
        for tensor, other in zip(tensors, (there._sums, there._bins), strict=True):
            tensor += other

    monkeypatch.setattr("maskllm4v.tasks.classification.accuracy.distributed.sum_", add)
    assert here.metrics() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("classes", [10, 1000])
def test_metrics_are_those_of_torchmetrics(classes: int) -> None:
    logits, labels, dense = samples(400, classes)
    found = tallied(logits, labels, dense, [150, 250])
    for k in (1, 5):
        wanted = MulticlassAccuracy(classes, top_k=k, average="micro")(logits, labels)
        assert found[f"top{k}"] == pytest.approx(100 * float(wanted), rel=1e-6)
    wanted = MulticlassCalibrationError(classes, n_bins=BINS, norm="l1")(logits, labels)
    assert found["ece"] == pytest.approx(100 * float(wanted), rel=1e-5)
