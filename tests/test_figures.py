"""Figures: which ones a table gets, what stands in them, and the same bytes every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import made_diffusion
import numpy as np
import pytest
from made_diffusion import TIMESTEPS, diffusion, picture
from made_records import DIGITS, make_records
from matplotlib.figure import Figure

from maskllm4v.config import Experiment
from maskllm4v.reporting.aggregate import aggregate, current_records
from maskllm4v.reporting.figures import draw_figures
from maskllm4v.reporting.figures.bars import bars
from maskllm4v.reporting.figures.lines import timesteps
from maskllm4v.reporting.figures.samples import GAP, IN_LINE, SIDE, fitted, samples
from maskllm4v.runs.paths import picture_file, record_file
from maskllm4v.utils.images import read_picture, write_picture
from maskllm4v.utils.io import read_json, write_json

DIFFUSION = diffusion()


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    return made_diffusion.make_records(DIFFUSION, tmp_path / "reports")


def drawn(experiment: Experiment, reports: Path, folder: Path) -> dict[str, bytes]:
    """All figures of a table by file name."""
    records = current_records(experiment, reports)
    written = draw_figures(experiment, records, aggregate(experiment, records), reports, folder)
    assert sorted(written) == sorted(folder.iterdir())
    return {path.name: path.read_bytes() for path in written}


def bars_of(experiment: Experiment, reports: Path) -> Figure | None:
    return bars(experiment, aggregate(experiment, current_records(experiment, reports)))


def changed(path: Path, **metrics: float) -> None:
    """Other numbers in a record, for all seeds."""
    record: dict[str, Any] = read_json(path)
    for of_seed in record["metrics"].values():
        of_seed |= metrics
    write_json(path, record)


# Which figures


def test_figures_of_diffusion(reports: Path, tmp_path: Path) -> None:
    found = drawn(DIFFUSION, reports, tmp_path / "a")
    vectors = {f"{name}.{suffix}" for name in ("quality", "curves", "timesteps") for suffix in ("svg", "png")}
    assert set(found) == {*vectors, "samples.png"}
    assert drawn(DIFFUSION, reports, tmp_path / "b") == found


def test_figures_of_classification(tmp_path: Path) -> None:
    found = drawn(DIGITS, make_records(DIGITS, tmp_path / "reports"), tmp_path / "figures")
    assert set(found) == {f"{name}.{suffix}" for name in ("accuracy", "curves") for suffix in ("svg", "png")}


@pytest.mark.parametrize("experiment", [DIGITS, DIFFUSION], ids=["classification", "diffusion"])
def test_nothing_measured_nothing_drawn(experiment: Experiment, tmp_path: Path) -> None:
    assert draw_figures(experiment, {}, aggregate(experiment, {}), tmp_path, tmp_path / "figures") == []


# Bars


def test_a_panel_for_accuracy_and_one_for_the_error(reports: Path) -> None:
    figure = bars_of(DIFFUSION, reports)
    assert figure is not None
    accuracy, error = figure.axes
    assert accuracy.get_xlabel() == "conditional accuracy (%), bars start off zero"
    assert accuracy.get_xlim()[1] == 100
    assert error.get_xlabel() == "ε-MSE, lower is better"
    assert (error.get_xscale(), error.get_xlim()[0]) == ("linear", 0)
    widths = [bar.get_width() for bar in error.patches][::-1]
    assert widths == pytest.approx([0.051 + 0.01 * number for number in range(7)])


def test_without_a_classifier_there_is_the_error_alone(tmp_path: Path) -> None:
    figure = bars_of(DIFFUSION, made_diffusion.make_records(DIFFUSION, tmp_path, judged=False))
    assert figure is not None
    assert [axes.get_xlabel() for axes in figure.axes] == ["ε-MSE, lower is better"]


def test_errors_of_several_sizes_get_a_logarithmic_axis(reports: Path) -> None:
    changed(record_file("tiny", "tiny-magnitude", reports), eps_mse=0.9)
    figure = bars_of(DIFFUSION, reports)
    assert figure is not None
    error = figure.axes[1]
    assert (error.get_xscale(), error.get_xlabel()) == ("log", "ε-MSE, lower is better, logarithmic")
    assert 0 < error.get_xlim()[0] < 0.051


# Lines over timesteps


def test_lines_over_timesteps_are_means_over_seeds(reports: Path) -> None:
    figure = timesteps(DIFFUSION, current_records(DIFFUSION, reports))
    assert figure is not None
    error, distance = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["ε-MSE", "MSE to dense"]
    assert (len(error.lines), len(distance.lines)) == (7, 6)  # the dense model is no distance away from itself
    assert list(error.lines[1].get_xdata()) == list(TIMESTEPS)
    assert list(error.lines[1].get_ydata()) == pytest.approx([0.061 * 40 / t for t in TIMESTEPS], abs=2e-6)
    assert [text.get_text() for text in figure.legends[0].get_texts()][:2] == ["DiT (dense)", "Magnitude"]
    colours = [line.get_color() for line in error.lines]
    assert len(set(colours)) == 7
    assert [line.get_color() for line in distance.lines] == colours[1:]


# Samples


def test_samples_are_enlarged_by_whole_numbers(reports: Path, tmp_path: Path) -> None:
    drawn(DIFFUSION, reports, tmp_path / "figures")
    figure = read_picture(tmp_path / "figures" / "samples.png")
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
    figure = samples(DIFFUSION, DIFFUSION.rows, reports)
    assert figure is not None
    titles = [text.get_text().replace("\n", " ") for text in figure.texts]
    assert titles[0] == "DiT (dense)"
    assert titles[-1] == "MaskLLM-4V (30 steps) ← Magnitude"


def test_rows_without_a_picture_leave_no_hole(reports: Path) -> None:
    picture_file("tiny", "tiny-wanda", "samples", reports).unlink()
    figure = samples(DIFFUSION, DIFFUSION.rows, reports)
    assert figure is not None
    assert (len(figure.images), [text.get_text() for text in figure.texts][2]) == (6, "SparseGPT w/o update")


def test_pictures_of_stale_rows_are_not_shown(reports: Path, tmp_path: Path) -> None:
    longer = diffusion(dense={"row": "tiny-dense", "init": "scratch", "steps": 6})
    assert not drawn(longer, reports, tmp_path / "figures").keys() & {"samples.png", "timesteps.png", "quality.png"}


@pytest.mark.parametrize("shape", [(8, 8), (33, 100), (479, 481), (100, 33), (1024, 512)])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_figure_has_the_size_that_its_pictures_need(shape: tuple[int, int], count: int, tmp_path: Path) -> None:
    rows = list(DIFFUSION.rows)[:count]
    for row in rows:
        pixels = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
        write_picture(picture_file("tiny", row, "samples", tmp_path), pixels)
    figure = samples(DIFFUSION, rows, tmp_path)
    assert figure is not None
    figure.savefig(tmp_path / "figure.png")
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
