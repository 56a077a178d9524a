"""Which of our modules a module imports, read from the source (``ast``), function-level imports included."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = ("maskllm4v", "stages")
# What imports a module of the task's folder, whichever task it is asked for.
BY_NAME = {"maskllm4v.config.tasks": "settings", "maskllm4v.tasks.base": "task"}


@cache
def modules() -> Mapping[str, Path]:
    """All our modules by dotted name."""
    found = {}
    for package in OURS:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _nodes(tree: ast.AST) -> list[ast.AST]:
    """All nodes but those that only a type checker sees."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(tree):
        if not _is_type_checking(child):
            found += [child, *_nodes(child)]
    return found


@cache
def imported_names(path: Path) -> frozenset[str]:
    """Dotted names that a file imports; ``from a import b`` counts as ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(names)


@cache
def imports(module: str) -> frozenset[str]:
    """Our modules that a module imports directly, the packages around them included."""
    known = modules()
    names = imported_names(known[module])
    with_parents = {".".join(n.split(".")[: i + 1]) for n in names for i in range(len(n.split(".")))}
    parents = {".".join(module.split(".")[:i]) for i in range(1, len(module.split(".")))}
    return frozenset(((with_parents | parents) & known.keys()) - {module})


def imported_by_name(module: str) -> set[str]:
    """Our modules that a module imports by a name that its source does not tell: those of all tasks."""
    last = BY_NAME.get(module)
    return {name for name in modules() if last and name.startswith("maskllm4v.tasks.") and name.endswith(f".{last}")}


@cache
def closure(module: str) -> frozenset[str]:
    """A module and all of ours that it imports, directly or not, whatever the task."""
    seen: set[str] = set()
    ahead = [module]
    while ahead:
        current = ahead.pop()
        if current not in seen:
            seen.add(current)
            ahead += imports(current) | imported_by_name(current)
    return frozenset(seen)
