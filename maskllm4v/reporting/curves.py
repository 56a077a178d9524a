"""Training curves of a table's rows: as one frame, and as the file that ``dvc plots`` reads."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from maskllm4v.config import Experiment
from maskllm4v.reporting.names import short_names
from maskllm4v.runs.paths import curve_file, record_file
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import read_text
from maskllm4v.utils.text import one_line

COLUMNS = ("loss", "tau", "scaling", "max_probability", "off_prior", "flipped", "kept_energy", "grad_norm")


def read_curves(experiment: Experiment, reports: Path, row: str) -> pd.DataFrame | None:
    """All seeds' curves of a trained row, with a ``seed`` column; None where it was not trained or not measured yet.

    Raises:
        UserError: one is missing though the row was measured, is damaged, or ends before others do.
    """
    paths = {seed: curve_file(experiment.table, row, seed, reports) for seed in experiment.seeds}
    missing = [path for path in paths.values() if not path.exists()]
    if missing and is_trained(experiment, row) and record_file(experiment.table, row, reports).exists():
        raise UserError(f"{missing[0]} is missing, though the row was measured; run dvc repro")
    frames = [_read(path).assign(seed=seed) for seed, path in paths.items() if path.exists()]
    if len({tuple(frame["step"]) for frame in frames}) > 1:
        raise UserError(f"{next(iter(paths.values())).parent}: the curves of its seeds have points at different steps")
    return pd.concat(frames, ignore_index=True) if frames else None


def is_trained(experiment: Experiment, row: str) -> bool:
    """Whether training it keeps a curve."""
    return row in experiment.learned or row in experiment.finetuned


def curves_csv(experiment: Experiment, reports: Path) -> str:
    """``step, row`` and :data:`COLUMNS`, mean over seeds, of all trained rows; what a row has not is empty.

    One file, because a plot of DVC's that spans files has to list them, and ``dvc.yaml`` can list no rows.
    """
    names = short_names(experiment.rows)
    frames = [pd.DataFrame(columns=("step", "row", *COLUMNS))]
    for row in (*experiment.learned, *experiment.finetuned):
        found = read_curves(experiment, reports, row)
        if found is not None:
            frames.append(found.groupby("step").mean().reset_index().assign(row=names[row]))
    frame = pd.concat(frames[1:] or frames, join="outer", ignore_index=True).reindex(columns=frames[0].columns)
    text: str = frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return text


def _read(path: Path) -> pd.DataFrame:
    text = read_text(path)
    columns = {line.count(",") for line in text.splitlines()}
    try:
        frame = pd.read_csv(path).astype(float)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from error
    if not text.endswith("\n") or len(columns) > 1 or "step" not in frame:
        raise UserError(f"{path} is damaged: a line is cut, or column 'step' is missing")
    return frame.astype({"step": int})
