"""Which row made which file, so that one that lies under another row's name is noticed.

A file does not say whose it is: its bytes are those that ``dvc.lock`` and records name. So the stage that makes one
notes the digest of its tensors in ``.cache/made/<row>/seed<k>.txt``. Digests that no row has noted (DVC brought the
file into a new clone) are taken as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Collection

from maskllm4v.config import Experiment
from maskllm4v.runs.paths import MADE, checkpoint, made_file
from maskllm4v.utils.errors import CheckpointError


def note_maker(row: str, seed: int, digest: str) -> None:
    """Note the digest of the tensors that a row has made."""
    path = made_file(row, seed)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if digest not in _noted(row, seed):
            with path.open("a", encoding="utf-8") as file:
                file.write(f"{digest}\n")
    except OSError as error:  # no result: a full disk fails no stage
        print(f"cannot write {path}: {error.strerror}", file=sys.stderr)


def check_inputs(experiment: Experiment, seed: int, dense: str, row: str | None = None, masks: str = "") -> None:
    """Refuse what :func:`check_maker` refuses: a seed's dense weights, and a row's masks on them, by their digests."""
    check_maker(experiment.dense.row, experiment.dense_seed(seed), dense)
    if row is not None:
        above = {other.key for other in experiment.row(row).chain}
        below = {key for key in experiment.rows if row in {other.key for other in experiment.row(key).chain}}
        check_maker(row, seed, masks, above | below)


def check_maker(row: str, seed: int, digest: str, kin: Collection[str] = ()) -> None:
    """Refuse tensors that lie under a row's name and were made by another one, or by another of its seeds.

    Args:
        row, seed: under whose name they lie.
        digest: of the tensors.
        kin: rows whose masks come from this one's or the other way round; with ``update: none`` they are the same.

    Raises:
        CheckpointError: names both.
    """
    if digest in _noted(row, seed):
        return
    alike = {made_file(other, seed) for other in kin}
    for path in sorted(MADE.glob("*/seed*.txt")):
        if path not in alike and digest in path.read_text(encoding="utf-8").split():
            other = f"row {path.parent.name!r}, {path.stem.replace('seed', 'seed ')}"
            raise CheckpointError(
                f"{checkpoint(row, seed)} is not of row {row!r}, seed {seed}: {other} has made it; make the row again "
                f"(or delete {MADE}, if the row was renamed)"
            )


def _noted(row: str, seed: int) -> list[str]:
    path = made_file(row, seed)
    return path.read_text(encoding="utf-8").split() if path.exists() else []
