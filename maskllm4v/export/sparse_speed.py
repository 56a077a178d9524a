"""How fast a semi-structured product is against the dense one: tokens seen, algorithms, graphed medians."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

CALLS, REPEATS = 10, 15  # in a graph; of the graph


def tokens_by_layer(
    model: nn.Module, layers: Mapping[str, nn.Linear], example: Callable[[nn.Module], Any]
) -> dict[str, int]:
    """How many rows reach each layer at once while ``example(model)`` runs: the most where it is called repeatedly.

    Layers that are not reached are absent.
    """
    found: dict[str, int] = {}

    def watch(name: str, layer: nn.Linear) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs:
                found[name] = max(found.get(name, 0), inputs[0].numel() // layer.in_features)

        return layer.register_forward_pre_hook(hook)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            example(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


def random_tokens(tokens: int, like: Tensor) -> Tensor:
    """Normal noise ``[tokens, in]`` for a weight ``[out, in]``; torch's own generators stay where they are."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(tokens, like.shape[1], generator=generator, device=like.device, dtype=like.dtype)


def algorithms(packed: Tensor, inputs: Tensor, bias: Tensor | None, transposed: bool) -> list[int]:
    """cuSPARSELt's algorithms worth trying for these operands: its default, and the one that its search prefers.

    Args:
        packed: a compressed weight.
        inputs: ``[tokens, in]``; padded to a multiple of 8 tokens, as torch does in every product.
        bias: ``[out]`` or None.
        transposed: whether the product writes its output row-major.
    """
    padded = torch.nn.functional.pad(inputs, (0, 0, 0, -len(inputs) % 8))
    module: Any = getattr(torch._C, "_cusparselt", None)
    try:
        if hasattr(module, "mm_search"):
            found = int(module.mm_search(packed, padded.t(), bias, None, None, transposed)[0])
        else:
            found = torch._cslt_sparse_mm_search(packed, padded.t(), bias, transpose_result=transposed)
    except RuntimeError:  # a search that fails costs speed at most
        return [0]
    return list(dict.fromkeys((0, found)))


def graphed_ms(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Milliseconds that each call takes on the GPU inside a CUDA graph: medians, all graphs in turn.

    Each graph holds :data:`CALLS` calls, so that starting it does not count. Operands as small as a layer's weight may
    stay in the GPU's cache, for all candidates alike.
    """
    with torch.no_grad():
        graphs = [captured(call, CALLS) for call in calls]
    samples: list[list[float]] = [[] for _ in graphs]
    for repetition in range(REPEATS + 2):
        for graph, found in zip(graphs, samples, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repetition >= 2:
                found.append(begin.elapsed_time(end) / CALLS)
    return [statistics.median(found) for found in samples]


def captured(call: Callable[[], Any], times: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of so many calls in a row, on the tensors that ``call`` holds; its results are dropped."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up in the first calls, which no graph may hold
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph
