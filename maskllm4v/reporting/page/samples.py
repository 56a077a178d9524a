"""Pictures that rows' models sampled."""

from __future__ import annotations

from base64 import b64encode

from maskllm4v.reporting.page.results import Results
from maskllm4v.runs.paths import picture_file

PICTURE = "samples"


def read_samples(results: Results) -> dict[str, str]:
    """By row, the PNG file as an address that holds it; rows without one are absent."""
    table = results.experiment.table
    paths = {row: picture_file(table, row, PICTURE, results.reports) for row in results.records}
    found = {row: path.read_bytes() for row, path in paths.items() if path.exists()}
    return {row: f"data:image/png;base64,{b64encode(content).decode()}" for row, content in found.items()}
