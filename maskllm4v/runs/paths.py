"""Where the pipeline puts things, relative to the repository's root."""

from __future__ import annotations

from pathlib import Path

ARTIFACTS = Path("artifacts")
REPORTS = Path("reports")
TIMINGS = Path(".cache/timings")  # git-ignored; nothing hashes them
RESUME = Path(".cache/resume")
LIVE = Path(".cache/live")
MADE = Path(".cache/made")


def data_folder(name: str) -> Path:
    return ARTIFACTS / "data" / name


def checkpoint(row: str, seed: int) -> Path:
    """Dense weights or masks of one row and seed."""
    return ARTIFACTS / row / f"seed{seed}.safetensors"


def made_file(row: str, seed: int) -> Path:
    """Digests of the tensors that were made as those of one row and seed, undeclared to DVC."""
    return MADE / row / f"seed{seed}.txt"


def judge_file(row: str) -> Path:
    """The classifier that a dense row's samples, and those of all rows made from it, are judged by."""
    return ARTIFACTS / row / "judge.safetensors"


def cost_file(row: str, seed: int) -> Path:
    """Speed and memory of a training on its machine; no result."""
    return TIMINGS / f"{row}-seed{seed}.json"


def origin_file(row: str) -> Path:
    """How a row's artifacts were made: settings, hardware, processes."""
    return ARTIFACTS / row / "made.json"


def resume_folder(row: str) -> Path:
    """States of interrupted trainings, undeclared to DVC."""
    return RESUME / row


def resume_lock(row: str) -> Path:
    """Held by the process that trains a row."""
    return RESUME / f"{row}.lock"


def live_folder(row: str) -> Path:
    """Curves of a row's trainings while they run."""
    return LIVE / row


def live_file(row: str, seed: int) -> Path:
    return live_folder(row) / f"seed{seed}.csv"


def run_folder(table: str, row: str, reports: Path = REPORTS) -> Path:
    """All that is committed of one row: what it was measured as, and its training curves."""
    return reports / table / "runs" / row


def evaluation_folder(table: str, row: str, reports: Path = REPORTS) -> Path:
    """All that evaluating a row gives; one folder, for the pictures in it are the task's to name."""
    return run_folder(table, row, reports) / "evaluation"


def record_file(table: str, row: str, reports: Path = REPORTS) -> Path:
    return evaluation_folder(table, row, reports) / "record.json"


def layers_file(table: str, row: str, reports: Path = REPORTS) -> Path:
    return evaluation_folder(table, row, reports) / "layers.csv"


def mask_statistics_file(table: str, row: str, reports: Path = REPORTS) -> Path:
    return evaluation_folder(table, row, reports) / "masks.csv"


def tile_file(table: str, row: str, reports: Path = REPORTS) -> Path:
    """A corner of one weight with its mask before and after, of the first seed."""
    return evaluation_folder(table, row, reports) / "tile.json"


def picture_file(table: str, row: str, name: str, reports: Path = REPORTS) -> Path:
    return evaluation_folder(table, row, reports) / f"{name}.png"


def export_folder(row: str) -> Path:
    """A row's folded model, as others take it."""
    return ARTIFACTS / "exports" / row


def export_file(table: str, row: str, reports: Path = REPORTS) -> Path:
    """What is committed of a row's exported files: names, sizes, digests."""
    return run_folder(table, row, reports) / "export.json"


def curve_file(table: str, row: str, seed: int, reports: Path = REPORTS) -> Path:
    return run_folder(table, row, reports) / "curves" / f"seed{seed}.csv"
