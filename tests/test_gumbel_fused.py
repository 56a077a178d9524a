"""The Triton kernels against the textbook form in float64, under Triton's interpreter and on a GPU."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from maskllm4v import randomness
from maskllm4v.gumbel.sampling import Sampling
from maskllm4v.randomness import CHUNK, philox_key

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
fused = pytest.importorskip("maskllm4v.gumbel.fused")

CANDIDATES = torch.tensor([[float(j in kept) for j in range(4)] for kept in itertools.combinations(range(4), 2)])
KEY = tuple(int(half) for half in philox_key(0, "fused"))
soft_and_hard = pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
compiled = pytest.mark.skipif(
    not isinstance(fused.triton_kernels.philox_uniforms, triton.JITFunction), reason="TRITON_INTERPRET is set"
)


@pytest.fixture(scope="module")
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


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=on_gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels run; for this test only, ``fused`` launches the interpreted ones."""
    if request.param == "cuda":
        return torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(fused, "triton_kernels", request.getfixturevalue("interpreted_kernels"))
    # Triton was imported to compile, and tl.sum is a compiled function itself.
    monkeypatch.setattr(tl, "sum", lambda x, axis: tl.reduce(x, axis, tl.standard._sum_combine))
    return torch.device("cpu")


@pytest.fixture
def large_programs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a large program as for a small one."""
    if device.type == "cpu":
        monkeypatch.setattr(fused, "BLOCK", 2048)


def textbook(weight: Tensor, logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """MaskLLM, Eq. 5-7, as printed, in the tensors' precision."""
    z = sampling.scaling * logits.t()
    if sampling.uniform is not None:
        z = z - torch.log(-torch.log(sampling.uniform.t().to(z)))
    p = torch.softmax(z / sampling.tau, dim=-1)
    if sampling.hard:
        one_hot = torch.zeros_like(p).scatter_(-1, p.argmax(-1, keepdim=True), 1.0)
        p = one_hot - p.detach() + p
    masked = weight * (p @ CANDIDATES.to(p))
    return masked, masked.square().sum()


class Case:
    """One random input, and what the textbook form and the kernels make of it."""

    def __init__(self, groups: int) -> None:
        self.weight = torch.randn(groups, 4)
        self.logits = 0.2 * torch.randn(6, groups)
        self.uniform = torch.cat(
            [
                randomness.uniforms(philox_key(0, "fused"), i, 6, min(CHUNK, groups - start))
                for i, start in enumerate(range(0, groups, CHUNK))
            ]
            or [torch.empty(6, 0)],
            1,
        )
        self.upstream = torch.randn(groups, 4)
        self.grad_energy = torch.tensor(-0.37)

    def textbook(self, sampling: Sampling, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Masked weight, energy, and gradients of <upstream, wm> − 0.37·energy by logits and weight."""
        weight, logits = (t.to(dtype, copy=True).requires_grad_() for t in (self.weight, self.logits))
        masked, energy = textbook(weight, logits, sampling)
        loss = (masked * self.upstream.to(dtype)).sum() + self.grad_energy.to(dtype) * energy
        return [masked.detach(), energy.detach(), *torch.autograd.grad(loss, (logits, weight))]

    def kernels(
        self, sampling: Sampling, device: torch.device, dtype: torch.dtype = torch.float32, weight_grad: bool = True
    ) -> list[Tensor]:
        """The same, on the CPU again."""
        weight, logits, candidates = (t.to(device) for t in (self.weight, self.logits, CANDIDATES))
        if sampling.uniform is not None:
            sampling = Sampling(
                sampling.tau, sampling.scaling, sampling.hard, sampling.key, sampling.uniform.to(device)
            )
        assert fused.supported(weight, logits, candidates, sampling)
        masked, energy = fused.forward(weight, logits, candidates, sampling, dtype)
        assert masked.dtype is dtype
        assert energy.dtype is torch.float32
        assert energy.shape == ()
        upstream, grad_energy = self.upstream.to(device), self.grad_energy.to(device)
        gradients = fused.backward(weight, logits, candidates, sampling, upstream, grad_energy, weight_grad)
        assert gradients[0].dtype is logits.dtype
        assert gradients[1] is None or gradients[1].dtype is weight.dtype
        return [t.cpu() for t in (masked, energy, *gradients) if t is not None]


def largest(difference: Tensor, relative_to: Tensor) -> float:
    return float(difference.abs().max() / relative_to.abs().max())


def norm(difference: Tensor, relative_to: Tensor) -> float:
    return float(difference.norm() / relative_to.norm())


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Up to what two compilations may round differently."""
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6 * float(b.abs().max()))


