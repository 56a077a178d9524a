"""``params.yaml`` of diffusion transformers: keys, what goes together, and what each row depends on."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_diffusion import JUDGE
from small_diffusion import raw as small
from small_params import SECTIONS, TRAINING, at, fault
from small_params import params as classification

from maskllm4v.config import DataSettings, load_experiment, parse_experiment
from maskllm4v.reporting.aggregate import current_records
from maskllm4v.runs.paths import record_file
from maskllm4v.utils.io import read_json, value_digest

ROOT = Path(__file__).parent.parent
SAMPLING = ["sampler", "steps", "guidance", "guided_channels", "clip"]
# Every key of diffusion's own sections, written down a second time.
OWN = {
    "task": [
        *("name", "eval_batch_size", "eval_amp", "eval_split", "vae", "scheduler", "train_timesteps", "beta_schedule"),
        *("beta_start", "beta_end", "hflip", "label_dropout", "conditioning_samples", "bank", "judge"),
    ],
    "task.bank": [*SAMPLING, "samples"],
    "task.judge": ["task", "model", "training"],
    "task.judge.task": SECTIONS["task"],
    "task.judge.model": SECTIONS["model"],
    "task.judge.model.input": SECTIONS["model.input"],
    "task.judge.training": TRAINING,
    "model": ["name", "args", "exclude", "on_misfit", "convolutions", "fused_attention", "adaln", "freq_shift"],
    "evaluation": [*SAMPLING, "images", "timesteps", "samples", "grid", "columns"],
}


def params(**sections: Any) -> dict[str, Any]:
    """With a judge, and a row of each kind."""
    found = small(
        priors={"one": {"method": "magnitude"}, "made": {"method": "wanda", "inputs": "generated"}},
        learning={"steps": 7, "batch_size": 8},
        learned={"own": {"prior": "one"}, "nodata": {"prior": "one", "inputs": "generated"}},
        updated={"fixed": {"masks": "one", "update": "least_squares", "inputs": "generated"}},
        finetuned={"more": {"start": "dense", "steps": 4}},
        rows={row: row for row in ("dense", "one", "made", "own", "nodata", "fixed", "more")},
    )
    found["task"]["judge"] = {**copy.deepcopy(JUDGE), "task": {}}
    found["task"]["judge"]["model"]["input"] = {}
    for name, values in sections.items():
        found[name] = {**found[name], **values}
    return found


def changed(path: str, value: Any) -> dict[str, Any]:
    found = copy.deepcopy(params())
    section, _, key = path.rpartition(".")
    at(found, section)[key] = value
    return found


# Keys


@pytest.mark.parametrize(("section", "key"), [(s, k) for s, keys in OWN.items() for k in keys])
def test_unknown_key_is_answered_with_its_neighbour(section: str, key: str) -> None:
    message = fault(changed(f"{section}.{key}x", 1))
    assert message == (
        f"params.yaml: unknown key '{section}.{key}x'; did you mean {key!r}? allowed: {', '.join(OWN[section])}"
    )


def test_keys_of_the_other_kind_are_unknown() -> None:
    assert fault(changed("task.label_smoothing", 0.1)).startswith("params.yaml: unknown key 'task.label_smoothing'; ")
    assert fault(changed("model.stem", None)).startswith("params.yaml: unknown key 'model.stem'; ")
    other = classification()
    other["task"]["vae"] = "folder"
    assert "unknown key 'task.vae'" in fault(other)


@pytest.mark.parametrize("section", OWN)
def test_every_key_is_a_field_and_frozen(section: str) -> None:
    found: Any = parse_experiment(params())
    for part in section.split("."):
        found = getattr(found, part)
    assert list(type(found).model_fields) == OWN[section]
    with pytest.raises(ValueError, match="frozen"):
        setattr(found, OWN[section][0], None)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("task.name", "pose"),
        ("task.train_timesteps", 0),
        ("task.beta_schedule", "sigmoid"),
        ("task.beta_start", 0.0),
        ("task.label_dropout", 1.5),
        ("task.conditioning_samples", 0),
        ("task.eval_split", "train"),
        ("task.bank.samples", 0),
        ("task.bank.sampler", "euler"),
        ("task.judge.training.lr", "fast"),
        ("task.judge.model.exclude", "head"),
        ("model.adaln", 1),
        ("model.freq_shift", 2),
        ("evaluation.sampler", "euler"),
        ("evaluation.steps", 0),
        ("evaluation.guidance", 0.5),
        ("evaluation.guided_channels", 0),
        ("evaluation.clip", "yes"),
        ("evaluation.images", -1),
        ("evaluation.grid", []),
        ("learning.distillation", 2.0),
        ("priors.one.inputs", "real"),
        ("learned.own.inputs", "noise"),
        ("updated.fixed.inputs", "noise"),
    ],
)
def test_wrong_value_is_named(path: str, value: Any) -> None:
    raw = changed(path, value)
    if path == "task.name":
        raw["task"] = {"name": value}
    message = fault(raw)
    assert message.startswith(f"params.yaml: {path} is {value!r}; ")
    assert "\n" not in message


@pytest.mark.parametrize("key", ["model", "training"])
def test_required_key_is_missed(key: str) -> None:
    found = params()
    del found["task"]["judge"][key]
    assert fault(found) == f"params.yaml: key 'task.judge.{key}' is missing"


# What learning starts from


def test_masks_of_diffusion_are_distilled_unless_told_otherwise() -> None:
    found = parse_experiment(params())
    assert {row: learned.distillation for row, learned in found.learned.items()} == {"own": 1.0, "nodata": 1.0}
    assert found.learning.distillation == 1.0
    raw = params(learning={"distillation": 0.5})
    raw["learned"]["own"]["distillation"] = 0.0
    found = parse_experiment(raw)
    assert {row: learned.distillation for row, learned in found.learned.items()} == {"own": 0.0, "nodata": 0.5}
    assert all(learned.distillation == 0 for learned in parse_experiment(classification()).learned.values())


def test_distillation_is_the_default_where_learning_is_left_out() -> None:
    raw = params()
    del raw["learning"]
    for learned in raw["learned"].values():
        learned |= {"steps": 5, "batch_size": 8}
    assert parse_experiment(raw).learned["own"].distillation == 1.0


def test_inputs_are_written_down_only_where_they_are_made() -> None:
    found = parse_experiment(params())
    assert "inputs" not in found.row("one").made_with()["prior"]
    assert "inputs" not in found.row("own").made_with()["learning"]
    assert found.row("made").made_with()["prior"]["inputs"] == "generated"
    assert found.row("nodata").made_with()["learning"]["inputs"] == "generated"
    assert found.row("fixed").made_with()["update"]["inputs"] == "generated"
    assert parse_experiment(found.model_dump()) == found


# What each row depends on


def moved(before: dict[str, Any], after: dict[str, Any], *, of: str = "made_with") -> set[str]:
    first, second = parse_experiment(before), parse_experiment(after)
    assert first != second
    return {row for row in first.rows if getattr(first.row(row), of)() != getattr(second.row(row), of)()}


@pytest.mark.parametrize(
    ("path", "value", "rows"),
    [
        ("evaluation.steps", 9, ""),
        ("evaluation.samples", 9, ""),
        ("learned.own.inputs", "generated", "own"),
        ("updated.fixed.inputs", "data", "fixed"),
        ("priors.one.inputs", "generated", "one own nodata fixed"),
        ("learning.distillation", 0.5, "own nodata"),
        ("task.bank.samples", 9, "dense one made own nodata fixed more"),
        ("task.judge.training.steps", 9, "dense one made own nodata fixed more"),
        ("model.adaln", False, "dense one made own nodata fixed more"),
    ],
)
def test_row_settings_change_with_what_a_row_depends_on(path: str, value: Any, rows: str) -> None:
    assert moved(params(), changed(path, value)) == set(rows.split())


@pytest.mark.parametrize("defaults", [True, False])
def test_records_depend_on_how_rows_are_measured_and_rows_do_not(defaults: bool) -> None:
    found = parse_experiment(params())
    measured = found.evaluation.model_dump(mode="json", exclude_defaults=not defaults)
    for row in found.rows:
        settings = found.row(row).record_settings(defaults=defaults)
        assert settings.pop("evaluation") == measured
        assert settings == found.row(row).made_with(defaults=defaults)
        assert json.loads(json.dumps(settings)) == settings
    assert moved(params(), changed("evaluation.steps", 9), of="record_settings") == set(found.rows)


def test_records_of_classification_hold_row_settings_alone() -> None:
    found = parse_experiment(classification())
    assert all(found.row(row).record_settings() == found.row(row).made_with(defaults=False) for row in found.rows)


@pytest.mark.parametrize(
    "table", ["digits", "digits_patterns", "digits_segmentation", "digits_detection", "dit_digits", "cifar10"]
)
def test_committed_records_are_of_the_present_settings(table: str) -> None:
    found = load_experiment(ROOT / "experiments" / f"{table}.yaml")
    current = current_records(found, ROOT / "reports")
    assert list(current) == list(found.rows)
    for row in found.rows:
        record = read_json(record_file(table, row, ROOT / "reports"))
        assert record["settings"] == found.row(row).record_settings()
        assert record["settings_digest"] == value_digest(record["settings"])


# The tables' files


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_names_its_task(path: Path) -> None:
    """Stages depend on the code of the task that is named; a default would not be seen."""
    assert yaml.safe_load(path.read_text())["task"]["name"] == load_experiment(path).task.name


def test_experiments_on_one_manifest_agree_on_it() -> None:
    """They would make ``artifacts/data/<name>/`` of each other anew, and with it all that depends on it."""
    found: dict[str, DataSettings] = {}
    for path in sorted((ROOT / "experiments").glob("*.yaml")):
        data = load_experiment(path).data
        assert found.setdefault(data.name, data) == data, path.name
