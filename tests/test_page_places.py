"""A digit of a record stands in certain places of a page: it changes these, and no other."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from import_graph import ROOT
from made_diffusion import diffusion, make_records
from parsed_page import Element, Page, changes

from maskllm4v.reporting.page import index_page, table_page
from maskllm4v.reporting.report import experiments
from maskllm4v.runs.paths import curve_file, layers_file, mask_statistics_file, record_file
from maskllm4v.runs.records import write_record
from maskllm4v.utils.io import read_json, write_text

EXPERIMENTS = experiments(ROOT)
TABLE, DENSE, LEARNED = "digits", "digits-dense", "digits-maskllm-distilled-prior"
ONE_SHOT, BEST_ONE_SHOT = "digits-wanda", "digits-sparsegpt-update"


def copied(reports: Path) -> Path:
    """The committed records of the table and the benchmarks; no receipts, whose claim an edited record would lose."""
    shutil.copytree(ROOT / "reports" / TABLE / "runs", reports / TABLE / "runs")
    shutil.copytree(ROOT / "reports" / "benchmarks", reports / "benchmarks")
    return reports


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of the committed records."""
    return page(copied(tmp_path_factory.mktemp("before")))


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """The committed records, to be edited."""
    return copied(tmp_path)


def page(reports: Path) -> Page:
    """Without the numbers beside points and the lines that lead there: where they have room, other points decide."""
    text = table_page(EXPERIMENTS[TABLE], reports, TABLE)
    bare = re.sub(r'<path[^>]*class="leader"[^>]*>(</path>)?|<text[^>]*class="number"[^>]*>[^<]*</text>', "", text)
    assert bare != text
    return Page(bare)


def metric_changed(reports: Path, row: str, seed: int, metric: str, by: float) -> None:
    path = record_file(TABLE, row, reports)
    record: dict[str, Any] = read_json(path)
    record["metrics"][str(seed)][metric] = round(record["metrics"][str(seed)][metric] + by, 6)
    write_record(path, record)


def cell_changed(path: Path, column: str, by: float, where: Callable[[dict[str, str]], bool]) -> None:
    """A number of the first fitting line of a CSV file."""
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    row = next(filter(where, rows))
    row[column] = f"{float(row[column]) + by:.6g}"
    lines = [",".join(line.values()) for line in rows]
    write_text(path, "\n".join([",".join(rows[0]), *lines]) + "\n")


def assert_exactly(before: Page, after: Page, shown: Callable[[Element], bool]) -> list[Element]:
    """What changed is what says that it shows the number; returns it."""
    found, wanted = changes(before, after), [element for element in before.elements if shown(element)]
    assert found == wanted
    assert found
    return found


def test_calibration_error_of_a_seed_stands_in_its_cell_and_among_the_seeds(before: Page, reports: Path) -> None:
    metric_changed(reports, ONE_SHOT, 1, "ece", 3.0)
    found = assert_exactly(
        before, page(reports), lambda e: e.shows in [(ONE_SHOT, "ece", None), (ONE_SHOT, "ece", "1")]
    )
    assert [element.tag for element in found] == ["td", "td"]


@pytest.mark.parametrize("row", [ONE_SHOT, LEARNED])
def test_headline_of_a_seed(row: str, before: Page, reports: Path) -> None:
    """Cells, bar, dot of the seed, point of the chart of costs, and the paired difference."""
    metric_changed(reports, row, 1, "top1", -0.6)
    shown = {(row, "top1", None), (row, "top1", "1"), (row, "delta", None)}
    found = assert_exactly(before, page(reports), lambda e: e.shows in shown)
    assert {element.tag for element in found} == {"td", "text", "title", "rect", "path", "circle"}


