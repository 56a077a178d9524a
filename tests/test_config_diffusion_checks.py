"""Settings of diffusion transformers that do not go together, refused before anything is made; and those that do."""

from __future__ import annotations

from typing import Any

import pytest
from small_diffusion import ARGS
from small_params import at, fault
from small_params import params as classification
from test_config_diffusion import OWN, changed, params

from maskllm4v.config import parse_experiment
from maskllm4v.tasks.diffusion.settings import EvaluationSettings

ONE_STEP = "steps is 1, but DDPM goes from the last timestep to the first: 2 at least"
NO_GRADIENT = "but the variance's channels get no gradient from the noise's error"
ORIGINAL = [207, 360, 387, 974, 88, 979, 417, 279]


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("task.beta_end", 1e-5, "task: beta_end is 1e-05, below beta_start 0.0001"),
        ("evaluation.grid", [3, -1], "evaluation.grid.1 is -1; input should be greater than or equal to 0"),
        ("evaluation.samples", 1, "evaluation: samples is 1, but distances need two at least; 0: none"),
        ("task.judge.training", {"lr": 0.1}, "task.judge: training needs steps or epochs"),
        ("task.judge.task", {"eval_split": "holdout"}, "task.judge: task.eval_split is not the judge's to say, but ta"),
        ("task.eval_split", "holdout", "task.eval_split is 'holdout', which needs data.holdout"),
        ("dense.progressive", {"size": 4, "steps": 2}, "dense.progressive is for task 'classification' only"),
        ("model", {"name": "vit_tiny_patch16_224"}, "allowed for task 'diffusion': DiTTransformer2DModel"),
        ("task", {"name": "classification"}, "allowed for task 'classification': a timm model"),
        ("evaluation", {"steps": 1}, f"evaluation: {ONE_STEP}"),
        ("task.bank", {"steps": 1}, f"task.bank: {ONE_STEP}"),
        ("evaluation.grid", [3, 10, 11], "evaluation.grid: no class 10; the model has 10"),
        ("evaluation.guided_channels", 2, "evaluation.guided_channels is 2; there are 1"),
        ("task.bank.guided_channels", 2, "task.bank.guided_channels is 2; there are 1"),
        ("evaluation.timesteps", 1001, "evaluation.timesteps is 1001, but there are 1000"),
        ("task.train_timesteps", 1, "evaluation.timesteps is 2, but there are 1"),
        ("task.bank.samples", 7, "learned.nodata.batch_size is 8, but task.bank.samples is 7"),
        ("model.args", {**ARGS, "sample_size": [8, 8]}, "args.sample_size is [8, 8], which is no whole number"),
        ("model.args", {**ARGS, "num_embeds_ada_norm": "ten"}, "args.num_embeds_ada_norm is 'ten', which is no who"),
    ],
)
def test_what_does_not_go_together_is_said(path: str, value: Any, expected: str) -> None:
    message = fault(changed(path, value))
    assert message.startswith("params.yaml: ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("evaluation", {"steps": 2}),
        ("evaluation", {"sampler": "ddim", "steps": 1}),
        ("evaluation.grid", [9, 0, 9]),
        ("evaluation.guided_channels", 1),
        ("evaluation.timesteps", 1000),
        ("task.bank.samples", 8),
        ("learned.own.batch_size", 100),  # of data
        ("model.args", {**ARGS, "out_channels": None}),
    ],
)
def test_limits_themselves_are_allowed(path: str, value: Any) -> None:
    found = at(parse_experiment(changed(path, value)).model_dump(exclude_unset=True), path)
    assert found == value


def test_samples_need_a_judge() -> None:
    raw = params(evaluation={"samples": 5})
    assert parse_experiment(raw).evaluation.samples == 5
    raw["task"]["judge"] = None
    assert "evaluation.samples is 5, which needs task.judge" in fault(raw)


# Guidance


