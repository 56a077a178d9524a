"""The order of channels: against brute force, and of whole models."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_diffusion import dit
from small_layers import inputs_of
from timm.layers import Mlp
from torch import Tensor, nn

import maskllm4v
from maskllm4v import Calibration, permute_channels_, prune
from maskllm4v.oneshot.permute import best_order
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import ConfigError, DataError, PatternError

HIDDEN, VALUES = [[f"blocks.{i}.{name}" for i in range(2)] for name in ("mlp.fc2", "attn.proj")]


def kept(scores: Tensor, pattern: NMPattern) -> float:
    """What the N highest of every group sum up to."""
    return float(scores.double().reshape(-1, pattern.m).topk(pattern.n, 1).values.sum())


def orders(count: int, parts: int = 1) -> Iterator[Tensor]:
    """All orders in which columns stay within their part."""
    size = count // parts
    inside = [itertools.permutations(range(i * size, (i + 1) * size)) for i in range(parts)]
    for found in itertools.product(*inside):
        yield torch.tensor([column for part in found for column in part])


def swaps(order: Tensor, parts: int = 1) -> Iterator[Tensor]:
    size = len(order) // parts
    for i, j in itertools.combinations(range(len(order)), 2):
        if i // size == j // size:
            other = order.clone()
            other[[i, j]] = other[[j, i]]
            yield other


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("pattern", "parts"), [("1:2", 1), ("1:3", 1), ("2:3", 1), ("1:2", 2)])
def test_best_of_all_orders(pattern: str, parts: int, seed: int) -> None:
    """With two groups a part, of at most three columns, every partition is one swap away, so that none is missed."""
    chosen = NMPattern(pattern)
    scores = torch.rand(7, 2 * parts * chosen.m, generator=torch.Generator().manual_seed(seed))
    best = max(kept(scores[:, order], chosen) for order in orders(scores.shape[1], parts))
    found = best_order(scores, chosen, parts=parts)
    assert kept(scores[:, found], chosen) == pytest.approx(best, rel=1e-12)


def test_large_values_that_meet_are_spread() -> None:
    """2:4, and both groups of one row hold four or no large values: two each is the only best order."""
    scores = torch.tensor([[8.0, 7, 6, 5, 0.4, 0.3, 0.2, 0.1]])
    pattern = NMPattern("2:4")
    found = best_order(scores, pattern)
    assert kept(scores[:, found], pattern) == 26
    assert kept(scores, pattern) < 16


@pytest.mark.parametrize(
    ("shape", "pattern", "parts"),
    [((9, 24), "2:4", 1), ((9, 24), "1:4", 3), ((5, 24), "2:4", 4), ((4, 32), "4:8", 2), ((6, 15), "2:5", 1)],
)
def test_no_swap_is_left_that_pays(shape: tuple[int, int], pattern: str, parts: int) -> None:
    """Also where heads do not end with a group: six columns each, in groups of four."""
    scores, chosen = torch.randn(shape).abs(), NMPattern(pattern)
    found = best_order(scores, chosen, parts=parts, sweeps=1000)
    size = shape[1] // parts
    assert torch.equal(found.sort().values, torch.arange(shape[1]))
    assert torch.equal(found // size, torch.arange(shape[1]) // size)
    reached = kept(scores[:, found], chosen)
    assert reached > kept(scores, chosen)
    worth = 1.01e-6 * reached / (shape[1] // chosen.m)
    assert all(kept(scores[:, other], chosen) <= reached + worth for other in swaps(found, parts))


@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from(["1:2", "2:4", "1:4", "3:4", "4:8"]),
    st.integers(0, 4),
    st.integers(0, 2**16),
)
def test_never_worse_than_it_was(rows: int, groups: int, text: str, sweeps: int, seed: int) -> None:
    """Ties and zeros among the scores; each sweep keeps more than the one before."""
    pattern = NMPattern(text)
    scores = torch.randint(0, 4, (rows, groups * pattern.m), generator=torch.Generator().manual_seed(seed)).float()
    before = 0.0
    for count in range(sweeps + 1):
        reached = kept(scores[:, best_order(scores, pattern, sweeps=count)], pattern)
        assert reached >= before
        before = reached
    assert torch.equal(best_order(scores, pattern, sweeps=0), torch.arange(scores.shape[1]))
    assert before >= kept(scores, pattern)


def test_order_depends_on_nothing_but_the_scores() -> None:
    scores, pattern, threads = torch.randn(40, 64).abs(), NMPattern("2:4"), torch.get_num_threads()
    found = best_order(scores, pattern)
    torch.manual_seed(99)
    try:
        torch.set_num_threads(3)
        assert torch.equal(best_order(scores.clone(), pattern), found)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(best_order(scores.double(), pattern), found)
    assert torch.equal(best_order(1024 * scores, pattern), found)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_have_to_be_finite(value: float) -> None:
    scores = torch.rand(4, 8)
    scores[1, 2] = value
    with pytest.raises(PatternError, match="layer 'here': scores are not finite"):
        best_order(scores, NMPattern("2:4"), layer="here")
    with pytest.raises(PatternError, match="layer 'here': its 10 input features are no multiple of 4"):
        best_order(torch.rand(4, 10), NMPattern("2:4"), layer="here")


# Whole models


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 1, 8, 8)


@torch.no_grad()
def test_a_model_keeps_more_and_computes_the_same(tiny_vit: nn.Module) -> None:
    model, inputs = tiny_vit.double(), images().double()
    wanted, before = model(inputs), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    permutations = permute_channels_(model, "2:4", exclude=["head"])
    assert sorted(permutations) == sorted([*HIDDEN, *VALUES])
    assert float((model(inputs) - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())
    pattern = NMPattern("2:4")
    for name, order in permutations.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, before[f"{name}.weight"][:, order])
        assert torch.equal(order, best_order(before[f"{name}.weight"].abs(), pattern, parts=4 if "attn" in name else 1))
        assert kept(weight.abs(), pattern) > kept(before[f"{name}.weight"].abs(), pattern)
    maskllm4v.apply_permutations_(model, maskllm4v.invert_permutations(permutations))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_calibration_weighs_channels_by_their_inputs(tiny_vit: nn.Module) -> None:
    batches = [images(), images()]
    norms = {name: rows.norm(dim=0) for name, rows in inputs_of(tiny_vit, [*HIDDEN, *VALUES], batches).items()}
    before = {name: tiny_vit.get_submodule(name).weight.clone() for name in norms}
    permutations = permute_channels_(tiny_vit, "1:4", calibration=batches, exclude=["head"])
    for name, weight in before.items():
        scores = weight.double().abs() * norms[name]
        assert kept(scores[:, permutations[name]], NMPattern("1:4")) > kept(scores, NMPattern("1:4"))
    assert any(not permutations[name].equal(best_order(before[name].abs(), NMPattern("1:4"))) for name in HIDDEN)


def wanda(model: nn.Module, layers: Iterable[str], batch: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Prune a model by Wanda: masks by layer, and of some layers Σ|w|·‖x‖ of what is kept, x as in the dense model."""
    norms = {name: rows.norm(dim=0) for name, rows in inputs_of(model, layers, [batch]).items()}
    masks = prune(model, "wanda", calibration=batch, exclude=["head"])
    scores = {name: model.get_submodule(name).weight.detach().double().abs() * norm for name, norm in norms.items()}
    return masks, {name: float(score[masks[name]].sum()) for name, score in scores.items()}


