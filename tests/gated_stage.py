"""``python gated_stage.py STAGE ROW STEP``: a stage whose trainings wait after a step until a file ``go`` is there."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskllm4v.training.finetuning import WeightLearner
from maskllm4v.training.mask_learning import MaskLearner
from stages import entry


def gated(log: Callable[..., None], gate: int) -> Callable[..., None]:
    def wrapper(learner: Any, step: int, *arguments: Any) -> None:
        parent = os.getppid()
        # Before a point is taken, so that the one before is in its file.
        while step >= gate and not Path("go").exists() and os.getppid() == parent:
            time.sleep(0.01)
        log(learner, step, *arguments)

    return wrapper


if __name__ == "__main__":
    stage, row, step = sys.argv[1:]
    for learner in (MaskLearner, WeightLearner):
        learner.log = gated(learner.log, int(step))  # type: ignore[attr-defined]
    sys.argv[1:] = [row]
    entry.run(stage, importlib.import_module(f"stages.{stage}").main)
