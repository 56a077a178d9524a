"""The table in a terminal: the README's numbers, below each other, within its width."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from import_graph import ROOT
from made_diffusion import diffusion
from made_diffusion import make_records as make_diffusion_records
from made_records import DIGITS, make_records

from maskllm4v.cli import main as command_line
from maskllm4v.config import Experiment
from maskllm4v.reporting.aggregate import aggregate, best_row, current_records
from maskllm4v.reporting.metrics import metrics_of
from maskllm4v.reporting.report import experiments
from maskllm4v.reporting.tables import result_cells
from maskllm4v.reporting.terminal import _aligned, show, table_text

REPORTS = ROOT / "reports"
COMMITTED = experiments(ROOT)
EACH = pytest.mark.parametrize("experiment", COMMITTED.values(), ids=COMMITTED)
SHORT = ("Pattern", "Weight update", "Cost (s)")


def words(text: str) -> list[str]:
    return text.replace(" ± ", " ±").split()


@EACH
@pytest.mark.parametrize("width", [80, 120, 150, 400])
def test_fits_the_terminal(experiment: Experiment, width: int) -> None:
    lines = table_text(experiment, REPORTS, width).splitlines()
    assert max(map(len, lines)) <= width


@EACH
@pytest.mark.parametrize("width", [400, None])
def test_wide_terminals_show_every_cell_in_its_line(experiment: Experiment, width: int | None) -> None:
    metrics = metrics_of(experiment.task.name)
    table = aggregate(experiment, current_records(experiment, REPORTS))
    rows = [result_cells(line, metrics) for line in table.to_dict("records")]
    lines = table_text(experiment, REPORTS, width).splitlines()
    shown = lines[lines.index(next(line for line in lines if line.startswith("─"))) + 1 :][: len(rows)]
    for line, row in zip(shown, rows, strict=True):
        found = re.sub(r" ± +", " ± ", line)
        assert words(found)[:-1] == words(" ".join(row[:-1]))  # the cost stands last


def test_narrow_ones_say_what_is_left_out() -> None:
    text = table_text(DIGITS, REPORTS, 120)
    assert "No room for Top-5 (%), Cross-entropy, ECE (%), Agreement (%): see reports/digits/table.md." in " ".join(
        text.split()
    )
    assert "ECE" not in text.partition("\n\n")[0]
    assert "No room" not in table_text(DIGITS, REPORTS, 400)


def test_headline_and_difference_stay_however_narrow() -> None:
    assert "-8.60 ± 0.61" in table_text(DIGITS, REPORTS, 10)


@pytest.mark.parametrize(
    ("column", "lines"),
    [
        (["95.59 ± 1.12", "8.25 ± 13.60"], ["95.59 ±  1.12", " 8.25 ± 13.60"]),
        (["–", "-0.63 ± 0.28"], [" –          ", "-0.63 ± 0.28"]),
        (["85.90", "76.68 ± 0.00"], ["85.90       ", "76.68 ± 0.00"]),
        (["0.0076", "34", "8.6", "–"], [" 0.0076", "34     ", " 8.6   ", " –     "]),
        (["–", "–"], ["–", "–"]),
    ],
)
def test_numbers_stand_at_their_decimal_points(column: list[str], lines: list[str]) -> None:
    assert _aligned(column) == lines


@pytest.mark.parametrize(
    ("label", "more"), [("±✔–Δ", 0), ("ワンダ", 3), ("e\u0301", -1)], ids=["narrow", "two columns", "accent"]
)
def test_columns_stay_below_each_other_with_letters_of_any_width(label: str, more: int, tmp_path: Path) -> None:
    lines = labelled(label, tmp_path, 400)
    (line,) = [line for line in lines if line.startswith(label)]
    other = next(line for line in lines if line.startswith("Magnitude"))
    assert line.index("2:4") + more == other.index("2:4")


@pytest.mark.parametrize("label", ["[bold]Wanda[/bold]", "[2:4] Wanda", "Wanda :smile: \\[x]", "https://a.b 'c' 1.5"])
def test_labels_are_no_markup(label: str, tmp_path: Path) -> None:
    assert any(line.startswith(f"{label}  ") for line in labelled(label, tmp_path, None))


@pytest.mark.parametrize("width", [80, 90, 100, 120])
def test_long_labels_are_wrapped_and_whole(width: int, tmp_path: Path) -> None:
    label = "Wanda with a name that is longer than terminals have room for, on and on"
    lines = labelled(label, tmp_path, width)
    start = next(place for place, line in enumerate(lines) if line.startswith("Wanda with"))
    end = next(place for place, line in enumerate(lines) if line.startswith("SparseGPT"))
    assert end - start > 1
    assert max(map(len, lines)) <= width
    column = lines[start].index(" 2:4")
    assert " ".join(line[:column].strip() for line in lines[start:end]) == label


def labelled(label: str, reports: Path, width: int | None) -> list[str]:
    """Lines of a table with another label for one of its rows."""
    raw = DIGITS.model_dump()
    raw["rows"]["digits-wanda"] = label
    experiment = Experiment.model_validate(raw)
    return table_text(experiment, make_records(experiment, reports), width).splitlines()


@EACH
def test_the_best_sparse_row_is_bold(experiment: Experiment) -> None:
    table = aggregate(experiment, current_records(experiment, REPORTS)).set_index("row")
    best = best_row(experiment, table.reset_index())
    plain, bold = (table_text(experiment, REPORTS, 400, bold) for bold in (False, True))
    marked = re.findall(r"\033\[1m(.*?)\033\[0m", bold)
    headline = metrics_of(experiment.task.name).headline
    wanted = (
        [] if best is None else [table["label"][best], f"{table[f'{headline.name}_mean'][best]:.{headline.digits}f}"]
    )
    assert [text.strip().partition(" ± ")[0] for text in marked] == wanted
    assert re.sub(r"\033\[[01]m", "", bold) == plain


@pytest.mark.parametrize(
    ("tty", "no_color", "bold"), [(True, None, True), (True, "1", False), (True, "", True), (False, None, False)]
)
def test_bold_is_for_terminals_that_want_it(
    tty: bool, no_color: str | None, bold: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color is not None:
        monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty)
    show(DIGITS, REPORTS)
    assert ("\033[1m" in capsys.readouterr().out) is bold


def test_dumb_terminals_get_no_escapes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show(DIGITS, REPORTS)
    assert "\033" not in capsys.readouterr().out


def test_pipes_get_all_columns_and_no_space_at_the_ends() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    command = [sys.executable, "-m", "maskllm4v", "report", "--show", "digits"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    text = done.stdout.decode()
    assert text == table_text(COMMITTED["digits"], REPORTS) + "\n"
    assert "No room" not in text
    assert not re.search(r" $|\033", text, re.MULTILINE)


def test_a_leak_is_said(tmp_path: Path) -> None:
    raw = DIGITS.model_dump()
    raw["data"]["calibration_split"] = "test"
    leaking = Experiment.model_validate(raw)
    assert "Calibrated on the reported split, which leaks." in table_text(leaking, make_records(leaking, tmp_path), 400)


def test_diffusion_is_measured_by_its_own_headline(tmp_path: Path) -> None:
    experiment = diffusion()
    text = table_text(experiment, make_diffusion_records(experiment, tmp_path), 400)
    assert "ε-MSE" in text
    assert "Δ is the paired difference of ε-MSE" in text


def test_nothing_measured(tmp_path: Path) -> None:
    assert table_text(DIGITS, tmp_path, 400).endswith("\n\nNot measured yet.")


# The command


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["maskllm4v", "report", *arguments])
    command_line.main()


@pytest.mark.parametrize(("arguments", "table"), [([], "digits"), (["cifar10"], "cifar10")])
def test_show_prints_a_table_and_writes_nothing(
    arguments: list[str], table: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in REPORTS.rglob("*")}
    monkeypatch.setenv("COLUMNS", "400")
    run(monkeypatch, "--show", *arguments)
    assert capsys.readouterr().out == table_text(COMMITTED[table], REPORTS, 400) + "\n"
    assert {path: path.stat().st_mtime_ns for path in REPORTS.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [(["--show", "mnist"], 1, "no table 'mnist'; allowed: ade20k_eomt_l, "), (["--show", "--check"], 2, "not allowed")],
)
def test_show_refuses(
    arguments: list[str],
    status: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, *arguments)
    assert error.value.code == status
    assert text in capsys.readouterr().err
