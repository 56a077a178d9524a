"""``params.yaml``: what is accepted, and what each mistake is answered with."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.serialize import parse_yaml
from pydantic import ValidationError
from small_params import SECTIONS, at, changed, fault, params

from maskllm4v.config import Experiment, load_experiment, parse_experiment
from maskllm4v.utils.errors import ConfigError

ROOT = Path(__file__).parent.parent


# Files


def test_params_are_the_digits_experiment() -> None:
    found = load_experiment(ROOT / "params.yaml")
    assert found == load_experiment(ROOT / "experiments" / "digits.yaml")
    assert found.table == "digits"
    assert found.exact
    assert found.dense.betas == (0.9, 0.99)


def test_params_are_the_digits_file_to_the_byte() -> None:
    assert (ROOT / "params.yaml").read_bytes() == (ROOT / "experiments" / "digits.yaml").read_bytes()


def test_file_says_what_the_object_says() -> None:
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    found = load_experiment(ROOT / "params.yaml").model_dump(mode="json")
    for section in ("data", "task", "model", "dense", "learning", "runtime"):
        for key, value in raw[section].items():
            assert found[section][key] == value, f"{section}.{key}"
    assert list(found["learned"]) == list(raw["learned"])
    assert found["rows"] == raw["rows"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "cannot read"),
        (b"", "NoneType"),
        (b"# only a comment\n", "NoneType"),
        (b"- table\n- title\n", "holds list"),
        (b"table\n", "holds str"),
        (b"table: [digits\n", "is no YAML"),
        (b"table:\tdigits\n\tdata: 1\n", "is no YAML"),
        (b"table: \xff\xfe\n", "YAML"),
        (b"title: 2024-99-99\n", "YAML"),  # looks like a date
    ],
    ids=["missing", "empty", "comment", "list", "text", "bracket", "tabs", "no UTF-8", "no date"],
)
def test_unusable_files_are_named(content: bytes | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=expected) as caught:
        load_experiment(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# Unknown keys


@pytest.mark.parametrize(("section", "key"), [(s, k) for s, keys in SECTIONS.items() for k in keys])
def test_unknown_key_is_answered_with_its_neighbour(section: str, key: str) -> None:
    raw = params()
    at(raw, section)[f"{key}x"] = 1
    dotted = f"{section}.{key}x".removeprefix(".")
    allowed = ", ".join(SECTIONS[section])
    assert fault(raw) == f"params.yaml: unknown key {dotted!r}; did you mean {key!r}? allowed: {allowed}"


def test_strange_key_gets_no_hint() -> None:
    message = fault(changed("data.qqqq", 1))
    assert message.startswith("params.yaml: unknown key 'data.qqqq'; allowed: name, ")


def test_all_faults_are_listed_a_line_each() -> None:
    raw = changed("data.nam", 1)
    raw["dense"]["lr"] = "fast"
    raw["tabel"] = 1
    lines = fault(raw).splitlines()
    assert len(lines) == 3
    assert all(line.startswith("params.yaml: ") for line in lines)
    assert {word for word in ("'data.nam'", "dense.lr is", "'tabel'") for line in lines if word in line} == {
        "'data.nam'",
        "dense.lr is",
        "'tabel'",
    }


@pytest.mark.parametrize("key", ["table", "title", "seeds", "data", "model", "dense", "rows"])
def test_required_section_is_missed(key: str) -> None:
    raw = params()
    del raw[key]
    assert f"key '{key}' is missing" in fault(raw)


@pytest.mark.parametrize(
    "path",
    [
        *("data.source", "model.name", "dense.row", "priors.one.method", "learned.own.prior", "finetuned.tuned.start"),
        *("updated.better.masks", "updated.better.update"),
    ],
)
def test_required_key_is_missed(path: str) -> None:
    raw = params()
    section, _, key = path.rpartition(".")
    del at(raw, section)[key]
    assert f"key '{path}' is missing" in fault(raw)


# Wrong types and values


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("dense.lr", "fast"),
        ("dense.steps", "100"),
        ("dense.steps", True),
        ("dense.steps", 100.0),
        ("dense.steps", 0),
        ("dense.lr", True),
        ("dense.lr", 0.0),
        ("dense.lr", float("nan")),
        ("dense.lr", float("inf")),
        ("dense.weight_decay", -0.1),
        ("dense.warmup", 1.5),
        ("dense.init", "random"),
        ("model.fused_attention", 1),
        ("model.fused_attention", "no"),
        ("model.exclude", "head"),
        ("data.calibration", 0),
        ("data.calibration_split", "holdout"),
        ("data.calibration_sets", 0),
        ("data.classes", 0),
        ("data.in_memory", True),
        ("data.holdout", -1),
        ("model.stem", []),
        ("model.input.crop_pct", 0.0),
        ("model.input.mean", 0.5),
        ("model.stem.channels", []),
        ("task.eval_split", "train"),
        ("task.hflip", 2.0),
        ("learning.epochs", 0.0),
        ("learning.accumulate", 0),
        ("learning.amp", "int8"),
        ("learning.select", "first"),
        ("runtime.processes", -1),
        ("runtime.checkpoint_minutes", -1.0),
        ("data.test_fraction", 1.0),
        ("data.split_seed", 1.5),
        ("data.source", "imagenet"),
        ("task.shift", -1),
        ("task.name", "pose"),
        ("runtime.loader_workers", -1),
        ("learning.ema", 1.0),
        ("learning.anneal", "month"),
        ("learning.hard", 1),
        ("priors.one.propagate", "sparse"),
        ("priors.one.update_weights", 1),
        ("updated.better.update", "obs"),
        ("updated.better.target", "both"),
        ("updated.better.damping", -0.1),
        ("learned.own.weights", "one"),
        ("exact", 1),
        ("pattern", 24),
        ("pattern", "2-4"),
        ("seeds", []),
        ("seeds", 3),
    ],
)
def test_wrong_value_is_named(path: str, value: Any) -> None:
    message = fault(changed(path, value))
    assert message.startswith(f"params.yaml: {path} is {value!r}; ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("seeds", [0, -1], "seeds.1 is -1"),
        ("seeds", [0, 1.0], "seeds.1 is 1.0"),
        ("dense.betas", [0.9, "high"], "dense.betas.1 is 'high'"),
        ("dense.betas", [0.9, 1.5], "dense.betas.1 is 1.5"),
        ("model.stem.strides", [1, 0], "model.stem.strides.1 is 0"),
        ("model.input.std", [0.5, 0.0], "model.input.std.1 is 0.0"),
        ("learning.tau", [4.0, 0.0], "learning.tau.1 is 0.0"),
        ("learning.tau", [4.0], "learning.tau.1"),
        ("learning.tau", [4.0, 1.0, 0.5], "learning.tau"),
        ("learning.tau", 4.0, "learning.tau is 4.0"),
    ],
)
def test_part_of_a_list_is_named(path: str, value: Any, expected: str) -> None:
    message = fault(changed(path, value))
    assert expected in message
    assert "learned" not in message


@pytest.mark.parametrize("path", ["dense.lr", "learning.lr", "learned.own.lr"])
@pytest.mark.parametrize("value", ["1e-3", "0.001"])
def test_number_as_text_is_refused(path: str, value: str) -> None:
    assert fault(changed(path, value)) == f"params.yaml: {path} is {value!r}; input should be a valid number"


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("dense.lr", "1e-3", 0.001),
        ("dense.lr", "1.0e-3", 0.001),
        ("dense.lr", ".5", 0.5),
        ("dense.lr", "+2.", 2.0),
        ("dense.steps", "010", 10),  # octal in YAML 1.1
        ("pattern", "2:4", "2:4"),  # 124 in YAML 1.1
        ("title", "no", "no"),  # False in YAML 1.1
        ("dense.steps", "1_000", 1000),
        ("exact", "true", True),
    ],
)
def test_scalars_are_read_as_dvc_reads_them(path: str, text: str, expected: Any, tmp_path: Path) -> None:
    raw = changed(path, "PLACEHOLDER")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw).replace("PLACEHOLDER", text))
    found: Any = load_experiment(tmp_path / "params.yaml")
    for part in path.split("."):
        found = getattr(found, part)
    assert found == expected
    assert type(found) is type(expected)
    assert type(parse_yaml(f"key: {text}", "params.yaml")["key"]) is type(expected)


@pytest.mark.parametrize(("path", "text"), [("dense.steps", "1e3"), ("title", "0x10"), ("exact", "yes")])
def test_scalars_of_another_type_are_refused(path: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(changed(path, "PLACEHOLDER")).replace("PLACEHOLDER", text))
    with pytest.raises(ConfigError, match=f"{path} is "):
        load_experiment(tmp_path / "params.yaml")


def test_int_stands_for_a_float() -> None:
    assert parse_experiment(changed("dense.lr", 1)).dense.lr == 1.0


@pytest.mark.parametrize(
    "section",
    ["data", "model", "dense", "learning", "learned", "learned.own", "updated", "finetuned", "priors", "rows"],
)
@pytest.mark.parametrize("value", [[], "text", 1])
def test_section_of_another_type_is_an_error(section: str, value: Any) -> None:
    assert f"params.yaml: {section}" in fault(changed(section, value))


@pytest.mark.parametrize("slug", ["Upper", "with space", "a/b", "../up", "-first", "_first", "ä", "", "end\n"])
@pytest.mark.parametrize("path", ["table", "data.name", "dense.row", "learned.own.prior"])
def test_bad_slug_is_refused(path: str, slug: str) -> None:
    assert f"params.yaml: {path} is {slug!r}; " in fault(changed(path, slug))


@pytest.mark.parametrize("section", ["priors", "learned", "rows"])
def test_bad_row_key_is_refused(section: str) -> None:
    raw = params()
    raw[section]["a/b"] = copy.deepcopy(next(iter(raw[section].values())))
    assert f"params.yaml: {section}.a/b is 'a/b'; " in fault(raw)


# The objects


@pytest.mark.parametrize("section", SECTIONS)
def test_objects_are_frozen(section: str) -> None:
    found: Any = parse_experiment(params())
    for part in section.split(".") if section else []:
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    for key in SECTIONS[section]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(found, key, getattr(found, key))


def test_defaults_are_not_shared_between_experiments() -> None:
    first, second = parse_experiment(params()), parse_experiment(params())
    assert isinstance(first, Experiment)
    first.model.exclude.append("blocks.0")
    assert second.model.exclude == ["head"]


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("table: a\ntitle: b\ntable: c\n", 3, "table"),
        ("table: a\nlearned:\n  one: {prior: p}\n  one: {prior: q}\n", 4, "one"),
        ("table: a\nlearning: {steps: 3, lr: 1, steps: 4}\n", 2, "steps"),
    ],
)
def test_a_key_that_is_there_twice_is_an_error(text: str, line: int, key: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"params\.yaml, line {line}: key '{key}' is there twice$"):
        load_experiment(tmp_path / "params.yaml")


@pytest.mark.parametrize("name", ["digits", "dit_digits"])
def test_an_experiment_survives_being_written_down(name: str) -> None:
    """Its class is one of its task's, which nobody can import by its name."""
    experiment = load_experiment(ROOT / "experiments" / f"{name}.yaml")
    copies = [
        Experiment.model_validate(experiment),
        Experiment.model_validate(experiment.model_dump()),
        Experiment.model_validate_json(experiment.model_dump_json()),
        pickle.loads(pickle.dumps(experiment)),
        copy.deepcopy(experiment),
    ]
    assert all(one == experiment and type(one) is type(experiment) for one in copies)
