"""Where models are computed, and what that is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from maskllm4v.utils.devices import hardware, pick_device
from maskllm4v.utils.errors import ConfigError


def find_cuda(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(("available", "kind"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_cuda_where_it_is(available: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_cuda(monkeypatch, int(available))
    assert pick_device("auto").type == kind


@pytest.mark.parametrize("available", [True, False])
def test_cpu_is_the_cpu(available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    find_cuda(monkeypatch, int(available))
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "CPU", "cuda:-1"])
def test_unknown_device_is_a_config_error(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^runtime\.device is ") as caught:
        pick_device(name)
    assert repr(name) in str(caught.value)
    assert "allowed: auto, cpu, cuda" in str(caught.value)


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_cuda_without_cuda_is_a_config_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_cuda(monkeypatch, 0)
    with pytest.raises(ConfigError, match=rf"^runtime\.device is '{name}', but torch finds no CUDA device here$"):
        pick_device(name)


def test_cuda_of_a_number_that_is_not_there_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    find_cuda(monkeypatch, 1)
    assert pick_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"runtime\.device is 'cuda:1'"):
        pick_device("cuda:1")


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_every_process_takes_a_gpu_of_its_own(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_cuda(monkeypatch, 3)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert pick_device(wanted) == torch.device("cuda", 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(ConfigError, match=r"runtime\.device is 'cuda:3', but torch finds 3 CUDA device here"):
        pick_device(wanted)
    find_cuda(monkeypatch, 0)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert pick_device("auto") == torch.device("cpu")


def test_mps_without_mps_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"runtime\.device is 'mps'"):
        pick_device("mps")


def test_device_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert hardware(torch.device("cuda", 1)) == "GPU 1"
    words = hardware(torch.device("cpu"))
    assert words
    assert words == words.strip()
    assert ":" not in words
    assert "\n" not in words


DENORMALS = """
import sys
import torch

if sys.argv[1] == "picked":
    from maskllm4v.utils.devices import pick_device

    pick_device("cpu")
torch.set_num_threads(3)
denormal = torch.full((3_000_000,), 1000, dtype=torch.int32).view(torch.float32)  # 1.4e-42, by its bits
print(int(denormal.mul(1.5).view(torch.int32).count_nonzero()))
"""


@pytest.mark.parametrize(("how", "left"), [("picked", 0), ("not picked", 3_000_000)])
def test_picking_the_cpu_flushes_denormals_in_every_thread(how: str, left: int) -> None:
    """In a process of its own: threads inherit it when they are started."""
    command = [sys.executable, "-c", DENORMALS, how]
    folder = Path(__file__).parents[1]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=300)
    assert int(found.stdout) == left
