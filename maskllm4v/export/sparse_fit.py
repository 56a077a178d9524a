"""What keeps a layer from a semi-structured weight: the GPU, the weight's pattern, its type, its shape."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maskllm4v.sparsity.layers import Masked
from maskllm4v.utils.errors import ConfigError

BACKENDS = {  # in order of preference
    "cusparselt": "SparseSemiStructuredTensorCUSPARSELT",
    "cutlass": "SparseSemiStructuredTensorCUTLASS",
}
DTYPES = (torch.float16, torch.bfloat16)  # torch takes 8 bits too, and float32, but that as 1:2


def pick_backend(asked: str | None, device: torch.device | None) -> tuple[str | None, str]:
    """The backend to use, or None and why there is none.

    Args:
        asked: a name of :data:`BACKENDS`; None: the first that works.
        device: the model's GPU; None: the current one.

    Raises:
        ConfigError: the one asked for is unknown or cannot work.
    """
    if asked is not None and asked not in BACKENDS:
        raise ConfigError(f"backend is {asked!r}; allowed: {', '.join(map(repr, BACKENDS))}")
    found = capability(device)
    if found is None:
        obstacles = dict.fromkeys(BACKENDS, "torch finds no CUDA device here")
    else:
        here = ".".join(map(str, found))
        obstacles = {  # CUTLASS: torch says so, but only at the first product
            "cusparselt": f"2:4 needs compute capability 8.0, this GPU has {here}" if found < (8, 0) else "",
            "cutlass": f"torch's CUTLASS needs compute capability 8.x, this GPU has {here}" if found[0] != 8 else "",
        }
        if not torch.backends.cusparselt.is_available():
            obstacles["cusparselt"] = "torch was built without cuSPARSELt"
    if asked is not None:
        if obstacles[asked]:
            raise ConfigError(f"backend is {asked!r}, but {obstacles[asked]}")
        return asked, ""
    works = next((name for name, obstacle in obstacles.items() if not obstacle), None)
    return works, "" if works else "; ".join(dict.fromkeys(obstacles.values()))


def capability(device: torch.device | None) -> tuple[int, int] | None:
    """The GPU's compute capability; None if there is no GPU."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def on_gpu(weight: Tensor) -> bool:
    return weight.is_cuda


def layer_incompatibility(layer: nn.Linear, backend: str | None, why: str = "") -> str:
    """Why a layer's weight cannot be semi-structured, or nothing; ``why`` there is no backend."""
    if isinstance(layer, Masked):
        return "its mask is not folded yet: call fold_ first"
    if type(layer) is not nn.Linear:
        return f"it is a {type(layer).__name__}, which may be read instead of called"
    weight = layer.weight.detach()
    if reason := weight_incompatibility(weight):
        return reason
    if weight.dtype not in DTYPES:
        return f"its weight is {_short(weight.dtype)}, not float16 or bfloat16"
    if not on_gpu(weight):
        return f"its weight is on {weight.device}, not on a GPU"
    if backend is None:
        return why
    least = getattr(torch.sparse, BACKENDS[backend])._DTYPE_SHAPE_CONSTRAINTS[weight.dtype]
    if weight.shape[0] % least.sparse_min_rows or weight.shape[1] % least.sparse_min_cols:
        return f"{backend} needs multiples of {least.sparse_min_rows} outputs and {least.sparse_min_cols} inputs"
    return ""


def weight_incompatibility(weight: Tensor) -> str:
    """The first group of a weight ``[out, in]`` that keeps more than two of four, in words; or nothing."""
    if weight.shape[1] % 4:
        return f"its {weight.shape[1]} inputs are no multiple of 4"
    kept = (weight != 0).reshape(len(weight), -1, 4).sum(2)
    wrong = (kept > 2).flatten()
    if not bool(wrong.any()):
        return ""
    row, group = divmod(int(wrong.int().argmax()), kept.shape[1])
    return f"not 2:4: row {row} keeps {int(kept[row, group])} of inputs {4 * group} to {4 * group + 3}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
