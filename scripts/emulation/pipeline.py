"""What ``dvc.yaml`` makes of an experiment: every call of a stage, the artifacts it reads, the outputs it writes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from maskllm4v.config import Experiment

REFERENCE = re.compile(r"\$\{([^}]+)\}")
COMMAND = re.compile(r"python -m stages\.(\w+) (\S+)")
MADE = ("artifacts/", "reports/")


@dataclass(frozen=True)
class Call:
    """One call of a stage.

    Attributes:
        table: whose.
        stage: ``"train"``, run as ``python -m stages.train``.
        key: its argument: a row, or the name of the data.
        inputs: paths that it reads and other stages write, relative to the project.
        outputs: paths that it writes.
    """

    table: str
    stage: str
    key: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def name(self) -> str:
        """As DVC has it: ``train@digits-maskllm-short-magnitude``."""
        return f"{self.stage}@{self.key}"

    def __str__(self) -> str:
        return f"{self.table} {self.name}"


def calls(experiment: Experiment, root: Path) -> list[Call]:
    """All calls of the stages that compute something of a row or of the data, each after those that it needs.

    The report and what MLflow is sent are made from all records of a table, without torch; they are left out.

    Raises:
        ValueError: ``dvc.yaml`` holds what is not understood here, or stages that wait for one another.
    """
    stages = yaml.safe_load((root / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    values = experiment.model_dump(mode="json")
    found = [call for stage in stages.values() if "foreach" in stage for call in _expanded(stage, values)]
    return _ordered(found)


def _expanded(stage: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[Call]:
    """The calls that a ``foreach`` stands for."""
    over = stage["foreach"]
    items = _value(over, values) if isinstance(over, str) else [_filled(item, values) for item in over]
    pairs = items.items() if isinstance(items, dict) else [(None, item) for item in items]
    for key, item in pairs:
        known = {**values, "key": key, "item": item}
        command = _filled(stage["do"]["cmd"], known)
        if (words := COMMAND.fullmatch(command)) is None:
            raise ValueError(f"dvc.yaml: {command!r} does not call one stage with one argument")
        yield Call(
            table=values["table"],
            stage=words[1],
            key=words[2],
            inputs=tuple(path for path in _paths(stage["do"]["deps"], known) if path.startswith(MADE)),
            outputs=tuple(_paths(stage["do"]["outs"], known)),
        )


def _paths(listed: list[Any], known: Mapping[str, Any]) -> Iterator[str]:
    """Paths of dependencies or outputs, with or without flags of their own."""
    for entry in listed:
        for path in [entry] if isinstance(entry, str) else entry:
            yield _filled(path, known)


def _filled(text: str, known: Mapping[str, Any]) -> str:
    return REFERENCE.sub(lambda found: str(_value(found[0], known)), text)


def _value(reference: str, known: Mapping[str, Any]) -> Any:
    """What ``${a.b}`` stands for."""
    if (found := REFERENCE.fullmatch(reference)) is None:
        raise ValueError(f"dvc.yaml: {reference!r} is not understood")
    value: Any = known
    for name in found[1].split("."):
        value = value[name]
    return value


def _ordered(found: list[Call]) -> list[Call]:
    """Each after those whose outputs it reads."""
    ahead, done = list(found), list[Call]()
    while ahead:
        missing = {path for call in ahead for path in call.outputs}
        ready = [call for call in ahead if not missing & set(call.inputs)]
        if not ready:
            raise ValueError(f"dvc.yaml: stages wait for one another: {', '.join(map(str, ahead))}")
        done += ready
        ahead = [call for call in ahead if call not in ready]
    return done
