"""Which calls of stages compute in the same way: of each kind, one stands for all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from maskllm4v.config import Experiment
from scripts.emulation.pipeline import Call

SHARED = ("data", "task", "model", "evaluation")  # what all stages of a table depend on


def kind(experiment: Experiment, call: Call) -> str:
    """What a call computes, as canonical JSON without the names and amounts that do not matter to it.

    What a row is called changes no computation, and neither does a number in its settings, unless it is 0 or 1, which
    often turn something off. Whatever else is in there counts, so a new setting makes a new kind by itself.
    """
    about: dict[str, Any] = {"stage": call.stage, **_shared(experiment)}
    if call.key in experiment.rows:
        about |= _of_row(experiment, call.stage, call.key)
    return json.dumps(about, sort_keys=True)


def _shared(experiment: Experiment) -> dict[str, Any]:
    """Sizes included, by which libraries choose their kernels."""
    values = {name: getattr(experiment, name).model_dump(mode="json") for name in SHARED}
    del values["data"]["name"]
    return values


def _of_row(experiment: Experiment, stage: str, row: str) -> dict[str, Any]:
    made = experiment.row(row)
    about: dict[str, Any] = {"row": made.kind, "new weights": made.updates_weights}
    if stage == "evaluate":  # masks and permutations of all kinds are laid on in the same way
        return about
    first = made.oneshot
    about |= {"pattern": made.pattern, "permutation": first and first.settings.permutation}
    if stage == "export":
        return {**about, "exports": experiment.exports[row].model_dump(mode="json")}
    if stage == "dense":
        return {**about, "dense": _abstract(experiment.dense.model_dump(mode="json"), experiment.rows)}
    return {**about, "made": _abstract(made.settings.model_dump(mode="json", exclude={"pattern"}), experiment.rows)}


def _abstract(value: Any, rows: Iterable[str]) -> Any:
    if isinstance(value, Mapping):
        return {name: _abstract(inner, rows) for name, inner in value.items()}
    if isinstance(value, list):
        return [_abstract(inner, rows) for inner in value]
    if isinstance(value, str) and value in rows:
        return "a row"
    return "a number" if isinstance(value, int | float) and value not in (0, 1) else value


def representatives(experiments: Mapping[str, Experiment], calls: Iterable[Call]) -> dict[Call, Call]:
    """For each call the first one of its kind, which may be of another table.

    Args:
        experiments: by the tables' names.
        calls: of all their stages, see :func:`scripts.emulation.pipeline.calls`.
    """
    first: dict[str, Call] = {}
    return {call: first.setdefault(kind(experiments[call.table], call), call) for call in calls}


def needed(wanted: Iterable[Call], calls: Iterable[Call]) -> list[Call]:
    """The calls that are wanted, and all that make what these read; in the order of ``calls``."""
    listed, found = list(calls), set(wanted)
    while True:
        read = {(call.table, path) for call in found for path in call.inputs}
        makers = {call for call in listed if read & {(call.table, path) for path in call.outputs}}
        if makers <= found:
            return [call for call in listed if call in found]
        found |= makers
