"""Where this is: the repository that a person works in, or a copy that DVC has made for one experiment.

``dvc exp run --temp`` and ``--queue`` run in a folder below ``.dvc/tmp/exps`` that is thrown away, and say in
``DVC_ROOT`` where the repository lies. Runs are kept there, in one store.
"""

from __future__ import annotations

import os
from pathlib import Path

STORE = "mlflow.db"  # sqlite; git-ignored and disposable, as is what lies beside it in mlruns/
SERVER = "MLFLOW_TRACKING_URI"  # names a store elsewhere


def main_root(root: Path) -> Path:
    """The repository's root, absolute, of which ``root`` may be a throw-away copy."""
    here, named = root.resolve(), os.environ.get("DVC_ROOT", "")
    main = Path(named).resolve()
    # In a stage that DVC runs in place it is the root itself; a clone that such a stage makes inherits it.
    return main if named and here.is_relative_to(main / ".dvc" / "tmp" / "exps") else here


def is_copy(root: Path) -> bool:
    """Whether ``root`` is a throw-away copy."""
    return main_root(root) != root.resolve()


def has_store(root: Path) -> bool:
    """Whether there is a store to send runs to already: a server, or the file that ``make ui`` or ``track`` makes."""
    return bool(os.environ.get(SERVER)) or (main_root(root) / STORE).exists()
