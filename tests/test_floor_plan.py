"""Who may import whom; and what each stage depends on, compared with ``dvc.yaml``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from import_graph import ROOT, closure, imported_names, imports, modules

STOREYS = (  # from the ground up; a folder imports from those below its storey, never from a neighbour
    "utils",
    "config sparsity",
    "data checkpoints oneshot runs",
    "tasks receipts",
    "training evaluation export reporting",
    "tracking",
    "cli",
    "__main__",
)
CLOSED = {"oneshot": {"config"}}  # below, and not to be imported all the same: pruning knows no experiment
ALL = sorted(modules())
FOLDERS = [name for storey in STOREYS for name in storey.split()]


def folder(module: str) -> str:
    """``data`` for ``maskllm4v.data.folder``."""
    return module.split(".")[1]


def roots(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imported_names(modules()[module])}


def test_the_package_has_these_folders() -> None:
    assert {folder(module) for module in ALL if module.startswith("maskllm4v.")} == set(FOLDERS)


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_import_from_storeys_below(name: str) -> None:
    storey = next(i for i, names in enumerate(STOREYS) if name in names.split())
    below = {other for names in STOREYS[:storey] for other in names.split()} - CLOSED.get(name, set())
    inside = [module for module in ALL if module.startswith("maskllm4v.") and folder(module) == name]
    found = {(m, other) for m in inside for other in imports(m) - {"maskllm4v"} if folder(other) not in below | {name}}
    assert not found


TASKS = sorted(path.parent.name for path in (ROOT / "maskllm4v" / "tasks").glob("*/settings.py"))
BARE = ("utils", "runs", "tasks", "tasks/shared", *(f"tasks/{task}" for task in TASKS))
EMPTY = [f"maskllm4v/{name}/__init__.py" for name in BARE]


@pytest.mark.parametrize("path", EMPTY)
def test_the_pin_can_come_before_numpy_and_torch(path: str) -> None:
    assert (ROOT / path).read_text() == ""


LIBRARIES = {  # who may speak to it: a module, or a package as a whole
    "accelerate": {"maskllm4v.utils.distributed"},
    "dvc": set(),
    "jinja2": {"maskllm4v.reporting.page"},
    "matplotlib": {"maskllm4v.reporting.figures.samples"},
    "mlflow": {"maskllm4v.tracking"},
    "rich": {"maskllm4v.reporting.terminal"},
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_one_folder_speaks_to_each_library(library: str) -> None:
    found = {module for module in ALL if library in roots(module)}
    places = {place for module in found for place in LIBRARIES[library] if f"{module}.".startswith(f"{place}.")}
    strangers = {m for m in found if not any(f"{m}.".startswith(f"{place}.") for place in LIBRARIES[library])}
    assert (places, strangers) == (LIBRARIES[library], set())


@pytest.mark.parametrize("module", ALL)
def test_the_package_knows_nothing_of_what_uses_it(module: str) -> None:
    assert not {"benchmarks", "scripts", "tests"} & roots(module)
    if module.startswith("maskllm4v"):
        assert "stages" not in roots(module)


LIGHT = (
    "maskllm4v.config",
    "maskllm4v.receipts",
    "maskllm4v.reporting",
    "maskllm4v.runs.live",
    "maskllm4v.tracking.sender",
)


@pytest.mark.parametrize("module", [m for m in ALL if m.startswith(LIGHT)])
def test_reports_and_settings_need_no_torch(module: str) -> None:
    pin = "maskllm4v.utils.determinism"  # pin_torch imports torch, in stages; receipts read the pin's variables
    late = {pin, f"{pin}.portable"}
    assert not any({"torch", "timm"} & roots(name) for name in closure(module) - late)


def test_no_cycles() -> None:
    imported = {
        m: {other for other in imports(m) if not m.startswith(f"{other}.")} for m in ALL
    }  # not to one's own package
    while imported:
        leaves = {m for m, ahead in imported.items() if not ahead & imported.keys()}
        assert leaves, f"a cycle among {sorted(imported)}"
        imported = {m: ahead for m, ahead in imported.items() if m not in leaves}


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, maskllm4v; print([m for m in ('numpy', 'torch', 'timm', 'mlflow', 'dvc') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    import maskllm4v

    assert all(getattr(maskllm4v, name) is not None for name in maskllm4v.__all__)
    assert {name for name in dir(maskllm4v) if not name.startswith("__")} == set(maskllm4v.__all__)


# The packages' own __init__.py hold names and a version, if anything: nothing that a result could depend on.
EXEMPT = {"maskllm4v/__init__.py", "stages/__init__.py", *EMPTY}
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def declared_code(stage: str) -> list[str]:
    deps = STAGES[stage].get("do", STAGES[stage])["deps"]
    return [dep for dep in deps if dep.startswith(("maskllm4v/", "stages/"))]


def expanded(dep: str) -> list[str]:
    """What a dependency stands for, whichever task an experiment has."""
    return [dep.replace("${task.name}", name) for name in TASKS] if "${task.name}" in dep else [dep]


@pytest.mark.parametrize("stage", STAGES)
def test_stage_declares_the_code_that_it_imports(stage: str) -> None:
    needed = {modules()[m].relative_to(ROOT) for m in closure(f"stages.{stage}")} - {Path(p) for p in EXEMPT}
    declared = [path for dep in declared_code(stage) for path in expanded(dep)]
    missing = [str(p) for p in sorted(needed) if not any(p == Path(d) or Path(d) in p.parents for d in declared)]
    useless = [d for d in declared if not any(p == Path(d) or Path(d) in p.parents for p in needed)]
    assert (missing, useless) == ([], [])


@pytest.mark.parametrize("stage", ["report", "documents"])
def test_reports_declare_the_settings_of_every_task(stage: str) -> None:
    """They read all tables, whatever the task of ``params.yaml``."""
    settings = {dep for dep in declared_code(stage) if dep.startswith("maskllm4v/tasks/")}
    assert settings == {f"maskllm4v/tasks/{name}/settings.py" for name in TASKS}


@pytest.mark.parametrize("stage", STAGES)
def test_stage_commands_hold_nothing_of_one_machine(stage: str) -> None:
    command = STAGES[stage].get("do", STAGES[stage])["cmd"]
    assert command.startswith(f"python -m stages.{stage}")
    assert "/" not in command


@pytest.mark.parametrize("path", sorted((ROOT / "stages").glob("*.py")), ids=lambda p: p.name)
def test_stages_are_thin(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 70
