"""What is the same whatever is trained: optimisers, precision, checkpointing, bad losses, cost."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from regression import Regression, column, learnable, logits, same_curves, settings, trained
from torch import Tensor, nn

from maskllm4v.config import DenseSettings
from maskllm4v.sparsity.parameters import learnable_masks
from maskllm4v.sparsity.surgery import fold_, make_learnable
from maskllm4v.training.finetuning import train_dense
from maskllm4v.training.mask_learning import MaskResult, learn_masks
from maskllm4v.utils.errors import ConfigError, TrainingError


def dense(**changes: Any) -> DenseSettings:
    return DenseSettings(**{"row": "dense", "init": "scratch", "steps": 60, "batch_size": 32, "lr": 0.02, **changes})


# Optimisers


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_timms_optimiser_by_name_is_that_one(momentum: float) -> None:
    """Plain SGD, and Nesterov's, written out in float64."""
    arguments = {"momentum": momentum, "nesterov": momentum > 0}
    run = dense(optimizer="sgd", optimizer_args=arguments, steps=5, warmup=0.0, weight_decay=0.0, clip_grad=0.0)
    task = Regression(dtype=torch.float64)
    model, reference = task.build_model(0), task.build_model(0)
    train_dense(model, task, run, seed=2)
    weights = list(reference.parameters())
    speeds = [torch.zeros_like(p) for p in weights]
    for step, (x, y) in enumerate(task.train_batches(seed=2, batch_size=32, steps=5)):
        gradients = torch.autograd.grad((reference(x) - y).square().mean(), weights)
        lr = 0.02 * (1 + math.cos(math.pi * step / 4)) / 2
        with torch.no_grad():
            for p, gradient, speed in zip(weights, gradients, speeds, strict=True):
                speed.mul_(momentum).add_(gradient)
                p.sub_(lr * (gradient + momentum * speed))
    for found, wanted in zip(model.parameters(), weights, strict=True):
        assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["muon", "lion", "nadamw"])
def test_masks_are_learned_by_timms_optimisers(optimizer: str) -> None:
    task, model = Regression(), learnable()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learn_masks(model, task, settings(optimizer=optimizer))
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all()
        assert torch.equal(tensor, before[name]) == (not name.endswith("logits")), name


def test_betas_among_the_optimisers_arguments_go_first() -> None:
    usual, given = (
        trained(**changes)[0] for changes in ({"betas": (0.5, 0.6)}, {"optimizer_args": {"betas": [0.5, 0.6]}})
    )
    assert all(torch.equal(tensor, logits(given)[name]) for name, tensor in logits(usual).items())


@pytest.mark.parametrize("arguments", [{"nonsense": 1}, {"eps": -1.0}, {"lr": 0.5}])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bad_arguments_of_an_optimiser(optimizer: str, arguments: dict[str, Any]) -> None:
    task = Regression()
    with pytest.raises(ConfigError, match=f"^optimizer_args do not fit '{optimizer}': "):
        learn_masks(learnable(), task, settings(optimizer=optimizer, optimizer_args=arguments))
    assert not task.modes


def test_unknown_optimiser_is_answered_with_the_known() -> None:
    with pytest.raises(ConfigError, match=r"^optimizer is 'adamv'; allowed: .*adamw.*muon"):
        trained(optimizer="adamv")


# Precision and memory


def test_fp16_is_refused_on_cpus() -> None:
    task = Regression()
    with pytest.raises(ConfigError, match="amp is 'fp16', which CPUs do not train in"):
        trained(task, amp="fp16")
    assert not task.modes


