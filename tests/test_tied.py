"""A parameter that several modules hold: embeddings are pruned only if asked for, an update suits all layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskllm4v import (
    LearnableMaskedLinear,
    NMPattern,
    current_masks,
    dense_weight,
    fold_,
    make_learnable,
    prune,
    replace_linear_with_,
    update_weights_,
)
from maskllm4v.sparsity.layers import mask_of
from maskllm4v.sparsity.survey import survey
from maskllm4v.utils.errors import ConfigError

P24 = NMPattern("2:4")
TOKENS = torch.arange(24).reshape(4, 6)


class Language(nn.Module):
    """A table of positions, and one of tokens that is the head's matrix, too."""

    def __init__(self, **how: Any) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.tokens, self.positions = nn.Embedding(24, 16, **how), nn.Embedding(6, 16)
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 24)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        found: Tensor = self.head(torch.tanh(self.body(x)))
        return found


USES: dict[str, Any] = {
    "prune": lambda model, **how: prune(model, "wanda", calibration=[TOKENS], **how),
    "make_learnable": lambda model, **how: make_learnable(model, None, pattern="2:4", **how),
    "replace_linear_with_": lambda model, **how: replace_linear_with_(model, LearnableMaskedLinear, **how),
}
every_use = pytest.mark.parametrize("use", USES.values(), ids=USES)


@every_use
def test_a_table_is_left_alone_and_the_report_says_why(use: Any) -> None:
    model = Language()
    before = model.tokens.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"dense: shared with Embedding \(an option\): 'head'"):
        use(model)
    assert type(model.tokens) is nn.Embedding
    assert torch.equal(model.head.weight, before)
    assert survey(Language(), P24).dense["head"].reason == "shared with Embedding (an option)"
    assert "positions" not in {*survey(Language(), P24).dense, *survey(Language(), P24).prunable}


@every_use
def test_if_asked_for_both_read_it_under_one_mask(use: Any) -> None:
    model = Language().eval()
    with pytest.warns(UserWarning, match=r"^layer 'head': tied to an embedding, whose table loses 50\.0 %") as seen:
        use(model, tied=True)
    assert seen[0].filename == __file__
    assert list(current_masks(model)) == ["body", "head"]
    assert mask_of(model.tokens) is mask_of(model.head) is not None
    assert dense_weight(model.tokens) is dense_weight(model.head)
    assert type(model.positions) is nn.Embedding
    outputs, table = model(TOKENS), model.tokens(torch.arange(24))
    assert table.ne(0).unflatten(1, (4, 4)).sum(2).eq(2).all()
    folded = fold_(model)
    assert type(folded.tokens) is nn.Embedding
    assert folded.tokens.weight is folded.head.weight
    assert torch.equal(folded.tokens.weight, table)
    torch.testing.assert_close(folded(TOKENS), outputs, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*tied to an embedding")
def test_statistics_are_those_of_the_head() -> None:
    model = Language()
    x = model.tokens(TOKENS) + model.positions(torch.arange(6))
    inputs = torch.tanh(model.body(x)).flatten(0, 1)
    expected = P24.topn_mask(model.head.weight.detach().abs() * inputs.square().sum(0).sqrt())
    masks = prune(model, "wanda", calibration=[TOKENS], tied=True)
    assert torch.equal(masks["head"], expected)


@pytest.mark.filterwarnings("ignore:.*tied to an embedding")
@pytest.mark.parametrize("method", ["least_squares", "sparsegpt"])
def test_an_update_for_the_head_alone_is_refused(method: str) -> None:
    model = Language()
    with pytest.raises(ConfigError, match="layer 'head': tied to an embedding, which an update"):
        prune(model, "sparsegpt", calibration=[TOKENS], update_weights=True, tied=True)
    assert type(model.head) is nn.Linear
    prune(model, "magnitude", tied=True)
    before = dense_weight(model.head)
    with pytest.raises(ConfigError, match="layer 'head': tied to an embedding, which an update"):
        update_weights_(model, method, calibration=[TOKENS])
    assert dense_weight(model.tokens) is before


@pytest.mark.parametrize("how", [{"max_norm": 1.0}, {"sparse": True}])
def test_tables_that_are_written_to_as_they_are_read_are_never_pruned(how: dict[str, Any]) -> None:
    found = survey(Language(**how), P24, tied=True)
    assert found.dense["head"].reason == "shared with Embedding"


# Two layers with one weight


class Twice(nn.Module):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.b(torch.tanh(self.a(x)))
        return found


@pytest.mark.parametrize("target", ["symmetric", "asymmetric"])
def test_least_squares_suits_all_that_the_weight_sees(target: Any) -> None:
    """Sums over the inputs of both layers, in float64; neither has changed yet when they are seen."""
    model, x = Twice(), torch.randn(200, 16) @ torch.randn(16, 16)
    dense, weight = copy.deepcopy(model).double(), model.a.weight.detach().double()
    mask = prune(model, "magnitude")["a"]
    update_weights_(model, calibration=[x[:100], x[100:]], target=target, damping=0.1)
    with torch.no_grad():
        seen = torch.cat([x.double(), torch.tanh(dense.a(x.double()))])
    h = 2 / len(seen) * seen.T @ seen
    ridge = 0.1 * h.diagonal().mean() * torch.eye(16)
    right = weight @ (h + ridge)
    expected = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        expected[row, kept] = torch.linalg.solve((h + ridge)[kept][:, kept], right[row, kept])
    assert dense_weight(model.a) is dense_weight(model.b)
    torch.testing.assert_close(dense_weight(model.a).detach().double(), expected, rtol=1e-4, atol=1e-4)


def test_sparsegpt_updates_it_once_for_all_that_it_sees() -> None:
    """As one layer that sees the inputs of both."""
    model, x = Twice(), torch.randn(200, 16)
    with torch.no_grad():
        seen = torch.cat([x, torch.tanh(model.a(x))])
    alone = nn.Sequential(copy.deepcopy(model.a))
    mask = prune(model, "sparsegpt", calibration=[x], update_weights=True)["a"]
    wanted = prune(alone, "sparsegpt", calibration=[seen], update_weights=True)["0"]
    assert torch.equal(mask, wanted)
    torch.testing.assert_close(dense_weight(model.a), dense_weight(alone[0]), rtol=1e-4, atol=1e-4)
    assert dense_weight(model.a) is dense_weight(model.b)
