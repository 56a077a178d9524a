"""The exact pin, what may be imported before it, and seeds side by side."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from maskllm4v.config import Experiment, load_experiment
from maskllm4v.runs.seeds import map_seeds, seed_processes
from maskllm4v.utils import determinism
from maskllm4v.utils.errors import ConfigError, PatternError, UserError

ROOT = Path(__file__).parent.parent
# Written down a second time: another value would give other bits.
PIN = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "OPENBLAS_CORETYPE": "Haswell",
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",
}


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, without the pin's variables unless they are given."""
    clean = {k: v for k, v in os.environ.items() if k not in PIN}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def answer(code: str, **environment: str) -> Any:
    """What the code prints last, as JSON."""
    done = python(code, **environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# The pin


def test_pin_sets_every_variable_and_imports_neither() -> None:
    found = answer(
        "import json, os, sys\n"
        "from maskllm4v.utils import determinism\n"
        "before = dict(os.environ)\n"
        "determinism.pin_kernels()\n"
        "changed = {k: v for k, v in os.environ.items() if before.get(k) != v}\n"
        "print(json.dumps([changed, [m for m in ('numpy', 'torch') if m in sys.modules]]))"
    )
    assert found == [PIN, []]


def test_pin_overrides_what_is_set() -> None:
    code = "import json, os, maskllm4v.utils.determinism as d; d.pin_kernels(); print(json.dumps(dict(os.environ)))"
    found = answer(code, OMP_NUM_THREADS="8", MKL_CBWR="AVX2")
    assert {key: found[key] for key in PIN} == PIN


def test_pin_reaches_numpy_and_torch() -> None:
    found = answer(
        "import json\n"
        "from maskllm4v.utils import determinism\n"
        "determinism.pin_kernels()\n"
        "import torch\n"
        "try:\n"
        "    from numpy._core._multiarray_umath import __cpu_features__ as features\n"
        "except ImportError:\n"  # numpy 1
        "    from numpy.core._multiarray_umath import __cpu_features__ as features\n"
        "threads = torch.get_num_threads()\n"
        "determinism.pin_torch()\n"
        "print(json.dumps([torch.backends.cpu.get_cpu_capability(), threads, features.get('X86_V4', False)]))"
    )
    if determinism.is_supported():
        assert found[0] == "AVX2"
    assert found[1:] == [1, False]


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_late_pin_is_an_error_and_sets_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in PIN:
        monkeypatch.delenv(key, raising=False)
    for other in ("numpy", "torch"):
        monkeypatch.delitem(sys.modules, other, raising=False)
    monkeypatch.setitem(sys.modules, name, object())
    with pytest.raises(RuntimeError, match=rf"pin_kernels\(\) has to come before the import of {name}$"):
        determinism.pin_kernels()
    assert not set(PIN) & set(os.environ)


@pytest.mark.parametrize("key", PIN)
def test_every_variable_counts_once_torch_is_there(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in PIN.items():
        monkeypatch.setenv(name, value)
    determinism.pin_kernels()  # torch is there, but everything was set
    monkeypatch.setenv(key, "other")
    with pytest.raises(RuntimeError, match="numpy and torch"):
        determinism.pin_kernels()
    assert os.environ[key] == "other"
    monkeypatch.delenv(key)
    with pytest.raises(RuntimeError, match="numpy and torch"):
        determinism.pin_kernels()


def test_late_pin_in_a_fresh_interpreter() -> None:
    done = python("import torch\nfrom maskllm4v.utils import determinism\ndeterminism.pin_kernels()")
    assert done.returncode == 1
    assert "RuntimeError: pin_kernels() has to come before the import of" in done.stderr


def test_pin_torch_sets_one_thread_and_determinism() -> None:
    found = answer(
        "import json, torch\n"
        "from maskllm4v.utils import determinism\n"
        "torch.set_num_threads(2)\n"
        "determinism.pin_torch()\n"
        "tiny = (torch.tensor([1e-40]) * 1).item()\n"
        "deterministic = torch.are_deterministic_algorithms_enabled()\n"
        "warn = torch.is_deterministic_algorithms_warn_only_enabled()\n"
        "fill = torch.utils.deterministic.fill_uninitialized_memory\n"
        "print(json.dumps([torch.get_num_threads(), deterministic, warn, fill, tiny]))"
    )
    assert found == [1, True, False, False, 0.0]


@pytest.mark.parametrize("machine", ["arm64", "aarch64", "riscv64"])
def test_other_machines_get_a_warning_and_no_promise(
    machine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in PIN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert not determinism.is_supported()
    determinism.pin_kernels()
    streams = capsys.readouterr()
    assert "not on this machine" in streams.err
    assert not streams.out


@pytest.mark.parametrize(("flags", "supported"), [("sse4_2 avx avx2 bmi", True), ("sse4_2 avx bmi", False)])
def test_promise_needs_avx2(
    flags: str, supported: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in PIN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"flags\t\t: fpu {flags} erms\n")
    assert determinism.is_supported() is supported
    determinism.pin_kernels()
    assert bool(capsys.readouterr().err) is not supported


LIGHT = [
    "maskllm4v",
    "maskllm4v.utils.determinism",
    "maskllm4v.config",
    "maskllm4v.utils.distributed",
    "maskllm4v.utils.errors",
    "maskllm4v.utils.io",
    "maskllm4v.runs.paths",
    "maskllm4v.utils.processes",
    "stages.entry",
    *sorted(f"stages.{path.stem}" for path in (ROOT / "stages").glob("*.py") if path.stem not in ("__init__", "entry")),
]


def test_what_stages_import_before_the_pin_imports_neither() -> None:
    found = answer(
        "import importlib, json, sys\n"
        "heavy = {}\n"
        f"for name in {LIGHT!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy[name] = [m for m in ('numpy', 'torch') if m in sys.modules]\n"
        "print(json.dumps(heavy))"
    )
    assert found == {name: [] for name in LIGHT}


# Seeds side by side


def experiment(seeds: list[int], *, processes: int = 0, exact: bool = True) -> Experiment:
    whole = load_experiment(ROOT / "params.yaml")
    runtime = whole.runtime.model_copy(update={"seed_processes": processes})
    return whole.model_copy(update={"seeds": seeds, "exact": exact, "runtime": runtime})


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_come_in_the_order_of_seeds(processes: int) -> None:
    offset, seeds = 100, [7, 2, 5]  # the closure is not picklable

    def one(seed: int, position: int) -> tuple[int, list[float]]:
        torch.manual_seed(seed)
        return seed + offset, torch.randn(3).tolist()

    expected = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        expected.append((seed + 100, torch.randn(3, generator=generator).tolist()))
    assert map_seeds(experiment(seeds, processes=processes), seeds, one) == expected


@pytest.mark.parametrize("processes", [0, 2, 3])
def test_each_seed_has_its_own_position_when_forked(processes: int) -> None:
    assert map_seeds(experiment([7, 2, 5], processes=processes), [7, 2, 5], lambda _, position: position) == [0, 1, 2]


@pytest.mark.parametrize(("processes", "inside"), [(1, True), (2, False)])
def test_one_process_is_this_one(processes: int, inside: bool) -> None:
    found = map_seeds(experiment([7, 2], processes=processes), [7, 2], lambda *_: os.getpid())
    assert (os.getpid() in found) is inside


def test_children_leave_the_callers_memory_alone() -> None:
    seen: list[int] = []
    map_seeds(experiment([7, 2], processes=2), [7, 2], lambda seed, _: seen.append(seed))
    assert seen == []


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("error", [UserError, PatternError])
def test_user_error_reaches_the_caller(error: type[UserError], processes: int) -> None:
    def one(seed: int, position: int) -> int:
        if seed == 2:
            raise error("layer 'a': does not fit")
        return seed

    with pytest.raises(error, match=r"^layer 'a': does not fit$") as caught:
        map_seeds(experiment([7, 2, 5], processes=processes), [7, 2, 5], one)
    assert type(caught.value) is error


def test_second_call_uses_its_own_function() -> None:
    both = experiment([1, 2], processes=2)
    assert map_seeds(both, [1, 2], lambda seed, _: seed) == [1, 2]
    assert map_seeds(both, [1, 2], lambda seed, _: -seed) == [-1, -2]


def test_seeds_may_be_fewer_than_the_experiments() -> None:
    """A dense model that all seeds share is made once, in this process."""
    found = map_seeds(experiment([7, 2, 5], processes=3), [7], lambda seed, position: (seed, position, os.getpid()))
    assert found == [(7, 0, os.getpid())]


@pytest.mark.parametrize(
    ("wanted", "exact", "cores", "expected"),
    [
        (0, True, 2, 4),
        (0, True, None, 2),
        (1, True, 2, 1),
        (2, True, 2, 2),
        (9, True, 2, 9),
        (0, False, 2, 1),
        (3, False, 2, 3),
    ],
)
def test_number_of_processes(
    wanted: int, exact: bool, cores: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert seed_processes(experiment([0, 1, 2], processes=wanted, exact=exact)) == expected


@pytest.mark.parametrize(("exact", "cores", "expected"), [(False, 8, 4), (False, 1, 1), (True, 8, 1)])
def test_processes_that_are_not_pinned_divide_the_cores(
    exact: bool, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cores)  # the pin's one thread is conftest's here
    two = experiment([7, 2], processes=2, exact=exact)
    assert map_seeds(two, [7, 2], lambda *_: torch.get_num_threads()) == [expected] * 2


def test_one_of_several_processes_forks_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert seed_processes(experiment([1, 2], processes=2)) == 1


def test_seeds_side_by_side_are_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskllm4v.runs.seeds.pick_device", lambda _: torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"runtime\.seed_processes is for CPUs"):
        seed_processes(experiment([1, 2], processes=2, exact=False))


def test_no_fork_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    assert seed_processes(experiment([1, 2])) == 1
