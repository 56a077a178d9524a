"""Tasks are found by name: their sections of ``params.yaml``, and what they are made of."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from import_graph import ROOT
from small_params import changed, fault, params

import maskllm4v.tasks
from maskllm4v.config import DataSettings, TaskSpec, load_experiment, parse_experiment
from maskllm4v.config import tasks as config_tasks
from maskllm4v.tasks.base import open_task

SETTINGS = """
from maskllm4v.config.sections import ModelSettings, Settings, TaskSettings
from maskllm4v.config.tasks import TaskSections

class RankingSettings(TaskSettings):
    name: str = "ranking"
    depth: int = 3

class Evaluation(Settings):
    rounds: int = 2

def check(experiment):
    if experiment.evaluation.rounds > experiment.task.depth:
        raise ValueError("more rounds than depth")

SECTIONS = TaskSections(RankingSettings, ModelSettings, Evaluation, {"distillation": 0.5}, check)
"""
TASK = """
class Ranking:
    def __init__(self, spec, data_folder):
        self.spec, self.folder = spec, data_folder

TASK = Ranking
"""


@pytest.fixture
def ranking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Params of a task that is a folder more."""
    folder = tmp_path / "ranking"
    folder.mkdir()
    for name, text in (("__init__", ""), ("settings", SETTINGS), ("task", TASK)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(config_tasks, "FOLDER", tmp_path)
    monkeypatch.setattr(maskllm4v.tasks, "__path__", [*maskllm4v.tasks.__path__, str(tmp_path)])
    raw = params() | {"model": {"name": "Net", "args": {"size": 3}}, "evaluation": {"rounds": 3}}
    yield raw | {"task": {"name": "ranking"}}
    for module in [module for module in sys.modules if module.startswith("maskllm4v.tasks.ranking")]:
        del sys.modules[module]


def test_a_new_task_is_a_new_folder(ranking: dict[str, Any]) -> None:
    found = parse_experiment(ranking)
    assert found.task.model_dump()["depth"] == 3
    assert (found.model.name, found.model.excluded_layers) == ("Net", [])
    assert found.learned["own"].distillation == 0.5
    assert found.row("own").record_settings()["evaluation"] == {"rounds": 3}
    opened: Any = open_task(found.task_spec(), Path("here"))
    assert type(opened).__name__ == "Ranking"
    assert (opened.spec, opened.folder) == (found.task_spec(), Path("here"))


def test_mistakes_in_the_sections_of_a_new_task(ranking: dict[str, Any]) -> None:
    keys = "allowed: name, eval_batch_size, eval_amp, eval_split, depth"
    assert fault({**ranking, "task": {"name": "ranking", "dept": 1}}) == (
        f"params.yaml: unknown key 'task.dept'; did you mean 'depth'? {keys}"
    )
    assert fault({**ranking, "evaluation": {"rounds": 9}}) == "params.yaml: more rounds than depth"


@pytest.mark.parametrize("name", ["pose", "Diffusion", "", 7, None, ["diffusion"]])
def test_unknown_task_is_answered_with_those_that_there_are(name: Any) -> None:
    expected = (
        f"params.yaml: task.name is {name!r}; allowed: 'classification', 'detection', 'diffusion', 'segmentation'"
    )
    assert fault(changed("task.name", name)) == expected


def test_task_is_classification_where_none_is_named() -> None:
    raw = params()
    del raw["task"]
    assert parse_experiment(raw) == parse_experiment(params())
    assert parse_experiment(raw).task.name == "classification"


@pytest.mark.parametrize(
    ("table", "tasks"), [("digits", ["classification"]), ("dit_digits", ["classification", "diffusion"])]
)
def test_an_experiment_loads_its_own_task_alone_and_no_torch(table: str, tasks: list[str]) -> None:
    """The second task's judge is a classifier."""
    code = (
        "import sys; from pathlib import Path; from maskllm4v.config import load_experiment;"
        f"load_experiment(Path('experiments/{table}.yaml'));"
        "print([m for m in ('numpy', 'torch') if m in sys.modules],"
        "sorted(m for m in sys.modules if m.startswith('maskllm4v.tasks.') and m.endswith('.settings')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == f"[] {[f'maskllm4v.tasks.{task}.settings' for task in tasks]}"


# What a task is made of


def test_a_table_gives_what_its_task_is_made_of() -> None:
    found = load_experiment(ROOT / "experiments" / "dit_digits.yaml")
    spec = found.task_spec(judge=Path("judge.safetensors"))
    assert (spec.task, spec.model, spec.evaluation) == (found.task, found.model, found.evaluation)
    assert (spec.data, spec.seeds, spec.runtime) == (found.data, found.seeds, found.runtime)
    assert spec.judge == Path("judge.safetensors")
    assert found.task_spec().judge is None


@pytest.mark.parametrize(("sets", "expected"), [(1, [0, 0, 0]), (2, [0, 1, 0]), (3, [0, 1, 2]), (5, [0, 1, 2])])
def test_seeds_take_turns_with_calibration_sets(sets: int, expected: list[int]) -> None:
    found = parse_experiment(params())
    data = DataSettings(name="digits", source="digits", calibration_sets=sets)
    spec = TaskSpec(found.task, found.model, data=data, seeds=[7, 3, 5])
    assert [spec.calibration_set(seed) for seed in spec.seeds] == expected