class Watched(Regression):
    """Remembers the types of outputs, and of what the last layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[torch.dtype, torch.dtype]] = set()
        self.inside = torch.float32

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        def note(*args: Any) -> None:
            self.inside = args[2].dtype

        (last,) = [module for name, module in model.named_modules() if name.split(".")[-1] == "2"]
        handle = last.register_forward_hook(note)
        outputs = super().forward(model, batch)
        handle.remove()
        self.seen.add((self.inside, outputs.dtype))
        return outputs


def test_bf16_computes_in_it_and_keeps_masters_in_fp32() -> None:
    task = Watched()
    model, learned = trained(task, amp="bf16", distillation=0.5)
    assert task.seen == {(torch.bfloat16, torch.float32)}
    whole = trained(distillation=0.5)[1]
    assert column(learned, "loss") != column(whole, "loss")
    assert column(learned, "loss") == pytest.approx(column(whole, "loss"), rel=0.05)
    assert {tensor.dtype for tensor in logits(model).values()} == {torch.float32}
    # afterwards the model computes as it did before, and so do its copies
    x = torch.randn(3, 16)
    assert torch.equal(model(x), fold_(copy.deepcopy(model))(x))
    assert model(x).dtype == torch.float32
    assert task.seen == {(torch.bfloat16, torch.float32)}


class Images:
    """Noise to be called what it is not: a task for the tiny ViT."""

    data_digest = ""

    def steps_per_epoch(self, batch_size: int) -> int:
        return 4

    def train_batches(self, *, steps: int, batch_size: int, start: int = 0, **_: Any) -> Any:
        for step in range(start, steps):
            draw = torch.Generator().manual_seed(step)
            yield torch.randn(batch_size, 1, 8, 8, generator=draw), torch.randint(10, (batch_size,), generator=draw)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(outputs.float(), batch[1])

    def distillation_loss(self, outputs: Tensor, teacher: Tensor, temperature: float, batch: Any) -> Tensor:
        return (outputs - teacher).square().mean()


def learned_by_vit(model: nn.Module, **changes: Any) -> tuple[nn.Module, MaskResult]:
    nn.init.normal_(model.head.weight, std=0.1)  # timm starts it at zero
    for block in model.blocks:
        block.mlp.drop1.p = 0.2
    make_learnable(model, None, pattern="2:4", exclude=["head"])
    run = settings(steps=4, batch_size=8, log_every=1, regularisation=0.01, distillation=0.5, **changes)
    return model, learn_masks(model, Images(), run)  # type: ignore[arg-type]


def test_recomputing_activations_gives_the_same_gradients(tiny_vit: nn.Module) -> None:
    other = copy.deepcopy(tiny_vit)
    torch.manual_seed(1)
    kept, curve = learned_by_vit(tiny_vit)
    torch.manual_seed(1)
    recomputed, same = learned_by_vit(other, grad_checkpointing=True)
    same_curves(same, curve)  # gradient norms among its columns
    for name, tensor in logits(kept).items():
        assert torch.equal(logits(recomputed)[name], tensor)
    assert not recomputed.grad_checkpointing


def test_recomputing_ends_with_a_training_that_fails(tiny_vit: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Images, "loss", lambda self, outputs, batch: outputs.sum() * math.nan)
    with pytest.raises(TrainingError):
        learned_by_vit(tiny_vit, grad_checkpointing=True)
    assert not tiny_vit.grad_checkpointing


def test_activations_are_recomputed(tiny_vit: nn.Module) -> None:
    calls = []
    tiny_vit.blocks[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    learned_by_vit(tiny_vit, grad_checkpointing=True)
    assert len(calls) == 4 * 3  # forward, backward, and the teacher's


def test_models_that_cannot_recompute_say_so() -> None:
    with pytest.raises(ConfigError, match="grad_checkpointing is on, but the model has no set_grad_checkpointing"):
        trained(grad_checkpointing=True)


def test_memory_format_of_images_changes_no_result(tiny_convnext: nn.Module) -> None:
    model = make_learnable(tiny_convnext, None, pattern="2:4", exclude=["head*"])
    task = Images()
    task.train_batches = lambda **_: ((torch.randn(2, 3, 64, 64), torch.tensor([1, 2])) for _ in range(2))  # type: ignore[method-assign]
    learn_masks(model, task, settings(steps=2, batch_size=2, channels_last=True))  # type: ignore[arg-type]
    assert model.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(tensor.isfinite().all() for tensor in logits(model).values())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
@pytest.mark.parametrize("changes", [{}, {"distillation": 0.5, "ema": 0.9}, {"accumulate": 2, "amp": "bf16"}])
def test_compiled_models_learn_the_same(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and run as Python: what is tested is that training can be traced, not a compiler."""
    plain, wanted = trained(**changes)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = learnable()
    for layer in learnable_masks(model).values():
        layer.backend = "chunked"  # as plain models take it: another rounds otherwise
    found = learn_masks(model, Regression(), settings(compile=True, **changes))
    same_curves(found, wanted)
    assert all(torch.equal(tensor, logits(plain)[name]) for name, tensor in logits(model).items())


# Losses and gradients that are not finite

BAD = [math.nan, math.inf, -math.inf, None]


def what(bad: float | None) -> str:
    return "gradient" if bad is None else "loss"


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("step", [0, 3, 5, 11])
def test_first_bad_step_is_named(step: int, bad: float | None) -> None:
    with pytest.raises(TrainingError, match=f"^my-row, seed 7: the {what(bad)} is not finite at step {step}$"):
        learn_masks(learnable(), Regression(bad_at=step, bad=bad), settings(), seed=7, row="my-row")


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("step", [0, 7, 50, 59])
def test_diverging_dense_training_names_row_seed_and_step(step: int, bad: float | None) -> None:
    task = Regression(bad_at=step, bad=bad)
    with pytest.raises(TrainingError, match=f"^dense, seed 4: the {what(bad)} is not finite at step {step}$"):
        train_dense(task.build_model(0), task, dense(), seed=4)


def test_run_stops_at_the_next_point() -> None:
    task = Regression(bad_at=3)
    with pytest.raises(TrainingError):
        learn_masks(learnable(), task, settings())
    assert task.steps_taken == 5


def test_one_bad_micro_batch_is_enough() -> None:
    class Once(Regression):
        def loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return super().loss(outputs, batch) * (math.nan if self.losses == 7 else 1.0)

    with pytest.raises(TrainingError, match=r"the loss is not finite at step 1$"):
        learn_masks(learnable(), Once(), settings(accumulate=4))


# Cost


def test_cost_is_that_of_this_process() -> None:
    cost = trained(steps=30)[1].cost
    assert 30 < cost.samples_per_second < 1e7
    assert 2**26 < cost.peak_memory < 2**36


def test_first_step_costs_nothing() -> None:
    """It compiles and warms up; a run of one step therefore has no speed."""
    assert trained(steps=1)[1].cost.samples_per_second == 0


def test_speed_counts_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 104.0])  # after the first step, and at the end
    monkeypatch.setattr("maskllm4v.training.cost.Clock._now", lambda _: next(clock))
    assert trained(steps=11, batch_size=32, accumulate=2)[1].cost.samples_per_second == 10 * 32 / 4


@pytest.mark.parametrize("changes", [{"amp": "bf16"}, {"amp": "bf16", "compile": True}, {}])
def test_model_is_handed_back_as_it_was(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast and compilation are around the model, not in it: a second training starts as the first did."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = learnable()
    before = set(vars(model))
    curves = []
    for _ in range(2):
        start = {name: layer.clone() for name, layer in logits(model).items()}
        curves.append(learn_masks(model, Regression(), settings(**changes), seed=1).curve)
        assert set(vars(model)) == before
        assert model(torch.randn(2, 16)).dtype is torch.float32
        for name, layer in learnable_masks(model).items():
            layer.logits.data.copy_(start[name])
    assert curves[0] == curves[1]
