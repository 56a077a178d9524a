"""Precision of a step: half-precision outputs, and fp16's scaled gradients, tried on CPUs, which autocast to it too."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from regression import Regression, column, learnable, logits, settings, trained
from torch import Tensor, nn

from maskllm4v.config import TrainingSettings
from maskllm4v.training import engine
from maskllm4v.training.engine import Engine, check_precision, mixed_precision
from maskllm4v.training.mask_learning import MaskLearner
from maskllm4v.training.optim import LearningRate
from maskllm4v.training.resume import Resume
from maskllm4v.training.trainer import run
from maskllm4v.utils.errors import ConfigError, TrainingError

CPU = torch.device("cpu")
Pair = namedtuple("Pair", ["prediction", "count"])


class Giving(nn.Module):
    """Gives its layer's outputs in some structure."""

    def __init__(self, structure: Any) -> None:
        super().__init__()
        self.layer, self.structure, self.inside = nn.Linear(4, 2), structure, torch.float32

    def forward(self, x: Tensor, *, count: int = 0) -> Any:
        outputs = self.layer(x)
        self.inside = outputs.dtype
        return self.structure(outputs, torch.tensor(count))


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize(
    "structure",
    [
        lambda outputs, count: (outputs, count),
        lambda outputs, count: [outputs, count],
        lambda outputs, count: Pair(outputs, count),
        lambda outputs, count: {"prediction": outputs, "count": count},
        lambda outputs, count: (outputs, {"deep": (count,)}),
    ],
)
def test_outputs_are_float32_whatever_holds_them(structure: Any, amp: str, dtype: torch.dtype) -> None:
    model = Giving(structure)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        wanted = model.layer(torch.ones(3, 4))
    found = mixed_precision(model, CPU, amp)(torch.ones(3, 4), count=7)
    assert model.inside == wanted.dtype == dtype
    assert type(found) is type(structure(wanted, 7))
    first, second = found.values() if isinstance(found, dict) else found
    assert first.dtype == torch.float32
    assert torch.equal(first, wanted.float())
    count = second["deep"][0] if isinstance(second, dict) else second
    assert (count.dtype, int(count)) == (torch.int64, 7)


def test_full_precision_needs_no_wrapper() -> None:
    model = nn.Linear(4, 2)
    assert mixed_precision(model, CPU, "no") is model


def test_old_gpus_refuse_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    for supported in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda answer=supported: answer)
        check_precision("fp16", gpu)
        if supported:
            check_precision("bf16", gpu)
    with pytest.raises(ConfigError, match="amp is 'bf16', which this GPU does not compute in; allowed there: 'no'"):
        check_precision("bf16", gpu)


def test_groups_keep_their_ratios() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.02}], lr=0.2)
    run_settings = TrainingSettings(steps=10, lr=0.2, min_lr=0.1, warmup=0.2)
    rate = LearningRate(optimizer, run_settings, 10)
    for step, done, wanted in ((0, 0.0, 0.1), (1, 0.0, 0.2), (5, 0.5, 0.15), (9, 1.0, 0.1)):
        assert rate.set(step, done) == pytest.approx(wanted, abs=1e-12)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([wanted, wanted / 10], abs=1e-12)


