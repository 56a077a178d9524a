"""Folded models on GPUs with 2:4 tensor cores: semi-structured weights of ``torch.sparse``, where right and worth it.

``to_sparse_semi_structured`` as torch offers it has three traps, seen on an H100 with torch 2.11; the numbers are in
``reports/benchmarks/inference_cuda.json``:

- A weight with three non-zeros in a group of four is compressed all the same, and its products are garbage. Here every
  group is checked first, and every converted layer against its dense product afterwards.
- cuSPARSELt plans each product anew, more than half a millisecond of host time a call: run eagerly, ViT-B/16 at batch 8
  is nine times slower than dense. Run converted models in CUDA graphs: captured by hand, or
  ``torch.compile(mode="reduce-overhead")``.
- The product is a transposed view, and all elementwise operations behind it run on strided memory: even in a graph
  ViT-B/16 at batch 128 is three times slower. Here it is written row-major, which costs the same.

Few tokens do not pay: with the 197 of one image all layers of ViT-B/16 are slower. See ``example`` and ``faster_only``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.export.sparse_fit import BACKENDS, layer_incompatibility, on_gpu, pick_backend
from maskllm4v.export.sparse_speed import algorithms, graphed_ms, random_tokens, tokens_by_layer
from maskllm4v.sparsity.surgery import replace_
from maskllm4v.sparsity.survey import Exclude, prunable_linears
from maskllm4v.utils.errors import ConfigError

CHECKED = 1024  # tokens, at most, of the check against the dense product


@dataclass(frozen=True)
class Conversion:
    """What became of one layer.

    Attributes:
        layer: its name.
        shape: of its weight, ``(out, in)``.
        converted: whether its weight is semi-structured now.
        reason: why not; empty if it is.
        tokens: rows that ``example`` sent through it at once; None without one.
        algorithm: cuSPARSELt's, by number.
        dense_ms, sparse_ms: of one product of that many rows in a CUDA graph, medians in milliseconds; None if they
            were not measured.
    """

    layer: str
    shape: tuple[int, int]
    converted: bool = False
    reason: str = ""
    tokens: int | None = None
    algorithm: int = 0
    dense_ms: float | None = None
    sparse_ms: float | None = None


class SemiStructuredLinear(nn.Linear):
    """A linear layer with a semi-structured weight, for inference only.

    torch hands the input's address to the kernel, which takes all that is not row-major for transposed: a class token
    cut out of its sequence would give garbage without a word. So inputs are made contiguous here.

    Attributes:
        row_major: whether outputs are contiguous, too.
    """

    row_major: bool

    def forward(self, input: Tensor) -> Tensor:
        flat = input.reshape(-1, self.in_features).contiguous()
        output = F.linear(flat, self.weight, self.bias).view(*input.shape[:-1], self.out_features)
        return output.contiguous() if self.row_major else output


def to_semi_structured_(
    model: nn.Module,
    *,
    exclude: Exclude = (),
    example: Callable[[nn.Module], Any] | None = None,
    backend: str | None = None,
    transposed_output: bool = True,
    faster_only: bool = False,
) -> list[Conversion]:
    """Give the linear layers of a folded half-precision model on a GPU semi-structured weights, in place.

    What does not fit stays as it is, with the reason. A converted model can be run, not trained, saved or moved.

    Args:
        model: see :func:`maskllm4v.fold_`.
        exclude: modules or name patterns that stay dense, and are not reported.
        example: runs the model once on typical inputs, as in ``lambda model: model(images)``. Then both products of
            each layer are timed on as many tokens, and the fastest algorithm known to cuSPARSELt is taken.
        backend: ``"cusparselt"`` or ``"cutlass"``; by default what the GPU can.
        transposed_output: whether outputs are written row-major; False leaves them as torch does.
        faster_only: leave layers dense that are not faster there; needs ``example``.

    Returns:
        A line a layer, in the model's order; see :func:`conversion_table`.

    Raises:
        ConfigError: the backend is unknown or cannot work here; no example for ``faster_only``; an exclusion matches
            nothing; the model is a single linear layer.
    """
    if faster_only and example is None:
        raise ConfigError("faster_only needs an example to tell how many tokens a layer gets")
    ready = [module for module in model.modules() if isinstance(module, SemiStructuredLinear)]
    layers = prunable_linears(model, exclude=[*exclude, *ready] if ready else exclude)
    device = next((layer.weight.device for layer in layers.values() if on_gpu(layer.weight)), None)
    chosen, why = pick_backend(backend, device)
    reasons = {name: layer_incompatibility(layer, chosen, why) for name, layer in layers.items()}
    fit = {name: layer for name, layer in layers.items() if not reasons[name]}
    tokens = tokens_by_layer(model, fit, example) if fit and example is not None else {}
    found, speeds = list[Conversion](), dict[tuple[Any, ...], tuple[int, float, float]]()
    for name, layer in layers.items():
        line = Conversion(name, (layer.out_features, layer.in_features), reason=reasons[name], tokens=tokens.get(name))
        if not line.reason and faster_only and line.tokens is None:
            line = replace(line, reason="the example does not run it")
        if line.reason or chosen is None:
            found.append(line)
            continue
        try:
            with torch.cuda.device_of(layer.weight), torch.no_grad():
                line, new = _convert(layer, line, chosen, transposed_output, faster_only, speeds)
        except RuntimeError as error:  # torch's or the library's: this layer stays dense, others may do
            line, new = replace(line, reason=f"failed: {str(error).strip().partition(chr(10))[0]}"), None
        if new is not None:
            replace_(model, [name], lambda _, __, new=new: new)  # type: ignore[misc]
        found.append(line)
    return found


def conversion_table(conversions: Iterable[Conversion]) -> str:
    """Aligned text, a line a layer; ``-`` where nothing was measured."""
    head = ("layer", "shape", "weight", "reason", "tokens", "algorithm", "dense ms", "sparse ms")
    lines = [head]
    for name, (out, width), converted, *rest in map(astuple, conversions):
        reason, tokens, algorithm, *times = rest
        cells = [tokens, algorithm if converted else None, *times]
        shown = ("-" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells)
        lines.append((name, f"{out}x{width}", "sparse" if converted else "dense", reason, *shown))
    order = (0, 1, 2, 4, 5, 6, 7, 3)  # reasons are long and come last
    widths = [max(len(line[i]) for line in lines) for i in order]
    return "\n".join("  ".join(line[i].ljust(w) for i, w in zip(order, widths, strict=True)).rstrip() for line in lines)


def compress(weight: Tensor, backend: str, *, algorithm: int = 0, transposed_output: bool = True) -> Tensor:
    """A weight ``[out, in]`` that is 2:4, as one of torch's semi-structured tensors."""
    weight = weight.detach().masked_fill(weight == 0, 0.0).contiguous()  # no -0.0, as a folded mask leaves behind
    kind: Any = getattr(torch.sparse, BACKENDS[backend])
    with warnings.catch_warnings():  # torch calls the whole class a prototype
        warnings.simplefilter("ignore")
        found: Any = kind.from_dense(weight)
        if backend == "cutlass":
            return found
        return kind(
            *(weight.shape, found.packed, None, None, None, None),
            fuse_transpose_cusparselt=transposed_output,
            alg_id_cusparselt=algorithm,
        )