def test_wanda_keeps_more_of_its_score_and_prunes_what_was_permuted(tiny_vit: nn.Module) -> None:
    batch, plain = images(20), copy.deepcopy(tiny_vit)
    permutations = permute_channels_(tiny_vit, "2:4", calibration=batch, exclude=["head"])
    assert sorted(permutations) == sorted([*HIDDEN, *VALUES])
    permuted = {name: tiny_vit.get_submodule(name).weight.detach().clone() for name in permutations}
    masks, keeps = wanda(tiny_vit, permutations, batch)
    _, kept_before = wanda(plain, permutations, batch)
    for name, weight in permuted.items():
        assert torch.equal(maskllm4v.dense_weight(tiny_vit.get_submodule(name)), weight)
        NMPattern("2:4").validate(masks[name], name)
        assert keeps[name] > (1.03 if name in HIDDEN else 1.001) * kept_before[name]  # heads leave less to choose


def test_layers_that_stay_dense_keep_their_order(tiny_vit: nn.Module) -> None:
    permutations = permute_channels_(tiny_vit, "2:4", exclude=["head", "blocks.0.mlp", "blocks.1.attn.proj"])
    assert sorted(permutations) == ["blocks.0.attn.proj", "blocks.1.mlp.fc2"]


def test_channels_that_make_one_group_a_head_stay(tiny_vit: nn.Module) -> None:
    """Heads of eight channels under 4:8: nothing to swap there."""
    assert sorted(permute_channels_(tiny_vit, "4:8", exclude=["head"])) == HIDDEN