# Scaled gradients


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs autocast to fp16, if slowly."""
    monkeypatch.setattr(engine, "check_precision", lambda amp, device: None)


class Stepping(MaskLearner):
    """Keeps the logits of every step, and may be killed in one."""

    def __init__(self, model: nn.Module, task: Regression, killed_at: int | None = None, **changes: Any) -> None:
        self.run_settings, self.killed_at = settings(amp="fp16", **changes), killed_at
        self.seen: list[list[Tensor]] = []
        super().__init__(model, task, self.run_settings, prior=None, row="masks", on_point=None)  # type: ignore[arg-type]

    def begin_step(self, step: int, done: float, lr: float) -> None:
        if step == self.killed_at:
            raise KeyboardInterrupt
        super().begin_step(step, done, lr)

    def end_step(self, step: int) -> None:
        super().end_step(step)
        self.seen.append([tensor.detach().clone() for tensor in self.tensors])


def stepped(resume: Resume | None = None, bad_at: int | None = None, **changes: Any) -> Stepping:
    task = Regression(bad_at=bad_at, bad=None)
    learner = Stepping(learnable(), task, **changes)
    run(learner, task, learner.run_settings, seed=0, resume=resume)  # type: ignore[arg-type]
    return learner


def test_fp16_learns_as_float32_does(on_cpu: None) -> None:
    model, learned = trained(amp="fp16", clip_grad=1.0)
    plain, wanted = trained(clip_grad=1.0)
    assert column(learned, "loss") != column(wanted, "loss")
    assert column(learned, "loss") == pytest.approx(column(wanted, "loss"), rel=0.01)
    assert column(learned, "grad_norm") == pytest.approx(column(wanted, "grad_norm"), rel=0.02)  # not scaled
    for name, tensor in logits(plain).items():
        torch.testing.assert_close(logits(model)[name], tensor, rtol=0, atol=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "nadamw"])
def test_a_gradient_that_overflows_skips_its_step_and_halves_the_scale(
    optimizer: str, on_cpu: None, tmp_path: Path
) -> None:
    """A fused optimiser is told so; for others the scaler does not call it."""
    resume = Resume(tmp_path, 0, {}, minutes=0)
    usual = stepped(resume, optimizer=optimizer)
    scale = final(resume)["scaler"]["scale"]
    learner = stepped(resume := Resume(tmp_path / "bad", 0, {}, minutes=0), bad_at=4, optimizer=optimizer)
    assert final(resume)["scaler"]["scale"] == scale / 2
    same = [all(map(torch.equal, *pair)) for pair in zip(learner.seen[:-1], learner.seen[1:], strict=True)]
    assert [step for step, unmoved in enumerate(same, 1) if unmoved] == [4]
    assert all(map(torch.equal, learner.seen[3], usual.seen[3]))
    assert all(tensor.isfinite().all() for tensor in learner.tensors)


def test_a_loss_that_is_not_finite_is_an_error_all_the_same(on_cpu: None) -> None:
    with pytest.raises(TrainingError, match=r"the loss is not finite at step 3$"):
        trained(Regression(bad_at=3), amp="fp16")


def test_an_interrupted_run_goes_on_with_its_scale(on_cpu: None, tmp_path: Path) -> None:
    whole = Resume(tmp_path / "whole", 0, {}, minutes=0)
    expected = stepped(whole, bad_at=2)
    halves = Resume(tmp_path / "halves", 0, {}, minutes=0, steps=3)
    with pytest.raises(KeyboardInterrupt):
        stepped(halves, bad_at=2, killed_at=7)
    assert final(halves)["step"] == 6
    found = stepped(halves, bad_at=2)
    assert len(found.seen) == 12 - 6
    assert all(map(torch.equal, found.seen[-1], expected.seen[-1]))
    assert final(halves)["scaler"] == final(whole)["scaler"]


def final(resume: Resume) -> dict[str, Any]:
    state = resume.load(CPU)
    assert state is not None
    return state


def test_micro_batches_share_a_scale(on_cpu: None) -> None:
    """Gradients of several passes add up before they are unscaled, once."""
    model = nn.Linear(4, 1, bias=False)
    tensors = [model.weight]
    optimizer = torch.optim.SGD(tensors, lr=0.0)
    run_engine = Engine(model, tensors, optimizer, TrainingSettings(steps=1, amp="fp16", clip_grad=0.0))
    x = torch.eye(4)[:3]
    with run_engine.wrapped() as wrapped:
        for row in x:
            with run_engine.micro_step(wrapped, last=False):
                run_engine.backward(wrapped(row).sum() / 4)
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad[0], 2.0**14 * torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert float(run_engine.clip()) == pytest.approx(3**0.5 / 4)
    assert torch.equal(model.weight.grad[0], torch.tensor([0.25, 0.25, 0.25, 0.0]))
    run_engine.step()
    assert model.weight.grad is None
