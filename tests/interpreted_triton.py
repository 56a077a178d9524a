"""A plugin: where the Triton kernels run in a test, without a GPU under Triton's interpreter."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import pytest
import torch

tl = pytest.importorskip("triton.language")
fused = pytest.importorskip("maskllm4v.sparsity.gumbel.triton_op")

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="session")
def interpreted_kernels() -> ModuleType:
    """The kernels once more, for the interpreter, which takes them over where they are decorated."""
    spec = importlib.util.spec_from_file_location("_interpreted_kernels", fused.triton_kernels.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


@pytest.fixture
def interpreter(interpreted_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """For this test only, ``fused`` launches the interpreted kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fused, "triton_kernels", interpreted_kernels)
    # Triton was imported to compile, and tl.sum is a compiled function itself.
    monkeypatch.setattr(tl, "sum", lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine))


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=on_gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels run."""
    if request.param == "cuda":
        return torch.device("cuda")
    request.getfixturevalue("interpreter")
    return torch.device("cpu")


@pytest.fixture
def large_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a large program as for a small one."""
    if device.type == "cpu":
        monkeypatch.setattr(fused, "BLOCK", 2048)
