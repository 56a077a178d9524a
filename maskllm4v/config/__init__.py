"""``params.yaml`` as frozen, validated objects; an unknown or mistyped key is an error that names it.

The sections that are a task's own stand in its folder, ``maskllm4v/tasks/<task>/settings.py``
(:mod:`maskllm4v.config.tasks`).

The file describes one experiment, which makes one table. Its sections, in the order of the pipeline:
``data`` → ``model`` → ``dense`` → ``priors`` → ``learning``, ``learned``, ``updated`` and ``finetuned`` →
``evaluation`` → ``rows`` (the table) → ``exports``.
"""

from maskllm4v.config.base import Settings
from maskllm4v.config.experiment import Experiment
from maskllm4v.config.reading import PARAMS, load_experiment, parse_experiment, parse_section
from maskllm4v.config.rows import DenseRow, FinetunedRow, Kind, LearnedRow, OneShotRow, Row, UpdatedRow
from maskllm4v.config.sections import (
    AugmentationSettings,
    DataSettings,
    DenseSettings,
    ExportSettings,
    FinetunedSettings,
    JointAugmentationSettings,
    LearnedSettings,
    LearningSettings,
    ModelSettings,
    PriorSettings,
    RuntimeSettings,
    SceneSettings,
    TaskSettings,
    TrainingSettings,
    UpdatedSettings,
    UpdateSettings,
)
from maskllm4v.config.tasks import TaskSpec

__all__ = [
    "PARAMS",
    "AugmentationSettings",
    "DataSettings",
    "DenseRow",
    "DenseSettings",
    "Experiment",
    "ExportSettings",
    "FinetunedRow",
    "FinetunedSettings",
    "JointAugmentationSettings",
    "Kind",
    "LearnedRow",
    "LearnedSettings",
    "LearningSettings",
    "ModelSettings",
    "OneShotRow",
    "PriorSettings",
    "Row",
    "RuntimeSettings",
    "SceneSettings",
    "Settings",
    "TaskSettings",
    "TaskSpec",
    "TrainingSettings",
    "UpdateSettings",
    "UpdatedRow",
    "UpdatedSettings",
    "load_experiment",
    "parse_experiment",
    "parse_section",
]
