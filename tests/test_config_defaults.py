"""Settings at their defaults are no part of a record, so that new ones change none; all others are."""

from __future__ import annotations

import ast
import inspect
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from import_graph import ROOT
from small_diffusion import raw as diffusion
from small_params import SECTIONS, at, changed, params

from maskllm4v.config import Experiment, Settings, UpdatedSettings, load_experiment, parse_experiment
from maskllm4v.config.experiment import experiment_class
from maskllm4v.config.tasks import task_names
from maskllm4v.reporting.report import experiment_files
from maskllm4v.runs.records import settings_digest
from maskllm4v.tasks.classification.settings import ClassificationSettings, InputSettings

EXPERIMENTS = sorted(experiment_files(ROOT))
TABLES = [
    "cifar10",
    "digits",
    "digits_detection",
    "digits_patterns",
    "digits_segmentation",
    "dit_digits",
]  # those with records
ADDED = "an_added_setting"


def reachable() -> set[type[Settings]]:
    """All sections of experiments of all tasks, however deep, with the classes that they are derived from."""
    found: set[type[Settings]] = set()

    def visit(annotation: Any) -> None:
        if isinstance(annotation, type) and issubclass(annotation, Settings) and annotation not in found:
            found.update(base for base in annotation.__mro__ if issubclass(base, Settings) and base is not Settings)
            for field in annotation.model_fields.values():
                visit(field.annotation)
        for inner in get_args(annotation):
            visit(inner)

    for task in task_names():
        visit(experiment_class(task))
    return found - {experiment_class(task) for task in task_names()}


SECTION_NAMES = sorted(section.__name__ for section in reachable())

