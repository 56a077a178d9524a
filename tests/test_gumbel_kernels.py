"""The Triton kernels' noise, and what they are compiled to, of which nothing needs a GPU."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_case import CANDIDATES, KEY, KernelCase, fused, same
from mask_oracle import norm

from maskllm4v.sparsity.gumbel.sampling import Sampling
from maskllm4v.utils.rng import CHUNK, philox_key, uniforms

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytest_plugins = ["interpreted_triton"]
compiled = pytest.mark.skipif(
    not isinstance(fused.triton_kernels.philox_uniforms, triton.JITFunction), reason="TRITON_INTERPRET is set"
)


@pytest.mark.parametrize("candidates", [1, 4, 6, 8, 28, 70])
def test_uniforms_are_those_of_numpy(candidates: int, device: torch.device) -> None:
    found = fused.uniforms(KEY, candidates, 300, device)
    assert torch.equal(found.cpu(), uniforms(philox_key(0, "case"), 0, candidates, 300))


@pytest.mark.parametrize("candidates", [6, 70])
@pytest.mark.parametrize("chunk", [0, 2**31 // CHUNK - 1, 2**35 // CHUNK])
def test_uniforms_go_on_in_the_next_chunk(candidates: int, chunk: int, device: torch.device) -> None:
    found = fused.uniforms(KEY, candidates, 12, device, first=(chunk + 1) * CHUNK - 5)
    key = philox_key(0, "case")
    before = uniforms(key, chunk, candidates, CHUNK)[:, -5:]
    assert torch.equal(found.cpu(), torch.cat([before, uniforms(key, chunk + 1, candidates, 7)], 1))


@pytest.mark.parametrize("half", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_uniforms_of_every_size_of_key(half: int, device: torch.device) -> None:
    for key in ((half, 5), (5, half)):
        found = fused.uniforms(key, 6, 20, device)
        assert torch.equal(found.cpu(), uniforms(np.array(key, np.uint64), 0, 6, 20))


def take_logarithm(x, y, logarithm: tl.constexpr, BLOCK: tl.constexpr):
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + position, logarithm(tl.load(x + position)))


def test_logarithm_of_every_uniform_and_of_exponentials(device: torch.device) -> None:
    kernel, block = triton.jit(take_logarithm), 2**20 if device.type == "cpu" else 1024
    u = ((torch.arange(2**23, device=device) + 0.5) * 2.0**-23).float()
    for x, bound in ((u, 1.5), (-torch.log(u[::8].contiguous()), 1.8)):
        found = torch.empty_like(x)
        kernel[(len(x) // block,)](
            x, found, logarithm=fused.triton_kernels._log, BLOCK=block, num_warps=8, enable_fp_fusion=True
        )
        exact = torch.log(x.double())
        assert bool(((found - exact).abs() <= bound * 2.0**-24 * exact.abs()).all())


@pytest.mark.parametrize(("tau", "hard"), [(1.0, False), (0.5, True)])
@pytest.mark.usefixtures("large_programs")
def test_a_key_draws_the_uniforms_of_each_chunk(tau: float, hard: bool, device: torch.device) -> None:
    case = KernelCase(CHUNK + 3)
    drawn = case.kernels(Sampling(tau, 10.0, hard, key=KEY), device)
    given = case.kernels(Sampling(tau, 10.0, hard, uniform=case.uniform), device)
    same(drawn, given)


# Compilation, of which nothing needs a GPU


@compiled
def test_a_cpu_is_not_supported() -> None:
    case = KernelCase(8)
    assert not fused.supported(case.weight, case.logits, CANDIDATES, Sampling(1.0, 10.0))


def hopper() -> object:
    pytest.importorskip("triton.backends.nvidia")
    return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)


def arguments(name: str, values: dict[str, object]) -> dict[str, object]:
    """A kernel's arguments by its parameters' names, in their order."""
    example = {
        "grad_weight": None,
        "uniform": None,
        "layers": None,
        "keys": None,
        "NOISE": "drawn",
        "HARD": False,
        "JOINED": False,
        "WEIGHT_GRAD": False,
        "BLOCK": fused.BLOCK,
        "groups": 1000,
        "key0": KEY[0],
        "key1": KEY[1],
        "scaling": 10.0,
        "inverse_tau": 1.0,
        "candidates": 6,
        "blocks": 1,
        "first": 0,
    }
    return {k: values.get(k, example.get(k, torch.float32)) for k in getattr(fused.triton_kernels, name).arg_names}


KERNELS = ("masked_weight_forward", "masked_weight_backward", "philox_uniforms")


@compiled
@pytest.mark.parametrize(
    ("name", "values"),
    [
        (KERNELS[0], {}),
        (KERNELS[0], {"NOISE": "none", "HARD": True, "masked": torch.bfloat16}),
        (KERNELS[1], {"grad_masked": torch.bfloat16}),
        *((name, {"JOINED": True, "layers": torch.int64, "keys": torch.int64}) for name in KERNELS[:2]),
        (
            KERNELS[1],
            {
                **dict.fromkeys(("weight", "logits", "grad_masked", "grad_logits", "grad_weight"), torch.float16),
                **{"NOISE": "given", "uniform": torch.float64, "HARD": True, "WEIGHT_GRAD": True},
            },
        ),
        (KERNELS[2], {}),
    ],
)
def test_compiles_for_a_gpu(
    name: str, values: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    target, kernel = hopper(), getattr(fused.triton_kernels, name)
    types = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float64: "*fp64"}
    types[torch.int64] = "*i64"
    signature, constants, aligned = {}, {}, {}
    for i, ((argument, value), parameter) in enumerate(
        zip(arguments(name, values).items(), kernel.params, strict=True)
    ):
        if isinstance(value, torch.dtype):
            signature[argument], aligned[(i,)] = types[value], [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None:
            signature[argument], constants[(i,)] = "constexpr", value
        else:
            signature[argument] = parameter.annotation or ("fp32" if isinstance(value, float) else "i32")
    source = importlib.import_module("triton.compiler").ASTSource(kernel, signature, constants, aligned)
    found = triton.compile(source, target=target, options=fused._OPTIONS)
    assert len(found.asm["cubin"]) > 0
    assert "convert_layout" not in found.asm["ttgir"]  # what a group needs stays in its thread


@compiled
@pytest.mark.parametrize("name", KERNELS)
def test_new_values_compile_nothing(name: str) -> None:
    target, kernel = hopper(), getattr(fused.triton_kernels, name)
    backend = importlib.import_module("triton.compiler").make_backend(target)
    bind = importlib.import_module("triton.runtime.jit").create_function_from_signature(
        kernel.signature, kernel.params, backend
    )
    sizes = (0, 1, 2, 16, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
    changes: list[dict[str, object]] = [{half: size} for half in ("key0", "key1") for size in sizes]
    changes += [{"groups": size} for size in (1, 2, 16, 2**31, 2**40)] + [{"first": 2**40}, {"blocks": 16}]
    changes += [{"scaling": s, "inverse_tau": t} for s in (0.0, 1.0, 100.0) for t in (1.0, 16.0, 0.3)]
    x = torch.empty(16)

    def specialisation(values: dict[str, object]) -> str:
        return str(bind(**{k: x if isinstance(v, torch.dtype) else v for k, v in arguments(name, values).items()})[1])

    assert {specialisation(change) for change in changes} == {specialisation({})}
    assert specialisation({"BLOCK": 512}) != specialisation({})  # it would be seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_one_kernel_serves_every_draw() -> None:
    case = KernelCase(300)
    weight, logits, candidates = (t.cuda() for t in (case.weight, case.logits, CANDIDATES))

    def variants() -> int:
        return len(fused.triton_kernels.masked_weight_forward.device_caches[torch.cuda.current_device()][0])

    fused.forward(weight, logits, candidates, Sampling(1.0, 10.0, key=KEY), torch.float32)
    before = variants()
    for key, tau, groups in [((0, 1), 0.5, 1), ((2**31, 2**32), 1.0, 16), ((2**63, 2**64 - 1), 3.0, 300)]:
        sampling = Sampling(tau, 100, key=key)
        fused.forward(weight[:groups], logits[:, :groups], candidates, sampling, torch.float32)
    assert variants() == before


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 40 * 2**30,
    reason="no CUDA device of 40 GiB",
)
def test_offsets_beyond_32_bits() -> None:
    chunks = -(-(2**31) // 4 // CHUNK) + 1  # 4·groups and 6·groups exceed 2³¹
    groups, tail = chunks * CHUNK, 512
    weight = torch.ones(groups, 4, dtype=torch.bfloat16, device="cuda")
    logits = torch.zeros(6, groups, dtype=torch.bfloat16, device="cuda")
    sampling = Sampling(1.0, 10.0, key=KEY)
    masked, _ = fused.forward(weight, logits, CANDIDATES.cuda(), sampling, torch.bfloat16)
    grad_logits, _ = fused.backward(
        weight, logits, CANDIDATES.cuda(), sampling, masked, torch.tensor(0.0, device="cuda"), False
    )
    case = KernelCase(tail)
    case.uniform = uniforms(philox_key(0, "case"), chunks - 1, 6, CHUNK)[:, -tail:]
    case.weight, case.logits = weight[-tail:].cpu(), logits[:, -tail:].cpu()
    case.upstream, case.grad_energy = masked[-tail:].cpu(), 0.0
    exact = case.textbook(Sampling(1.0, 10.0, uniform=case.uniform))
    torch.testing.assert_close(masked[-tail:].cpu().double(), exact[0], rtol=1e-2, atol=1e-3)
    assert norm(grad_logits[:, -tail:].cpu().double() - exact[2], exact[2]) <= 1e-2
