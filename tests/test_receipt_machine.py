"""What a receipt says of CPU, system and environment, and what it warns of."""

from __future__ import annotations

import platform
import shutil
from importlib import metadata
from pathlib import Path

import pytest
from import_graph import ROOT
from made_records import DIGITS
from receipt_project import EPYC, make_checkout

from maskllm4v.receipts import CPU, build_receipt
from maskllm4v.receipts.environment import exported, lock_warning, package_versions, unlocked
from maskllm4v.receipts.machine import describe_cpu, read_cpu, read_system

INTEL = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 85
model name\t: Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz
stepping\t: 4
flags\t\t: fpu sse2 avx avx2 avx512f

processor\t: 1
vendor_id\t: Other
model name\t: the second
"""


def test_cpu_from_cpuinfo() -> None:
    assert describe_cpu(INTEL, "x86_64") == CPU(
        name="Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz",
        architecture="x86_64",
        vendor="GenuineIntel",
        family=6,
        model=85,
        stepping=4,
        avx2=True,
    )
    assert describe_cpu(INTEL.replace("avx2 ", ""), "x86_64").avx2 is False
    assert str(describe_cpu(INTEL, "x86_64")) == "Intel(R) Xeon(R) Gold 6130 CPU @ 2.10GHz (family 6, model 85)"


@pytest.mark.parametrize(
    ("cpuinfo", "processor", "name"),
    [
        ("", "arm", "arm"),
        ("", "", "arm64"),
        ("processor\t: 0\nBogoMIPS\t: 48.00\n", "", "arm64"),
        ("model name\t: |<b>\x1b[31m`x`\u202e\n", "", "b 31m x"),
        (f"model name\t: {'x' * 500}\nmodel\t: lots\n", "", "x" * 80),
        ("model name\t:\n", "", "arm64"),
    ],
)
def test_cpu_that_says_little_or_too_much(cpuinfo: str, processor: str, name: str) -> None:
    found = describe_cpu(cpuinfo, "arm64", processor)
    assert (found.name, found.architecture, found.family, found.model) == (name, "arm64", None, None)
    assert str(found) == name
    assert CPU.model_validate_json(found.model_dump_json()) == found


def test_this_machine_can_be_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert read_cpu().architecture == platform.machine()
    assert read_system().startswith(platform.system())
    monkeypatch.setattr("maskllm4v.receipts.machine.CPUINFO", tmp_path / "missing")
    assert read_cpu().avx2 is None


def test_system_says_no_more_than_its_release(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "release", lambda: "6.1.0-27-bobs-laptop")
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "debian", "VERSION_ID": "12", "NAME": "x"})
    assert read_system() == "Linux 6.1, debian 12"
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"ID": "arch"})
    assert read_system() == "Linux 6.1, arch"

    def missing() -> dict[str, str]:
        raise OSError

    monkeypatch.setattr(platform, "freedesktop_os_release", missing)
    monkeypatch.setattr(platform, "release", lambda: "odd")
    assert read_system() == "Linux"


# The locked environment


def lock(folder: Path, text: str) -> Path:
    (folder / "requirements.lock").write_text(text)
    return folder


def test_unlocked_packages(tmp_path: Path) -> None:
    numpy, torch = metadata.version("numpy"), metadata.version("torch")
    text = (
        "# a comment\n"
        f"numpy=={numpy} \\\n    --hash=sha256:{'0' * 64}\n"
        "torch==0.1 ; python_full_version >= '3.11' \\\n    --hash=sha256:00\n"
        "numpy==9.9 ; sys_platform == 'other'\n"
        "no-such-package==1.0\n"
        "not a requirement at all\n"
    )
    assert unlocked(lock(tmp_path, text)) == {"no-such-package": (None, "1.0"), "torch": (torch, "0.1")}
    assert unlocked(lock(tmp_path, f"numpy=={numpy}\n")) == {}
    assert unlocked(lock(tmp_path, "")) == {}
    assert unlocked(tmp_path / "nowhere") is None
    (tmp_path / "requirements.lock").write_bytes(b"\xff\xfe")
    assert unlocked(tmp_path) is None


def test_other_builds_are_not_the_locked_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _: "2.0+cpu")
    assert unlocked(lock(tmp_path, "torch==2.0\n")) == {"torch": ("2.0+cpu", "2.0")}
    assert unlocked(lock(tmp_path, "torch==2.0+cpu\n")) == {}


def test_lock_of_this_project_is_read() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    names = {line.partition("==")[0] for line in lines if "==" in line and not line.startswith((" ", "#"))}
    found = unlocked(ROOT)
    assert found is not None
    assert set(found) <= names
    assert {"torch", "numpy", "timm"} <= names


def test_lock_warning_names_what_matters_first() -> None:
    found = {"aiohttp": ("1", "2"), "boto": (None, "3"), "torch": ("2.1", "2.2"), "zipp": ("1", "2")}
    assert lock_warning(found) == "not the locked environment: torch 2.1 (locked: 2.2), aiohttp 1 (locked: 2), 2 more"
    assert lock_warning({"boto": (None, "3")}) == "not the locked environment: boto missing (locked: 3)"


def test_versions_are_those_of_the_task() -> None:
    found = package_versions("classification")
    assert found["torch"] == metadata.version("torch")
    assert "diffusers" not in found
    assert set(package_versions("diffusion")) == {*found, "diffusers", "torchmetrics"}


# Kernel settings


def test_exported_settings() -> None:
    environment = {
        "HOME": "/home/bob",
        "MKL_CBWR": "AVX2",
        "OMP_NUM_THREADS": "1",  # what the pin sets
        "MKL_NUM_THREADS": "",
        "ONEDNN_MAX_CPU_ISA": "/home/bob",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2",
    }
    assert exported(environment) == {
        "MKL_CBWR": "AVX2",
        "MKL_NUM_THREADS": "",
        "ONEDNN_MAX_CPU_ISA": "(other)",
        "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2",
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkout(tmp_path_factory.mktemp("base") / "checkout")


@pytest.fixture
def here(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MKL_CBWR", "OMP_NUM_THREADS", "ONEDNN_DEFAULT_FPMATH_MODE"):
        monkeypatch.delenv(name, raising=False)
    return lock(shutil.copytree(base, tmp_path / "checkout"), f"torch=={metadata.version('torch')}\n")


def warnings(here: Path, cpu: CPU = EPYC, exact: bool = True) -> list[str]:
    return build_receipt(here, DIGITS.model_copy(update={"exact": exact}), cpu=cpu).warnings


def test_no_warning_where_all_is_well(here: Path) -> None:
    found = build_receipt(here, DIGITS, cpu=EPYC)
    assert (found.warnings, found.locked, found.unlocked, found.settings) == ([], True, {}, {})


def test_warnings(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    lock(here, "torch==0.1\n")
    old = EPYC.model_copy(update={"avx2": False})
    assert warnings(here, old) == [
        "this CPU has no AVX2: exact results are not promised here",
        f"not the locked environment: torch {metadata.version('torch')} (locked: 0.1)",
        "MKL_CBWR=AVX2 was exported; exact runs override it with COMPATIBLE",
        "ONEDNN_DEFAULT_FPMATH_MODE=BF16 was exported and applies, for the pin does not set it",
    ]
    (here / "requirements.lock").unlink()
    assert warnings(here, old, exact=False) == [
        "no requirements.lock here: not known whether this is the locked environment",
        "MKL_CBWR=AVX2 was exported and applies",
        "ONEDNN_DEFAULT_FPMATH_MODE=BF16 was exported and applies",
    ]


def test_other_architectures_are_warned_of(here: Path) -> None:
    arm = CPU(name="Neoverse", architecture="aarch64")
    assert warnings(here, arm) == ["aarch64 is not x86-64: exact results are not promised here"]
    assert warnings(here, arm, exact=False) == []
