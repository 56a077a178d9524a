"""Figures: which ones a table gets, what stands in them, and the same bytes every time."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import made_diffusion
import numpy as np
import pytest
from import_graph import ROOT
from made_diffusion import TIMESTEPS, diffusion, picture
from made_records import DIGITS, make_records
from parsed_page import Element, Page

from maskllm4v.config import Experiment
from maskllm4v.reporting.figures import figure_files, figure_texts
from maskllm4v.reporting.figures.samples import GAP, IN_LINE, SIDE, fitted, samples, samples_file
from maskllm4v.reporting.figures.sheet import WIDE
from maskllm4v.reporting.page import table_page
from maskllm4v.reporting.page.pictures import KINDS
from maskllm4v.reporting.page.results import Results
from maskllm4v.reporting.report import check_report, experiments
from maskllm4v.runs.paths import picture_file, record_file
from maskllm4v.runs.records import write_record
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.images import read_picture, write_picture
from maskllm4v.utils.io import read_json, write_files

DIFFUSION = diffusion()
COMMITTED = experiments(ROOT)
EACH = pytest.mark.parametrize("table", [table for table in COMMITTED if (ROOT / "reports" / table / "runs").exists()])
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    return made_diffusion.make_records(DIFFUSION, tmp_path / "reports")


@cache
def committed(table: str) -> dict[str, str]:
    """The charts of a committed table by file name."""
    return figure_texts(COMMITTED[table], ROOT / "reports")


def shapes(page: Page, row: str, metric: str, tag: str) -> list[Element]:
    """What shows a row's metric."""
    return [element for element in page.elements if element.tag == tag and element.shows[:2] == (row, metric)]


def changed(path: Path, **metrics: float) -> None:
    """Other numbers in a record, for all seeds."""
    record: dict[str, Any] = read_json(path)
    for of_seed in record["metrics"].values():
        of_seed |= metrics
    write_record(path, record)


# Which figures


def test_figures_of_diffusion(reports: Path, tmp_path: Path) -> None:
    found = figure_files(DIFFUSION, reports)
    assert set(found) == {"quality.svg", "curves.svg", "timesteps.svg", "samples.png"}
    assert figure_files(DIFFUSION, reports) == found


def test_figures_of_classification(tmp_path: Path) -> None:
    found = figure_files(DIGITS, make_records(DIGITS, tmp_path / "reports"))
    assert set(found) == {"accuracy.svg", "curves.svg"}


@pytest.mark.parametrize("experiment", [DIGITS, DIFFUSION], ids=["classification", "diffusion"])
def test_nothing_measured_nothing_drawn(experiment: Experiment, tmp_path: Path) -> None:
    assert figure_files(experiment, tmp_path) == {}


# Files of their own


@EACH
def test_charts_are_those_of_the_page(table: str) -> None:
    page = table_page(COMMITTED[table], ROOT / "reports", table)
    for name, text in committed(table).items():
        charts = re.findall(r"<svg[^>]*>(<title>.*?)</svg>", text.partition("</style>")[2], re.DOTALL)
        assert charts
        assert all(chart in page for chart in charts), name


@EACH
def test_files_are_whole_and_ask_for_nothing(table: str) -> None:
    for text in committed(table).values():
        root = ElementTree.fromstring(text)
        assert (root.tag, root[0].tag, root[1].tag) == (f"{SVG}svg", f"{SVG}title", f"{SVG}desc")
        assert root[0].text.startswith(COMMITTED[table].title)
        assert not re.search(r"url\(|@import|href|https?://", text.replace(SVG[1:-1], ""))
        style, _, body = text.partition("</style>")
        used = {name for group in re.findall(r'class="([^"]*)"', body) for name in group.split()}
        assert used <= set(re.findall(r"\.([a-zA-Z][\w-]*)", style)) | {"lines"}  # pages let these grow


@EACH
def test_nothing_stands_outside_or_on_something_else(table: str) -> None:
    for text in committed(table).values():
        root = ElementTree.fromstring(text)
        width, height = (float(root.attrib[side]) for side in ("width", "height"))
        assert width <= WIDE
        assert root.attrib["viewBox"] == f"0 0 {width:g} {height:g}"
        charts = [[float(c.attrib[key]) for key in ("x", "y", "width", "height")] for c in root.findall(f"{SVG}svg")]
        assert all(min(x, y) > 0 and x + w < width and y + h < height for x, y, w, h in charts)
        lowest = max(y + h for _, y, _, h in charts)
        lines = [c for c in root if c.tag in (f"{SVG}g", f"{SVG}text")]
        tops = [float(re.findall(r"[\d.]+", c.get("transform", f"0 {c.get('y')}"))[1]) for c in lines]
        assert lowest < min(tops)
        assert max(tops) < height
        assert all(b - a > 11 for a, b in pairwise(sorted(set(tops))))


