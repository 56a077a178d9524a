"""Trained rows and their budgets, and how sections agree."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from small_params import at, changed, fault, params

from maskllm4v.config import TrainingSettings, parse_experiment, starts
from maskllm4v.sparsity import patterns
from maskllm4v.utils.errors import ConfigError

# Trained rows


def test_learning_defaults_reach_rows_and_own_values_win() -> None:
    found = parse_experiment(params()).learned
    assert (found["own"].steps, found["own"].lr, found["own"].hard) == (9, 0.5, True)
    assert (found["plain"].steps, found["plain"].lr, found["plain"].hard) == (7, 0.5, False)
    assert found["plain"].tau == (4.0, 0.05)  # neither says anything


def test_rows_without_learning_section_take_the_defaults() -> None:
    raw = params()
    del raw["learning"]
    raw["learned"]["plain"]["steps"] = raw["finetuned"]["tuned"]["steps"] = 3
    found = parse_experiment(raw)
    assert [found.learned[row].steps for row in ("own", "plain")] == [9, 3]
    assert [found.learned[row].lr for row in ("own", "plain")] == [1e-3, 1e-3]
    assert (found.learned["own"].min_lr, found.finetuned["tuned"].min_lr) == (1e-4, 0.0)


def test_learning_reaches_finetuned_rows_where_they_know_the_key() -> None:
    raw = params()
    raw["learning"] |= {"tau": [3.0, 0.1], "ema": 0.5, "min_lr": 0.25}
    raw["finetuned"]["more"]["lr"] = 0.125
    found = parse_experiment(raw).finetuned
    assert (found["tuned"].steps, found["tuned"].lr, found["tuned"].ema, found["tuned"].min_lr) == (7, 0.5, 0.5, 0.25)
    assert (found["more"].steps, found["more"].lr, found["more"].ema) == (4, 0.125, 0.5)


@pytest.mark.parametrize("row", ["learned.plain", "finetuned.tuned"])
@pytest.mark.parametrize(("common", "own"), [("steps", "epochs"), ("epochs", "steps"), ("epochs", "epochs")])
def test_a_rows_budget_goes_before_the_common_one(row: str, common: str, own: str) -> None:
    raw = params()
    raw["learning"] = {common: 8}
    at(raw, row)[own] = 3
    found: Any = parse_experiment(raw)
    section, name = row.split(".")
    trained = getattr(found, section)[name]
    assert {"steps": trained.steps, "epochs": trained.epochs} == {"steps": None, "epochs": None, own: 3}


@pytest.mark.parametrize("row", ["learned.plain", "finetuned.tuned"])
def test_row_without_a_budget_is_named(row: str) -> None:
    raw = params()
    del raw["learning"]["steps"]
    for name in {"learned.plain", "finetuned.tuned"} - {row}:
        at(raw, name)["steps"] = 1
    assert fault(raw) == f"params.yaml: {row} needs steps or epochs, there or in learning"


@pytest.mark.parametrize("row", ["dense", "learning", "learned.own", "finetuned.more"])
def test_steps_and_epochs_are_exclusive(row: str) -> None:
    raw = params()
    at(raw, row)["epochs"] = 2
    assert f"params.yaml: {row}: one of steps and epochs, not both" in fault(raw).splitlines()


def test_dense_model_from_scratch_needs_a_budget() -> None:
    raw = params()
    del raw["dense"]["steps"]
    assert fault(raw) == "params.yaml: dense: steps or epochs is needed for init 'scratch'"
    raw["dense"]["init"] = "pretrained"
    assert parse_experiment(raw).dense.steps is None


@pytest.mark.parametrize(
    ("settings", "steps"),
    [({"steps": 9}, 9), ({"epochs": 2}, 20), ({"epochs": 0.5}, 5), ({"epochs": 0.25}, 3), ({"epochs": 0.01}, 1)],
)
def test_epochs_are_steps_in_the_end(settings: dict[str, Any], steps: int) -> None:
    assert TrainingSettings(**settings).total_steps(10) == steps


def test_steps_of_no_budget_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="a training needs steps or epochs"):
        TrainingSettings().total_steps(10)


@pytest.mark.parametrize("row", ["dense", "learning", "learned.own", "finetuned.tuned"])
def test_micro_batches_divide_a_batch(row: str) -> None:
    raw = params()
    at(raw, row).update(batch_size=12, accumulate=5)
    line = f"params.yaml: {row}: accumulate is 5, which does not divide batch_size 12"
    assert line in fault(raw).splitlines()
    at(raw, row)["accumulate"] = 4
    parse_experiment(raw)


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
    for section, row in (("learned", "plain"), ("finetuned", "tuned")):
        del raw[section][row], raw["rows"][row]
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


def start_from_nothing(raw: dict[str, Any]) -> None:
    raw["finetuned"]["tuned"]["start"] = "two"


def start_from_learned(raw: dict[str, Any]) -> None:
    raw["finetuned"]["tuned"]["start"] = "own"


def repeat_finetuned_row(raw: dict[str, Any]) -> None:
    raw["finetuned"]["own"] = {"start": "one"}


def repeat_updated_row(raw: dict[str, Any]) -> None:
    raw["updated"]["own"] = {"masks": "one", "update": "sparsegpt"}


def update_nothing(raw: dict[str, Any]) -> None:
    raw["updated"]["better"]["masks"] = "tuned"


def update_updated(raw: dict[str, Any]) -> None:
    raw["updated"]["better"]["masks"] = "better"


def update_for_another_target(raw: dict[str, Any]) -> None:
    raw["updated"]["better"] |= {"update": "sparsegpt", "target": "asymmetric"}


def update_from_no_generator(raw: dict[str, Any]) -> None:
    raw["updated"]["better"]["inputs"] = "generated"


def learn_on_weights_nobody_updated(raw: dict[str, Any]) -> None:
    raw["learned"]["own"]["weights"] = "updated"


def learn_from_updated_without_its_weights(raw: dict[str, Any]) -> None:
    raw["learned"]["own"]["prior"] = "better"


def go_in_a_circle(raw: dict[str, Any]) -> None:
    raw["learned"]["own"] |= {"prior": "better", "weights": "updated"}
    raw["updated"]["better"]["masks"] = "own"


def update_with_settings_of_none(raw: dict[str, Any]) -> None:
    raw["updated"]["better"] = {"masks": "one", "update": "none", "damping": 1.0}


def no_pattern(raw: dict[str, Any]) -> None:
    raw["priors"]["one"]["pattern"] = "4:2"


def wide_pattern(raw: dict[str, Any]) -> None:
    raw["pattern"] = "20:40"


def too_many_candidates(raw: dict[str, Any]) -> None:
    raw["priors"]["one"]["pattern"] = "8:16"


def export_masks_without_their_weights(raw: dict[str, Any]) -> None:
    raw["exports"]["better"] = {"formats": ["mask"]}


def select_without_holdout(raw: dict[str, Any]) -> None:
    del raw["data"]["holdout"]
    raw["learned"]["own"]["select"] = "best"


def report_without_holdout(raw: dict[str, Any]) -> None:
    del raw["data"]["holdout"]
    raw["task"]["eval_split"] = "holdout"


def export_nothing(raw: dict[str, Any]) -> None:
    raw["exports"]["two"] = {}


def pack_dense_row(raw: dict[str, Any]) -> None:
    raw["exports"]["more"] = {"formats": ["dense", "packed"]}


def graph_in_bfloat16(raw: dict[str, Any]) -> None:
    raw["exports"]["own"] = {"formats": ["onnx"], "dtypes": ["bf16"]}


def repeat_seed(raw: dict[str, Any]) -> None:
    raw["seeds"] = [0, 1, 0]


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (drop_row, ["'own' is made but not listed", "dense, one, plain, better, tuned, more"]),
        (invent_row, ["'ghost' is listed but made nowhere", "better, dense, more, one, own, plain, tuned"]),
        (repeat_dense_row, ["name the same row twice"]),
        (repeat_prior_row, ["name the same row twice"]),
        (name_unknown_prior, ["learned.own.prior is 'two'", "allowed: one, better"]),
        (name_learned_prior, ["learned.own.prior is 'plain'", "allowed: one, better"]),
        (start_from_nothing, ["finetuned.tuned.start is 'two'", "allowed: dense, one"]),
        (start_from_learned, ["finetuned.tuned.start is 'own'", "allowed: dense, one"]),
        (repeat_finetuned_row, ["name the same row twice"]),
        (repeat_updated_row, ["name the same row twice"]),
        (update_nothing, ["updated.better.masks is 'tuned'", "allowed: one, own, plain"]),
        (update_updated, ["updated.better.masks is 'better'", "allowed: one, own, plain"]),
        (update_for_another_target, ["updated.better: target is 'asymmetric'", "update 'sparsegpt': 'symmetric'"]),
        (update_from_no_generator, ["better: inputs is 'generated', which task 'classification' cannot make"]),
        (learn_on_weights_nobody_updated, ["learned.own.weights is 'updated', but prior 'one' updates none"]),
        (learn_from_updated_without_its_weights, ["learned.own.prior is 'better'", "say weights: updated", "'one'"]),
        (go_in_a_circle, ["own: its masks come from itself: own ← better ← own"]),
        (update_with_settings_of_none, ["updated.better: damping is 1.0, but update is 'none'"]),
        (no_pattern, ["pattern of one is '4:2'", "1 <= N < M"]),
        (wide_pattern, ["is '20:40'", "M <= 16, or few candidates"]),
        (too_many_candidates, ["learned.own.gate is 'candidates', too many for 8:16; allowed: 'positions'"]),
        (export_masks_without_their_weights, ["exports.better.formats holds 'mask'", "weights are updated, too"]),
        (select_without_holdout, ["learned.own.select is 'best', which needs data.holdout"]),
        (report_without_holdout, ["task.eval_split is 'holdout', which needs data.holdout"]),
        (export_nothing, ["exports: 'two' is no row", "allowed: dense, one, own, plain, better, tuned, more"]),
        (pack_dense_row, ["exports.more.formats holds 'packed', but the row is dense"]),
        (graph_in_bfloat16, ["exports.own: formats holds 'onnx'", "dtypes has neither"]),
        (repeat_seed, ["seeds: [0, 1, 0] holds one twice"]),
    ],
)
def test_sections_have_to_agree(spoil: Callable[[dict[str, Any]], None], parts: list[str]) -> None:
    raw = params()
    spoil(raw)
    message = fault(raw)
    assert message.startswith("params.yaml: ")
    assert all(part in message for part in parts)


@pytest.mark.parametrize(("path", "value"), [("learned.own.select", "best"), ("task.eval_split", "holdout")])
def test_held_out_images_allow_to_choose(path: str, value: str) -> None:
    parse_experiment(changed(path, value))


def test_exported_files_are_listed_once_each() -> None:
    given = {"formats": ["packed", "mask", "onnx", "mask"], "dtypes": ["bf16", "fp16", "bf16"]}
    files = parse_experiment(changed("exports.own", given)).exports["own"].files()
    assert files == [("packed", "bf16"), ("packed", "fp16"), ("mask", None), ("onnx", "fp16")]
    assert parse_experiment(changed("exports.tuned", {})).exports["tuned"].files() == [
        *(("packed", dtype) for dtype in ("fp32", "fp16")),
        *(("dense", dtype) for dtype in ("fp32", "fp16")),
    ]


def test_limits_are_those_of_patterns() -> None:
    """Which import torch, so that settings have them a second time."""
    assert (starts.MAX_CANDIDATES, starts.MAX_WIDE) == (patterns.MAX_CANDIDATES, patterns.MAX_WIDE)


def test_wide_patterns_with_a_logit_a_position() -> None:
    raw = params()
    too_many_candidates(raw)
    raw["learned"] = {row: {**learned, "gate": "positions"} for row, learned in raw["learned"].items()}
    assert parse_experiment(raw).row("own").pattern == "8:16"