def test_headline_of_the_dense_model_moves_all_differences(before: Page, reports: Path) -> None:
    metric_changed(reports, DENSE, 1, "top1", -0.6)
    shown = {(DENSE, "top1", None), (DENSE, "top1", "1")}

    found = assert_exactly(
        before, page(reports), lambda e: e.shows in shown or (e.shows[1] == "delta" and e.shows[0] != DENSE)
    )
    cells = [e for e in found if e.tag == "td" and e.attributes["data-metric"] == "delta"]
    assert len(cells) == len(EXPERIMENTS[TABLE].rows) - 1


def test_point_of_a_curve_moves_its_line_and_band(before: Page, reports: Path) -> None:
    path = curve_file(TABLE, LEARNED, 1, reports)
    cell_changed(path, "off_prior", 0.05, lambda line: line["step"] == "100")
    shown = (LEARNED, "off_prior", None)
    found = assert_exactly(before, page(reports), lambda e: e.shows == shown and e.tag == "path")
    assert len(found) == 2


def test_error_of_one_layer(before: Page, reports: Path) -> None:
    layer = "blocks.1.attn.proj"
    path = layers_file(TABLE, LEARNED, reports)
    cell_changed(path, "output_error", -0.1, lambda line: (line["seed"], line["layer"]) == ("1", layer))
    found = assert_exactly(
        before,
        page(reports),
        lambda e: e.shows == (LEARNED, "output_error", None) and e.marks["data-layer"] in (layer, "all"),
    )
    assert len(found) == 2


def test_agreement_of_seeds_in_one_layer(before: Page, reports: Path) -> None:
    layer = "blocks.1.attn.proj"
    path = mask_statistics_file(TABLE, LEARNED, reports)
    cell_changed(path, "seed_agreement", 0.3, lambda line: (line["seed"], line["layer"]) == ("1", layer))
    found = assert_exactly(  # the layer's dot, and the row's mean as a tick and in figures
        before,
        page(reports),
        lambda e: e.shows == (LEARNED, "seed_agreement", None) and e.marks.get("data-layer", layer) == layer,
    )
    assert [element.tag for element in found] == ["text", "circle", "title", "path"]


def test_share_of_a_candidate_mask(before: Page, reports: Path) -> None:
    path = mask_statistics_file(TABLE, LEARNED, reports)
    cell_changed(path, "1100", -0.03, lambda line: line["seed"] == "1")
    found = changes(before, page(reports))
    assert {element.shows for element in found} == {(LEARNED, "candidates", None)}
    assert {element.marks["data-candidate"] for element in found} == {"1100"}
    assert [element.tag for element in found] == ["title", "rect"]  # the layer is neither the least nor the most


def test_error_at_a_timestep_bends_a_line(tmp_path: Path) -> None:
    experiment, row = diffusion(), "tiny-wanda"

    def drawn() -> Page:
        return Page(table_page(experiment, tmp_path, None))

    make_records(experiment, tmp_path)
    before, path = drawn(), record_file("tiny", row, tmp_path)
    record: dict[str, Any] = read_json(path)
    record["metrics"]["1"]["eps_mse/t0250"] *= 2
    write_record(path, record)
    shown = [(row, "eps_mse/t", None), (row, "eps_mse/t0250", "1")]
    found = assert_exactly(before, drawn(), lambda e: e.shows in shown and e.tag != "title")
    assert [element.tag for element in found] == ["path", "td"]


def test_what_a_page_does_not_show_changes_nothing(before: Page, reports: Path) -> None:
    """A column that no chart draws."""
    cell_changed(curve_file(TABLE, LEARNED, 1, reports), "grad_norm", 0.5, lambda _: True)
    assert changes(before, page(reports)) == []


def test_index_shows_the_best_rows_alone(reports: Path) -> None:
    def index() -> Page:
        return Page(index_page({TABLE: EXPERIMENTS[TABLE]}, reports))

    before = index()
    metric_changed(reports, ONE_SHOT, 1, "top1", -0.6)
    assert changes(before, index()) == []
    metric_changed(reports, BEST_ONE_SHOT, 1, "top1", -0.6)
    assert_exactly(before, index(), lambda e: e.shows == (BEST_ONE_SHOT, "top1", None))
