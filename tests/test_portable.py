"""Operations that an exact process replaces or refuses: what they compute, in every form that PyTorch has of them."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maskllm4v.utils.determinism import portable
from maskllm4v.utils.errors import ExactnessError


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    portable.install()
    yield
    portable.uninstall()


def close(found: Tensor, exact: Tensor, terms: int) -> None:
    """To the rounding of a sum of so many products of normal numbers."""
    assert found.dtype is torch.float32
    assert found.shape == exact.shape
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2.0**-23 * 8 * max(terms, 1))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "rows apart": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[..., :1, :].expand_as(x),
    "offset": lambda x: torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape),
}
SHAPES = [(1, 1, 1), (1, 32, 96), (64, 32, 1), (3, 5, 2), (37, 19, 23), (128, 96, 64), (4, 0, 3), (0, 3, 4), (3, 4, 0)]


@pytest.mark.parametrize("layout", list(itertools.product(LAYOUTS, LAYOUTS)), ids="-".join)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[int, int, int], layout: tuple[str, str]) -> None:
    m, k, n = shape
    for batch in ((), (3,)):
        if "expanded" in layout and 0 in (m, k):
            continue
        a, b = LAYOUTS[layout[0]](torch.randn(*batch, m, k)), LAYOUTS[layout[1]](torch.randn(*batch, k, n))
        before = a.clone(), b.clone()
        close(a @ b, a.double() @ b.double(), k)
        assert torch.equal(a, before[0])
        assert torch.equal(b, before[1])


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0, 1), (1, -1), (0.5, 2.0)])
@pytest.mark.parametrize("batched", [False, True])
def test_products_that_are_added(batched: bool, beta: float, alpha: float) -> None:
    batch = (3,) if batched else ()
    name = "baddbmm" if batched else "addmm"
    a, b, c = torch.randn(*batch, 5, 7), torch.randn(*batch, 7, 4), torch.randn(*batch, 5, 4)
    how = {"beta": beta, "alpha": alpha}
    exact = beta * c.double() + alpha * (a.double() @ b.double())
    close(getattr(torch, name)(c, a, b, **how), exact, 7)
    into = torch.empty(0)
    assert getattr(torch, name)(c, a, b, **how, out=into) is into
    close(into, exact, 7)
    held = torch.cat([c, c], -1)[..., :4]  # rows apart: a part of something larger
    assert getattr(held, f"{name}_")(a, b, **how) is held
    close(held, exact, 7)
    with_row = getattr(torch, name)(c[..., :1, :], a, b, **how)
    close(with_row, beta * c[..., :1, :].double() + alpha * (a.double() @ b.double()), 7)
    if beta == 0:
        assert getattr(torch, name)(c * torch.nan, a, b, **how).isfinite().all()


def test_products_into_what_is_there() -> None:
    a, b = torch.randn(5, 7), torch.randn(7, 4)
    into = torch.empty(4, 5).t()
    assert torch.mm(a, b, out=into) is into
    close(into, a.double() @ b.double(), 7)
    into = torch.empty(0)
    torch.bmm(a[None], b[None], out=into)
    close(into, (a.double() @ b.double())[None], 7)


def test_square_of_a_matrix_is_symmetric() -> None:
    for rows, width in ((700, 33), (50, 128), (5, 3)):
        x = torch.randn(rows, width) + 0.3
        square = x.t() @ x
        assert torch.equal(square, square.t())


def test_gradients_pass_through() -> None:
    x, w, b = (torch.randn(*shape, requires_grad=True) for shape in ((6, 5, 8), (7, 8), (7,)))
    F.linear(x, w, b).square().sum().sqrt().backward()
    found = [t.grad.double() for t in (x, w, b)]
    exact = [t.detach().double().requires_grad_() for t in (x, w, b)]
    F.linear(*exact).square().sum().sqrt().backward()
    for a, other in zip(found, exact, strict=True):
        torch.testing.assert_close(a, other.grad, rtol=1e-4, atol=1e-5)


def test_other_kinds_of_numbers_keep_torchs_kernels() -> None:
    a, b = torch.randn(4, 5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    whole = [a @ b, a.bfloat16() @ b.bfloat16(), a.long() @ b.long(), torch.complex(a, a) @ torch.complex(b, b)]
    roots = [torch.complex(a, a).sqrt(), a.bfloat16().abs().sqrt(), torch.tensor([4, 9]).sqrt()]
    factor = torch.linalg.cholesky_ex(a @ a.t())[0]
    portable.uninstall()
    assert all(map(torch.equal, whole, [a @ b, a.bfloat16() @ b.bfloat16(), a.long() @ b.long(),
                                        torch.complex(a, a) @ torch.complex(b, b)]))  # fmt: skip
    assert all(map(torch.equal, roots, [torch.complex(a, a).sqrt(), a.bfloat16().abs().sqrt(),
                                        torch.tensor([4, 9]).sqrt()]))  # fmt: skip
    assert torch.equal(factor, torch.linalg.cholesky_ex(a @ a.t())[0])


# Square roots


def rooted(x: Tensor) -> Iterator[Tensor]:
    """Every way to a square root, of values that may be overwritten."""
    yield torch.sqrt(x)
    yield x.clone().sqrt_()
    yield torch.sqrt(x, out=torch.empty(0, dtype=x.dtype))
    yield x**0.5
    yield x.clone().pow_(0.5)
    yield torch.pow(x, 0.5, out=torch.empty_like(x))
    yield torch._foreach_sqrt([x])[0]
    yield x[None].t().sqrt().t()[0]
    yield torch.stack([x, x], 1)[:, 1].sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_square_roots_are_correctly_rounded(dtype: torch.dtype) -> None:
    x = torch.cat([torch.rand(3000).exp() - 1, torch.tensor([0.0, -0.0, torch.inf, 4.0, 2.0**-140])]).to(dtype)
    # The C library's of a double is correctly rounded, and so is what it gives to half of the digits.
    exact = torch.tensor([math.sqrt(value) for value in x.tolist()], dtype=torch.float64).to(dtype)
    for found in rooted(x):
        assert found.dtype is dtype
        assert torch.equal(found, exact)


def test_roots_of_negative_numbers_are_no_warning() -> None:
    for found in rooted(torch.tensor([-1.0, torch.nan])):
        assert found.isnan().all()


def test_distances_use_the_root() -> None:
    x = torch.randn(40, 6)
    exact = (x.double()[:, None] - x.double()).square().sum(-1).sqrt()
    torch.testing.assert_close(torch.cdist(x, x).double(), exact, rtol=1e-4, atol=2e-3)


# Cholesky factors


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (16, 16), (40, 40), (7, 12, 12)], ids=str)
def test_factors_are_those_of_float64(shape: tuple[int, ...], upper: bool) -> None:
    x = torch.randn(*shape[:-1], 3 * shape[-1])
    h = (x @ x.transpose(-1, -2)).contiguous()
    exact = torch.linalg.cholesky(h.double(), upper=upper).float()
    factor, info = torch.linalg.cholesky_ex(h, upper=upper)
    assert torch.equal(factor, exact)
    assert not info.any()
    into = torch.empty(0), torch.empty(0, dtype=torch.int32)
    torch.linalg.cholesky_ex(h, upper=upper, out=into)
    assert torch.equal(into[0], exact)
    assert torch.equal(torch.linalg.cholesky(h, upper=upper), exact)


def test_missing_factors_are_told() -> None:
    h = torch.stack([torch.eye(4), torch.diag(torch.tensor([1.0, 1.0, -1.0, 1.0]))])
    assert torch.linalg.cholesky_ex(h)[1].tolist() == [0, 3]
    with pytest.raises(torch.linalg.LinAlgError, match="not positive-definite"):
        torch.linalg.cholesky(h)


# What is refused, and the process


REFUSED = [
    *itertools.product(("acos", "asin", "atan", "tan", "log2", "log10"), (torch.float32, torch.float64)),
    ("log", torch.float64),
]


@pytest.mark.parametrize(("name", "dtype"), REFUSED)
def test_refused_operations_are_named(name: str, dtype: torch.dtype) -> None:
    x = torch.rand(3, dtype=dtype)
    forms: list[Callable[[], Any]] = [
        lambda: getattr(torch, name)(x),
        lambda: getattr(x.clone(), f"{name}_")(),
        lambda: getattr(torch, name)(x, out=torch.empty_like(x)),
    ]
    kind = str(dtype).removeprefix("torch.")
    for form in forms:
        with pytest.raises(ExactnessError, match=rf"^{name} of {kind} has other bits.*; use "):
            form()
    getattr(torch, name)(torch.complex(x, x))


def test_refusals_name_what_uses_the_operation() -> None:
    with pytest.raises(ExactnessError, match=r"^log of float64"):
        torch.rand(3, 4, dtype=torch.float64).logsumexp(1)
    torch.rand(3, 4).logsumexp(1)


def test_installed_once_and_taken_back() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        portable.install()
    portable.uninstall()
    portable.uninstall()
    assert torch.rand(3).tan().isfinite().all()


def test_an_old_torch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    portable.uninstall()
    monkeypatch.delattr(torch.library, "get_kernel")
    with pytest.raises(ExactnessError, match="cannot replace operations"):
        portable.install()
