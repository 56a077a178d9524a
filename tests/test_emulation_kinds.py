"""Which calls of stages are run on emulated CPUs: settings cut short, calls in order, one of each kind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from import_graph import ROOT

from maskllm4v.config import Experiment, load_experiment, parse_experiment
from maskllm4v.tasks.diffusion.settings import DiffusionSettings
from scripts.emulation.kinds import kind, needed, representatives
from scripts.emulation.pipeline import Call, calls
from scripts.emulation.shortened import CAPS, exact_tables, shortened

TABLES = exact_tables(ROOT)
SHORT = {table: shortened(experiment) for table, experiment in TABLES.items()}


def test_exact_tables_are_found_by_their_setting() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "experiments").glob("*.yaml")]
    assert len(TABLES) == sum("\nexact: true" in text for text in texts) > 0
    assert all(experiment.exact for experiment in TABLES.values())


# Settings


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, (*path, name))
    else:
        yield path, value


def settings(experiment: Experiment) -> dict[str, Any]:
    """All of them, those of scenes at their defaults, too, which are not written down."""
    found: dict[str, Any] = experiment.model_dump(mode="json")
    if experiment.data.source == "scenes":
        found["data"]["scenes"] = experiment.data.scenes.model_dump(mode="json")
    return found


@pytest.mark.parametrize("table", TABLES)
def test_only_amounts_are_cut(table: str) -> None:
    before, after = (dict(leaves(settings(e))) for e in (TABLES[table], SHORT[table]))
    assert before.keys() == after.keys()
    changed = {path for path in before if before[path] != after[path]}
    lists = {("seeds",), ("evaluation", "grid")}
    exports = {path for path in changed if path[0] == "exports"}
    runtime = {path for path in changed if path[0] == "runtime"}
    amounts = {path for path in changed if path[-1] in {*CAPS, "test_fraction"}}
    assert changed <= lists | exports | runtime | amounts
    for path in amounts:
        assert 0 < after[path] < before[path]
    for path in lists & changed:
        assert after[path] == before[path][: len(after[path])]
    for path in exports:
        assert after[path]
        assert set(after[path]) < set(before[path])


@pytest.mark.parametrize("table", TABLES)
def test_trainings_have_a_few_steps_and_one_seed(table: str) -> None:
    short = SHORT[table]
    trained = [
        short.dense,
        *short.learned.values(),
        *short.finetuned.values(),
        *([short.task.judge.training] if isinstance(short.task, DiffusionSettings) and short.task.judge else []),
    ]
    assert {training.steps for training in trained} == {CAPS["steps"]}
    assert len(short.seeds) == short.runtime.seed_processes == 1
    assert short.runtime.device == "cpu"


def small(**sections: Any) -> Experiment:
    """The digits, with one prior and one learned row; sections add to it or replace values."""
    raw = TABLES["digits"].model_dump(mode="json")
    raw |= {"learned": {"l": {**raw["learned"]["digits-maskllm-detinit"], "prior": "p", "init": "prior"}}}
    raw |= {"priors": {"p": {"method": "magnitude"}}, "updated": {}, "finetuned": {}, "exports": {}}
    for section, values in sections.items():
        raw[section] = {**raw[section], **values} if isinstance(values, dict) else values
    made = [raw["dense"]["row"], *(row for name in ("priors", "learned", "updated", "finetuned") for row in raw[name])]
    return parse_experiment({**raw, "rows": {row: row for row in made}})


def test_epochs_become_steps() -> None:
    row = {**small().learned["l"].model_dump(mode="json"), "steps": None, "epochs": 2.0}
    found = shortened(small(learned={"l": row})).learned["l"]
    assert (found.steps, found.epochs) == (CAPS["steps"], None)


def test_small_amounts_stay() -> None:
    data = shortened(small(data={"calibration": 5, "test_fraction": 0.007})).data
    assert (data.calibration, data.test_fraction) == (5, 0.007)


def test_a_row_is_exported_in_what_is_left() -> None:
    found = shortened(small(exports={"l": {"formats": ["onnx"], "dtypes": ["fp16"]}})).exports["l"]
    assert found.formats == ["onnx"]
    assert found.dtypes == ["fp32"]


# Calls


@pytest.mark.parametrize("table", TABLES)
def test_calls_are_those_of_dvc(table: str) -> None:
    experiment, found = TABLES[table], calls(TABLES[table], ROOT)
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for call in found:
        assert len(call.outputs) == len(stages[call.stage]["do"]["outs"])
        assert not [path for path in (*call.inputs, *call.outputs) if "$" in path or path.startswith("maskllm4v")]
    names = [call.name for call in found]
    assert len(set(names)) == len(names)
    for row in experiment.rows:
        assert sum(call.key == row for call in found) == 2 + (row in experiment.exports)
    assert {path for call in found for path in call.inputs} <= {path for call in found for path in call.outputs}


@pytest.mark.parametrize("table", TABLES)
def test_each_call_comes_after_those_that_it_needs(table: str) -> None:
    written: set[str] = set()
    for call in calls(TABLES[table], ROOT):
        assert set(call.inputs) <= written
        written |= set(call.outputs)


DVC = """
stages:
  train:
    foreach: ${{learned}}
    do:
      cmd: {cmd}
      deps:
        - artifacts/${{item.prior}}
      outs:
        - artifacts/${{key}}
