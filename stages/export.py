"""Write a row's folded model for others: packed, masks alone, dense with zeros, ONNX."""

from __future__ import annotations

from maskllm4v.config import Experiment
from maskllm4v.runs.paths import data_folder, export_file, export_folder
from maskllm4v.utils.errors import ConfigError
from stages.entry import run


def main(experiment: Experiment, row: str) -> None:
    from maskllm4v.export.writing import write_row
    from maskllm4v.runs.provenance import read_origin
    from maskllm4v.tasks.base import open_task
    from maskllm4v.utils.io import empty_folder, write_json
    from maskllm4v.utils.processes import is_main

    if row not in experiment.exports:
        raise ConfigError(f"exports names no row {row!r}; it has {', '.join(experiment.exports) or 'none'}")
    read_origin(experiment, row)  # made with other settings: an error
    if not is_main():
        return
    empty_folder(export_folder(row))
    task = open_task(experiment.task_spec(), data_folder(experiment.data.name))
    found = write_row(experiment, task, row, export_folder(row))
    write_json(export_file(experiment.table, row), found)
    for file in found["files"]:
        print(f"{export_folder(row) / file['file']}: {file['bytes']:,} bytes")


if __name__ == "__main__":
    run("export", main)
