"""Layers to prune, and the one-shot methods' formulas, written out plainly; in float64 unless said otherwise."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from maskllm4v.oneshot.activations.statistics import Hessian

LAYERS = [(64, 256, "2:4"), (96, 64, "1:4"), (48, 320, "4:8"), (48, 200, "2:8"), (48, 300, "3:6"), (32, 12, "3:6")]
every_layer = pytest.mark.parametrize(("out", "width", "pattern"), LAYERS)


def numbers(pattern: str) -> tuple[int, int]:
    n, m = pattern.split(":")
    return int(n), int(m)


def layer_case(out: int, width: int, rows: int = 1024, dead: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and correlated inputs of uneven sizes, of which ``dead`` are always zero."""
    inputs = torch.randn(rows, width) @ (torch.eye(width) + 0.7 * torch.randn(width, width) / width**0.5)
    inputs *= torch.rand(width) + 0.2
    inputs[:, torch.randperm(width)[:dead]] = 0
    return torch.randn(out, width), inputs


def hessian_of(inputs: Tensor, dtype: torch.dtype = torch.float32) -> Hessian:
    statistic = Hessian(inputs.shape[1], inputs.device)
    statistic.update(inputs)
    statistic.sum_of_products = statistic.sum_of_products.to(dtype)
    return statistic


def keep_best(scores: Tensor, n: int, m: int) -> Tensor:
    groups = scores.reshape(-1, m)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    return mask.scatter_(1, groups.topk(n, 1).indices, True).reshape(scores.shape)


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """The original's ``Hinv`` (upper Cholesky factor of the inverse), and which inputs are dead."""
    h = hessian.double().clone()
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    h.diagonal().add_(damping * h.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True), dead


def sparsegpt_mask(weight: Tensor, hessian: Tensor, n: int, m: int) -> Tensor:
    """Without update: every group by w²/d²."""
    diagonal = inverse_factor(hessian)[0].diagonal()
    return keep_best(weight.double() ** 2 / diagonal**2, n, m)


def sparsegpt_original(weight: Tensor, hessian: Tensor, n: int, m: int, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """``fasterprune`` as published; returns mask and weights."""
    hinv, dead = inverse_factor(hessian, damping)
    return column_loop(weight.double().masked_fill(dead, 0), hinv, n, m)


def column_loop(weight: Tensor, hinv: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """Its loop: blocks of 128 columns, column by column, in the weight's precision; returns mask and weights."""
    w = weight.clone()
    mask = torch.zeros_like(w, dtype=torch.bool)
    # The original lets groups straddle its blocks where M does not divide 128; one block avoids that, and
    # the size of the blocks does not change the result otherwise.
    block_size = 128 if 128 % m == 0 else w.shape[1]
    for i1 in range(0, w.shape[1], block_size):
        i2 = min(i1 + block_size, w.shape[1])
        w1, q1, err1 = w[:, i1:i2].clone(), w.new_zeros(len(w), i2 - i1), w.new_zeros(len(w), i2 - i1)
        hinv1 = hinv[i1:i2, i1:i2]
        for i in range(i2 - i1):
            if i % m == 0:
                scores = w1[:, i : i + m] ** 2 / hinv1.diagonal()[i : i + m] ** 2
                mask[:, i1 + i : i1 + i + m] = keep_best(scores, n, m)
            q = torch.where(mask[:, i1 + i], w1[:, i], 0.0)
            err = (w1[:, i] - q) / hinv1[i, i]
            w1[:, i:] -= err[:, None] @ hinv1[i, i:][None]
            q1[:, i], err1[:, i] = q, err
        w[:, i1:i2] = q1
        w[:, i2:] -= err1 @ hinv[i1:i2, i2:]
    return mask, w


def inputs_of(model: nn.Module, names: Iterable[str], batches: list[Tensor]) -> dict[str, Tensor]:
    """Every row that each layer is fed, ``[rows, in]``, while the whole model runs in float64."""
    model = copy.deepcopy(model).double().eval()
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in rows:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, seen=rows[name]: seen.append(args[0].reshape(-1, module.in_features))
        )
    with torch.no_grad():
        for batch in batches:
            model(batch.double())
    return {name: torch.cat(seen) for name, seen in rows.items()}


def agreement(a: dict[str, Tensor], b: dict[str, Tensor], m: int) -> float:
    """The share of equal groups."""
    assert a.keys() == b.keys()
    same = [(a[name] == b[name]).reshape(-1, m).all(1) for name in a]
    return float(torch.cat(same).double().mean())


def images(channels: int = 1, size: int = 8, count: int = 3, batch: int = 24) -> list[Tensor]:
    return [torch.randn(batch, channels, size, size) for _ in range(count)]


def names_in(model: nn.Module, part: str = "blocks") -> list[str]:
    return [n for n, layer in model.named_modules() if type(layer) is nn.Linear and n.startswith(part)]
