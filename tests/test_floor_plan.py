"""Who may import whom; and what each stage depends on, compared with ``dvc.yaml``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from import_graph import ROOT, closure, imported_names, imports, modules

LOWEST = {"maskllm4v", "maskllm4v.errors"}
ROOMS = {  # module: all of ours that it may import, next to LOWEST
    "maskllm4v.patterns": set(),
    "maskllm4v.randomness": set(),
    "maskllm4v.files": set(),
    "maskllm4v.schedule": set(),
    "maskllm4v.gumbel": {"randomness"},
    "maskllm4v.layers": {"patterns", "gumbel", "randomness"},
    "maskllm4v.surgery": {"patterns", "layers"},
    "maskllm4v.calibration": set(),
    "maskllm4v.config": set(),
    "maskllm4v.checkpoints": {"files", "patterns"},
    "maskllm4v.training": {"config", "finite", "layers", "progress", "randomness", "schedule", "surgery", "tasks"},
}
ALL = sorted(modules())


def roots(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imported_names(modules()[module])}


@pytest.mark.parametrize("module", ROOMS)
def test_room_has_no_other_doors(module: str) -> None:
    allowed = LOWEST | {f"maskllm4v.{name}" for name in ROOMS[module]}
    assert imports(module) <= allowed


@pytest.mark.parametrize("module", ALL)
def test_arrows_point_down(module: str) -> None:
    if module.startswith("maskllm4v"):
        assert "stages" not in roots(module)
    assert "dvc" not in roots(module)
    if module != "maskllm4v.tracking":
        assert "mlflow" not in roots(module)
    if module.startswith("maskllm4v.pruners"):
        assert not any(name.startswith(("maskllm4v.tasks", "maskllm4v.data")) for name in closure(module))


@pytest.mark.parametrize("module", [m for m in ALL if m.startswith(("maskllm4v.reporting", "maskllm4v.tracking"))])
def test_reports_need_no_torch(module: str) -> None:
    assert not any("torch" in roots(name) or "timm" in roots(name) for name in closure(module))


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


def declared_code(stage: str) -> list[str]:
    deps = STAGES[stage].get("do", STAGES[stage])["deps"]
    return [dep for dep in deps if dep.startswith(("maskllm4v/", "stages/"))]


@pytest.mark.parametrize("stage", STAGES)
def test_stage_declares_the_code_that_it_imports(stage: str) -> None:
    needed = {modules()[m].relative_to(ROOT) for m in closure(f"stages.{stage}")} - {Path(p) for p in EXEMPT}
    declared = declared_code(stage)
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
