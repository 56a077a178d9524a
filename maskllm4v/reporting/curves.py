"""Training curves of a table's rows: as one frame, and as the file that ``dvc plots`` reads."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from maskllm4v.config import Experiment
from maskllm4v.reporting.names import short_names
from maskllm4v.runs.paths import curve_file

COLUMNS = ("loss", "tau", "scaling", "max_probability", "off_prior", "flipped", "kept_energy", "grad_norm")


def read_curves(experiment: Experiment, reports: Path, row: str) -> pd.DataFrame | None:
    """All seeds' curves of a trained row, with a ``seed`` column; None where there are none."""
    paths = {seed: curve_file(experiment.table, row, seed, reports) for seed in experiment.seeds}
    frames = [pd.read_csv(path).assign(seed=seed) for seed, path in paths.items() if path.exists()]
    return pd.concat(frames, ignore_index=True) if frames else None


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
