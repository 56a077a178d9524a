"""``params.yaml`` as frozen, validated objects; an unknown or mistyped key is an error that names it.

The file describes one experiment, which makes one table. Its sections, in the order of the pipeline:
``data`` → ``model`` → ``dense`` → ``priors`` → ``learning``, ``learned``, ``updated`` and ``finetuned`` →
``evaluation`` → ``rows`` (the table) → ``exports``.
"""

from maskllm4v.config.diffusion import (
    DiffusionSettings,
    DiTSettings,
    EvaluationSettings,
    JudgeSettings,
    SamplingSettings,
)
from maskllm4v.config.experiment import Experiment
from maskllm4v.config.reading import PARAMS, load_experiment, parse_experiment
from maskllm4v.config.rows import DenseRow, FinetunedRow, Kind, LearnedRow, OneShotRow, Row, UpdatedRow
from maskllm4v.config.sections import (
    DataSettings,
    DenseSettings,
    ExportSettings,
    FinetunedSettings,
    LearnedSettings,
    LearningSettings,
    ModelSettings,
    PriorSettings,
    RuntimeSettings,
    TaskSettings,
    TrainingSettings,
    UpdatedSettings,
)

__all__ = [
    "PARAMS",
    "DataSettings",
    "DenseRow",
    "DenseSettings",
    "DiTSettings",
    "DiffusionSettings",
    "EvaluationSettings",
    "Experiment",
    "ExportSettings",
    "FinetunedRow",
    "FinetunedSettings",
    "Kind",
    "JudgeSettings",
    "LearnedRow",
    "LearnedSettings",
    "LearningSettings",
    "ModelSettings",
    "OneShotRow",
    "PriorSettings",
    "Row",
    "RuntimeSettings",
    "SamplingSettings",
    "TaskSettings",
    "TrainingSettings",
    "UpdatedRow",
    "UpdatedSettings",
    "load_experiment",
    "parse_experiment",
]
