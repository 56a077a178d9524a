"""Do masks hold for any architecture? A model of each family, with random weights, and what has to hold for it.

    python -m scripts.sweep [NAME ...] [--covering]

Prints a line a model. The exit status is 1 if anything fails that ``exceptions.py`` does not list, or if an exception
holds by now. It takes some twenty minutes on two busy cores; models are independent, so give names to run a few.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase

from scripts.sweep.covering import COVERING
from scripts.sweep.exceptions import unexpected
from scripts.sweep.models import Subject
from scripts.sweep.others import OTHERS
from scripts.sweep.properties import check
from scripts.sweep.timm_models import TIMM

SUBJECTS = {subject.name: subject for subject in (*TIMM, *OTHERS)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="as in shells ('timm sw*'); default: all")
    parser.add_argument("--covering", action="store_true", help="those that the tests run")
    given = parser.parse_args(arguments)
    wanted = given.names or (list(COVERING) if given.covering else ["*"])
    chosen = [one for name, one in SUBJECTS.items() if any(fnmatchcase(name, pattern) for pattern in wanted)]
    if not chosen:
        parser.error(f"no model is called so; there are {', '.join(SUBJECTS)}")
    failed = [subject.name for subject in chosen if not _line(subject)]
    print(f"{len(chosen) - len(failed)} of {len(chosen)} models as expected" + "".join(f"\n  not {n}" for n in failed))
    return 1 if failed else 0


def _line(subject: Subject) -> bool:
    """Run one and print what came out; whether that was expected."""
    begin = time.monotonic()
    try:
        found = check(subject)
        faults = unexpected(subject.name, found)
    except Exception as error:  # whatever a model stumbles over is a finding, and the others still run
        found, faults = {}, [f"{type(error).__name__}: {error}"]
    said = "fails" if faults else "as listed: " + ", ".join(found) if found else "holds"
    print(f"{subject.name:32} {time.monotonic() - begin:6.1f} s  {said}", *faults, sep="\n    ", flush=True)
    return not faults


if __name__ == "__main__":
    sys.exit(main())
