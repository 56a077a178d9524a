"""A warm process runs a module as a fresh interpreter does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import warm_python

from maskllm4v.utils import determinism

PROGRAMS = {
    "nothing": "",
    "arguments and folder": "import os, sys; print(sys.argv[1:], os.getcwd(), sys.path[:2], __name__, __file__)",
    "environment": "import os; print(sorted(os.environ.items()))",
    "standard streams": "import sys; print(sys.stdin.read()); print('é', file=sys.stderr)",
    "nothing of ours is there": "import sys; print([name for name in sys.modules if 'maskllm4v' in name])",
    "a module of the folder": "import maskllm4v; print(maskllm4v.WHOSE)",
    "a status": "raise SystemExit(3)",
    "a message": "import sys; sys.exit('wrong: this')",
    "an unknown module": "import nothing_of_the_kind",
    "killed": f"import os; print('said', flush=True); os.kill(os.getpid(), {signal.SIGKILL})",
    "at the end": "import atexit; atexit.register(print, 'the end')",
    "processes of its own": "import concurrent.futures as f, multiprocessing as m, os\n"
    "with f.ProcessPoolExecutor(2, m.get_context('fork')) as pool: print(list(pool.map(abs, [-1, -2])))",
}


def run(python: Path | str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **determinism.ENVIRONMENT, "PYTHONPATH": f"{folder}/others", "SOME": "thing"}
    command = [python, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, input="said", capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("kind", PROGRAMS)
def test_same_as_a_fresh_interpreter(kind: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAMS[kind])
    (tmp_path / "maskllm4v.py").write_text("WHOSE = 'of the folder'")
    fresh, warm = (
        run(python, tmp_path, "-m", "program", "-x", "y z") for python in (sys.executable, warm_python.python())
    )
    assert (warm.returncode, warm.stdout) == (fresh.returncode, fresh.stdout)
    assert warm.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


def test_packages_are_there_already(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import sys; print('torch' in sys.modules, 'timm' in sys.modules)")
    assert run(warm_python.python(), tmp_path, "-m", "program").stdout == "True True\n"
    assert run(sys.executable, tmp_path, "-m", "program").stdout == "False False\n"


def test_the_exact_pin_holds_whatever_the_environment(tmp_path: Path) -> None:
    code = "import os; from maskllm4v.utils import determinism as d; d.pin_kernels()"
    code += "; print(d.ENVIRONMENT.items() <= os.environ.items())"
    (tmp_path / "program.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(determinism.__file__).parents[3]), "MKL_CBWR": "AVX2"}
    command = [warm_python.python(), "-m", "program"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_other_than_modules_run_afresh(tmp_path: Path) -> None:
    done = run(warm_python.python(), tmp_path, "-c", "import sys; print('torch' in sys.modules, sys.argv)", "x")
    assert done.stdout == "False ['-c', 'x']\n"
