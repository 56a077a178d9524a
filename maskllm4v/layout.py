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


def curve(table: str, row: str, seed: int) -> Path:
    return REPORTS / table / "curves" / row / f"seed{seed}.csv"


def diagnostics(table: str, row: str) -> Path:
    return REPORTS / table / "diagnostics" / f"{row}.csv"
