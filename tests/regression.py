"""A task without images for the training loops: the answers of a random linear map, eight steps an epoch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskllm4v.checkpoints.third_party import dense_state
from maskllm4v.config import LearningSettings
from maskllm4v.sparsity.calibration import Calibration
from maskllm4v.sparsity.masks import Mask
from maskllm4v.sparsity.parameters import learnable_masks
from maskllm4v.sparsity.surgery import make_learnable
from maskllm4v.training.mask_learning import CURVE_COLUMNS, MaskResult, learn_masks
from maskllm4v.utils.sharding import WHOLE, BatchShard

NAMES = ("0", "2")  # of the model's linear layers
STEPS_PER_EPOCH = 8
Batch = tuple[Tensor, Tensor]


class Regression:
    """Random features and the answers of a random linear map; remembers what it was asked.

    Args:
        bad_at: the step whose loss is ``bad``, or has a gradient that is not finite (``bad=None``).
        scores: what :meth:`evaluate` gives, one call after the other.
    """

    data_digest = ""

    def __init__(
        self,
        *,
        bad_at: int | None = None,
        bad: float | None = math.nan,
        dtype: torch.dtype = torch.float32,
        scores: tuple[float, ...] = (),
    ) -> None:
        self.map = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.bad_at, self.bad, self.dtype = bad_at, bad, dtype
        self.size = 8  # pixels, if these were images
        self.scores = iter(scores)
        self.steps_taken = self.losses = 0
        self.sizes: list[int] = []
        self.modes: list[list[bool]] = []
        self.teachers: list[tuple[Tensor, Tensor, Tensor, float]] = []
        self.asked: list[tuple[str | None, dict[str, Tensor]]] = []
        self.last: Any = None

    def build_model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).to(self.dtype).eval()

    def read_weights(self, path: Path) -> Mapping[str, Tensor]:
        return dense_state(path)

    def train_batches(
        self, *, seed: int, batch_size: int, steps: int, start: int = 0, shard: BatchShard = WHOLE
    ) -> Iterator[Batch]:
        for step in range(start, steps):
            self.steps_taken = step
            features = torch.randn(batch_size, 16, generator=torch.Generator().manual_seed(1000 * seed + step))
            parts = features.to(self.dtype).chunk(shard.count)
            for part in shard.parts:
                self.sizes.append(self.size)
                yield parts[part], parts[part] @ self.map

    def steps_per_epoch(self, batch_size: int) -> int:
        return STEPS_PER_EPOCH

    def resized(self, size: int) -> Regression:
        other = copy.copy(self)  # its lists are this task's
        other.size = size
        return other

    def calibration(self, batch_size: int, seed: int) -> list[Calibration]:
        return [Calibration(self.train_batches(seed=99, batch_size=batch_size, steps=2), self.forward)]

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        self.modes.append([m.training for m in model.modules() if not isinstance(m, Mask)])
        self.last = batch
        outputs: Tensor = model(batch[0])
        return outputs

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        self.losses += 1
        value = F.mse_loss(outputs, batch[1])
        if self.steps_taken != self.bad_at:
            return value
        return value + (0 * outputs.sum()).sqrt() if self.bad is None else value * self.bad

    def distillation_loss(self, outputs: Tensor, teacher: Tensor, temperature: float, batch: Any) -> Tensor:
        assert batch is self.last
        self.teachers.append((batch[0], outputs.detach().clone(), teacher.clone(), temperature))
        return F.mse_loss(outputs, teacher) * temperature

    def evaluate(self, model: nn.Module, dense: nn.Module | None = None, split: str | None = None) -> dict[str, float]:
        model.eval()
        self.asked.append((split, logits(model)))
        return {"top1": next(self.scores)}

    def score(self, model: nn.Module, split: str) -> float:
        return self.evaluate(model, split=split)["top1"]

    def summary(self, model: nn.Module, metrics: dict[str, float], extra_parameters: int) -> dict[str, Any]:
        return {}


class Noisy(nn.Sequential):
    """With dropout, which draws from torch's own generator."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 4))


class Normalised(nn.Sequential):
    """With batch norm, whose running statistics are not those of any batch."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        with torch.no_grad():
            self[1].running_mean.normal_()
            self[1].running_var.uniform_(0.5, 2)

    def statistics(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self[1].buffers()]


def settings(**changes: Any) -> LearningSettings:
    return LearningSettings(**{"steps": 12, "batch_size": 32, "lr": 0.05, "min_lr": 0.01, "log_every": 5, **changes})


def priors() -> dict[str, Tensor]:
    """The first two of every four: not what the magnitudes say."""
    first = torch.tensor([True, True, False, False])
    return {"0": first.repeat(8, 4), "2": first.repeat(4, 2)}


def learnable(model: nn.Module | None = None, *, seed: int = 0, init: Any = "prior", **options: Any) -> nn.Module:
    """The task's model with learnable masks that start at :func:`priors`."""
    model = Regression().build_model(0) if model is None else model
    return make_learnable(model, priors(), pattern="2:4", init=init, seed=seed, **options)


def logits(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.logits.detach().clone() for name, layer in learnable_masks(model).items()}


def column(learned: MaskResult, name: str) -> list[float]:
    return [point[CURVE_COLUMNS.index(name)] for point in learned.curve]


def trained(task: Regression | None = None, *, seed: int = 0, **changes: Any) -> tuple[nn.Module, MaskResult]:
    model = learnable(seed=seed)
    return model, learn_masks(model, task or Regression(), settings(**changes), seed=seed)


def same_curves(found: MaskResult, wanted: MaskResult) -> None:
    """Equal but for Σ(masked weight)², which is summed in another order where layers draw their masks one by one."""
    energy = CURVE_COLUMNS.index("kept_energy")
    assert len(found.curve) == len(wanted.curve)
    for point, other in zip(found.curve, wanted.curve, strict=True):
        assert point[:energy] == other[:energy]
        assert point[energy + 1 :] == other[energy + 1 :]
        assert math.isclose(point[energy], other[energy], rel_tol=8 * 2.0**-24)
