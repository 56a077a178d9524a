"""The list of exported files, and pictures that rows' models made."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

from maskllm4v.files import read_json
from maskllm4v.layout import export_file, picture_file
from maskllm4v.reporting.deployment import ratio_to_dense
from maskllm4v.reporting.page.results import Results

PICTURE = "samples"


def export_manifests(results: Results) -> list[dict[str, Any]]:
    """What is committed of each exported row, in the table's order; files with their ``ratio`` to the dense one."""
    table = results.experiment.table
    paths = [export_file(table, row, results.reports) for row in results.experiment.rows]
    manifests = [dict(read_json(path)) for path in paths if path.exists()]
    return [{**m, "files": [{**f, "ratio": ratio_to_dense(f, m["files"])} for f in m["files"]]} for m in manifests]


def pictures(results: Results) -> dict[str, str]:
    """Samples of each row's model as ``data:`` addresses, by row."""
    table = results.experiment.table
    paths = {row: picture_file(table, row, PICTURE, results.reports) for row in results.records}
    found = {row: path.read_bytes() for row, path in paths.items() if path.exists()}
    return {row: f"data:image/png;base64,{b64encode(content).decode()}" for row, content in found.items()}
