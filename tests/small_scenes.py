"""Experiments on scenes of digits that are as small as can be, and their tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from maskllm4v.config import Experiment, parse_experiment
from maskllm4v.tasks.base import Task, open_task

Kind = Literal["segmentation", "detection"]
ARGS = {
    **{"img_size": 32, "patch_size": 8, "in_chans": 1, "num_classes": 0, "embed_dim": 16, "depth": 1, "num_heads": 2},
    **{"class_token": False, "global_pool": "", "use_rot_pos_emb": True, "use_abs_pos_emb": False},
}
MODELS: dict[str, dict[str, Any]] = {"segmentation": {"classes": 11}, "detection": {"classes": 10}}
TASKS: dict[str, dict[str, Any]] = {"segmentation": {"border": 1}, "detection": {"sizes": [10.4, 11.9]}}


def raw(kind: Kind, **sections: Any) -> dict[str, Any]:
    """Params; sections that are given take the place of others."""
    return {
        "table": "small",
        "title": "Small",
        "exact": True,
        "seeds": [0],
        "data": {
            **{"name": "scenes", "source": "scenes", "split_seed": 1, "calibration": 6},
            "scenes": {"train": 24, "test": 13},
        },
        "task": {"name": kind, "eval_batch_size": 5, "pictured": 3, **TASKS[kind]},
        "model": {"name": "Eva", "args": ARGS, "stride": 8, "fused_attention": False, **MODELS[kind]},
        "dense": {"row": "small-dense", "init": "scratch", "steps": 4, "batch_size": 8, "lr": 0.01},
        "rows": {"small-dense": "dense"},
        "runtime": {"device": "cpu"},
        **sections,
    }


def experiment(kind: Kind, **sections: Any) -> Experiment:
    return parse_experiment(raw(kind, **sections))


def open_small(kind: Kind, folder: Path, **sections: Any) -> Task:
    """The task on scenes that :func:`maskllm4v.data.prepare` has put into a folder."""
    return open_task(experiment(kind, **sections).task_spec(), folder)