def errors(found: list[Tensor], exact: list[Tensor], weight: Tensor) -> list[float]:
    """Of the masked weight, the energy, and the gradients by logits and weight."""
    differences = [a.double() - b for a, b in zip(found, exact, strict=True)]
    return [
        largest(differences[0], weight),
        abs(float(differences[1] / exact[1])),
        norm(differences[2], exact[2]),
        norm(differences[3], exact[3]),
    ]


# Noise


@pytest.mark.parametrize("candidates", [1, 4, 6, 8, 28, 70])
def test_uniforms_are_those_of_numpy(candidates: int, device: torch.device) -> None:
    found = fused.uniforms(KEY, candidates, 300, device)
    assert torch.equal(found.cpu(), randomness.uniforms(philox_key(0, "fused"), 0, candidates, 300))


@pytest.mark.parametrize("candidates", [6, 70])
@pytest.mark.parametrize("chunk", [0, 2**31 // CHUNK - 1, 2**35 // CHUNK])
def test_uniforms_go_on_in_the_next_chunk(candidates: int, chunk: int, device: torch.device) -> None:
    found = fused.uniforms(KEY, candidates, 12, device, first=(chunk + 1) * CHUNK - 5)
    key = philox_key(0, "fused")
    before = randomness.uniforms(key, chunk, candidates, CHUNK)[:, -5:]
    assert torch.equal(found.cpu(), torch.cat([before, randomness.uniforms(key, chunk + 1, candidates, 7)], 1))


@pytest.mark.parametrize("half", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_uniforms_of_every_size_of_key(half: int, device: torch.device) -> None:
    for key in ((half, 5), (5, half)):
        found = fused.uniforms(key, 6, 20, device)
        assert torch.equal(found.cpu(), randomness.uniforms(np.array(key, np.uint64), 0, 6, 20))


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
    case = Case(CHUNK + 3)
    drawn = case.kernels(Sampling(tau, 10.0, hard, key=KEY), device)
    given = case.kernels(Sampling(tau, 10.0, hard, uniform=case.uniform), device)
    same(drawn, given)


# The function


@soft_and_hard
@pytest.mark.parametrize("noise", [True, False], ids=["noise", "no noise"])
@pytest.mark.parametrize(
    ("tau", "scaling", "value_bound", "gradient_bound"),
    [(4.0, 10.0, 1e-6, 1e-5), (1.0, 10.0, 1e-6, 1e-5), (1.0, 100.0, 1e-6, 1e-5), (0.05, 100.0, 1e-4, 2e-4)],
)
@pytest.mark.usefixtures("large_programs")
def test_error(
    tau: float,
    scaling: float,
    value_bound: float,
    gradient_bound: float,
    noise: bool,
    hard: bool,
    device: torch.device,
) -> None:
    case = Case(6000)
    sampling = Sampling(tau, scaling, hard, uniform=case.uniform if noise else None)
    exact = case.textbook(sampling)
    found = errors(case.kernels(sampling, device), exact, case.weight)
    for error, bound in zip(found, (value_bound, value_bound, gradient_bound, gradient_bound), strict=True):
        assert error <= bound
    theirs = errors(case.textbook(sampling, torch.float32), exact, case.weight)
    exponential = 2.0**-23 if device.type == "cuda" else 0.0  # a GPU's fast 2ˣ is off by up to two units
    for i in (0, 2, 3):  # the energy is a single number, right by accident or not
        assert found[i] <= 2 * theirs[i] + exponential


@soft_and_hard
@pytest.mark.parametrize("groups", [1, 2, 7, 255, 256, 257, 700])
def test_any_number_of_groups(groups: int, hard: bool, device: torch.device) -> None:
    case = Case(groups)
    sampling = Sampling(0.8, 10.0, hard, uniform=case.uniform)
    found = errors(case.kernels(sampling, device), case.textbook(sampling), case.weight)
    assert max(found[:2]) <= 2e-6
    assert max(found[2:]) <= 1e-5


def test_no_groups(device: torch.device) -> None:
    case = Case(0)
    masked, energy, grad_logits, grad_weight = case.kernels(Sampling(1.0, 10.0, key=KEY), device)
    assert masked.shape == grad_weight.shape == (0, 4)
    assert grad_logits.shape == (6, 0)
    assert float(energy) == 0
    assert fused.uniforms(KEY, 6, 0, device).shape == (6, 0)


@pytest.mark.parametrize("part", ["masked", "energy"])
@soft_and_hard
def test_gradient_of_each_output_alone(part: str, hard: bool, device: torch.device) -> None:
    case = Case(64)
    if part == "masked":
        case.grad_energy.zero_()
    else:
        case.upstream.zero_()
    sampling = Sampling(1.0, 10.0, hard, uniform=case.uniform)
    found = errors(case.kernels(sampling, device), case.textbook(sampling), case.weight)
    assert max(found[2:]) <= 1e-5


def test_frozen_weight_gets_no_gradient(device: torch.device) -> None:
    case = Case(64)
    sampling = Sampling(1.0, 10.0, key=KEY)
    frozen = case.kernels(sampling, device, weight_grad=False)
    assert len(frozen) == 3
    same(frozen, case.kernels(sampling, device)[:3])


def test_inputs_are_left_alone(device: torch.device) -> None:
    case = Case(64)
    for t in vars(case).values():
        t.data = t.to(device)
    before = {name: t.clone() for name, t in vars(case).items()}
    case.kernels(Sampling(1.0, 10.0, uniform=case.uniform), device)
    for name, t in vars(case).items():
        assert torch.equal(t, before[name])


def test_equal_candidates_go_to_the_first(device: torch.device) -> None:
    case = Case(64)
    for first in range(6):
        case.logits = torch.where(torch.arange(6) < first, -1.0, 2.0)[:, None].repeat(1, 64)
        masked = case.kernels(Sampling(1.0, 10.0, hard=True), device)[0]
        assert torch.equal(masked, case.weight * CANDIDATES[first])


@soft_and_hard
@pytest.mark.parametrize("tau", [1.0, 0.05])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_saturated_logits_are_finite(size: float, tau: float, hard: bool, device: torch.device) -> None:
    case = Case(60)
    chosen = torch.arange(60) % 6
    case.logits = torch.zeros(6, 60)
    case.logits[chosen, torch.arange(60)] = size
    masked, energy, grad_logits, grad_weight = case.kernels(Sampling(tau, 100.0, hard, key=KEY), device)
    assert all(t.isfinite().all() for t in (masked, energy, grad_logits, grad_weight))
    if size > 0:  # certain: the mask is that candidate, and nothing pulls any more
        torch.testing.assert_close(masked, case.weight * CANDIDATES[chosen], rtol=1e-6, atol=0)
        pull = (case.upstream.abs() + case.weight.abs()).max() * case.weight.abs().max()
        assert float(grad_logits.abs().max()) <= 1e-6 * 100.0 / tau * float(pull)
    else:  # impossible: the rest share the probability
        assert not grad_logits[chosen, torch.arange(60)].any()


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_extreme_noise_is_finite(tau: float, device: torch.device) -> None:
    case = Case(64)
    extremes = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24, 1 - 2.0**-40, 1.0], dtype=torch.float64)
    case.uniform = extremes[torch.randint(0, 6, (6, 64))]
    case.uniform[:, :6] = extremes  # the same for all candidates: as good as none
    found = case.kernels(Sampling(tau, 10.0, uniform=case.uniform), device)
    assert all(t.isfinite().all() for t in found)
    without = case.kernels(Sampling(tau, 10.0), device)
    torch.testing.assert_close(found[0][:6], without[0][:6], rtol=1e-5, atol=1e-6)


# Types, strides, what is supported


@pytest.mark.parametrize("noise_dtype", [torch.float64, torch.float16])
def test_uniform_of_any_float_type(noise_dtype: torch.dtype, device: torch.device) -> None:
    case = Case(64)
    uniform = case.uniform.clamp(0.01, 0.99).to(noise_dtype)
    found = case.kernels(Sampling(1.0, 10.0, uniform=uniform), device)
    expected = case.kernels(Sampling(1.0, 10.0, uniform=uniform.float()), device)
    same(found, expected)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", ["autocast", "weight", "logits", "everything"])
@soft_and_hard
def test_sixteen_bits(what: str, half: torch.dtype, hard: bool, device: torch.device) -> None:
    case = Case(300)
    case.upstream = case.upstream.to(half)
    if what in ("weight", "everything"):
        case.weight = case.weight.to(half)
    if what in ("logits", "everything"):
        case.logits = case.logits.to(half)
    sampling = Sampling(1.0, 10.0, hard, uniform=case.uniform)
    exact, found = case.textbook(sampling), case.kernels(sampling, device, half)
    unit = torch.finfo(half).eps  # the interpreter cuts bits off; a GPU rounds, to half of it
    torch.testing.assert_close(found[0].double(), exact[0], rtol=1.01 * unit, atol=1e-6)
    assert float(found[1]) == pytest.approx(float(exact[1]), rel=1e-6)  # of the values before they are rounded
    for gradient, reference, rounded in ((2, exact[2], case.logits), (3, exact[3], case.weight)):
        bound = 1e-5 if rounded.dtype is torch.float32 else unit
        assert norm(found[gradient].double() - reference, reference) <= bound


@soft_and_hard
def test_strided_tensors_equal_contiguous_ones(hard: bool, device: torch.device) -> None:
    case = Case(128)
    how = {"tau": 1.0, "scaling": 10.0, "hard": hard}
    expected = case.kernels(Sampling(**how, uniform=case.uniform), device)
    for view in (lambda t: t.t().contiguous().t(), lambda t: torch.stack([t, t], 2)[..., 0]):
        strided = Case(128)
        for name in ("weight", "logits", "uniform", "upstream"):
            setattr(strided, name, view(getattr(case, name).to(device)))
            assert not getattr(strided, name).is_contiguous()
        same(strided.kernels(Sampling(**how, uniform=strided.uniform), device), expected)


def test_expanded_gradient(device: torch.device) -> None:
    case, sampling = Case(64), Sampling(1.0, 10.0, key=KEY)
    case.upstream = torch.full((64, 4), 0.7)
    expected = case.kernels(sampling, device)
    case.upstream = torch.tensor(0.7).expand(64, 4)
    same(case.kernels(sampling, device), expected)


def test_unaligned_tensors(device: torch.device) -> None:
    case, sampling = Case(65), Sampling(1.0, 10.0, key=KEY)
    expected = case.kernels(sampling, device)
    for name in ("weight", "logits", "upstream"):
        t = getattr(case, name).to(device)
        setattr(case, name, torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape))
    same(case.kernels(sampling, device), expected)


