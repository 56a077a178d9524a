"""Averages over the steps of a run, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from regression import Regression, learnable, logits, settings, trained
from torch import Tensor

from maskllm4v.training.averaging import Average
from maskllm4v.training.mask_learning import learn_masks


def walk(steps: int) -> list[list[Tensor]]:
    """Values of two tensors before and after each step."""
    return [[torch.randn(3, 4), torch.randn(2)] for _ in range(steps + 1)]


@pytest.mark.parametrize("decay", [0.05, 0.5, 0.99, 0.9999])
def test_average_is_the_formula(decay: float) -> None:
    values = walk(40)
    tensors = [value.clone() for value in values[0]]
    average, wanted = Average(tensors, decay), [value.double() for value in values[0]]
    for found in values[1:]:
        for tensor, value in zip(tensors, found, strict=True):
            tensor.copy_(value)
        average.update()
        wanted = [decay * mean + (1 - decay) * value.double() for mean, value in zip(wanted, found, strict=True)]
        for mean, expected in zip(average.values, wanted, strict=True):
            assert torch.allclose(mean.double(), expected, rtol=0, atol=len(values) * torch.finfo(mean.dtype).eps)
    assert all(torch.equal(tensor, value) for tensor, value in zip(tensors, values[-1], strict=True))


def test_swap_exchanges_and_twice_is_as_before() -> None:
    before, after = walk(1)
    tensors = [torch.nn.Parameter(value.clone()) for value in before]
    average = Average(tensors, 0.5)
    with torch.no_grad():
        for tensor, value in zip(tensors, after, strict=True):
            tensor.copy_(value)
    average.swap()
    assert all(torch.equal(tensor, value) for tensor, value in zip(tensors, before, strict=True))
    assert all(torch.equal(value, new) for value, new in zip(average.values, after, strict=True))
    average.swap()
    assert all(torch.equal(tensor, value) for tensor, value in zip(tensors, after, strict=True))
    assert all(torch.equal(value, old) for value, old in zip(average.values, before, strict=True))


def test_switched_off_it_keeps_and_does_nothing() -> None:
    tensors = [torch.ones(3)]
    average = Average(tensors, 0.0)
    average.update()
    average.swap()
    assert average.values == []
    assert torch.equal(tensors[0], torch.ones(3))


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.99])
def test_final_logits_are_the_average(decay: float) -> None:
    model = learnable()
    states = [logits(model)]
    learn_masks(model, Regression(), settings(ema=decay, log_every=1), on_point=lambda _: states.append(logits(model)))
    assert len(states) == 13
    for name, found in logits(model).items():
        average = states[0][name].double()
        for state in states[1:]:
            average = decay * average + (1 - decay) * state[name].double()
        assert torch.allclose(found.double(), average, rtol=0, atol=1e-5)
        assert not torch.allclose(found, states[-1][name], rtol=0, atol=1e-4)


def test_average_does_not_change_the_training() -> None:
    curves = [trained(ema=decay)[1].curve for decay in (0.0, 0.9)]
    assert curves[0] == curves[1]
