"""Curves of a table in one file, and the short names that rows have there."""

from __future__ import annotations

import io
import statistics
from pathlib import Path

import pandas as pd
import pytest
from made_records import DIGITS, make_records, with_controls

from maskllm4v.reporting.curves import COLUMNS, curves_csv
from maskllm4v.reporting.names import short_names
from maskllm4v.runs.paths import curve_file
from maskllm4v.utils.errors import UserError


def read(text: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(text)).set_index("row")


def test_means_over_seeds_of_every_learned_row(tmp_path: Path) -> None:
    found = read(curves_csv(DIGITS, make_records(DIGITS, tmp_path)))
    assert list(dict.fromkeys(found.index)) == [row.removeprefix("digits-") for row in DIGITS.learned]
    row = "digits-maskllm-detinit"
    seeds = [pd.read_csv(curve_file("digits", row, seed, tmp_path)) for seed in DIGITS.seeds]
    assert list(found.loc["maskllm-detinit", "step"]) == list(seeds[0]["step"])
    for column in COLUMNS:
        wanted = [statistics.mean(values) for values in zip(*(seed[column] for seed in seeds), strict=True)]
        assert list(found.loc["maskllm-detinit", column]) == pytest.approx(wanted, rel=1e-5)


def test_controls_have_a_loss_and_no_masks(tmp_path: Path) -> None:
    controls = with_controls()
    control = read(curves_csv(controls, make_records(controls, tmp_path))).loc["dense-more"]
    assert control["loss"].notna().all()
    assert control[["tau", "max_probability", "flipped", "off_prior"]].isna().all(axis=None)


def test_rows_without_curves_are_left_out(tmp_path: Path) -> None:
    assert curves_csv(DIGITS, tmp_path) == f"step,row,{','.join(COLUMNS)}\n"
    make_records(DIGITS, tmp_path, ["digits-maskllm-detinit"])
    assert set(read(curves_csv(DIGITS, tmp_path)).index) == {"maskllm-detinit"}


@pytest.mark.parametrize("gone", [[1], [0, 1, 2]])
def test_a_measured_row_without_curves_is_named(gone: list[int], tmp_path: Path) -> None:
    make_records(DIGITS, tmp_path)
    paths = [curve_file("digits", "digits-maskllm-detinit", seed, tmp_path) for seed in gone]
    for path in paths:
        path.unlink()
    with pytest.raises(UserError, match=f"{paths[0]} is missing, though the row was measured"):
        curves_csv(DIGITS, tmp_path)


@pytest.mark.parametrize(
    ("rows", "short"),
    [
        (["digits-dense", "digits-maskllm-long"], ["dense", "maskllm-long"]),
        (["a-b-dense", "a-b-1of4-wanda", "a-b-1of4-masks"], ["dense", "1of4-wanda", "1of4-masks"]),
        (["dit-maskllm", "dit-maskllm-nodata"], ["maskllm", "maskllm-nodata"]),  # what begins another row stays
        (["cifar10-dense", "digits-dense"], ["cifar10-dense", "digits-dense"]),
        (["digits-dense", "digit-dense"], ["digits-dense", "digit-dense"]),  # whole words alone
        (["dense", "masks"], ["dense", "masks"]),
        (["digits-dense"], ["dense"]),
        ([], []),
    ],
)
def test_short_names(rows: list[str], short: list[str]) -> None:
    assert short_names(rows) == dict(zip(rows, short, strict=True))
