"""The README says what the records say, and names only what exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from import_graph import ROOT

from maskllm4v.reporting.readme import splice
from maskllm4v.reporting.report import check_report, experiments
from maskllm4v.utils.errors import UserError

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_and_tables_agree_with_the_records() -> None:
    check_report(ROOT)


def test_every_measured_table_has_its_place() -> None:
    for table in experiments(ROOT):
        measured = (ROOT / "reports" / table / "runs").exists()
        assert not measured or f"<!-- {table} -->" in README


def test_params_are_a_published_experiment() -> None:
    active = (ROOT / "params.yaml").read_text(encoding="utf-8")
    assert active in [path.read_text(encoding="utf-8") for path in (ROOT / "experiments").glob("*.yaml")]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"^(?:\$ )?make (\w+)", README, re.MULTILINE)) | set(re.findall(r"`make (\w+)", README))
    assert named
    assert named <= targets


def test_linked_files_exist() -> None:
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert [link for link in links if link and not (ROOT / link).exists()] == []


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python_examples_run(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if ".cuda()" in block and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_yaml_examples_are_yaml() -> None:
    for block in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL):
        assert yaml.safe_load(block)


def test_splice_replaces_between_markers_only() -> None:
    text = "a\n<!-- t -->\nold\n<!-- /t -->\nz\n"
    assert splice(text, {"t": "new\n", "other": "x"}) == "a\n<!-- t -->\nnew\n<!-- /t -->\nz\n"
    assert splice(text, {"t": r"\1 \g<0>"}) == "a\n<!-- t -->\n\\1 \\g<0>\n<!-- /t -->\nz\n"


@pytest.mark.parametrize(
    "text", ["<!-- t -->", "<!-- /t -->", "<!-- /t --> <!-- t -->", "<!-- t --><!-- t --><!-- /t -->"]
)
def test_splice_refuses_broken_markers(text: str) -> None:
    with pytest.raises(UserError, match="README"):
        splice(text, {"t": "new"})


def test_check_finds_an_edited_number(tmp_path: Path) -> None:
    for name in ("params.yaml", "README.md"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("reports", "experiments"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    check_report(tmp_path)
    table = re.search(r"<!-- digits -->.*?(\d\d\.\d\d)", README, re.DOTALL)
    assert table is not None
    start = table.start(1)
    (tmp_path / "README.md").write_text(README[:start] + "99.99" + README[start + 5 :], encoding="utf-8")
    with pytest.raises(UserError, match=r"README\.md"):
        check_report(tmp_path)
