"""Who may import whom; and what each stage depends on, compared with ``dvc.yaml``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from import_graph import ROOT, closure, imported_names, imports, modules

LOWEST = {"maskllm4v", "maskllm4v.utils.errors"}  # open to all
ROOMS = {  # from the ground up: a module, or a package as a whole, and all of ours that it opens to
    "averaging": set(),
    "exact": set(),
    "files": set(),
    "finite": set(),
    "layout": set(),
    "metrics": set(),
    "patterns": set(),
    "processes": set(),
    "randomness": set(),
    "schedule": set(),
    "share": set(),
    "workspace": set(),
    "config": set(),
    "curves": {"files"},
    "pictures": {"files"},
    "records": {"files"},
    "receipts": {"config", "exact", "files", "layout", "records"},
    "devices": set(),
    "distributed": {"processes"},
    "progress": {"processes"},
    "gumbel": {"patterns", "randomness"},
    "gates": {"gumbel", "patterns"},
    "layers": {"gates", "gumbel", "patterns", "randomness"},
    "joined": {"gumbel", "layers"},
    "surgery": {"layers", "patterns"},
    "channels": {"surgery"},
    "chains": set(),
    "statistics": {"distributed"},
    "watching": {"chains", "processes", "statistics"},
    "calibration": {"chains", "statistics", "watching"},
    "side_by_side": {"calibration", "chains", "processes", "statistics", "surgery", "watching"},
    "pruners": {"calibration", "layers", "patterns", "progress", "randomness", "statistics", "surgery"},
    "permutation": {"calibration", "channels", "patterns", "progress", "statistics", "surgery"},
    "updates": {
        *("calibration", "layers", "patterns", "progress", "pruners", "side_by_side", "statistics", "surgery"),
    },
    "sealed": {"files"},
    "checkpoints": {"patterns", "sealed"},
    "hybrid": {"checkpoints", "surgery"},
    "packed": {"checkpoints", "patterns", "sealed"},
    "original": {"checkpoints", "packed", "patterns", "sealed"},
    "models": {"config", "randomness"},
    "origin": {"config", "devices", "files", "layout", "processes"},
    "parallel": {"config", "devices", "processes"},
    "live": {"config", "layout", "processes", "workspace"},
    "resume": {"config", "files", "layout", "processes", "records"},
    "data": {"config", "files", "processes", "progress", "randomness", "share"},
    "tasks": {
        *("calibration", "checkpoints", "config", "data", "devices", "distributed", "files", "layout", "models"),
        *("original", "processes", "progress", "randomness", "share"),
    },
    "loop": {
        *("config", "distributed", "finite", "layers", "processes", "progress"),
        *("randomness", "resume", "schedule", "share", "tasks"),
    },
    "training": {
        *("averaging", "config", "joined", "layers", "loop", "processes", "resume", "schedule", "surgery", "tasks"),
    },
    "weights": {"averaging", "config", "loop", "resume", "tasks", "training"},
    "dense": {"checkpoints", "config", "resume", "tasks", "weights"},
    "diagnostics": {"calibration", "checkpoints", "distributed", "surgery"},
    "mask_statistics": {"checkpoints", "patterns"},
    "evaluation": {"channels", "checkpoints", "config", "diagnostics", "gates", "surgery", "tasks"},
    "export": {
        *("checkpoints", "config", "evaluation", "files", "layers", "layout", "original", "packed", "patterns"),
        *("sealed", "surgery", "tasks"),
    },
    "reporting": {"config", "files", "layout", "metrics", "pictures", "receipts", "records"},
    "tracking": {
        *("checkpoints", "config", "curves", "export", "files", "layout", "metrics", "origin", "pictures", "progress"),
        *("records", "reporting", "tasks", "workspace"),
    },
    "cli": {
        *("channels", "checkpoints", "config", "curves", "data", "dense", "devices", "distributed", "evaluation"),
        *("export", "files", "gates", "layout", "models", "original", "packed", "patterns", "permutation", "pictures"),
        *("processes", "pruners", "receipts", "records", "resume", "sealed", "surgery", "tasks", "training", "updates"),
    },
    "__main__": {"cli", "config", "files", "layout", "reporting", "tracking"},
}
ALL = sorted(modules())


def room(module: str) -> str:
    """``data`` for ``maskllm4v.data.folder``."""
    return module.split(".")[1]


def ours(module: str) -> bool:
    return module.startswith("maskllm4v.") and module not in LOWEST


def roots(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imported_names(modules()[module])}


@pytest.mark.parametrize("name", [*ROOMS, *sorted({room(m) for m in ALL if ours(m)} - ROOMS.keys())])
def test_room_has_the_doors_of_the_plan(name: str) -> None:
    inside = [module for module in ALL if ours(module) and room(module) == name]
    assert inside, "no such room"
    doors = {room(other) for module in inside for other in imports(module) if ours(other)} - {name}
    assert doors == ROOMS[name]


def test_doors_lead_down() -> None:
    storeys = list(ROOMS)
    for name, doors in ROOMS.items():
        assert doors <= set(storeys[: storeys.index(name)]), name


LIBRARIES = {  # who may speak to it: a module, or a package as a whole
    "accelerate": {"maskllm4v.utils.distributed", "maskllm4v.training.trainer"},
    "dvc": set(),
    "jinja2": {"maskllm4v.reporting.page"},
    "matplotlib": {"maskllm4v.reporting.figures"},
    "mlflow": {"maskllm4v.tracking"},
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_one_room_speaks_to_each_library(library: str) -> None:
    found = {module for module in ALL if library in roots(module)}
    places = {place for module in found for place in LIBRARIES[library] if f"{module}.".startswith(f"{place}.")}
    strangers = {m for m in found if not any(f"{m}.".startswith(f"{place}.") for place in LIBRARIES[library])}
    assert (places, strangers) == (LIBRARIES[library], set())


@pytest.mark.parametrize("module", ALL)
def test_arrows_point_down(module: str) -> None:
    assert "benchmarks" not in roots(module)
    if module.startswith("maskllm4v"):
        assert "stages" not in roots(module)
    if module.startswith(("maskllm4v.oneshot.prune", "maskllm4v.oneshot.weight_update")):
        assert not any(name.startswith(("maskllm4v.tasks.base", "maskllm4v.data")) for name in closure(module))


LIGHT = ("maskllm4v.receipts", "maskllm4v.reporting", "maskllm4v.runs.live", "maskllm4v.tracking.sender")


@pytest.mark.parametrize("module", [m for m in ALL if m.startswith(LIGHT)])
def test_reports_need_no_torch(module: str) -> None:
    late = {
        "maskllm4v.utils.determinism",
        "maskllm4v.utils.determinism.portable",
    }  # its pin_torch imports torch, in stages; receipts read the pin's variables
    assert not any({"torch", "timm"} & roots(name) for name in closure(module) - late)


def test_no_cycles() -> None:
    doors = {
        m: {other for other in imports(m) if not m.startswith(f"{other}.")} for m in ALL
    }  # not to one's own package
    while doors:
        leaves = {m for m, ahead in doors.items() if not ahead & doors.keys()}
        assert leaves, f"a cycle among {sorted(doors)}"
        doors = {m: ahead for m, ahead in doors.items() if m not in leaves}


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, maskllm4v; print([m for m in ('numpy', 'torch', 'timm', 'mlflow', 'dvc') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_exist() -> None:
    import maskllm4v

    assert all(getattr(maskllm4v, name) is not None for name in maskllm4v.__all__)


# The packages' own __init__.py hold names and a version: nothing that a result could depend on.
EXEMPT = {"maskllm4v/__init__.py", "stages/__init__.py"}
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
TASKS = sorted(path.parent.name for path in (ROOT / "maskllm4v" / "tasks").glob("*/__init__.py"))


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


@pytest.mark.parametrize("stage", STAGES)
def test_stage_commands_hold_nothing_of_one_machine(stage: str) -> None:
    command = STAGES[stage].get("do", STAGES[stage])["cmd"]
    assert command.startswith(f"python -m stages.{stage}")
    assert "/" not in command


@pytest.mark.parametrize("path", sorted((ROOT / "stages").glob("*.py")), ids=lambda p: p.name)
def test_stages_are_thin(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 70