@pytest.mark.parametrize("section", ["evaluation", "task.bank"])
def test_guidance_needs_a_model_that_has_seen_no_label(section: str) -> None:
    raw = changed("task.label_dropout", 0.0)
    raw["evaluation"]["guidance"] = raw["task"]["bank"]["guidance"] = 1.0
    assert parse_experiment(raw).dense.init == "scratch"
    at(raw, section)["guidance"] = 1.5
    assert f"{section}.guidance is 1.5, which needs task.label_dropout in training" in fault(raw)
    raw["dense"] |= {"init": "checkpoint", "checkpoint": "x.safetensors"}  # trained elsewhere
    assert parse_experiment(raw).dense.init == "checkpoint"


# Models that give out their variance


def sigma(**learned: Any) -> dict[str, Any]:
    """Loaded, and without a fine-tuned row; ``learned``: settings of a row that learns from data."""
    raw = changed("model.args", {**ARGS, "out_channels": 2})
    raw["dense"] |= {"init": "checkpoint", "checkpoint": "x.safetensors"}
    raw["learned"]["own"] |= learned
    del raw["finetuned"], raw["rows"]["more"]
    return raw


@pytest.mark.parametrize(
    ("args", "learned_sigma"),
    [({}, False), ({"out_channels": None}, False), ({"out_channels": 1}, False), ({"out_channels": 2}, True)],
)
def test_variance_is_told_by_the_outputs(args: dict[str, Any], learned_sigma: bool) -> None:
    raw = sigma()
    raw["model"]["args"] = {**ARGS, **args}
    assert parse_experiment(raw).model.learned_sigma is learned_sigma  # type: ignore[union-attr]


def test_variance_is_not_trained_from_scratch() -> None:
    raw = sigma()
    raw["dense"]["init"] = "scratch"
    del raw["dense"]["checkpoint"]
    assert f"model.args.out_channels is twice in_channels, {NO_GRADIENT}; load such a model" in fault(raw)


def test_variance_is_not_fine_tuned() -> None:
    raw = sigma()
    raw["finetuned"], raw["rows"]["more"] = {"more": {"start": "dense", "steps": 4}}, "More"
    assert f"finetuned.more: {NO_GRADIENT.removeprefix('but ')}" in fault(raw)


def test_variance_is_distilled() -> None:
    assert parse_experiment(sigma(distillation=0.1)).learned["own"].distillation == 0.1
    expected = f"learned.own.distillation is 0, {NO_GRADIENT}; give distillation some weight"
    assert expected in fault(sigma(distillation=0.0))


# Pictures


@pytest.mark.parametrize(
    ("classes", "pictured"),
    [(1000, ORIGINAL), (980, ORIGINAL), (979, list(range(8))), (10, list(range(8))), (3, [0, 1, 2])],
)
def test_classes_that_are_pictured(classes: int, pictured: list[int]) -> None:
    assert EvaluationSettings().grid is None
    assert EvaluationSettings().pictured(classes) == pictured
    assert EvaluationSettings(grid=[2, 0, 2]).pictured(classes) == [2, 0, 2]


# Classification


OTHERS = {"sampler": "ddim", "guidance": 2.0, "guided_channels": 3, "clip": True, "grid": [1]}  # the rest: numbers


@pytest.mark.parametrize("key", OWN["evaluation"])
def test_evaluation_is_no_section_of_classification(key: str) -> None:
    raw = {**classification(), "evaluation": {key: OTHERS.get(key, 9)}}
    assert f"evaluation.{key} is for task 'diffusion' only" in fault(raw)


def test_classification_may_say_what_it_evaluates_by_default() -> None:
    found = parse_experiment(classification())
    assert parse_experiment(found.model_dump()) == found


@pytest.mark.parametrize(("section", "row"), [("priors", "one"), ("learned", "own")])
def test_nothing_is_generated_for_classification(section: str, row: str) -> None:
    raw = classification()
    raw[section][row]["inputs"] = "generated"
    assert f"{row}: inputs is 'generated', which task 'classification' cannot make" in fault(raw)