def test_bytes_do_not_depend_on_the_process() -> None:
    code = (
        "import sys; from pathlib import Path; from maskllm4v.reporting.figures import figure_texts\n"
        "from maskllm4v.reporting.report import experiments\n"
        "texts = figure_texts(experiments(Path())['digits_patterns'], Path('reports'))\n"
        "sys.stdout.buffer.write(''.join(texts.values()).encode())"
    )
    wanted = "".join(committed("digits_patterns").values())
    for seed in ("1", "2"):
        environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
        assert done.stdout.decode() == wanted


def test_check_finds_an_edited_chart(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (tmp_path / "reports" / "digits").mkdir(parents=True)
    (tmp_path / "reports" / "digits" / "runs").symlink_to(ROOT / "reports" / "digits" / "runs")
    path = "reports/digits/figures/accuracy.svg"
    write_files({tmp_path / path: figure_files(COMMITTED["digits"], tmp_path / "reports")["accuracy.svg"]})
    check_report(tmp_path)
    text = (tmp_path / path).read_text(encoding="utf-8")
    (tmp_path / path).write_text(re.sub(r"\d\d\.\d\d ±", "12.34 ±", text, count=1), encoding="utf-8")
    with pytest.raises(UserError, match=f"^{path}: not what the records give"):
        check_report(tmp_path)


# Bars


def test_a_panel_for_accuracy_and_one_for_the_error(reports: Path) -> None:
    page = Page(figure_texts(DIFFUSION, reports)["quality.svg"])
    accuracy, error = page.find("svg", class_="bars")
    assert "conditional accuracy (%), bars start at 70" in page.text(accuracy)
    assert "ε-MSE, lower is better" in page.text(error)
    assert "logarithmic" not in page.text(error)
    widths = [float(shapes(page, row, "eps_mse", "rect")[0].attributes["width"]) for row in DIFFUSION.rows]
    assert [width / widths[0] for width in widths] == pytest.approx(
        [(0.051 + 0.01 * number) / 0.051 for number in range(7)], abs=0.002
    )


def test_without_a_classifier_there_is_the_error_alone(tmp_path: Path) -> None:
    made_diffusion.make_records(DIFFUSION, tmp_path, judged=False)
    page = Page(figure_texts(DIFFUSION, tmp_path)["quality.svg"])
    (error,) = page.find("svg", class_="bars")
    assert "ε-MSE, lower is better" in page.text(error)


def test_errors_of_several_sizes_get_a_logarithmic_axis(reports: Path) -> None:
    changed(record_file("tiny", "tiny-magnitude", reports), eps_mse=0.9)
    page = Page(figure_texts(DIFFUSION, reports)["quality.svg"])
    _, error = page.find("svg", class_="bars")
    assert "ε-MSE, lower is better, logarithmic" in page.text(error)
    dense, worst = (
        float(shapes(page, row, "eps_mse", "rect")[0].attributes["width"]) for row in ("tiny-dense", "tiny-magnitude")
    )
    assert worst / dense == pytest.approx(np.log10(0.9 / 0.01) / np.log10(0.051 / 0.01), abs=0.01)


# Lines over timesteps


def test_lines_over_timesteps_are_means_over_seeds(reports: Path) -> None:
    page = Page(figure_texts(DIFFUSION, reports)["timesteps.svg"])
    error, distance = page.find("svg", class_="lines")
    assert [page.text(page.find("text", class_="title")[n]) for n in range(2)] == [
        "ε-MSE, logarithmic",
        "MSE to dense, logarithmic",
    ]
    of_error, of_distance = (
        {e.shows[0]: e for e in page.inside(p) if e.tag == "path" and e.shows[0]} for p in (error, distance)
    )
    assert list(of_error) == list(DIFFUSION.rows)
    assert list(of_distance) == list(DIFFUSION.rows)[1:]  # the distance is to the dense model, which has none
    points = re.findall(r"([\d.]+) ([\d.]+)", of_error["tiny-magnitude"].attributes["d"])
    x, y = (np.array([float(pair[axis]) for pair in points]) for axis in (0, 1))
    assert np.allclose(np.diff(x) / np.diff(TIMESTEPS), (x[-1] - x[0]) / (TIMESTEPS[-1] - TIMESTEPS[0]), atol=0.002)
    values = np.log10([0.061 * 40 / t for t in TIMESTEPS])
    assert np.allclose(np.diff(y) / np.diff(values), (y[-1] - y[0]) / (values[-1] - values[0]), rtol=0.01)

    def styles(lines: dict[str, Element]) -> list[str]:
        return [page.elements[e.parent].attributes["class"] for e in lines.values() if e.parent is not None]

    assert len(set(styles(of_error))) == 7
    assert styles(of_distance) == styles(of_error)[1:]
    legend = [p for p in page.find("g") if page.elements[p].attributes.get("transform")]
    assert [page.text(p) for p in legend][:2] == ["1DiT (dense)", "2Magnitude"]
    marks = [page.elements[p + 1].attributes["class"] for p in legend]
    assert marks == styles(of_error)


# Samples

SAMPLES = KINDS[0]


def test_samples_are_enlarged_by_whole_numbers(reports: Path, tmp_path: Path) -> None:
    (tmp_path / "samples.png").write_bytes(figure_files(DIFFUSION, reports)["samples.png"])
    figure = read_picture(tmp_path / "samples.png")
    factor = SIDE // 12
    high, wide = 8 * factor, 12 * factor
    above = figure.shape[0] // 2 - high - GAP - GAP // 2  # two lines of pictures
    for number, row in enumerate(DIFFUSION.rows):
        left = GAP + number % IN_LINE * (wide + GAP)
        top = GAP + above + number // IN_LINE * (above + high + GAP)
        enlarged = np.kron(picture(DIFFUSION, row), np.ones((factor, factor), np.uint8))
        assert np.array_equal(figure[top : top + high, left : left + wide, 0], enlarged), row
    assert figure.shape[1] == GAP + IN_LINE * (wide + GAP)
    last = figure[top : top + high, left + wide + GAP :]
    assert (last == 255).all()  # seven pictures, four in a line


def test_titles_are_the_rows_labels(reports: Path) -> None:
    figure = samples(Results(DIFFUSION, reports), SAMPLES)
    titles = [text.get_text().replace("\n", " ") for text in figure.texts]
    assert titles[0] == "DiT (dense)"
    assert titles[-1] == "MaskLLM-4V (30 steps) ← Magnitude"


def test_rows_without_a_picture_leave_no_hole(reports: Path) -> None:
    picture_file("tiny", "tiny-wanda", "samples", reports).unlink()
    figure = samples(Results(DIFFUSION, reports), SAMPLES)
    assert (len(figure.images), [text.get_text() for text in figure.texts][2]) == (6, "SparseGPT w/o update")


def test_stale_rows_are_not_shown(reports: Path, tmp_path: Path) -> None:
    longer = diffusion(dense={"row": "tiny-dense", "init": "scratch", "steps": 6})
    assert figure_files(longer, reports) == {}


@pytest.mark.parametrize("shape", [(8, 8), (33, 100), (479, 481), (100, 33), (1024, 512)])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_figure_has_the_size_that_its_pictures_need(shape: tuple[int, int], count: int, tmp_path: Path) -> None:
    made_diffusion.make_records(DIFFUSION, tmp_path, pictured=False)
    for row in list(DIFFUSION.rows)[:count]:
        pixels = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
        write_picture(picture_file("tiny", row, "samples", tmp_path), pixels)
    (tmp_path / "figure.png").write_bytes(samples_file(Results(DIFFUSION, tmp_path), SAMPLES))
    found, wanted = read_picture(tmp_path / "figure.png"), fitted(pixels)
    high, wide = wanted.shape[:2]
    bottom = found.shape[0] - GAP  # of the last line
    left = GAP + (count - 1) % IN_LINE * (max(wide, SIDE // 2) + GAP)
    assert np.array_equal(found[bottom - high : bottom, left : left + wide], wanted)
    assert found.shape[1] == GAP + min(count, IN_LINE) * (max(wide, SIDE // 2) + GAP)


def test_large_pictures_are_averaged_in_squares() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE + 21, 2 * SIDE, 3), dtype=np.uint8)
    found = fitted(pixels)
    assert found.shape == ((SIDE + 21) // 2, SIDE, 3)
    assert found[3, 5, 1] == round(pixels[6:8, 10:12, 1].mean())
    assert found.dtype == np.uint8
