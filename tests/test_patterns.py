"""N:M patterns and their top-N masks against enumeration in plain Python."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pattern_cases import SHAPES, kept_positions, nm

from maskllm4v import NMPattern, UserError
from maskllm4v.utils.errors import PatternError


def choices(n: int, m: int) -> list[tuple[int, ...]]:
    """Kept positions of every candidate, in lexicographic order."""
    return sorted(kept for kept in itertools.product(range(m), repeat=n) if sorted(set(kept)) == list(kept))


@pytest.mark.parametrize(
    "given_as", ["2:4", (2, 4), [2, 4], ("2", "4"), NMPattern("2:4")], ids=["str", "tuple", "list", "strs", "pattern"]
)
def test_parses(given_as: object) -> None:
    pattern = NMPattern(given_as)
    assert (pattern.n, pattern.m) == (2, 4)
    assert str(pattern) == "2:4"


def test_parses_two_arguments() -> None:
    assert NMPattern(3, 8) == NMPattern("3:8")


@pytest.mark.parametrize(
    "bad",
    [
        *("", "2", "2:", ":4", "a:b", "2:4:8", "2.5:4", "2/4", "-1:4", "0:4", "4:4", "4:2", "2:17", "35:70"),
        *((2,), (2, 4, 8), (2.5, 4), (2.0, 4), (True, 4), (2, None), (4, 2), (0, 4), True, 2, 2.4, None),
    ],
    ids=str,
)
def test_rejects(bad: object) -> None:
    with pytest.raises(PatternError, match="pattern"):
        NMPattern(bad)


def test_limit_on_candidates_of_wide_groups_is_70() -> None:
    assert NMPattern("8:16").num_candidates == 12870
    assert NMPattern("69:70").num_candidates == 70
    with pytest.raises(PatternError, match=r"2:17 has 136 candidate .* at most 70 are supported where M is above 16"):
        NMPattern("2:17")


def test_error_is_a_user_error() -> None:
    assert issubclass(PatternError, UserError)
    assert issubclass(PatternError, ValueError)


def test_candidates_of_2_4_in_lexicographic_order() -> None:
    assert kept_positions(NMPattern("2:4").candidates(), 4) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]


@pytest.mark.parametrize(("n", "m"), [(n, m) for n, m in SHAPES if m <= 6])
def test_candidates(n: int, m: int) -> None:
    candidates = NMPattern(n, m).candidates()
    assert candidates.dtype is torch.bool
    assert kept_positions(candidates, m) == choices(n, m)


@pytest.mark.parametrize(("n", "m"), SHAPES)
def test_count_and_bits(n: int, m: int) -> None:
    pattern = NMPattern(n, m)
    assert pattern.num_candidates == math.factorial(m) // (math.factorial(n) * math.factorial(m - n))
    assert 2 ** (pattern.bits - 1) < pattern.num_candidates <= 2**pattern.bits
    assert pattern.candidates().shape == (pattern.num_candidates, m)


def test_candidates_dtype() -> None:
    assert NMPattern("1:2").candidates(dtype=torch.float64).tolist() == [[1.0, 0.0], [0.0, 1.0]]


def test_candidates_given_out_are_a_copy() -> None:
    pattern = NMPattern("1:5")
    given_out = pattern.candidates()
    try:
        given_out.logical_not_()
        assert kept_positions(pattern.candidates(), 5) == [(0,), (1,), (2,), (3,), (4,)]
    finally:  # leave a shared table as it was
        given_out.logical_not_()


def test_candidates_do_not_remember_a_device_context() -> None:
    with torch.device("meta"):
        NMPattern("1:13").candidates()
    assert NMPattern("1:13").candidates().device.type == "cpu"


def test_equality_and_hash() -> None:
    assert NMPattern("2:4") == NMPattern(2, 4)
    assert hash(NMPattern("2:4")) == hash(NMPattern((2, 4)))
    assert NMPattern("2:4") != NMPattern("1:4")
    assert NMPattern("2:4") != NMPattern("2:8")
    assert NMPattern("2:4") != "2:4"
    assert {NMPattern("2:4"): "found"}[NMPattern(2, 4)] == "found"


@pytest.mark.parametrize("copied", [lambda p: pickle.loads(pickle.dumps(p)), copy.copy, copy.deepcopy])
def test_copies_are_equal(copied: object) -> None:
    assert copied(NMPattern("3:7")) == NMPattern("3:7")


def test_repr_evaluates_to_the_pattern() -> None:
    assert eval(repr(NMPattern("3:7"))) == NMPattern("3:7")


def test_attributes_cannot_be_set() -> None:
    pattern = NMPattern("2:4")
    with pytest.raises(AttributeError):
        pattern.n = 1
    with pytest.raises(AttributeError):
        pattern.other = 1
    assert str(pattern) == "2:4"


def test_attributes_cannot_be_deleted() -> None:
    with pytest.raises(AttributeError):
        del NMPattern("2:4").n


def test_fits() -> None:
    assert NMPattern("2:4").fits(12)
    assert not NMPattern("2:4").fits(14)


@pytest.mark.parametrize(
    "use",
    [
        lambda p: p.check_fits(14, "blocks.0.fc"),
        lambda p: p.num_groups(torch.ones(2, 14), "blocks.0.fc"),
        lambda p: p.topn_mask(torch.ones(2, 14), "blocks.0.fc"),
        lambda p: p.validate(torch.ones(2, 14), "blocks.0.fc"),
        lambda p: p.pack(torch.ones(2, 14), "blocks.0.fc"),
        lambda p: p.unpack(torch.ones(3, dtype=torch.uint8), (2, 14), "blocks.0.fc"),
    ],
    ids=["check_fits", "num_groups", "topn_mask", "validate", "pack", "unpack"],
)
def test_misfit_names_the_layer(use: object) -> None:
    with pytest.raises(PatternError, match=r"'blocks\.0\.fc'.*14 .*4"):
        use(NMPattern("2:4"))


def test_num_groups() -> None:
    assert NMPattern("2:4").num_groups(torch.ones(3, 8)) == 6


@given(nm, st.data())
def test_topn_is_the_first_best_candidate(shape: tuple[int, int], data: st.DataObject) -> None:
    n, m = shape
    rows, groups = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    size = rows * groups * m
    # Few distinct integers: many ties, and sums without rounding.
    scores = data.draw(st.lists(st.integers(-3, 3), min_size=size, max_size=size))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.int64]))
    mask = NMPattern(n, m).topn_mask(torch.tensor(scores, dtype=dtype).reshape(rows, groups * m))
    assert mask.dtype is torch.bool
    assert mask.shape == (rows, groups * m)
    found = kept_positions(mask, m)
    for g, kept in enumerate(found):
        group = scores[g * m : (g + 1) * m]
        assert len(kept) == n
        # max() returns the first of equals
        assert kept == max(itertools.combinations(range(m), n), key=lambda c: sum(group[j] for j in c))


@given(
    st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (2, 5), (4, 8)]),
    st.lists(st.floats(allow_nan=False, allow_infinity=True, width=32), min_size=8, max_size=8),
)
def test_topn_of_any_floats(shape: tuple[int, int], floats: list[float]) -> None:
    n, m = shape
    group = floats[:m]
    (kept,) = kept_positions(NMPattern(n, m).topn_mask(torch.tensor([group])), m)
    # Sums would lose small terms or meet inf − inf; the best candidate has the largest sorted scores.
    assert kept == max(itertools.combinations(range(m), n), key=lambda c: sorted((group[j] for j in c), reverse=True))


def test_topn_with_infinities() -> None:
    inf = math.inf
    scores = torch.tensor([[-inf, -inf, -inf, -inf], [inf, 1.0, inf, inf], [-inf, 2.0, -inf, inf]])
    assert kept_positions(NMPattern("2:4").topn_mask(scores), 4) == [(0, 1), (0, 2), (1, 3)]


@pytest.mark.parametrize("other", [1.0, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 5, 15, 4000, 8191])
def test_topn_refuses_nan(at: int, other: float) -> None:
    scores = torch.full((2, 4096), other)
    scores.view(-1)[at] = math.nan
    with pytest.raises(PatternError, match=r"'blocks\.0\.fc'.*NaN"):
        NMPattern("2:4").topn_mask(scores, "blocks.0.fc")


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 6), (1, 12)])
def test_topn_of_many_groups(n: int, m: int) -> None:
    scores = torch.randn(90, 1000 * m).mul_(3).round_()  # ties in most groups; more groups than are taken at a time
    ranks = scores.reshape(-1, m).sort(descending=True, stable=True).indices.argsort()
    assert torch.equal(NMPattern(n, m).topn_mask(scores), (ranks < n).reshape(scores.shape))


def test_topn_of_nothing() -> None:
    assert NMPattern("2:4").topn_mask(torch.empty(0, 8)).shape == (0, 8)


def test_topn_of_a_transposed_tensor() -> None:
    scores = torch.randn(8, 6)
    pattern = NMPattern("2:4")
    assert torch.equal(pattern.topn_mask(scores.t()), pattern.topn_mask(scores.t().contiguous()))