"""
DAMAGED = {
    "a command of another kind": (DVC.format(cmd="make ${key}"), "'make l' does not call one stage"),
    "one input is never there": (
        DVC.format(cmd="python -m stages.train ${key}").replace("item.prior", "key"),
        "wait for one another: digits train@l",
    ),
    "foreach over words": ("stages: {train: {foreach: rows, do: {}}}", "'rows' is not understood"),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_what_is_not_understood_is_an_error(fault: str, tmp_path: Path) -> None:
    text, message = DAMAGED[fault]
    (tmp_path / "dvc.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        calls(small(), tmp_path)


# Kinds

ALL = [call for experiment in SHORT.values() for call in calls(experiment, ROOT)]


def test_each_call_has_a_representative_of_its_kind() -> None:
    found = representatives(SHORT, ALL)
    assert list(found) == ALL
    for call, other in found.items():
        assert kind(SHORT[call.table], call) == kind(SHORT[other.table], other)
        assert found[other] == other
    assert len({kind(SHORT[call.table], call) for call in found.values()}) == len(set(found.values())) < len(ALL)


def test_long_trainings_are_of_the_kind_of_short_ones() -> None:
    found = {call.name: other.name for call, other in representatives(SHORT, ALL).items()}
    short, long = "train@digits-maskllm-short-sparsegpt", "train@digits-maskllm-long-magnitude"
    assert found[short] == found[long] == short
    assert found["update@digits-maskllm-long-ls"] == "update@digits-magnitude-ls"


def test_the_same_stage_of_another_table_is_of_the_same_kind() -> None:
    found = {call.name: other.name for call, other in representatives(SHORT, ALL).items()}
    assert found["dense@digits-patterns-dense"] == "dense@digits-dense"
    assert found["dense@dit-dense"] == "dense@dit-dense"


def test_every_method_option_and_loss_of_the_tables_is_run() -> None:
    """Counted a second time, from the settings."""
    run = set(representatives(SHORT, ALL).values())
    for table, experiment in SHORT.items():
        keys = {call.key for call in run if call.stage in ("prior", "train", "update")}
        for row, prior in experiment.priors.items():
            same = [
                other
                for other, p in experiment.priors.items()
                if (p.method, p.update_weights, p.permutation)
                == (prior.method, prior.update_weights, prior.permutation)
                and experiment.row(other).pattern == experiment.row(row).pattern
            ]
            assert keys & set(same), (table, row)
        for row, learned in experiment.learned.items():
            same = [
                other
                for other, o in experiment.learned.items()
                if (o.gate, o.init, o.distillation, o.inputs, o.weights)
                == (learned.gate, learned.init, learned.distillation, learned.inputs, learned.weights)
                and experiment.row(other).pattern == experiment.row(row).pattern
            ]
            assert keys & set(same), (table, row)
        for row, updated in experiment.updated.items():
            same = [
                o for o, u in experiment.updated.items() if (u.update, u.target) == (updated.update, updated.target)
            ]
            assert keys & set(same), (table, row)


def learned(**values: Any) -> dict[str, Any]:
    return {"learned": {"other": {**small().learned["l"].model_dump(mode="json"), **values}}}


UPDATED = {"u": {"masks": "p", "update": "least_squares"}}
OTHERS = {
    "method": {"priors": {"other": {"method": "wanda"}}},
    "update of weights": {"priors": {"other": {"method": "magnitude", "update_weights": True}}},
    "pattern of a prior": {"priors": {"other": {"method": "magnitude", "pattern": "1:4"}}},
    "permutation": {"priors": {"other": {"method": "magnitude", "permutation": "greedy"}}},
    "gate": learned(gate="positions"),
    "init": learned(init="magnitude"),
    "loss": learned(distillation=1.0),
    "both losses": learned(distillation=0.5),
    "no regularisation": learned(regularisation=0.0),
    "average": learned(ema=0.9),
    "optimiser": learned(optimizer="lion"),
    "hybrid": {**learned(prior="u", weights="updated"), "updated": UPDATED},
    "pattern of a learned row": {**learned(prior="q"), "priors": {"q": {"method": "magnitude", "pattern": "1:4"}}},
    "start of permuted channels": {
        **learned(prior="q"),
        "priors": {"q": {"method": "magnitude", "permutation": "greedy"}},
    },
    "target": {"updated": {**UPDATED, "other": {**UPDATED["u"], "target": "symmetric"}}},
    "update": {"updated": {**UPDATED, "other": {"masks": "p", "update": "sparsegpt"}}},
}


@pytest.mark.parametrize("setting", OTHERS)
def test_a_setting_makes_another_kind(setting: str) -> None:
    experiment = small(**OTHERS[setting])
    found = representatives({"digits": experiment}, calls(experiment, ROOT))
    makers = {call: other for call, other in found.items() if call.key == "other" and call.stage != "evaluate"}
    assert makers
    assert all(call == other for call, other in makers.items())


SAME = {
    "amounts": learned(lr=0.5, steps=2, tau=[3.0, 0.1]),
    "another share of a loss": {
        "learned": {**learned(distillation=0.5)["learned"], "more": learned(distillation=0.25)["learned"]["other"]}
    },
    "masks of a learned row": {"updated": {**UPDATED, "other": {"masks": "l", "update": "least_squares"}}},
}


@pytest.mark.parametrize("setting", SAME)
def test_names_and_amounts_make_no_other_kind(setting: str) -> None:
    experiment = small(**SAME[setting])
    last = [call for call in calls(experiment, ROOT) if call.key in ("other", "more") and call.stage != "evaluate"][-1]
    assert representatives({"digits": experiment}, calls(experiment, ROOT))[last] != last


def test_sizes_of_models_make_other_kinds() -> None:
    experiment = small()
    wider = small(model={"args": {**experiment.model.args, "embed_dim": 64}})
    for call in calls(experiment, ROOT):
        assert kind(experiment, call) != kind(wider, call)


def test_what_makes_inputs_is_needed() -> None:
    found = needed([call for call in ALL if call.name == "evaluate@digits-hybrid-short"], ALL)
    assert [call.name for call in found] == [
        "prepare@digits",
        "dense@digits-dense",
        "prior@digits-magnitude",
        "update@digits-magnitude-ls",
        "train@digits-hybrid-short",
        "evaluate@digits-hybrid-short",
    ]
    assert {call.table for call in found} == {"digits"}


def test_kinds_are_plain_text() -> None:
    call = Call("digits", "prior", "p", (), ())
    about = json.loads(kind(small(), call))
    assert (about["stage"], about["made"]["method"]) == ("prior", "magnitude")


def test_experiments_that_are_not_exact_are_left_out() -> None:
    others = {load_experiment(path).table for path in (ROOT / "experiments").glob("*.yaml")} - TABLES.keys()
    assert others
    assert all(not load_experiment(ROOT / "experiments" / f"{table}.yaml").exact for table in others)
