"""The exported files of a table's rows."""

from __future__ import annotations

from typing import Any

from maskllm4v.reporting.benchmarks.deployment import ratio_to_dense
from maskllm4v.reporting.page.results import Results
from maskllm4v.runs.paths import export_file
from maskllm4v.utils.io import read_json


def export_manifests(results: Results) -> list[dict[str, Any]]:
    """What is committed of each exported row, in the table's order; files with their ``ratio`` to the dense one."""
    table = results.experiment.table
    paths = [export_file(table, row, results.reports) for row in results.experiment.rows]
    manifests = [dict(read_json(path)) for path in paths if path.exists()]
    return [{**m, "files": [{**f, "ratio": ratio_to_dense(f, m["files"])} for f in m["files"]]} for m in manifests]
