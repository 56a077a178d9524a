"""Reading ``params.yaml``, and saying in a line what is wrong with it."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from maskllm4v.config.base import Settings
from maskllm4v.config.experiment import Experiment, experiment_class
from maskllm4v.config.sections import LearningSettings
from maskllm4v.config.taken import check_is_free
from maskllm4v.config.tasks import task_name, task_names, task_sections
from maskllm4v.utils.errors import ConfigError

PARAMS = Path("params.yaml")
DEEPEST = 50  # that values may be nested; settings need some ten
MOST = 100_000  # values; a table of a thousand rows needs a third of that
OTHER_MODEL = ("literal_error", "other_task")  # faults of a model's name that make it another task's

AnySettings = TypeVar("AnySettings", bound=Settings)


def load_experiment(path: Path = PARAMS) -> Experiment:
    """Read and validate a params file.

    Raises:
        ConfigError: the file is missing, no YAML, or a key is wrong or there twice; all faults are listed, a line each;
            or another experiment makes its table.
    """
    raw = _read(path)
    experiment = parse_experiment(raw, str(path))
    check_is_free(path, experiment.table, experiment.rows, _read)
    return experiment


def _read(path: Path) -> Any:
    """What a params file holds; errors as :func:`load_experiment`."""
    try:
        raw = YAML(typ="safe").load(path.read_text(encoding="utf-8"))  # as DVC reads it: YAML 1.2, ``2:4`` is text
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except DuplicateKeyError as error:
        key = re.search(r'duplicate key "(.*?)"', str(error.problem))
        line = error.problem_mark.line + 1
        raise ConfigError(f"{path}, line {line}: key {key[1] if key else ''!r} is there twice") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deep") from error
    except (YAMLError, ValueError, KeyError) as error:  # no UTF-8, an impossible date, a wrong tag
        raise ConfigError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    return raw


def _check_values(raw: Any, origin: str) -> None:
    """Raise :class:`ConfigError` where values are nested too deep, or too many (YAML's aliases may name one often).

    And where a text has half a character in it, which no file can be called and nothing can show.
    """
    sizes: dict[int, int] = {}  # of containers, all that is in them counted as often as it is named
    around: set[int] = set()

    def size(value: Any) -> int:
        if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
            raise ConfigError(f"{origin}: {value[:80]!r} holds a lone surrogate, which is no character")
        if not isinstance(value, dict | list):
            return 1
        if (place := id(value)) not in sizes:
            if place in around:
                raise ConfigError(f"{origin}: a value holds itself, by an alias")
            if len(around) == DEEPEST:
                raise ConfigError(f"{origin} is nested more than {DEEPEST} deep")
            around.add(place)
            sizes[place] = 1 + sum(map(size, [*value, *value.values()] if isinstance(value, dict) else value))
            around.remove(place)
        return sizes[place]

    if size(raw) > MOST:
        raise ConfigError(f"{origin} holds more than {MOST:,} values")


def parse_experiment(raw: Any, origin: str = "params") -> Experiment:
    """Validate what a params file holds; see :func:`load_experiment`."""
    _check_values(raw, origin)
    if (name := task_name(raw)) not in task_names():
        raise ConfigError(f"{origin}: task.name is {name!r}; allowed: {', '.join(map(repr, task_names()))}")
    return parse_section(experiment_class(name), raw, origin)


def parse_section(section: type[AnySettings], raw: Any, origin: str = "params") -> AnySettings:
    """Validate plain values as settings.

    Raises:
        ConfigError: a key or value is wrong; all faults are listed, a line each, after ``origin``.
    """
    try:
        return section.model_validate(raw)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        decisive = [f for f in faults if f["type"] in OTHER_MODEL and f["loc"] == ("model", "name")]
        lines = dict.fromkeys(_explain(fault, raw, section) for fault in decisive or faults)  # others follow from it
        raise ConfigError("\n".join(f"{origin}: {line}" for line in lines)) from error


def _explain(fault: Any, raw: Any, section: type[Settings]) -> str:
    location = tuple(str(part) for part in fault["loc"] if part != "[key]")
    key = ".".join(location)
    if location[:1] in (("learned",), ("finetuned",)) and len(location) > 2:
        own = next(row for name, row in raw[location[0]].items() if str(name) == location[1])
        inherited = location[2] in LearningSettings.model_fields and location[2] not in own
        key = ".".join(("learning", *location[2:])) if inherited else key
    if fault["type"] == "extra_forbidden":
        return _unknown(key, location, _allowed_keys(section, location[:-1]))
    if fault["type"] == "missing":
        return f"key {key!r} is missing"
    if fault["type"] == "value_error" and not key:
        return str(fault["ctx"]["error"])
    found = fault["input"]
    if key == "model.name" and fault["type"] == "literal_error":
        expected = fault["ctx"]["expected"].replace("'", "")
        return f"{key} is {found!r}; allowed for task {task_name(raw)!r}: {expected}"
    if fault["type"] == "value_error":
        return f"{key}: {fault['ctx']['error']}"
    if not key:
        return f"holds {type(raw).__name__}, not a mapping of keys"
    return f"{key} is {found!r}; {fault['msg'][0].lower()}{fault['msg'][1:]}"


def _unknown(key: str, location: tuple[str, ...], allowed: list[str]) -> str:
    """What is said of an unknown key; of one that only other tasks know, whose they are."""
    if not allowed:
        sections = {name: getattr(task_sections(name), location[0], None) for name in task_names()}
        tasks = [name for name, section in sections.items() if location[-1] in getattr(section, "model_fields", ())]
        if tasks:
            return f"{key} is for task {' or '.join(map(repr, tasks))} only"
    close = difflib.get_close_matches(location[-1], allowed, 1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"unknown key {key!r}; {hint}allowed: {', '.join(allowed) or '(none)'}"


def _allowed_keys(section: Any, location: tuple[str, ...]) -> list[str]:
    """The keys of the section at a location such as ``("learned", "<row>")``."""
    for part in location:
        is_rows = get_origin(section) is dict
        section = get_args(section)[1] if is_rows else section.model_fields[part].annotation
        if get_origin(section) in (Union, UnionType):  # an optional section
            section = get_args(section)[0]
    return list(section.model_fields)
