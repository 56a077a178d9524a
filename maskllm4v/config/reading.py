"""Reading ``params.yaml``, and saying in a line what is wrong with it."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import Tag, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from maskllm4v.config.experiment import Experiment
from maskllm4v.config.sections import LearningSettings
from maskllm4v.utils.errors import ConfigError

PARAMS = Path("params.yaml")


def load_experiment(path: Path = PARAMS) -> Experiment:
    """Read and validate a params file.

    Raises:
        ConfigError: the file is missing, no YAML, or a key is wrong or there twice; all faults are listed, a line each.
    """
    try:
        raw = YAML(typ="safe").load(path.read_text(encoding="utf-8"))  # as DVC reads it: YAML 1.2, ``2:4`` is text
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except DuplicateKeyError as error:
        key = re.search(r'duplicate key "(.*?)"', str(error.problem))
        line = error.problem_mark.line + 1
        raise ConfigError(f"{path}, line {line}: key {key[1] if key else ''!r} is there twice") from error
    except (YAMLError, ValueError, KeyError, RecursionError) as error:  # no UTF-8, an impossible date, a wrong tag
        raise ConfigError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    return parse_experiment(raw, str(path))


def parse_experiment(raw: Any, origin: str = "params") -> Experiment:
    """Validate what a params file holds; see :func:`load_experiment`."""
    try:
        return Experiment.model_validate(raw)
    except ValidationError as error:
        lines = dict.fromkeys(_explain(fault, raw) for fault in error.errors(include_url=False))
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from error


def _explain(fault: Any, raw: Any) -> str:
    location = tuple(str(part) for part in fault["loc"] if part != "[key]")
    if location[:1] in (("task",), ("model",)) and len(location) > 1:  # the second says which of two kinds it is
        kind, location = location[1], (location[0], *location[2:])
    else:
        kind = ""
    key = ".".join(location)
    if location[:1] in (("learned",), ("finetuned",)) and len(location) > 2:
        own = next(row for name, row in raw[location[0]].items() if str(name) == location[1])
        inherited = location[2] in LearningSettings.model_fields and location[2] not in own
        key = ".".join(("learning", *location[2:])) if inherited else key
    if fault["type"] == "extra_forbidden":
        allowed = _allowed_keys(location[:-1], kind)
        close = difflib.get_close_matches(location[-1], allowed, 1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return f"unknown key {key!r}; {hint}allowed: {', '.join(allowed)}"
    if fault["type"] == "missing":
        return f"key {key!r} is missing"
    if fault["type"] == "value_error" and not key:
        return str(fault["ctx"]["error"])
    found = fault["input"]
    if key == "task.name" and fault["type"] == "literal_error":
        return f"{key} is {found!r}; input should be 'classification' or 'diffusion'"
    if fault["type"] == "value_error":
        return f"{key}: {fault['ctx']['error']}"
    if not key:
        return f"holds {type(raw).__name__}, not a mapping of keys"
    return f"{key} is {found!r}; {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _allowed_keys(location: tuple[str, ...], kind: str = "") -> list[str]:
    """The keys of the section at a location such as ``("learned", "<row>")``; ``kind``: of a task or a model."""
    section: Any = Experiment
    for part in location:
        is_rows = get_origin(section) is dict
        section = get_args(section)[1] if is_rows else section.model_fields[part].annotation
        if get_origin(section) in (Union, UnionType):  # an optional section, or one of several kinds
            section = next((one for one in get_args(section) if Tag(kind) in _tags(one)), get_args(section)[0])
        if get_origin(section) is Annotated:
            section = get_args(section)[0]
    return list(section.model_fields)


def _tags(section: Any) -> tuple[Any, ...]:
    return get_args(section)[1:] if get_origin(section) is Annotated else ()
