"""What each row is, and which settings its result depends on."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from import_graph import ROOT
from small_params import FINETUNING, LEARNING, SECTIONS, changed, fault, params

from maskllm4v.config import parse_experiment
from maskllm4v.runs.records import settings_digest
from maskllm4v.utils.errors import ConfigError


def test_kind_of_every_row() -> None:
    found = parse_experiment(params())
    assert {row: found.row(row).kind for row in found.rows} == {
        "dense": "dense",
        "one": "oneshot",
        "own": "learned",
        "plain": "learned",
        "better": "updated",
        "tuned": "finetuned",
        "more": "finetuned",
    }
    with pytest.raises(
        ConfigError, match="no row 'other' in this experiment; allowed: dense, one, own, plain, better, tuned, more"
    ):
        found.row("other")


def test_masks_and_patterns_of_every_row() -> None:
    raw = params()
    raw["priors"]["eight"], raw["rows"]["eight"] = {"method": "wanda", "pattern": "4:8"}, "Eight"
    raw["learned"]["plain"]["prior"] = "eight"
    raw["updated"] |= {"best": {"masks": "plain", "update": "sparsegpt"}}
    raw["learned"]["last"], raw["rows"]["last"] = {"prior": "best", "weights": "updated"}, "Last"
    raw["rows"]["best"] = "Best"
    found = parse_experiment(raw)
    assert {row.key: None if row.source is None else row.source.key for row in found.all_rows} == {
        **{"dense": None, "one": None, "own": "one", "plain": "eight"},
        **{"tuned": "one", "more": None, "eight": None, "better": "one", "best": "plain", "last": "best"},
    }
    assert {row.key: row.start for row in found.all_rows if row.kind == "finetuned"} == {
        "tuned": "one",
        "more": "dense",
    }
    assert {row.key: None if row.oneshot is None else row.oneshot.key for row in found.all_rows} == {
        **{"dense": None, "one": "one", "own": "one", "plain": "eight"},
        **{"tuned": "one", "more": None, "eight": "eight", "better": "one", "best": "eight", "last": "eight"},
    }
    assert {row: found.row(row).pattern for row in found.rows} == {
        **{"dense": None, "one": "2:4", "own": "2:4", "plain": "4:8"},
        **{"tuned": "2:4", "more": None, "eight": "4:8", "better": "2:4", "best": "4:8", "last": "4:8"},
    }
    assert [row for row in found.rows if found.row(row).updates_weights] == ["better", "tuned", "more", "last", "best"]
    with pytest.raises(ConfigError, match="no row 'x'"):
        found.row("x")


@pytest.mark.parametrize(
    ("dense", "seeds"),
    [
        ({"init": "scratch", "steps": 5}, [3, 1]),
        ({"init": "scratch", "steps": 5, "shared": True}, [3, 3]),
        ({"init": "pretrained"}, [3, 3]),
        ({"init": "checkpoint", "checkpoint": "a.safetensors"}, [3, 3]),
    ],
)
def test_dense_model_of_a_seed(dense: dict[str, Any], seeds: list[int]) -> None:
    found = parse_experiment({**params(), "seeds": [3, 1], "dense": {"row": "dense", **dense}})
    assert [found.dense_seed(seed) for seed in found.seeds] == seeds
    assert found.row("dense").seeds == list(dict.fromkeys(seeds))
    for row in ("one", "own", "better", "tuned", "more"):
        assert found.row(row).seeds == [3, 1]


OF_ONE_SOURCE = {
    "masks",
    "annotations",
    "ignored",
    "zero_is_ignored",
    "suffix",
    "image_suffix",
    "empty_boxes",
    "scenes",
}
UNWRITTEN = {"inputs", "gate", "permutation", "weights", "convolutions"}  # at their defaults; older records still fit
COMMON = {"table", "exact", "seeds", "data", "task", "model", "dense"}


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ("dense", COMMON),
        ("one", COMMON | {"pattern", "prior"}),
        ("own", COMMON | {"pattern", "prior", "learning"}),
        ("better", COMMON | {"pattern", "prior", "update"}),
        ("tuned", COMMON | {"pattern", "prior", "finetuning"}),
        ("more", COMMON | {"finetuning"}),
    ],
)
def test_row_settings_are_plain_and_complete(row: str, keys: set[str]) -> None:
    found = parse_experiment(params()).row(row).made_with()
    assert set(found) == keys
    assert json.loads(json.dumps(found)) == found
    sections = {"prior": "priors.one", "learning": "learned.own", "finetuning": "finetuned.tuned"}
    sections["update"] = "updated.better"
    for key in keys - {"table", "exact", "seeds", "pattern"}:
        unwritten = OF_ONE_SOURCE if key == "data" else UNWRITTEN
        assert set(found[key]) == set(SECTIONS[sections.get(key, key)]) - unwritten


# (change, rows whose settings change)
ALL = "dense one own plain better tuned more"
CHANGES = [
    ("title", "Other", ""),
    ("rows.own", "Other", ""),
    *((f"runtime.{key}", 2, "") for key in SECTIONS["runtime"] if key not in ("device", "checkpoint_minutes", "live")),
    ("runtime.device", "cpu", ""),
    ("runtime.checkpoint_minutes", 1.5, ""),
    ("runtime.live", False, ""),
    ("learned.own.lr", 0.1, "own"),
    ("updated.better.damping", 0.2, "better"),
    ("finetuned.tuned.lr", 0.1, "tuned"),
    ("finetuned.more.start", "one", "more"),
    ("learning.lr", 0.1, "own plain tuned more"),
    ("learning.gate", "positions", "own plain"),
    ("learned.own.gate", "positions", "own"),
    ("learning.steps", 3, "plain tuned"),
    ("learning.tau", [3.0, 0.1], "own plain"),
    ("priors.one.method", "wanda", "one own plain better tuned"),
    ("priors.one.pattern", "4:8", "one own plain better tuned"),
    ("priors.one.permutation", "greedy", "one own plain better tuned"),
    ("pattern", "4:8", "one own plain better tuned"),
    ("exact", True, ALL),
    ("seeds", [0], ALL),
    ("table", "other", ALL),
    ("data.split_seed", 5, ALL),
    ("data.holdout", 11, ALL),
    ("task.shift", 2, ALL),
    ("task.eval_split", "holdout", ALL),
    ("model.args", {"img_size": 4}, ALL),
    ("model.input", {"img_size": 4}, ALL),
    ("dense.lr", 0.1, ALL),
    ("dense.shared", True, ALL),
]


@pytest.mark.parametrize(("path", "value", "rows"), CHANGES, ids=[path for path, _, _ in CHANGES])
def test_row_settings_change_with_what_a_row_depends_on(path: str, value: Any, rows: str) -> None:
    before, after = parse_experiment(params()), parse_experiment(changed(path, value))
    assert before != after
    moved = {row for row in before.rows if before.row(row).made_with() != after.row(row).made_with()}
    assert moved == set(rows.split())
    moved = {row for row in before.rows if settings_digest(before, row) != settings_digest(after, row)}
    assert moved == set(rows.split())


def test_gate_is_written_down_only_where_it_is_not_the_default() -> None:
    assert (
        parse_experiment(changed("learned.own.gate", "candidates")).row("own").made_with()
        == parse_experiment(params()).row("own").made_with()
    )
    found = parse_experiment(changed("learned.own.gate", "positions"))
    assert found.row("own").made_with()["learning"]["gate"] == "positions"
    assert "gate" not in found.row("plain").made_with()["learning"]


OTHER = {float: 0.25, int: 11, bool: True, str: "x", tuple: [0.125, 0.5]}
OTHER_CHOICE = {
    **{"init": "magnitude", "anneal": "epoch", "propagate": "pruned", "select": "best", "amp": "bf16"},
    **{"accumulate": 2, "epochs": 0.25, "optimizer_args": {"a": 1}, "pattern": "4:8", "start": "dense"},
    **{"masks": "own", "update": "sparsegpt", "target": "symmetric"},
}


@pytest.mark.parametrize(
    ("row", "key"),
    [("learned.own", key) for key in LEARNING if key not in UNWRITTEN]
    + [("finetuned.tuned", key) for key in FINETUNING]
    + [("updated.better", key) for key in SECTIONS["updated.better"] if key not in UNWRITTEN],
)
def test_no_setting_of_a_made_row_reaches_another(row: str, key: str) -> None:
    raw, (section, name) = params(), row.split(".")
    before: Any = parse_experiment(raw)
    now = getattr(getattr(before, section)[name], key)
    if key == "epochs":
        raw[section][name].pop("steps", None)
    raw[section][name][key] = other_value(key, now)
    after = parse_experiment(raw)
    moved = {row for row in before.rows if before.row(row).made_with() != after.row(row).made_with()}
    assert moved == {name}


CHAIN = ["first", "second", "third", "fourth"]


def chain() -> dict[str, Any]:
    """Learned, updated, learned again on the updated weights, updated again; the first from a row that updates."""
    raw = params()
    raw["priors"]["two"] = {"method": "sparsegpt", "update_weights": True}
    raw["learned"]["first"] = {"prior": "two", "weights": "updated"}
    raw["updated"]["second"] = {"masks": "first", "update": "least_squares"}
    raw["learned"]["third"] = {"prior": "second", "weights": "updated"}
    raw["updated"]["fourth"] = {"masks": "third", "update": "sparsegpt"}
    raw["rows"] |= {row: row for row in ("two", *CHAIN)}
    return raw


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("priors.two", {"batch_size": 3}),
        ("learned.first", {"lr": 0.1}),
        ("updated.second", {"damping": 0.2}),
        ("learned.third", {"tau": [1.0, 1.0]}),
        ("updated.fourth", {"damping": 0.2}),
    ],
)
def test_settings_of_a_chain_hold_all_before_them(section: str, change: dict[str, Any]) -> None:
    raw = chain()
    before = parse_experiment(raw)
    rows, name = ["two", *CHAIN], section.split(".")[1]
    raw[section.split(".")[0]][name] |= change
    after = parse_experiment(raw)
    moved = [row for row in after.rows if before.row(row).made_with() != after.row(row).made_with()]
    assert moved == rows[rows.index(name) :]
    last = after.row("fourth").made_with()
    assert json.loads(json.dumps(last)) == last
    assert last["start"]["learning"]["weights"] == "updated"


def test_sparsegpts_update_is_its_authors_unless_the_row_says_otherwise() -> None:
    given: list[dict[str, Any]] = [{}, {"target": "symmetric"}, {"damping": 0.5}]
    found = [parse_experiment(changed("updated.better", {"masks": "one", "update": "sparsegpt", **g})) for g in given]
    assert [(e.updated["better"].target, e.updated["better"].damping) for e in found] == [
        *(("symmetric", 0.01), ("symmetric", 0.01), ("symmetric", 0.5))
    ]
    plain = parse_experiment(params()).updated["better"]
    assert (plain.target, plain.damping) == ("asymmetric", 0.1)


@pytest.mark.parametrize("key", [key for key in SECTIONS["priors.one"] if key not in UNWRITTEN])
def test_no_setting_of_a_prior_reaches_rows_without_it(key: str) -> None:
    raw = params()
    raw["priors"]["two"], raw["rows"]["two"] = {"method": "wanda"}, "Two"
    raw["learned"]["own"]["prior"] = "two"
    before = parse_experiment(raw)
    raw["priors"]["two"][key] = other_value(key, getattr(before.priors["two"], key))
    after = parse_experiment(raw)
    moved = {row for row in before.rows if before.row(row).made_with() != after.row(row).made_with()}
    assert moved == {"two", "own"}


def other_value(key: str, now: Any) -> Any:
    other = OTHER_CHOICE[key] if key in OTHER_CHOICE else not now if isinstance(now, bool) else OTHER[type(now)]
    assert other != now
    return other


def test_permutation_is_written_down_only_where_there_is_one() -> None:
    raw = params()
    raw["priors"]["one"]["permutation"] = "none"
    assert parse_experiment(raw).row("one").made_with() == parse_experiment(params()).row("one").made_with()
    permuted = parse_experiment(changed("priors.one.permutation", "greedy"))
    assert permuted.row("own").made_with()["prior"]["permutation"] == "greedy"
    assert parse_experiment(permuted.model_dump()) == permuted
    assert fault(changed("priors.one.permutation", "best")).startswith("params.yaml: priors.one.permutation is 'best'")


def test_row_settings_of_an_unknown_row_are_refused() -> None:
    with pytest.raises(ConfigError, match="no row 'x'"):
        parse_experiment(params()).row("x").made_with()


# Labels


def labelled(template: str, row: str = "own") -> str:
    raw = params()
    raw["rows"][row] = template
    return parse_experiment(raw).row(row).label


@pytest.mark.parametrize(
    ("template", "row", "label"),
    [
        ("MaskLLM ({steps} steps)", "own", "MaskLLM (7 steps)"),
        ("MaskLLM ({steps:,} steps), {pattern}", "plain", "MaskLLM (5,000 steps), 2:4"),
        ("{method} at {pattern}", "one", "magnitude at 2:4"),
        ("No {{braces}}", "dense", "No {braces}"),
    ],
)
def test_labels_are_templates_over_settings(template: str, row: str, label: str) -> None:
    raw = params()
    raw["learning"]["steps"], raw["learned"]["own"]["steps"] = 5000, 7
    raw["priors"]["one"]["method"] = "magnitude"
    raw["rows"][row] = template
    assert parse_experiment(raw).row(row).label == label


@pytest.mark.parametrize(
    ("template", "row", "why"),
    [
        ("({step} steps)", "own", r"it names 'step'; allowed: .*steps"),
        ("({steps} steps)", "one", "it names 'steps'; allowed: "),
        ("({pattern})", "dense", "it names 'pattern'; allowed: "),
        ("({betas})", "own", "it names 'betas'; allowed: "),
        ("({epochs} epochs)", "own", "it names 'epochs'; allowed: "),  # not set
        ("({steps.real})", "own", "it names 'steps.real'; allowed: "),
        ("{} steps", "own", "it names ''; allowed: "),
        ("(steps}", "own", "Single '}' encountered"),
        ("({steps", "own", "expected '}' before end of string"),
        ("{steps:%}}", "own", "Single '}'"),
        ("{steps:q}", "own", "Unknown format code 'q'"),
        ("{steps:{lr}}", "own", "a format specification holds braces"),
    ],
)
def test_labels_that_name_no_setting_are_errors(template: str, row: str, why: str) -> None:
    with pytest.raises(ConfigError, match=rf"rows\.{row} is .*: {why}"):
        labelled(template, row)


def test_committed_labels_say_their_length_by_themselves() -> None:
    for path in (ROOT / "experiments").glob("*.yaml"):
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert not [label for label in raw["rows"].values() if re.search(r"\d (steps|epochs?)", label)]
