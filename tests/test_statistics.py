"""Statistics of a layer's inputs: their sums, over processes too, and the precision of those."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from streaming import both_ways, check, images
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from maskllm4v.oneshot.activations.sequential import stream_statistics
from maskllm4v.oneshot.activations.statistics import Hessian, InputNorm
from maskllm4v.sparsity.survey import prunable_matrices


def test_hessian_mean() -> None:
    statistic = Hessian(3, torch.device("cpu"))
    first, second = torch.randn(5, 3), torch.randn(2, 3)
    statistic.update(first)
    statistic.update(second)
    rows = torch.cat([first, second]).double()
    expected = sum(2 * torch.outer(row, row) for row in rows) / 7
    torch.testing.assert_close(statistic.mean.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(statistic.mean, statistic.mean)


@pytest.mark.parametrize("width", [511, 512, 600, 1024])
def test_hessian_of_a_wide_layer(width: int) -> None:
    """From some width on only strips above the diagonal are summed."""
    statistic, batches = Hessian(width, torch.device("cpu")), [torch.randn(count, width) for count in (70, 1, 40)]
    for rows in batches:
        statistic.update(rows)
        first = statistic.mean
    everything = torch.cat(batches).double()
    expected = 2 / 111 * everything.t() @ everything
    torch.testing.assert_close(first.double(), expected, rtol=0, atol=1e-5)
    assert torch.equal(first, statistic.mean)
    assert torch.equal(first.triu(256), first.tril(-256).t())


def test_hessian_of_a_narrow_layer_is_one_product() -> None:
    statistic, rows = Hessian(511, torch.device("cpu")), torch.randn(500, 511)
    statistic.update(rows)
    assert torch.equal(statistic.sum_of_products, torch.zeros(511, 511).addmm_(rows.t(), rows))


@pytest.mark.parametrize("width", [3, 600])
@pytest.mark.parametrize("statistic", [InputNorm, Hessian])
def test_statistics_of_all_processes_are_added(statistic: type, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(7, width)
    here, there, whole = (statistic(width, torch.device("cpu")) for _ in range(3))
    for one, part in ((here, rows[:4]), (there, rows[4:]), (whole, rows)):
        one.update(part)

    def add(summed: Tensor, count: Tensor) -> None:
        summed += there.sum_of_products if isinstance(there, Hessian) else there.sum_of_squares
        count += there.rows

    monkeypatch.setattr("maskllm4v.oneshot.activations.statistics.sum_", add)
    here.combine()
    for one in (here, whole):
        if width == 3:
            check(one, rows.double())
        elif statistic is Hessian:
            expected = 2 / 7 * rows.double().t() @ rows.double()
            torch.testing.assert_close(one.mean.double(), expected, rtol=1e-5, atol=1e-5)


# Precision


def matmul_settings() -> list[Any]:
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:
        overall = "mixed"
    return [overall, torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]


class Products(TorchDispatchMode):
    """Notes the settings under which matrix products are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: list[list[Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in str(function):
            self.settings.append(matmul_settings()[1:])
        return function(*args, **(kwargs or {}))


@pytest.fixture
def lowered(request: pytest.FixtureRequest) -> Iterator[None]:
    """Products of less than float32 allowed, one way or another."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("needs torch 2.9")
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before, each = torch.get_float32_matmul_precision(), [backend.fp32_precision for backend in backends]
    if request.param == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    elif request.param == "one by one":
        backends[0].fp32_precision, backends[1].fp32_precision = "tf32", "bf16"
    else:
        torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision(before)
    for backend, precision in zip(backends, each, strict=True):
        backend.fp32_precision = precision


@pytest.mark.parametrize("lowered", ["medium", "high", "tf32", "one by one"], indirect=True)
@pytest.mark.parametrize("error", [False, True])
@pytest.mark.usefixtures("lowered")
def test_hessian_is_summed_in_full_float32(error: bool) -> None:
    statistic, before = Hessian(600, torch.device("cpu")), matmul_settings()
    rows = torch.randn(1000, 600)
    assert not set(before[1:]) <= {"ieee", "none"}
    with Products() as products:
        if error:
            with pytest.raises(RuntimeError):
                statistic.update(rows[:, :-1])
        else:
            statistic.update(rows)
    assert all(set(found) <= {"ieee", "none"} for found in products.settings)
    assert matmul_settings() == before
    if not error:
        assert len(products.settings) == 3  # strips
        expected = 2 / 1000 * rows.double().t() @ rows.double()
        torch.testing.assert_close(statistic.mean.double(), expected, rtol=0, atol=1e-5)


class Own(Hessian):
    def update(self, rows: Tensor) -> None:
        self.sum_of_products += rows.t() @ rows
        self.rows += rows.shape[0]


@both_ways
@pytest.mark.parametrize("statistic", [Hessian, Own])
def test_statistics_under_autocast_are_float32(tiny_vit: nn.Module, statistic: type, propagate: str) -> None:
    layers, seen = prunable_matrices(tiny_vit, exclude=["head"]), []
    tiny_vit.blocks[0].mlp.fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.autocast("cpu", torch.bfloat16):
        first = next(stream_statistics(tiny_vit, layers, images(), statistic, propagate=propagate))
    assert {x.dtype for x in seen} == {torch.bfloat16}
    rows = [x.double().reshape(-1, x.shape[-1]) for x in seen[1:]]  # before them, a look at what feeds what
    check(first["blocks.0.mlp.fc2"], torch.cat(rows))
