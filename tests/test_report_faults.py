"""``report`` and ``documents`` write all or nothing, and no table with numbers loses all of them unasked."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from commands import run as command
from import_graph import ROOT
from made_records import make_records

from maskllm4v.config import load_experiment, parse_experiment
from maskllm4v.reporting.report import readme_sections, write_documents, write_report, write_table
from maskllm4v.utils.errors import ConfigError, UserError
from maskllm4v.utils.io import write_text

EMPTY = "Not measured yet."
RAW = yaml.safe_load((ROOT / "params.yaml").read_text())
ROWS = ("digits-dense", "digits-magnitude", "digits-wanda")
RAW |= {"priors": {row: RAW["priors"][row] for row in ROWS[1:]}, "rows": {row: RAW["rows"][row] for row in ROWS}}
RAW |= {"learned": {}, "updated": {}, "exports": {}}  # few rows are fast


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The table digits with made-up records, rendered, and a README that shows it."""
    make_records(parse_experiment(RAW), tmp_path / "reports")
    with_params(tmp_path)
    (tmp_path / "README.md").write_text("# Title\n<!-- digits -->\n<!-- /digits -->\nEnd.\n")
    write_report(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(project: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in project.rglob("*") if path.is_file() and path.name != "params.yaml"}


def with_params(project: Path, **changes: object) -> None:
    (project / "params.yaml").write_text(yaml.safe_dump({**RAW, **changes}, sort_keys=False))


def test_written_whole(project: Path) -> None:
    assert " ± " in (project / "README.md").read_text()
    assert " ± " in (project / "reports/digits/table.md").read_text()


@pytest.mark.parametrize("write", [write_report, write_table, write_documents])
def test_numbers_are_not_replaced_by_none(write: object, project: Path) -> None:
    with_params(project, seeds=[7])
    before = files(project)
    with pytest.raises(UserError, match=r"(table\.md|README\.md, digits): numbers stand there.*--allow-empty`"):
        write(project)  # type: ignore[operator]
    assert files(project) == before


def test_numbers_are_replaced_if_asked(project: Path) -> None:
    with_params(project, seeds=[7])
    assert command("report").code == 1
    assert command("report", "--allow-empty").code == 0
    assert EMPTY in (project / "README.md").read_text()
    assert EMPTY in (project / "reports/digits/table.md").read_text()
    assert list((project / "reports/digits/figures").iterdir()) == []  # charts of nothing do not stay
    assert command("report").code == 0  # nothing is lost any more


def test_some_numbers_may_be_lost(project: Path) -> None:
    """A row that was changed is measured again; others stay."""
    with_params(project, priors={**RAW["priors"], "digits-wanda": {"method": "wanda", "propagate": "pruned"}})
    write_report(project)
    assert "| Wanda | 2:4 | – | – | – |" in (project / "README.md").read_text()


BROKEN = {
    "a marker twice": lambda readme: readme.write_text(readme.read_text() + "<!-- digits -->\n"),
    "no closing marker": lambda readme: readme.write_text("<!-- digits -->\n"),
    "binary": lambda readme: readme.write_bytes(b"<!-- digits -->\x00\xff\xfe<!-- /digits -->"),
    "a folder": lambda readme: (readme.unlink(), readme.mkdir()),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_readme_changes_no_table(how: str, project: Path) -> None:
    """In one line, and before anything is written."""
    BROKEN[how](project / "README.md")
    (project / "reports/digits/table.md").write_text("of before | ± |")
    before = files(project)
    done = command("report")
    assert done.code == 1
    assert re.fullmatch(r"report: .*README\.md.*\n", done.err)
    assert files(project) == before


def test_a_folder_in_the_way_changes_no_file(project: Path) -> None:
    (project / "reports/digits/index.html").unlink()
    (project / "reports/digits/index.html").mkdir()
    (project / "reports/digits/table.md").write_text("of before | ± |")
    before = files(project)
    done = command("report")
    assert (done.code, files(project)) == (1, before)
    assert re.fullmatch(r"report: cannot write .*index\.html: Is a directory\n", done.err)


def test_line_ends_of_a_readme_stay(project: Path) -> None:
    readme = project / "README.md"
    windows = readme.read_text().replace("\n", "\r\n").encode()
    write_text(readme, "# Title\r\n<!-- digits -->\r\nold\r\n<!-- /digits -->\r\nEnd.\r\n")
    write_report(project)
    assert readme.read_bytes() == windows
    assert command("report", "--check").code == 0
    before = readme.stat().st_mtime_ns
    write_report(project)
    assert readme.stat().st_mtime_ns == before


# Names


def markers() -> list[str]:
    """All blocks of the README that show no table, and the folders of ``reports/`` that hold none."""
    folders = [path.name for path in (ROOT / "reports").iterdir() if path.is_dir() and not (path / "table.md").exists()]
    return [*readme_sections({}, ROOT / "reports"), *folders]


def test_every_marker_is_known() -> None:
    assert set(markers()) >= {
        "published",
        "performance",
        "deployment",
        "receipts",
        "reproduced",
        "benchmarks",
        "proofs",
    }


@pytest.mark.parametrize("name", markers())
def test_no_table_is_called_as_a_generated_block(name: str) -> None:
    with pytest.raises(ConfigError, match=f"table is '{name}', as something else in reports or README is; taken: "):
        parse_experiment({**RAW, "table": name})


@pytest.mark.parametrize("name", ["data", "exports"])
def test_no_row_is_called_as_a_folder_of_artifacts(name: str) -> None:
    changed = {"priors": {**RAW["priors"], name: {"method": "wanda"}}, "rows": {**RAW["rows"], name: "Wanda"}}
    with pytest.raises(
        ConfigError, match=f"rows: '{name}' is a folder of artifacts that is no row's; taken: data, exp"
    ):
        parse_experiment({**RAW, **changed})


def test_no_table_is_another_experiment_s(tmp_path: Path) -> None:
    """One with other settings keeps some row; one with none in common is another experiment."""
    (tmp_path / "experiments").mkdir()
    shutil.copy(ROOT / "experiments/cifar10.yaml", tmp_path / "experiments")
    with_params(tmp_path, table="cifar10")
    with pytest.raises(ConfigError, match=r"params\.yaml: table is 'cifar10', which is that of .*cifar10\.yaml; give"):
        load_experiment(tmp_path / "params.yaml")
    raw = yaml.safe_load((ROOT / "experiments/cifar10.yaml").read_text())
    with_params(tmp_path, **{**raw, "seeds": [5], "title": "Changed"})
    assert load_experiment(tmp_path / "params.yaml").seeds == [5]
    shutil.copy(tmp_path / "params.yaml", tmp_path / "experiments/other.yaml")
    with pytest.raises(ConfigError, match=r"other\.yaml: table is 'cifar10', which is that of .*cifar10\.yaml"):
        load_experiment(tmp_path / "experiments/other.yaml")
    (tmp_path / "experiments/cifar10.yaml").write_text("table: cifar10\nrows: [")
    assert load_experiment(tmp_path / "params.yaml").seeds == [5]  # that file's fault is its own reader's
