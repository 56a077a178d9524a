"""Where the pipeline puts things, relative to the repository's root."""

from __future__ import annotations

from pathlib import Path

ARTIFACTS = Path("artifacts")
REPORTS = Path("reports")
TIMINGS = Path(".cache/timings")  # git-ignored; nothing hashes them


def data_folder(name: str) -> Path:
    return ARTIFACTS / "data" / name


def checkpoint(row: str, seed: int) -> Path:
    """Dense weights or masks of one row and seed."""
    return ARTIFACTS / row / f"seed{seed}.safetensors"


def settings_file(row: str) -> Path:
    """The settings that a row's artifacts were made with."""
    return ARTIFACTS / row / "settings.json"


def run_folder(table: str, row: str, reports: Path = REPORTS) -> Path:
    """All that is committed of one row: its record, its diagnostics, its training curves."""
    return reports / table / "runs" / row


def record_file(table: str, row: str, reports: Path = REPORTS) -> Path:
    return run_folder(table, row, reports) / "record.json"


def layers_file(table: str, row: str, reports: Path = REPORTS) -> Path:
    return run_folder(table, row, reports) / "layers.csv"


def curve_file(table: str, row: str, seed: int, reports: Path = REPORTS) -> Path:
    return run_folder(table, row, reports) / "curves" / f"seed{seed}.csv"
