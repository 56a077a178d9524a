"""Which backend computes a mask operation, and that all of them draw the same masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from mask_oracle import Case, equal_in_float64, errors, norm, textbook

from maskllm4v.sparsity.gumbel import BACKENDS, eager, inductor, masked_weight
from maskllm4v.sparsity.gumbel.backends import choose
from maskllm4v.sparsity.gumbel.sampling import Sampling
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.rng import CHUNK, philox_key, uniforms

pytest_plugins = ["interpreted_triton"]


@pytest.fixture(scope="module", autouse=True)
def compiled_afresh() -> Iterator[None]:
    """What was compiled before does not count, and too many compilations are an error, not uncompiled."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# The same masks from each


def equal_textbook(backend: str, groups: int, tau: float) -> None:
    case = Case(out=groups, groups_per_row=1)
    found = case.drawn(backend, torch.float64, tau=tau, scaling=20.0)
    exact = case.run(textbook, torch.float64, tau=tau, scaling=20.0)
    equal_in_float64(found, exact)
    for a, b in ((found[2][:, -3:], exact[2][:, -3:]), (found[3][-3:], exact[3][-3:])):
        assert norm(a - b, b) <= 1e-10


@pytest.mark.parametrize("threads", [1, 3])  # more of PyTorch's threads, more at a time
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_several_spans_equal_textbook(tau: float, threads: int, set_threads: Callable[[int], None]) -> None:
    set_threads(threads)
    width = max(eager.CPU_SPAN, threads * eager.THREAD_SPAN)
    equal_textbook("chunked", 2 * width + 3, tau)


def test_spans_cover_all_groups_once() -> None:
    assert eager.spans(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert eager.spans(8, 4) == [slice(0, 4), slice(4, 8)]
    assert eager.spans(0, 4) == []


@pytest.mark.parametrize("backend", ["chunked", "compiled"])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_spans_need_not_be_chunks(tau: float, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "CPU_SPAN", 5000)
    monkeypatch.setattr(eager, "THREAD_SPAN", 0)
    monkeypatch.setattr(inductor, "SPAN", 5000)
    assert 15_000 < CHUNK < 20_000  # the fourth span crosses into the second chunk
    equal_textbook(backend, 20_003, tau)


@pytest.mark.parametrize(("tau", "hard"), [(1.0, False), (0.5, False), (1.0, True)])
@pytest.mark.usefixtures("interpreter")
def test_triton_draws_the_same_masks(tau: float, hard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "maskllm4v.sparsity.gumbel.triton_op.BLOCK", 2048
    )  # the interpreter takes as long as for a small one
    case, how = Case(out=CHUNK + 3, groups_per_row=1, dtype=torch.float32), {"tau": tau, "scaling": 20.0, "hard": hard}
    found, exact = case.drawn("triton", torch.float32, **how), case.run(textbook, torch.float64, **how)
    value, energy, *gradients = errors(found, exact, case.weight)
    assert max(value, energy) <= 1e-6
    assert max(gradients) <= 1e-5


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("groups", [1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2)], ids=["2:4", "1:2"])
def test_key_draws_the_uniforms_of_each_chunk(n: int, m: int, groups: int, hard: bool) -> None:
    case = Case(n, m, out=groups, groups_per_row=1, dtype=torch.float32)
    key = philox_key(1, "noise")
    sizes = [min(CHUNK, groups - start) for start in range(0, groups, CHUNK)]
    uniform = torch.cat([uniforms(key, i, len(case.candidates), size) for i, size in enumerate(sizes)], 1)
    how = {"tau": 1.0, "scaling": 10.0, "hard": hard}
    drawn = case.run(masked_weight, torch.float32, uniform=None, key=key, **how)
    explicit = case.run(masked_weight, torch.float32, uniform=uniform, **how)
    assert all(torch.equal(a, b) for a, b in zip(drawn, explicit, strict=True))


# Which is taken


DRAWN = Sampling(1.0, 10.0, key=(1, 2))
OTHERS = {
    "hard": ((2, 4), Sampling(0.7, 10.0, hard=True, key=(1, 2))),
    "1:4": ((1, 4), Sampling(0.7, 10.0, key=(1, 2))),
    "4:8": ((4, 8), Sampling(0.7, 10.0, key=(1, 2))),
    "no noise": ((2, 4), Sampling(0.7, 10.0)),
}


def chosen(name: str, case: Case, sampling: Sampling) -> object:
    return choose(name, case.weight.view(-1, case.candidates.shape[1]), case.logits, case.candidates, sampling)


def test_cpus_take_plain_pytorch() -> None:
    assert chosen("auto", Case(), DRAWN) is eager
    assert chosen("chunked", Case(), DRAWN) is eager


def test_compiled_computes_what_it_is_made_for() -> None:
    case = Case()
    assert chosen("compiled", case, DRAWN) is inductor
    assert chosen("compiled", case, Sampling(1.0, 10.0, uniform=case.uniform)) is eager
    assert chosen("compiled", case, Sampling(1.0, 10.0, key=(1, 2), uniform=case.uniform)) is eager


@pytest.mark.parametrize("what", OTHERS)
def test_compiled_leaves_the_rest_to_auto(what: str) -> None:
    pattern, sampling = OTHERS[what]
    case = Case(*pattern)
    assert chosen("compiled", case, sampling) is eager
    how = {"tau": sampling.tau, "scaling": sampling.scaling, "hard": sampling.hard, "uniform": None}
    if sampling.key is not None:
        how["key"] = case.key
    found, expected = (
        case.run(masked_weight, torch.float32, backend=backend, **how) for backend in ("compiled", "auto")
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_unknown_backend_is_answered_with_the_known() -> None:
    with pytest.raises(ConfigError, match=f"^backend is 'cuda'; allowed: {', '.join(BACKENDS)}$"):
        Case().drawn("cuda", torch.float32, tau=1.0, scaling=10.0)


def test_triton_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^backend is 'triton', which needs a GPU"):
        Case().drawn("triton", torch.float32, tau=1.0, scaling=10.0)


# Compilation


def test_one_compilation_serves_every_size_and_draw() -> None:
    torch._dynamo.reset()

    def compute(groups: int, **how: object) -> None:
        case = Case(out=groups, groups_per_row=1, dtype=torch.float32)
        case.key = philox_key(groups)
        if groups % 2:
            case.logits = case.logits.t().contiguous().t()
        case.drawn("compiled", torch.float32, **how)

    for tau in (4.0, 1.0):
        compute(7, tau=tau, scaling=10.0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for groups in (2, 64, 1001, CHUNK + 6):
            compute(groups, tau=0.05 * groups, scaling=1.5 * groups)
        compute(8, tau=1.0, scaling=100.0)
        with pytest.raises(Exception, match="Recompil"):  # it would be seen
            Case().drawn("compiled", torch.float64, tau=1.0, scaling=100.0)
