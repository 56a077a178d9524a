"""All that is known of one row: settings, releases, hardware, inputs, and single values."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskllm4v.reporting.page.results import Results
from maskllm4v.runs.records import DIGITS
from maskllm4v.utils.text import plain

ABSENT = object()


@dataclass(frozen=True)
class Setting:
    """A line of settings, as YAML would show it; ``own``: another row of its kind has another value."""

    path: str
    indent: int
    text: str
    value: str
    own: bool


@dataclass(frozen=True)
class Value:
    """A metric by seed: with two decimals more than the table, and as the record holds it."""

    metric: str
    shown: dict[int, str]
    exact: dict[int, str]


@dataclass(frozen=True)
class Details:
    """Of one measured row; ``inputs`` are names and digests."""

    row: str
    settings: list[Setting]
    values: list[Value]
    versions: dict[str, str]
    made: str
    evaluated: str
    parameters: dict[str, str]
    inputs: list[tuple[str, str]]
    commands: list[str]

    @property
    def own(self) -> list[Setting]:
        return [setting for setting in self.settings if setting.own]


def row_details(results: Results, row: str, file: str | None) -> Details:
    """Read a row's record.

    Args:
        results: whose row it is.
        row: one that has a record.
        file: the experiment's in ``experiments/``, without ``.yaml``; None where it stands in ``params.yaml`` alone.
    """
    record = results.records[row]
    kin = [dict(_leaves(results.settings[r["row"]])) for r in results.records.values() if r["kind"] == record["kind"]]
    settings = [
        Setting(path, indent, text, _shown(value), _differs(path, value, kin))
        for path, indent, text, value in _lines(results.settings[row])
    ]
    switch = [f"make use EXPERIMENT={file}"] if file else []
    return Details(
        row=row,
        settings=settings,
        values=_values(results, record["metrics"]),
        versions=dict(record["versions"]),
        made=_where(record["made"]),
        evaluated=_where(record["evaluated"]),
        parameters={name: f"{count:,}" for name, count in record.get("parameters", {}).items()},
        inputs=list(_inputs(record["inputs"])),
        commands=[*switch, f"dvc repro evaluate@{row}"],
    )


def _lines(settings: Mapping[str, Any], before: str = "", indent: int = 0) -> Iterator[tuple[str, int, str, Any]]:
    """Of each setting, by name: dotted path, depth, text, and value (:data:`ABSENT` for a section)."""
    for key, value in sorted(settings.items()):
        path = f"{before}{key}"
        if isinstance(value, Mapping) and value:
            yield path, indent, f"{key}:", ABSENT
            yield from _lines(value, f"{path}.", indent + 1)
        else:
            yield path, indent, f"{key}: {_shown(value)}", value


def _differs(path: str, value: Any, kin: Sequence[Mapping[str, Any]]) -> bool:
    return value is not ABSENT and any(other.get(path, ABSENT) != value for other in kin)


def _leaves(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((path, value) for path, _, _, value in _lines(settings) if value is not ABSENT)


def _shown(value: Any) -> str:
    if value is ABSENT:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _values(results: Results, metrics: Mapping[str, Mapping[str, float]]) -> list[Value]:
    """The table's columns first, then what else the record holds, by name."""
    names = {name for of_seed in metrics.values() for name in of_seed}
    digits = {metric.name: metric.digits + 2 for metric in results.metrics.columns if metric.name in names}
    found = []
    for name in [*digits, *sorted(names - digits.keys())]:
        exact = {int(seed): metrics[seed][name] for seed in sorted(metrics, key=int) if name in metrics[seed]}
        shown = {seed: f"{value:.{digits.get(name, DIGITS)}f}" for seed, value in exact.items()}
        found.append(Value(name, shown, {seed: repr(value) for seed, value in exact.items()}))
    return found


def _where(made: Mapping[str, Any]) -> str:
    processes = made.get("world_size", 1)
    return plain(f"{made['hardware']}") + (f", {processes} processes" if processes > 1 else "")


def _inputs(inputs: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, digests in inputs.items():
        listed = digests if isinstance(digests, list) else [digests]
        for place, digest in enumerate(listed):
            yield (f"{name} {place}" if len(listed) > 1 else name), str(digest)
