"""Operations on the CPU that give the same bits whoever made it, in place of those of MKL's that do not.

Under the pin (:mod:`maskllm4v.utils.determinism`) MKL's matrix products agree on all CPUs, at a third of their speed.
Its square roots and its float32 Cholesky factors of up to 16 rows do not: they start from the processor's own
approximation of 1/√x, which Intel and AMD compute differently. An exact process replaces both kinds, below autograd:

* float32 products by NumPy's OpenBLAS, which the pin holds to one set of kernels: about twice as fast;
* square roots by NumPy's, which are the processor's and correctly rounded (IEEE 754);
* float32 Cholesky factors by those of float64, rounded. LAPACK's in float64 approximates nothing, and it is as fast for
  matrices this small; a factorisation of our own in fixed order would be as exact, and one more thing to trust.

Where nothing replaces an operation that is known to differ it is refused (:data:`REFUSED`): an error that names it, not
a table that is exact here only. About 8,000 results of torch's operations were compared between an AMD Zen 4 and QEMU's
Haswell and EPYC, which compute approximations exactly; what is in neither list agreed. `python -m scripts.emulate`
shows whether a new task's stages do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskllm4v.utils.errors import ExactnessError

_FLOAT, _DOUBLE = torch.float32, torch.float64
# Operations of aten whose last bit differs at some values of these dtypes, and what to use instead.
REFUSED: dict[str, tuple[tuple[torch.dtype, ...], str]] = {
    "acos": ((_FLOAT, _DOUBLE), "use atan2"),
    "asin": ((_FLOAT, _DOUBLE), "use atan2"),
    "atan": ((_FLOAT, _DOUBLE), "use atan2"),
    "tan": ((_FLOAT, _DOUBLE), "use sin and cos"),
    "log": ((_DOUBLE,), "use float32 or log1p"),
    "log10": ((_FLOAT, _DOUBLE), "use log in float32"),
    "log2": ((_FLOAT, _DOUBLE), "use log in float32"),
}

_library: torch.library.Library | None = None  # of this process; registrations end with it


def install() -> None:
    """Replace the operations in this process, for all threads, until :func:`uninstall`.

    Raises:
        ExactnessError: torch is too old to say which kernels it has.
    """
    global _library
    if _library is not None:
        return
    if not hasattr(torch.library, "get_kernel"):
        raise ExactnessError(f"torch {torch.__version__} cannot replace operations; exact runs need 2.10 or newer")
    _library = torch.library.Library("aten", "IMPL")
    for name, replacement in {**_PRODUCTS, **_FACTORS}.items():
        _replace(name, replacement, lambda x, *_: x.dtype is _FLOAT)
    for name, replacement in _ROOTS.items():
        _replace(name, replacement, lambda x, *_: x.dtype in _REAL)
    for name, replacement in _POWERS.items():  # torch takes the square root, past the replacement above
        _replace(name, replacement, lambda x, exponent, *_: x.dtype in _REAL and exponent == 0.5)
    for name, (dtypes, instead) in REFUSED.items():
        for form in (name, f"{name}_", f"{name}.out"):
            _replace(form, _refusal(name, instead), lambda x, *_, dtypes=dtypes: x.dtype in dtypes)


def uninstall() -> None:
    """Take the replacements back."""
    global _library
    if _library is not None:
        _library._destroy()
        _library = None


_REAL = (torch.float16, _FLOAT, _DOUBLE)


def _replace(name: str, replacement: Callable[..., Any], applies: Callable[..., bool]) -> None:
    """Register a replacement for what it applies to; for all else torch's own kernel stays."""
    kernel = torch.library.get_kernel(f"aten::{name}", "CPU")

    def run(keys: Any, *args: Any, **kwargs: Any) -> Any:
        return replacement(*args, **kwargs) if applies(*args) else kernel.call_boxed(keys, *args, **kwargs)

    assert _library is not None
    _library.impl(name, run, "CPU", with_keyset=True, allow_override=True)


def _array(x: Tensor) -> np.ndarray:
    """The same memory; a copy where BLAS could not read it, for NumPy's own loops are slow."""
    rows, columns = x.stride()[-2:]
    if not (rows == 1 or columns == 1) or rows == 0 or columns == 0:
        x = x.contiguous()
    return x.detach().numpy()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of matrices, or of batches of matrices."""
    out = torch.empty((*a.shape[:-1], b.shape[-1]), dtype=torch.float32)
    with np.errstate(all="ignore"):  # trainings look for numbers that are not finite themselves
        np.matmul(_array(a), _array(b), out=out.numpy())
    return out


def _product_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return out.resize_((*a.shape[:-1], b.shape[-1])).copy_(_product(a, b))


def _added(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """β·c + α·(a @ b); c is not looked at where β is 0."""
    out = _product(a, b)
    if alpha != 1:
        out.mul_(alpha)
    return out if beta == 0 else out.add_(c, alpha=beta)


def _added_to(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return c.copy_(_added(c, a, b, beta=beta, alpha=alpha))


def _added_out(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor) -> Tensor:
    return out.resize_((*a.shape[:-1], b.shape[-1])).copy_(_added(c, a, b, beta=beta, alpha=alpha))


def _root(x: Tensor) -> Tensor:
    return _root_out(x, out=torch.empty_like(x))


def _root_out(x: Tensor, *, out: Tensor) -> Tensor:
    out.resize_(x.shape)
    with np.errstate(all="ignore"):
        np.sqrt(x.detach().numpy(), out=out.detach().numpy())
    return out


def _factor(x: Tensor, *, upper: bool = False, check_errors: bool = False) -> tuple[Tensor, Tensor]:
    factor, info = torch.linalg.cholesky_ex(x.double(), upper=upper, check_errors=check_errors)
    return factor.float(), info


def _factor_out(
    x: Tensor, *, upper: bool = False, check_errors: bool = False, L: Tensor, info: Tensor
) -> tuple[Tensor, Tensor]:
    factor, found = _factor(x, upper=upper, check_errors=check_errors)
    return L.resize_(factor.shape).copy_(factor), info.resize_(found.shape).copy_(found)


_PRODUCTS: dict[str, Callable[..., Any]] = {
    "mm": _product,
    "mm.out": _product_out,
    "bmm": _product,
    "bmm.out": _product_out,
    "addmm": _added,
    "addmm_": _added_to,
    "addmm.out": _added_out,
    "baddbmm": _added,
    "baddbmm_": _added_to,
    "baddbmm.out": _added_out,
}
_ROOTS: dict[str, Callable[..., Any]] = {
    "sqrt": _root,
    "sqrt_": lambda x: _root_out(x, out=x),
    "sqrt.out": _root_out,
}
_POWERS: dict[str, Callable[..., Any]] = {
    "pow.Tensor_Scalar": lambda x, _: _root(x),
    "pow_.Scalar": lambda x, _: _root_out(x, out=x),
    "pow.Tensor_Scalar_out": lambda x, _, *, out: _root_out(x, out=out),
}
_FACTORS: dict[str, Callable[..., Any]] = {"linalg_cholesky_ex": _factor, "linalg_cholesky_ex.L": _factor_out}


def _refusal(name: str, instead: str) -> Callable[..., Any]:
    def refuse(x: Tensor, *_: Any, **__: Any) -> Any:
        kind = str(x.dtype).removeprefix("torch.")
        raise ExactnessError(
            f"{name} of {kind} has other bits on other makers' CPUs, so exact runs refuse it; {instead}"
        )

    return refuse
