"""Tables of what was measured layer by layer: a line a row, a column a layer, shaded by value."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd

from maskllm4v.reporting.page.results import Results
from maskllm4v.reporting.page.scales import Scale, linear_scale
from maskllm4v.runs.paths import layers_file
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.text import one_line

ALL = "all"  # the column with the mean over layers


@dataclass(frozen=True)
class Cell:
    """A number between 0 and about 1; ``shade`` is where it lies on the table's scale, in percent."""

    layer: str
    text: str
    about: str
    shade: int


@dataclass(frozen=True)
class LayerTable:
    """``blocks`` are layers that share the beginning of their names: the beginning, and the rest of each."""

    metric: str
    scale: Scale
    blocks: list[tuple[str, list[str]]]
    lines: dict[str, list[Cell]]


def read_layers(results: Results) -> pd.DataFrame:
    """Diagnostics of all rows: ``row, seed, layer`` and what was measured; empty without any."""
    experiment = results.experiment
    paths = {row: layers_file(experiment.table, row, results.reports) for row in results.records}
    return read_diagnostics(paths)


def read_diagnostics(paths: dict[str, Path]) -> pd.DataFrame:
    """CSV files of rows below each other, with a column ``row``; a missing or an empty file adds none."""
    frames = [_read(path).assign(row=row) for row, path in paths.items() if path.exists()]
    frames = [frame for frame in frames if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["row", "seed", "layer"])


def _read(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_csv(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from error
    if missing := {"seed", "layer"} - set(frame.columns):
        raise UserError(f"{path} is damaged: column {min(missing)!r} is missing")
    return frame


def layer_table(results: Results, frame: pd.DataFrame, metric: str, *, whole: bool = False) -> LayerTable | None:
    """Means over seeds of one measurement; ``whole``: its scale ends at 1. None where no row has it."""
    if metric not in frame or not frame[metric].notna().any():
        return None
    known = frame.dropna(subset=[metric])
    means = known.groupby(["row", "layer"], sort=False)[metric].mean()
    scale = linear_scale(means, high=1.0 if whole else None, low=None if whole else 0.0)
    layers = list(dict.fromkeys(known["layer"]))
    lines = {}
    for row in dict.fromkeys(known["row"]):
        of_row = known[known["row"] == row]
        by_layer: dict[str, list[float]] = {layer: [] for layer in layers}
        for layer, value in zip(of_row["layer"], of_row[metric], strict=True):  # a frame per cell would take seconds
            by_layer[layer].append(value)
        over_layers = of_row.groupby("seed")[metric].mean().to_list()
        lines[row] = [_cell(layer, values, scale) for layer, values in {**by_layer, ALL: over_layers}.items()]
    blocks = [(block, [rest for _, rest in names]) for block, names in groupby(map(_split, layers), lambda n: n[0])]
    return LayerTable(metric, scale, blocks, lines)


def _cell(layer: str, by_seed: list[float], scale: Scale) -> Cell:
    if not by_seed:
        return Cell(layer, "", "", 0)
    mean = float(np.mean(by_seed))
    seeds = ", ".join(f"{value:.4f}" for value in by_seed)
    name = "mean over all layers" if layer == ALL else layer
    about = f"{name}: {mean:.4f}" + (f" (seeds: {seeds})" if len(by_seed) > 1 else "")
    return Cell(layer, _short(mean), about, round(100 * scale(mean)))


def _short(value: float) -> str:
    """Two decimals without the zero before them."""
    text = f"{value:.2f}"
    return text[1:] if text.startswith("0.") else text


def _split(layer: str) -> tuple[str, str]:
    """``blocks.0.attn.qkv`` as ``blocks.0`` and ``attn.qkv``; a layer outside blocks has nothing before it."""
    parts = layer.split(".")
    end = next((place + 1 for place, part in enumerate(parts) if part.isdigit()), 0)
    return (".".join(parts[:end]), ".".join(parts[end:])) if 0 < end < len(parts) else ("", layer)
