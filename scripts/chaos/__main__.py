"""Break stages at random for some minutes, and count what came of it: ``python -m scripts.chaos --minutes 10``.

Each trial takes a fresh copy of a shortened chain, breaks one thing in it, and then does what a person would do. It
ends in the same bytes, in an error that names what is wrong (after which, once it is mended, come the same bytes), or
in a fault: a traceback, other bytes, a process that stays, a stage that hangs. The exit status is 1 if there was one.
"""

from __future__ import annotations

import argparse
import platform
import random
import sys
import time
from collections import Counter
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

from maskllm4v.utils.io import write_text
from scripts.chaos.chain import whole_chain
from scripts.chaos.trials import FAULT, NAMED, SAME, SKIPPED, attempt, trials

HEADER = ("", "tried", SAME, NAMED, FAULT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for trials; the chain is made before (default 10)")
    parser.add_argument("--seed", type=int, help="of what is drawn; times of kills differ even so")
    parser.add_argument("--only", default="", help="kinds whose names hold this")
    parser.add_argument("--write", type=Path, help="a Markdown file for the counts")
    a = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if a.seed is None else a.seed
    draw, kinds = random.Random(seed), {name: trial for name, trial in trials().items() if a.only in name}
    counts, faults = {name: Counter[str]() for name in kinds}, list[str]()
    print(f"seed {seed}", flush=True)
    with whole_chain() as project, TemporaryDirectory(prefix="chaos-") as scratch:
        end = time.monotonic() + 60 * a.minutes
        waiting: list[str] = []
        while time.monotonic() < end:
            if not waiting:  # every kind in turn, in a new order
                waiting = draw.sample(sorted(kinds), len(kinds))
            name = waiting.pop()
            outcome, seen = attempt(kinds[name], project, Path(scratch), draw)
            counts[name][outcome] += 1
            if outcome == FAULT:
                faults.append(f"{name}: {seen}")
            print(f"{name}: {outcome}{f' ({seen})' if seen else ''}", flush=True)
    table = _table(counts)
    print(f"\n{table}")
    if a.write:
        write_text(a.write, _document(table, faults, seed, a.minutes))
    if faults:
        sys.exit("\n".join(["", "faults:", *faults]))


def _table(counts: dict[str, Counter[str]]) -> str:
    lines = [HEADER, (":---", *["---:"] * 4)]
    for name, found in [*counts.items(), ("all", sum(counts.values(), Counter[str]()))]:
        tried = sum(found.values()) - found[SKIPPED]
        lines.append((name, *map(str, (tried, *(found[outcome] for outcome in HEADER[2:])))))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _document(table: str, faults: list[str], seed: int, minutes: float) -> str:
    machine = f"{platform.machine()}, {_cpu()}, {platform.system()} {platform.release()}"
    listed = "\n".join(["\nFaults:\n", *(f"* {fault}" for fault in faults), ""]) if faults else ""
    return f"""# Chaos: what was broken at random, and how it ended

`make chaos MINUTES=10` makes a shortened chain of all stages, then breaks one thing at a time in a fresh copy of it:
it kills stages and DVC itself, damages files, fills disks, lets servers hang and sets clocks back. *Same bytes*: the
same command then gave the results of an undisturbed run. *Named error*: a sentence said what was wrong, and once that
was mended the results were the same. *Fault*: anything else, such as a traceback or other results.

The last run: {date.today()}, {minutes:g} minutes of trials, seed {seed}, on {machine}.

{table}{listed}"""


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} × {names[0]}" if names else platform.processor()


if __name__ == "__main__":
    main()