def test_what_is_supported(device: torch.device) -> None:
    case, sampling = Case(8), Sampling(1.0, 10.0)
    weight, logits, candidates = (t.to(device) for t in (case.weight, case.logits, CANDIDATES))
    assert fused.supported(weight.bfloat16(), logits.half(), candidates, sampling)
    assert not fused.supported(weight.double(), logits, candidates, sampling)
    assert not fused.supported(weight, logits.double(), candidates, sampling)
    assert not fused.supported(weight, logits.to("meta"), candidates, sampling)
    assert not fused.supported(weight.view(-1, 2), logits[:2].repeat(1, 2), torch.eye(2, device=device), sampling)
    assert fused.supported(weight, logits, candidates, Sampling(1.0, 10.0, uniform=case.uniform.to(device)))
    assert not fused.supported(weight, logits, candidates, Sampling(1.0, 10.0, uniform=case.uniform.to("meta")))


# Compilation, of which nothing needs a GPU


@compiled
def test_a_cpu_is_not_supported() -> None:
    case = Case(8)
    assert not fused.supported(case.weight, case.logits, CANDIDATES, Sampling(1.0, 10.0))


def hopper() -> object:
    pytest.importorskip("triton.backends.nvidia")
    return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)


def arguments(name: str, values: dict[str, object]) -> dict[str, object]:
    """A kernel's arguments by its parameters' names, in their order."""
    example = {
        "grad_weight": None,
        "uniform": None,
        "NOISE": "drawn",
        "HARD": False,
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
    case = Case(300)
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
    case = Case(tail)
    case.uniform = randomness.uniforms(philox_key(0, "fused"), chunks - 1, 6, CHUNK)[:, -tail:]
    case.weight, case.logits = weight[-tail:].cpu(), logits[:, -tail:].cpu()
    case.upstream, case.grad_energy = masked[-tail:].cpu(), torch.tensor(0.0)
    exact = case.textbook(Sampling(1.0, 10.0, uniform=case.uniform))
    torch.testing.assert_close(masked[-tail:].cpu().double(), exact[0], rtol=1e-2, atol=1e-3)
    assert norm(grad_logits[:, -tail:].cpu().double() - exact[2], exact[2]) <= 1e-2