def test_layers_that_do_not_fit(tiny_vit: nn.Module) -> None:
    with pytest.raises(PatternError, match="input features are no multiple of 3"):
        permute_channels_(tiny_vit, "1:3", exclude=["head"])
    with pytest.raises(ConfigError, match="no layer to prune reads channels that can be permuted"):
        permute_channels_(tiny_vit, "1:3", exclude=["head"], on_misfit="skip")


def test_models_without_such_channels_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    with pytest.raises(ConfigError, match="no layer to prune reads channels that can be permuted"):
        permute_channels_(model, "2:4")


def test_pruned_models_are_refused(tiny_vit: nn.Module) -> None:
    prune(tiny_vit, "magnitude", exclude=["head"])
    with pytest.raises(ConfigError, match="has a mask already"):
        permute_channels_(tiny_vit, "2:4", exclude=["head"])


def test_nothing_changes_where_something_is_wrong(tiny_vit: nn.Module) -> None:
    with torch.no_grad():
        tiny_vit.blocks[1].mlp.fc2.weight[0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in tiny_vit.state_dict().items()}
    with pytest.raises(PatternError, match=r"'blocks.1.mlp.fc2': scores are not finite"):
        permute_channels_(tiny_vit, "2:4", exclude=["head"])
    with pytest.raises(DataError, match="no batches"):
        permute_channels_(tiny_vit, "2:4", exclude=["head"], calibration=[])
    after = tiny_vit.state_dict()
    assert all(torch.equal(tensor.nan_to_num(), after[name].nan_to_num()) for name, tensor in before.items())


@torch.no_grad()
def test_a_dit_is_permuted_by_the_part_of_the_calibration_that_shows_its_layers() -> None:
    model = dit().double()
    batch = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([5, 600, 30]), torch.tensor([1, 2, 10])
    wanted = model(*batch, return_dict=False)[0]
    shown = Calibration([batch], lambda model, batch: model(*batch, return_dict=False)[0])
    permutations = permute_channels_(model, "2:4", calibration=shown, exclude=["*.norm1.emb", "proj_out_*"])
    names = ("attn1.to_out.0", "ff.net.2")
    assert sorted(permutations) == [f"transformer_blocks.{i}.{name}" for i in range(2) for name in names]
    assert float((model(*batch, return_dict=False)[0] - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


class Forgetful(Mlp):
    """As in timm's TinyViT, whose attention overrides ``train``: the value of ``eval`` is nothing."""

    def train(self, mode: bool = True) -> None:
        super().train(mode)


def test_blocks_whose_eval_returns_nothing(tiny_vit: nn.Module) -> None:
    for block in tiny_vit.blocks:
        forgetful = Forgetful(32, 128)
        forgetful.load_state_dict(block.mlp.state_dict())
        block.mlp = forgetful
    assert tiny_vit.blocks[0].mlp.eval() is None
    assert {"blocks.0.mlp.fc2", "blocks.1.mlp.fc2"} <= permute_channels_(tiny_vit, "2:4", exclude=["head"]).keys()