def deviation(new: nn.Linear, dense: nn.Linear, tokens: int) -> float:
    """Relative error ‖new − dense‖ / ‖dense‖ of a product of random tokens, the dense one in float32."""
    inputs = random_tokens(min(tokens, CHECKED), dense.weight)
    bias = None if dense.bias is None else dense.bias.float()
    expected = F.linear(inputs.float(), dense.weight.float(), bias)
    error: Tensor = (new(inputs).float() - expected).norm() / expected.norm().clamp_min(1e-30)
    return float(error)


def _convert(
    layer: nn.Linear,
    line: Conversion,
    backend: str,
    transposed: bool,
    faster_only: bool,
    speeds: dict[tuple[Any, ...], tuple[int, float, float]],
) -> tuple[Conversion, SemiStructuredLinear | None]:
    """The layer's replacement, if it is right and wanted; ``speeds`` collects what was measured, by kind of layer."""
    if line.tokens:
        kind = (line.shape, layer.bias is None, layer.weight.dtype, line.tokens)
        if kind not in speeds:
            speeds[kind] = _measured(layer, backend, transposed, line.tokens)
        algorithm, dense, sparse = speeds[kind]
        line = replace(line, algorithm=algorithm, dense_ms=dense, sparse_ms=sparse)
        if faster_only and sparse >= dense:
            reason = f"not faster: {sparse:.4g} ms, dense {dense:.4g} ms, at {line.tokens} tokens"
            return replace(line, reason=reason), None
    new = _layer(layer, backend, line.algorithm, transposed)
    error, bound = deviation(new, layer, line.tokens or 200), 2 * torch.finfo(layer.weight.dtype).eps
    if not error <= bound:  # NaN is wrong, too
        return replace(line, reason=f"wrong product: relative error {error:.2g}, at most {bound:.2g} allowed"), None
    return replace(line, converted=True), new


def _measured(layer: nn.Linear, backend: str, transposed: bool, tokens: int) -> tuple[int, float, float]:
    """The best algorithm, and milliseconds of the dense product and of its own."""
    inputs = random_tokens(tokens, layer.weight)
    first = _layer(layer, backend, 0, transposed)
    weight: Any = first.weight
    numbers = algorithms(weight.packed, inputs, layer.bias, transposed) if backend == "cusparselt" else [0]
    candidates = {n: _layer(layer, backend, n, transposed) if n else first for n in numbers}
    calls: list[nn.Module] = [layer, *candidates.values()]
    dense, *sparse = graphed_ms([lambda call=call: call(inputs) for call in calls])  # type: ignore[misc]
    best = min(zip(sparse, candidates, strict=True))
    return best[1], dense, best[0]


def _layer(dense: nn.Linear, backend: str, algorithm: int, transposed: bool) -> SemiStructuredLinear:
    with torch.device("meta"):
        layer = SemiStructuredLinear(dense.in_features, dense.out_features, bias=dense.bias is not None)
    weight = compress(dense.weight, backend, algorithm=algorithm, transposed_output=transposed)
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), dense.bias
    layer.row_major = transposed
    return layer.train(dense.training)
