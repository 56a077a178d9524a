"""How every stage starts and ends: the pin before numpy and torch, errors in a line, timings aside."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

from maskllm4v import exact
from maskllm4v.config import Experiment, load_experiment
from maskllm4v.errors import UserError
from maskllm4v.files import write_json
from maskllm4v.layout import TIMINGS


def run(stage: str, main: Callable[[Experiment, str], None], *, takes: str | None = "row", torch: bool = True) -> None:
    """Run a stage's ``main(experiment, row)`` from the command line.

    Args:
        stage: its name.
        main: its work.
        takes: what its one argument is called, or None.
        torch: whether it computes with torch, which the exact pin then covers.
    """
    parser = argparse.ArgumentParser(prog=f"python -m stages.{stage}")
    if takes is not None:
        parser.add_argument(takes)
    key = getattr(parser.parse_args(), takes) if takes is not None else ""
    begin = time.perf_counter()
    try:
        experiment = load_experiment()
        if experiment.exact:
            exact.pin()
            if torch:
                exact.pin_torch()
        main(experiment, key)
        seconds = round(time.perf_counter() - begin, 3)
        write_json(TIMINGS / f"{stage}@{key or experiment.table}.json", {"seconds": seconds})
    except UserError as error:
        sys.exit(f"{stage}{f' {key}' if key else ''}: {error}")
