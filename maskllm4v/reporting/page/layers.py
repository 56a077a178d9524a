"""Tables of what was measured layer by layer: a line a row, a column a layer, shaded by value."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pandas as pd

from maskllm4v.layout import layers_file
from maskllm4v.reporting.page.results import Results
from maskllm4v.reporting.page.scales import Scale, linear

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
    frames = [pd.read_csv(path).assign(row=row) for row, path in paths.items() if path.exists()]
    frames = [frame for frame in frames if len(frame)]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["row", "seed", "layer"])


def layer_table(results: Results, frame: pd.DataFrame, metric: str, *, whole: bool = False) -> LayerTable | None:
    """Means over seeds of one measurement; ``whole``: its scale ends at 1. None where no row has it."""
    if metric not in frame or not frame[metric].notna().any():
        return None
    known = frame.dropna(subset=[metric])
    means = known.groupby(["row", "layer"], sort=False)[metric].mean()
    scale = linear(means, high=1.0 if whole else None, low=None if whole else 0.0)
    layers = list(dict.fromkeys(known["layer"]))
    lines = {}
    for row in dict.fromkeys(known["row"]):
        of_row = known[known["row"] == row]
        cells = [_cell(layer, of_row[of_row["layer"] == layer], metric, scale) for layer in layers]
        over_layers = of_row.groupby("seed", sort=True)[metric].mean()
        lines[row] = [*cells, _mean_cell({int(str(k)): float(v) for k, v in over_layers.items()}, scale)]
    blocks = [(block, [rest for _, rest in names]) for block, names in groupby(map(_split, layers), lambda n: n[0])]
    return LayerTable(metric, scale, blocks, lines)


def _cell(layer: str, known: pd.DataFrame, metric: str, scale: Scale) -> Cell:
    by_seed = {int(seed): float(value) for seed, value in zip(known["seed"], known[metric], strict=True)}
    return _of_seeds(layer, by_seed, scale)


def _mean_cell(by_seed: dict[int, float], scale: Scale) -> Cell:
    return _of_seeds(ALL, by_seed, scale)


def _of_seeds(layer: str, by_seed: dict[int, float], scale: Scale) -> Cell:
    if not by_seed:
        return Cell(layer, "", "", 0)
    mean = sum(by_seed.values()) / len(by_seed)
    seeds = ", ".join(f"{value:.4f}" for value in by_seed.values())
    name = "mean over all layers" if layer == ALL else layer
    about = f"{name}: {mean:.4f}" + (f" (seeds: {seeds})" if len(by_seed) > 1 else "")
    return Cell(layer, short(mean), about, round(100 * scale(mean)))


def short(value: float) -> str:
    """Two decimals without the zero before them."""
    text = f"{value:.2f}"
    return text[1:] if text.startswith("0.") else text


def _split(layer: str) -> tuple[str, str]:
    """``blocks.0.attn.qkv`` as ``blocks.0`` and ``attn.qkv``; a layer outside blocks has nothing before it."""
    parts = layer.split(".")
    end = next((place + 1 for place, part in enumerate(parts) if part.isdigit()), 0)
    return (".".join(parts[:end]), ".".join(parts[end:])) if 0 < end < len(parts) else ("", layer)