# New settings in copies of the package, one section after the other, and which rows are then measured.
COUNT = f"""
import importlib, json, sys
from pathlib import Path
root, folder = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(folder))
found = {{}}
for file, name, line in json.load(sys.stdin):
    path = folder / file
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    path.write_text("".join([*lines[:line], "    {ADDED}: int = 7\\n", *lines[line:]]))
    for module in [module for module in sys.modules if module.partition(".")[0] == "maskllm4v"]:
        del sys.modules[module]
    importlib.invalidate_caches()
    config, aggregate = (importlib.import_module(f"maskllm4v.{{m}}") for m in ("config", "reporting.aggregate"))
    experiments = [config.load_experiment(path) for path in sorted((root / "experiments").glob("*.yaml"))]
    section = sys.modules["maskllm4v." + ".".join(Path(file).with_suffix("").parts[1:])]
    assert "{ADDED}" in getattr(section, name).model_fields
    found[name] = {{e.table: list(aggregate.current_records(e, root / "reports")) for e in experiments}}
    path.write_text(text)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[str]]]:
    """Rows that are measured where a section has one more setting, by section, then by table."""
    folder = tmp_path_factory.mktemp("copy")
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "maskllm4v", folder / "maskllm4v", ignore=ignore)
    places = []
    for section in reachable():
        source, first = inspect.getsourcelines(section)
        body = ast.parse("".join(source)).body[0]
        assert isinstance(body, ast.ClassDef)
        end = body.body[0].end_lineno  # of the docstring
        assert end is not None
        file = Path(inspect.getfile(section)).relative_to(ROOT).as_posix()
        places.append([file, section.__name__, first + end - 1])
    command = [sys.executable, "-B", "-c", COUNT, str(ROOT), str(folder)]
    done = subprocess.run(command, input=json.dumps(places), cwd=folder, check=True, capture_output=True, text=True)
    found: dict[str, dict[str, list[str]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("section", SECTION_NAMES)
def test_a_new_setting_with_a_default_leaves_every_table_measured(
    section: str, measured: dict[str, dict[str, list[str]]]
) -> None:
    for table in TABLES:
        assert measured[section][table] == list(load_experiment(ROOT / f"experiments/{table}.yaml").rows)


def test_all_sections_are_tried(measured: dict[str, dict[str, list[str]]]) -> None:
    some = {"Experiment", "TaskSettings", "ClassificationSettings", "DiTSettings", "JudgeSettings", "LearnedSettings"}
    assert some <= measured.keys()
    assert len(measured) == len(SECTION_NAMES) >= 20


# What is written down


def sections(value: Any) -> Iterator[Settings]:
    """All sections of an experiment, however deep."""
    if isinstance(value, Settings):
        yield value
        value = dict(value)
    if isinstance(value, dict):
        for inner in value.values():
            yield from sections(inner)


@pytest.mark.parametrize("file", EXPERIMENTS)
def test_a_section_comes_back_from_what_is_written_down(file: str) -> None:
    found = [s for s in sections(load_experiment(ROOT / f"experiments/{file}.yaml")) if not isinstance(s, Experiment)]
    assert len(found) > 10
    for section in found:
        written = section.beyond_defaults()
        assert json.loads(json.dumps(written)) == written
        assert type(section).model_validate(written) == section


@pytest.mark.parametrize("file", EXPERIMENTS)
def test_all_settings_are_those_beyond_defaults_and_defaults(file: str) -> None:
    experiment = load_experiment(ROOT / f"experiments/{file}.yaml")
    for row in experiment.rows:
        all_, written = experiment.row(row).record_settings(defaults=True), experiment.row(row).record_settings()
        assert written.keys() == all_.keys()
        assert len(json.dumps(written)) < len(json.dumps(all_))
        for key in ("table", "exact", "seeds"):
            assert written[key] == all_[key]
        for key in ("data", "task", "model"):
            assert written[key]["name"] == all_[key]["name"]


def test_what_has_no_default_and_what_names_a_kind_is_always_written_down() -> None:
    found = parse_experiment(params())
    assert found.row("own").record_settings() == {
        **{"table": "t", "exact": False, "seeds": [0, 1], "pattern": "2:4"},
        "data": {"name": "digits", "source": "digits", "holdout": 10},
        "task": {"name": "classification"},
        "model": {
            "name": "VisionTransformer",
            "args": {"img_size": 8},
            "stem": {"channels": [4, 8], "strides": [2, 1]},
        },
        "dense": {"row": "dense", "init": "scratch", "steps": 5, "progressive": {"size": 4, "steps": 3}},
        "prior": {"method": "magnitude"},
        "learning": {"prior": "one", "steps": 9, "lr": 0.5, "hard": True},
    }
    assert found.row("better").record_settings()["update"] == {"masks": "one", "update": "least_squares"}
    assert found.row("more").record_settings()["finetuning"] == {"start": "dense", "steps": 4, "lr": 0.5}


def test_a_section_of_defaults_alone_is_empty() -> None:
    raw = diffusion()
    raw["evaluation"] = {}
    found = parse_experiment(raw)
    assert all(found.row(row).record_settings()["evaluation"] == {} for row in found.rows)


def test_a_default_that_is_given_is_not_written_down() -> None:
    raw = params()
    raw["model"]["input"] = {"mean": None}
    raw["task"] = {"name": "classification", "mixup": 0.0}
    raw["dense"] |= {"betas": [0.9, 0.999], "optimizer": "adamw"}
    given, plain = parse_experiment(raw), parse_experiment(params())
    assert all(given.row(row).record_settings() == plain.row(row).record_settings() for row in plain.rows)


class Inner(Settings):
    """All at its defaults unless it is given more."""

    size: int = 3


class Outer(Settings):
    """Sections in a section: one that need not be there, and one whose default is not that of its class."""

    maybe: Inner | None = None
    bigger: Inner = Inner(size=5)
    many: dict[str, Inner] = {}
    listed: list[Inner] = []


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({}, {}),
        ({"maybe": {}}, {"maybe": {}}),  # there, with nothing of its own; not the same as missing
        ({"maybe": {"size": 4}}, {"maybe": {"size": 4}}),
        ({"bigger": {"size": 5}}, {}),
        ({"bigger": {}}, {"bigger": {}}),  # 3, its class's default
        ({"many": {"a": {}, "b": {"size": 1}}}, {"many": {"a": {}, "b": {"size": 1}}}),
        ({"listed": [{}, {"size": 1}]}, {"listed": [{}, {"size": 1}]}),
    ],
)
def test_sections_inside_a_section(given: dict[str, Any], written: dict[str, Any]) -> None:
    found = Outer.model_validate(given)
    assert found.beyond_defaults() == written
    assert Outer.model_validate(written) == found


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ({"update": "sparsegpt"}, {}),
        ({"update": "sparsegpt", "damping": 0.1}, {"damping": 0.1}),
        ({"update": "sparsegpt", "damping": 0.01, "target": "symmetric"}, {}),
        ({"update": "least_squares"}, {}),
        ({"update": "least_squares", "damping": 0.01}, {"damping": 0.01}),
        ({"update": "least_squares", "target": "symmetric"}, {"target": "symmetric"}),
        ({"update": "none"}, {}),
    ],
)
def test_defaults_that_depend_on_the_update(given: dict[str, Any], written: dict[str, Any]) -> None:
    found = UpdatedSettings.model_validate({"masks": "one", **given})
    assert found.beyond_defaults() == {"masks": "one", "update": given["update"], **written}


def test_text_in_arguments_stays_as_it_is() -> None:
    raw = changed("model.args", {"img_size": 8, "nested": {"a": [1, {"b": None}]}, "flag": False})
    assert parse_experiment(raw).row("dense").record_settings()["model"]["args"] == raw["model"]["args"]


def test_defaults_of_a_class() -> None:
    assert InputSettings().defaults() == dict.fromkeys(SECTIONS["model.input"])
    assert set(ClassificationSettings().defaults()) == set(SECTIONS["task"])


def test_back_to_the_default_is_back_to_the_digest() -> None:
    raw = params()
    for key, field in ClassificationSettings.model_fields.items():
        at(raw, "task")[key] = list(field.default) if isinstance(field.default, tuple) else field.default
    before, after = parse_experiment(params()), parse_experiment(raw)
    assert [settings_digest(before, row) for row in before.rows] == [settings_digest(after, row) for row in after.rows]
