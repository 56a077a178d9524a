"""Converted models on a GPU: they compute the same, on any input, eagerly, in CUDA graphs and compiled."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from folded_vit import linears, pruned, small_vit
from torch import Tensor, nn

from maskllm4v.export.semi_structured import SemiStructuredLinear, conversion_table, to_semi_structured_
from maskllm4v.export.sparse_fit import capability
from maskllm4v.utils.errors import ConfigError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # torch's own, on prototypes and TF32
]
BOUNDS = {torch.bfloat16: 3e-2, torch.float16: 5e-3}
DTYPES = list(BOUNDS)


def deviation(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def images(batch: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(batch, 3, 112, 112, device="cuda", dtype=dtype)


def models(dtype: torch.dtype, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The dense one and the converted one."""
    dense = small_vit().to("cuda", dtype)
    sparse = copy.deepcopy(dense)
    found = to_semi_structured_(sparse, exclude=["head"], **options)
    assert all(line.converted for line in found), conversion_table(found)
    assert sum(isinstance(layer, SemiStructuredLinear) for layer in sparse.modules()) == 8
    return dense, sparse


@pytest.mark.parametrize("transposed_output", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_converted_models_compute_the_same(dtype: torch.dtype, transposed_output: bool) -> None:
    dense, sparse = models(dtype, transposed_output=transposed_output)
    for batch in (1, 3, 8):  # 197 tokens are no multiple of 8
        x = images(batch, dtype)
        with torch.no_grad():
            expected = dense(x)
            assert deviation(sparse(x), expected) < BOUNDS[dtype]
        with torch.inference_mode():
            assert deviation(sparse(x), expected) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_inputs_and_outputs_of_any_layout(dtype: torch.dtype, bias: bool) -> None:
    layer = pruned(128, 64).to("cuda", dtype)
    layer.bias = layer.bias if bias else None
    for transposed_output in (True, False):
        model = nn.Sequential(copy.deepcopy(layer))
        (line,) = to_semi_structured_(model, transposed_output=transposed_output)
        assert line.converted, line.reason
        sequence = torch.randn(16, 8, 64, device="cuda", dtype=dtype)
        inputs = [
            sequence,
            sequence[:, 0],  # a class token
            sequence[:, ::2],
            sequence.transpose(0, 1),
            torch.randn(16, 64, 8, device="cuda", dtype=dtype).transpose(1, 2),
            torch.randn(64, 16, device="cuda", dtype=dtype).t(),
            sequence[0, 0],
            sequence[None],
        ]
        for x in inputs:
            with torch.no_grad():
                found, expected = model(x), layer(x)
            assert found.shape == expected.shape
            assert found.is_contiguous() or not transposed_output
            assert deviation(found, expected) < BOUNDS[dtype]
            flat = found.transpose(0, -1).reshape(-1) + 0  # consumers of other layouts
            assert deviation(flat, expected.transpose(0, -1).reshape(-1)) < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_graph(dtype: torch.dtype) -> None:
    dense, sparse = models(dtype)
    x, stream, graph = images(2, dtype), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                sparse(x)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            found = sparse(x)
        for _ in range(2):
            x.copy_(images(2, dtype))
            graph.replay()
            assert deviation(found, dense(x)) < BOUNDS[dtype]


@pytest.mark.parametrize(("dtype", "batch"), [(torch.bfloat16, 1), (torch.bfloat16, 8), (torch.float16, 8)])
def test_compiled_with_cuda_graphs(dtype: torch.dtype, batch: int) -> None:
    """Padded to a multiple of 8 tokens, and as they are."""
    torch.compiler.reset()
    dense, sparse = models(dtype)
    compiled = torch.compile(sparse, mode="reduce-overhead", dynamic=False)
    with torch.no_grad():
        for _ in range(4):
            x = images(batch, dtype)
            assert deviation(compiled(x), dense(x)) < BOUNDS[dtype]
    torch.compiler.reset()


@pytest.mark.parametrize("faster_only", [False, True])
def test_example_gives_times_and_slow_layers_stay_dense(faster_only: bool) -> None:
    dense, x = small_vit().to("cuda", torch.bfloat16), images(2, torch.bfloat16)
    sparse = copy.deepcopy(dense)
    found = to_semi_structured_(sparse, exclude=["head"], example=lambda model: model(x), faster_only=faster_only)
    assert len(found) == 8
    for line in found:
        assert line.tokens == 2 * 197
        assert line.dense_ms is not None
        assert line.sparse_ms is not None
        assert 0 < line.dense_ms < 10
        assert 0 < line.sparse_ms < 10
        assert line.converted == (not faster_only or line.sparse_ms < line.dense_ms), line.reason
        assert line.converted or line.reason.startswith("not faster: ")
        assert isinstance(linears(sparse)[line.layer], SemiStructuredLinear) == line.converted
    with torch.no_grad():
        assert deviation(sparse(x), dense(x)) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize(("pattern", "fits"), [("1:4", True), ("3:4", False), ("4:8", False)])
def test_other_patterns(pattern: str, fits: bool) -> None:
    dense = small_vit(pattern).to("cuda", torch.bfloat16)
    sparse, x = copy.deepcopy(dense), images(2, torch.bfloat16)
    found = to_semi_structured_(sparse, exclude=["head"])
    assert [line.converted for line in found] == [fits] * 8, conversion_table(found)
    assert all(fits or line.reason.startswith("not 2:4: ") for line in found)
    with torch.no_grad():
        assert deviation(sparse(x), dense(x)) < BOUNDS[torch.bfloat16]


def test_float32_and_impossible_backends() -> None:
    model = small_vit().cuda()
    assert {line.reason for line in to_semi_structured_(model, exclude=["head"])} == {
        "its weight is float32, not float16 or bfloat16"
    }
    here = capability(None)
    assert here is not None
    if here[0] != 8:
        with pytest.raises(ConfigError, match=r"torch's CUTLASS needs compute capability 8\.x"):
            to_semi_structured_(model, backend="cutlass")
