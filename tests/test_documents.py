"""README, findings and the list of tables are outputs of the stage ``documents``: what records and ``dvc.lock`` say."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from import_graph import ROOT
from small_pipeline import run, small_params

from maskllm4v.reporting.report import check_documents, documents, experiments
from maskllm4v.utils.errors import UserError
from scripts.relock import edited_documents

STAGE = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["documents"]


def test_documents_are_those_of_the_lock() -> None:
    edited = edited_documents(ROOT)
    assert not edited, (
        f"{', '.join(edited)}: dvc.lock has another digest; run dvc repro (after an edit of prose, "
        "python -m scripts.relock writes it down without running a stage)"
    )


def test_stage_declares_what_is_written() -> None:
    """A hand-written text is never deleted before the stage runs, and is in git, not in DVC's cache."""
    outs = {path: flags for out in STAGE["outs"] for path, flags in out.items()}
    assert {ROOT / path for path in outs} == set(documents(ROOT))
    assert all(flags == {"cache": False, "persist": True} for flags in outs.values())


def test_stage_declares_the_records_of_every_table() -> None:
    measured = [f"reports/{table}/runs" for table in experiments(ROOT) if (ROOT / "reports" / table / "runs").exists()]
    missing = set(measured) - set(STAGE["deps"])
    assert not missing, f"dvc.yaml: the stage documents has to depend on {', '.join(sorted(missing))}"
    assert not [path for path in STAGE["deps"] if "$" in path]


def test_edited_block_is_named(tmp_path: Path) -> None:
    for name in ("experiments", "reports", "params.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/findings.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    check_documents(tmp_path)
    findings = tmp_path / "docs/findings.md"
    findings.write_text(findings.read_text().replace("\n<!-- /", "\nOne more line.\n<!-- /", 1))
    with pytest.raises(UserError, match=r"^docs/findings\.md: not what the records give; run dvc repro"):
        check_documents(tmp_path)


# By DVC


@pytest.fixture
def project(small_repro: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_repro / "repro", tmp_path / "project", symlinks=True)


def repro(project: Path, *arguments: str) -> list[str]:
    """The stages that ran."""
    done = run(project, "dvc", "repro", *arguments)
    assert done.returncode == 0, done.stderr
    return [line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")]


@pytest.mark.slow
def test_repro_restores_a_block_and_keeps_the_prose(project: Path) -> None:
    readme = project / "README.md"
    rendered = readme.read_text()
    assert rendered.count("±") > 10
    readme.write_text(f"Prose before.\n{rendered.replace('±', '+')}Prose after.\n")
    (project / "docs/findings.md").write_text("Prose alone.\n")
    (project / "reports/index.html").write_text("nothing of this stays")
    assert repro(project) == ["documents"]
    assert readme.read_text() == f"Prose before.\n{rendered}Prose after.\n"
    assert (project / "docs/findings.md").read_text() == "Prose alone.\n"
    assert (project / "reports/index.html").read_text() != "nothing of this stays"
    check_documents(project)
    assert edited_documents(project) == []
    assert repro(project) == []
    ignored = (path.read_text() for path in project.rglob(".gitignore"))
    assert not any(name in text for text in ignored for name in ("README", "findings", "index.html"))


@pytest.mark.slow
def test_another_table_changes_nothing_here(project: Path) -> None:
    (project / "params.yaml").write_text(yaml.safe_dump(small_params() | {"table": "other"}, sort_keys=False))
    before = (project / "README.md").read_text()
    assert repro(project, "--force", "--single-item", "documents") == ["documents"]
    assert (project / "README.md").read_text() == before
