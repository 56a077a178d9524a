"""``params.yaml``: what is accepted, and what each mistake is answered with."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from maskllm4v.config import Experiment, load_experiment, parse_experiment
from maskllm4v.errors import ConfigError

ROOT = Path(__file__).parent.parent
LEARNING = [
    "steps",
    "batch_size",
    "lr",
    "min_lr",
    "betas",
    "weight_decay",
    "clip_grad",
    "tau",
    "scaling",
    "anneal",
    "regularisation",
    "init",
    "prior_strength",
    "gate_std",
    "hard",
    "ema",
    "distillation",
    "distillation_temperature",
    "log_every",
]
# Every key of the format, written down a second time.
SECTIONS = {
    "": [
        "table",
        "title",
        "exact",
        "seeds",
        "pattern",
        "data",
        "task",
        "model",
        "dense",
        "priors",
        "learning",
        "learned",
        "rows",
        "runtime",
    ],
    "data": [
        "name",
        "source",
        "root",
        "train",
        "test",
        "hash_files",
        "test_fraction",
        "split_seed",
        "calibration",
        "calibration_seed",
    ],
    "task": ["name", "label_smoothing", "shift", "shift_probability", "eval_batch_size"],
    "model": ["name", "args", "exclude", "on_misfit", "fused_attention"],
    "dense": ["row", "init", "checkpoint", "steps", "batch_size", "lr", "betas", "weight_decay", "warmup", "clip_grad"],
    "priors.one": ["method", "update_weights", "propagate", "batch_size"],
    "learning": LEARNING,
    "learned.own": [*LEARNING, "prior"],
    "runtime": ["device", "loader_workers", "seed_processes"],
}


def params() -> dict[str, Any]:
    """A small valid file: one row of each kind, two of them learned."""
    return {
        "table": "t",
        "title": "A table",
        "seeds": [0, 1],
        "data": {"name": "digits", "source": "digits"},
        "task": {},
        "model": {"name": "VisionTransformer", "args": {"img_size": 8}},
        "dense": {"row": "dense", "init": "scratch"},
        "priors": {"one": {"method": "magnitude"}},
        "learning": {"lr": 0.5, "steps": 7},
        "learned": {"own": {"prior": "one", "steps": 9, "hard": True}, "plain": {"prior": "one"}},
        "rows": {"dense": "Dense", "one": "One", "own": "Own", "plain": "Plain"},
        "runtime": {},
    }


def at(raw: dict[str, Any], path: str) -> dict[str, Any]:
    for part in path.split(".") if path else []:
        raw = raw[part]
    return raw


def changed(path: str, value: Any) -> dict[str, Any]:
    raw = params()
    section, _, key = path.rpartition(".")
    at(raw, section)[key] = value
    return raw


def fault(raw: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_experiment(raw, "params.yaml")
    return str(caught.value)


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


@pytest.mark.parametrize("path", ["data.source", "model.name", "dense.row", "priors.one.method", "learned.own.prior"])
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
        ("data.test_fraction", 1.0),
        ("data.split_seed", 1.5),
        ("data.source", "imagenet"),
        ("task.shift", -1),
        ("task.name", "diffusion"),
        ("runtime.loader_workers", -1),
        ("learning.ema", 1.0),
        ("learning.anneal", "month"),
        ("learning.hard", 1),
        ("priors.one.propagate", "sparse"),
        ("priors.one.update_weights", 1),
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
        ("title", "0x10", "0x10"),
        ("exact", "true", True),
    ],
)
def test_scalars_are_read_as_in_yaml_1_2(path: str, text: str, expected: Any, tmp_path: Path) -> None:
    raw = changed(path, "PLACEHOLDER")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw).replace("PLACEHOLDER", text))
    found: Any = load_experiment(tmp_path / "params.yaml")
    for part in path.split("."):
        found = getattr(found, part)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(("path", "text"), [("dense.steps", "1e3"), ("dense.steps", "1_000"), ("exact", "yes")])
def test_scalars_of_another_type_are_refused(path: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(changed(path, "PLACEHOLDER")).replace("PLACEHOLDER", text))
    with pytest.raises(ConfigError, match=f"{path} is "):
        load_experiment(tmp_path / "params.yaml")


def test_int_stands_for_a_float() -> None:
    assert parse_experiment(changed("dense.lr", 1)).dense.lr == 1.0


@pytest.mark.parametrize("section", ["data", "model", "dense", "learning", "learned", "learned.own", "priors", "rows"])
@pytest.mark.parametrize("value", [[], "text", 1])
def test_section_of_another_type_is_an_error(section: str, value: Any) -> None:
    assert f"params.yaml: {section}" in fault(changed(section, value))


# Learned rows


def test_learning_defaults_reach_rows_and_own_values_win() -> None:
    found = parse_experiment(params()).learned
    assert (found["own"].steps, found["own"].lr, found["own"].hard) == (9, 0.5, True)
    assert (found["plain"].steps, found["plain"].lr, found["plain"].hard) == (7, 0.5, False)
    assert found["plain"].tau == (4.0, 0.05)  # neither says anything


def test_rows_without_learning_section_take_the_defaults() -> None:
    raw = params()
    del raw["learning"]
    found = parse_experiment(raw).learned
    assert (found["own"].steps, found["plain"].steps, found["plain"].lr) == (9, 2000, 1e-3)


def test_parsing_leaves_its_input_alone() -> None:
    raw = params()
    before = copy.deepcopy(raw)
    parse_experiment(raw)
    assert raw == before


def test_inherited_fault_is_named_once_where_it_stands() -> None:
    assert fault(changed("learning.lr", -1.0)).startswith("params.yaml: learning.lr is -1.0; ")
    assert "\n" not in fault(changed("learning.lr", -1.0))


def test_own_fault_is_named_in_its_row() -> None:
    message = fault(changed("learned.own.steps", 0))
    assert message.startswith("params.yaml: learned.own.steps is 0; ")
    assert "\n" not in message


def test_good_own_value_does_not_hide_the_shared_fault() -> None:
    raw = changed("learning.steps", 0)
    del raw["learned"]["plain"], raw["rows"]["plain"]
    assert fault(raw).startswith("params.yaml: learning.steps is 0; ")


def test_number_as_a_learned_row_is_an_error_of_ours() -> None:
    raw = changed("learning.lr", -1.0)
    raw["learned"][5] = {"prior": "one"}
    assert "learned.5 is 5" in fault(raw)


# Rows


def drop_row(raw: dict[str, Any]) -> None:
    del raw["rows"]["own"]


def invent_row(raw: dict[str, Any]) -> None:
    raw["rows"]["ghost"] = "Ghost"


def repeat_dense_row(raw: dict[str, Any]) -> None:
    raw["dense"]["row"] = "one"


def repeat_prior_row(raw: dict[str, Any]) -> None:
    raw["priors"]["own"] = {"method": "wanda"}


def name_unknown_prior(raw: dict[str, Any]) -> None:
    raw["learned"]["own"]["prior"] = "two"


def name_learned_prior(raw: dict[str, Any]) -> None:
    raw["learned"]["own"]["prior"] = "plain"


def repeat_seed(raw: dict[str, Any]) -> None:
    raw["seeds"] = [0, 1, 0]


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (drop_row, ["'own' is made but not listed", "dense, one, plain"]),
        (invent_row, ["'ghost' is listed but made nowhere", "dense, one, own, plain"]),
        (repeat_dense_row, ["name the same row twice"]),
        (repeat_prior_row, ["name the same row twice"]),
        (name_unknown_prior, ["learned.own.prior is 'two'", "allowed: one"]),
        (name_learned_prior, ["learned.own.prior is 'plain'", "allowed: one"]),
        (repeat_seed, ["seeds: [0, 1, 0] holds one twice"]),
    ],
)
def test_sections_have_to_agree(spoil: Callable[[dict[str, Any]], None], parts: list[str]) -> None:
    raw = params()
    spoil(raw)
    message = fault(raw)
    assert message.startswith("params.yaml: ")
    assert all(part in message for part in parts)


@pytest.mark.parametrize("slug", ["Upper", "with space", "a/b", "../up", "-first", "_first", "ä", "", "end\n"])
@pytest.mark.parametrize("path", ["table", "data.name", "dense.row", "learned.own.prior"])
def test_bad_slug_is_refused(path: str, slug: str) -> None:
    assert f"params.yaml: {path} is {slug!r}; " in fault(changed(path, slug))


@pytest.mark.parametrize("section", ["priors", "learned", "rows"])
def test_bad_row_key_is_refused(section: str) -> None:
    raw = params()
    raw[section]["a/b"] = copy.deepcopy(next(iter(raw[section].values())))
    assert f"params.yaml: {section}.a/b is 'a/b'; " in fault(raw)


@pytest.mark.parametrize(
    ("path", "value"), [("data.root", "/images"), ("data.source", "folder"), ("dense.init", "checkpoint")]
)
def test_source_and_its_path_go_together(path: str, value: str) -> None:
    section = path.split(".")[0]
    assert fault(changed(path, value)).startswith(f"params.yaml: {section}: ")


def test_checkpoint_without_its_init_is_refused() -> None:
    assert "checkpoint is needed for init 'checkpoint'" in fault(changed("dense.checkpoint", "a.safetensors"))


# The objects


@pytest.mark.parametrize("section", [s for s in SECTIONS if s not in ("priors.one", "learned.own")])
def test_objects_are_frozen(section: str) -> None:
    found: Any = parse_experiment(params())
    found = getattr(found, section) if section else found
    for key in SECTIONS[section]:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(found, key, getattr(found, key))


def test_row_objects_are_frozen() -> None:
    found = parse_experiment(params())
    with pytest.raises(ValidationError, match="frozen"):
        found.learned["own"].steps = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        found.priors["one"].method = "wanda"  # type: ignore[misc]


def test_kind_of_every_row() -> None:
    found = parse_experiment(params())
    assert {row: found.kind(row) for row in found.rows} == {
        "dense": "dense",
        "one": "oneshot",
        "own": "learned",
        "plain": "learned",
    }
    with pytest.raises(ConfigError, match="no row 'other' in this experiment; allowed: dense, one, own, plain"):
        found.kind("other")


COMMON = {"table", "exact", "seeds", "data", "task", "model", "dense"}


@pytest.mark.parametrize(
    ("row", "keys"),
    [("dense", COMMON), ("one", COMMON | {"pattern", "prior"}), ("own", COMMON | {"pattern", "prior", "learning"})],
)
def test_row_settings_are_plain_and_complete(row: str, keys: set[str]) -> None:
    found = parse_experiment(params()).row_settings(row)
    assert set(found) == keys
    assert json.loads(json.dumps(found)) == found
    sections = {"prior": "priors.one", "learning": "learned.own"}
    for key in keys & {"data", "task", "model", "dense", "prior", "learning"}:
        assert set(found[key]) == set(SECTIONS[sections.get(key, key)])


# (change, rows whose settings change)
CHANGES = [
    ("title", "Other", ""),
    ("rows.own", "Other", ""),
    ("runtime.device", "cpu", ""),
    ("runtime.loader_workers", 2, ""),
    ("runtime.seed_processes", 1, ""),
    ("learned.own.lr", 0.1, "own"),
    ("learning.lr", 0.1, "own plain"),
    ("learning.steps", 3, "plain"),
    ("priors.one.method", "wanda", "one own plain"),
    ("pattern", "4:8", "one own plain"),
    ("exact", True, "dense one own plain"),
    ("seeds", [0], "dense one own plain"),
    ("table", "other", "dense one own plain"),
    ("data.split_seed", 5, "dense one own plain"),
    ("task.shift", 2, "dense one own plain"),
    ("model.args", {"img_size": 4}, "dense one own plain"),
    ("dense.lr", 0.1, "dense one own plain"),
]


@pytest.mark.parametrize(("path", "value", "rows"), CHANGES, ids=[path for path, _, _ in CHANGES])
def test_row_settings_change_with_what_a_row_depends_on(path: str, value: Any, rows: str) -> None:
    before, after = parse_experiment(params()), parse_experiment(changed(path, value))
    assert before != after
    moved = {row for row in before.rows if before.row_settings(row) != after.row_settings(row)}
    assert moved == set(rows.split())


OTHER = {float: 0.25, int: 11, bool: True, str: "x", tuple: [0.125, 0.5]}
OTHER_CHOICE = {"init": "magnitude", "anneal": "epoch", "propagate": "pruned"}


@pytest.mark.parametrize("key", LEARNING)
def test_no_setting_of_a_learned_row_reaches_another(key: str) -> None:
    before = parse_experiment(params())
    now = getattr(before.learned["own"], key)
    after = parse_experiment(changed(f"learned.own.{key}", not now if key == "hard" else other_value(key, now)))
    moved = {row for row in before.rows if before.row_settings(row) != after.row_settings(row)}
    assert moved == {"own"}


@pytest.mark.parametrize("key", SECTIONS["priors.one"])
def test_no_setting_of_a_prior_reaches_rows_without_it(key: str) -> None:
    raw = params()
    raw["priors"]["two"], raw["rows"]["two"] = {"method": "wanda"}, "Two"
    raw["learned"]["own"]["prior"] = "two"
    before = parse_experiment(raw)
    raw["priors"]["two"][key] = other_value(key, getattr(before.priors["two"], key))
    after = parse_experiment(raw)
    moved = {row for row in before.rows if before.row_settings(row) != after.row_settings(row)}
    assert moved == {"two", "own"}


def other_value(key: str, now: Any) -> Any:
    other = OTHER_CHOICE[key] if key in OTHER_CHOICE else OTHER[type(now)]
    assert other != now
    return other


def test_row_settings_of_an_unknown_row_are_refused() -> None:
    with pytest.raises(ConfigError, match="no row 'x'"):
        parse_experiment(params()).row_settings("x")


def test_defaults_are_not_shared_between_experiments() -> None:
    first, second = parse_experiment(params()), parse_experiment(params())
    assert isinstance(first, Experiment)
    first.model.exclude.append("blocks.0")
    assert second.model.exclude == ["head"]
