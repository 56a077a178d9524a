"""A process that forks for every stage that it is told to run, natively or on an emulated CPU.

``python -m scripts.emulation.worker`` says in a line of JSON what it computes with, then reads one line for each call,
``{"folder": …, "stage": …, "key": …, "modules": […]}``, and answers with one.

A forked process inherits what its parent has imported, and the machine code that an emulator has translated for that.
So modules are imported here, before the fork: those that the same call needed natively.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import runpy
import signal
import sys
import traceback
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from maskllm4v.utils import determinism
from maskllm4v.utils.processes import end_with_parent

PATIENCE = 1200  # seconds that a call may take, far more than any does
LOG, IMPORTED = "log.txt", "imported.json"  # beside a call's project: what it printed, and its modules


def main() -> None:
    """Answers go where the standard output went; what else is printed goes to the standard error."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    before = threads()  # an emulator has some of its own
    determinism.pin_kernels()  # before numpy and torch, as a stage has it
    about = _kernels()
    determinism.pin_torch()
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        preload(asked.pop("modules"))
        if started := threads() - before:
            raise RuntimeError(
                f"threads {sorted(started)} before {asked}: forked processes lack them, and crash in QEMU"
            )
        print(json.dumps(answer(**asked, unused=answers.fileno())), file=answers, flush=True)


def _kernels() -> dict[str, str]:
    """Which instructions the libraries' kernels are of, on this CPU under the pin."""
    import numpy as np
    import torch

    found = np.lib.introspect.opt_func_info(func_name="^multiply$", signature="float32")
    return {"torch": torch.backends.cpu.get_cpu_capability(), "numpy": found["multiply"]["fff"]["current"]}


def threads() -> set[str]:
    """Of this process: number and name."""
    return {f"{task.name} {(task / 'comm').read_text().strip()}" for task in Path("/proc/self/task").iterdir()}


def preload(modules: Iterable[str]) -> None:
    """Import what a call will need; it would be right without, but slower."""
    for name in modules:
        with suppress(ImportError):  # the call will say what it misses
            importlib.import_module(name)


def answer(folder: str, stage: str, key: str, unused: int) -> dict[str, Any]:
    """Run a call in a forked process.

    Args:
        folder: of the project that it runs in.
        stage: its name.
        key: its argument.
        unused: file descriptor that the forked process closes: whoever reads there waits for this process only.

    Returns:
        ``status``: exit status, negative for a signal; ``seconds``: of CPU, user and system; ``modules``: what it had
        to import.
    """
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        os.close(unused)
        _run(Path(folder), stage, key)
    _, status, usage = os.wait4(process, 0)
    imported = Path(folder).parent / IMPORTED
    return {
        "status": os.waitstatus_to_exitcode(status),
        "seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "modules": json.loads(imported.read_text()) if imported.exists() else [],
    }


def _run(folder: Path, stage: str, key: str) -> NoReturn:
    """``python -m stages.<stage> <key>`` in a folder, and the end of this process."""
    status, before = 1, set(sys.modules)
    try:
        end_with_parent()
        signal.alarm(PATIENCE)  # its default action ends the process, even one that waits for a lock
        os.chdir(folder)
        log = os.open(folder.parent / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.argv = [stage, key]
        runpy.run_module(f"stages.{stage}", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        (folder.parent / IMPORTED).write_text(json.dumps(_importable(before)))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # without what the parent has registered for its own end


def _importable(before: set[str]) -> list[str]:
    """Modules that have come, in the order of their import, but for those that no file or package stands for."""
    found = [(name, module) for name, module in list(sys.modules.items()) if name not in before]
    return [name for name, module in found if getattr(getattr(module, "__spec__", None), "name", None) == name]


if __name__ == "__main__":
    main()
