"""Turn the data source into a verified manifest: ``artifacts/data/<name>/``."""

from __future__ import annotations

from maskllm4v.config import Experiment
from maskllm4v.runs.paths import data_folder
from maskllm4v.utils.errors import ConfigError
from stages.entry import run


def main(experiment: Experiment, name: str) -> None:
    from maskllm4v.data import prepare

    if name != experiment.data.name:
        raise ConfigError(f"no data source {name!r} in this experiment; allowed: {experiment.data.name}")
    manifest = prepare(experiment.data, data_folder(name))
    counts = ", ".join(f"{len(entries)} {split}" for split, entries in manifest.splits.items())
    print(f"{name}: {len(manifest.classes)} classes, {counts} images, {sum(map(len, manifest.calibration))} calibrate")


if __name__ == "__main__":
    run("prepare", main, takes="name", torch=False)
