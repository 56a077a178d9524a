"""Finding, replacing and folding layers inside models, and masks in and out."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import maskllm4v
from maskllm4v import (
    LearnableMaskedLinear,
    MaskedLinear,
    UserError,
    apply_masks_,
    current_masks,
    dense_weight,
    fold_,
    make_learnable,
    replace_linear_with_,
)
from maskllm4v.sparsity.parameters import learnable_masks, masked_parameters
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.sparsity.survey import prunable_linears
from maskllm4v.utils.errors import ConfigError, PatternError

BLOCK = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
BODY = [f"blocks.{i}.{name}" for i in range(2) for name in BLOCK]
IMAGES = (4, 1, 8, 8)


class Twice(nn.Module):
    """One linear layer under two names, in two places of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleDict({"fc": nn.Linear(8, 8)})
        self.second = nn.ModuleDict({"fc": self.first["fc"]})

    def forward(self, x: Tensor) -> Tensor:
        return self.second["fc"](torch.relu(self.first["fc"](x)))


def magnitude_masks(model: nn.Module, names: list[str], pattern: str = "2:4") -> dict[str, Tensor]:
    return {name: NMPattern(pattern).topn_mask(model.get_submodule(name).weight.detach().abs()) for name in names}


def types(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


# Finding layers


def test_finds_all_linears_in_order(tiny_vit: nn.Module) -> None:
    found = prunable_linears(tiny_vit)
    assert list(found) == [*BODY, "head"]
    assert all(found[name] is tiny_vit.get_submodule(name) for name in found)


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        (lambda m: [m.head], BODY),
        (lambda m: ["head"], BODY),
        (lambda m: [m.blocks[0]], [*BODY[4:], "head"]),
        (lambda m: ["blocks.0"], [*BODY[4:], "head"]),
        (lambda m: ["blocks.0.*"], [*BODY[4:], "head"]),
        (lambda m: ["*.mlp.fc[12]", "head"], [n for n in BODY if ".attn." in n]),
        (lambda m: ["*.mlp", m.head], [n for n in BODY if ".attn." in n]),
        (lambda m: [m.blocks[1].attn.qkv], [n for n in [*BODY, "head"] if n != "blocks.1.attn.qkv"]),
        (lambda m: ["blocks"], ["head"]),
        (lambda m: [m], []),
        (lambda m: (n for n in ["head"]), BODY),
    ],
    ids=["module", "name", "parent", "parent-name", "glob", "set", "mixed", "deep", "container", "all", "generator"],
)
def test_exclude(tiny_vit: nn.Module, exclude: Callable[[nn.Module], list], left: list[str]) -> None:
    assert list(prunable_linears(tiny_vit, exclude=exclude(tiny_vit))) == left


def test_name_does_not_exclude_its_prefixes() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "fc1": nn.Linear(4, 4)})
    assert list(prunable_linears(model, exclude=["fc"])) == ["fc1"]


@pytest.mark.parametrize("exclude", ["classifier", "blocks.7.*", "HEAD", nn.Linear(4, 4)], ids=str)
def test_exclusion_that_matches_nothing(tiny_vit: nn.Module, exclude: object) -> None:
    with pytest.raises(ConfigError, match="matches no layer"):
        prunable_linears(tiny_vit, exclude=[exclude])


@pytest.mark.parametrize("exclude", ["head", nn.Linear(4, 4)], ids=["str", "module"])
def test_exclude_is_a_list(tiny_vit: nn.Module, exclude: object) -> None:
    with pytest.raises(ConfigError, match="exclude is a list"):
        prunable_linears(tiny_vit, exclude=exclude)


@pytest.mark.parametrize("exclude", [["second"], ["second.fc"], ["first"], ["first.fc"]], ids=lambda e: e[0])
def test_any_name_of_a_shared_layer_excludes_it(exclude: list[str]) -> None:
    assert not prunable_linears(Twice(), exclude=exclude)


def test_misfit_is_an_error_that_names_the_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    with pytest.raises(PatternError, match=r"layer '1': its 6 input features"):
        prunable_linears(model, NMPattern("2:4"))
    assert list(prunable_linears(model, NMPattern("1:2"))) == ["0", "1"]


def test_misfit_can_be_skipped() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    assert list(prunable_linears(model, NMPattern("2:4"), on_misfit="skip")) == ["0"]


def test_misfit_can_be_excluded() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    assert list(prunable_linears(model, NMPattern("2:4"), exclude=["1"])) == ["0"]


def test_unknown_on_misfit() -> None:
    with pytest.raises(ConfigError, match="on_misfit is 'warn'"):
        prunable_linears(nn.Sequential(nn.Linear(4, 4)), on_misfit="warn")


def test_multihead_attention_is_masked_whole() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2, batch_first=True), "fc": nn.Linear(8, 8)})
    dense = copy.deepcopy(model)
    replace_linear_with_(model, LearnableMaskedLinear)
    assert list(masked_parameters(model)) == ["attn.in_proj_weight", "attn.out_proj", "fc"]
    x = torch.randn(2, 3, 8)
    folded = fold_(copy.deepcopy(model.eval()))
    assert torch.equal(model["attn"](x, x, x)[0], folded["attn"](x, x, x)[0])
    assert not torch.allclose(model["attn"](x, x, x)[0], dense["attn"](x, x, x)[0])


def test_excluded_attention_is_not_warned_about() -> None:
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "fc": nn.Linear(8, 8)})
    assert list(prunable_linears(model, exclude=["attn"])) == ["fc"]


# Replacing


def test_quick_start(tiny_vit: nn.Module) -> None:
    model = tiny_vit
    weights = {name: model.get_submodule(name).weight for name in BODY}
    result = replace_linear_with_(model, LearnableMaskedLinear, exclude=[model.head], N=2, M=4, hard=False)
    assert result is model
    assert list(learnable_masks(model)) == BODY
    assert type(model.head) is nn.Linear
    for name, layer in learnable_masks(model).items():
        assert dense_weight(model.get_submodule(name)) is weights[name]
        assert layer.pattern == NMPattern("2:4")
        assert layer.name == name
        assert not layer.hard
    assert model(torch.randn(IMAGES)).shape == (4, 10)


def test_arguments_reach_nested_layers(tiny_vit: nn.Module) -> None:
    how = {"hard": True, "tau": 3.0, "scaling": 7.0, "gate_std": 0.0, "seed": 5}
    replace_linear_with_(tiny_vit, LearnableMaskedLinear, exclude=[tiny_vit.head], N=1, M=4, **how)
    layers = learnable_masks(tiny_vit)
    assert list(layers) == BODY
    for layer in layers.values():
        assert layer.pattern == NMPattern("1:4")
        assert layer.logits.shape[0] == 4
        assert (layer.hard, layer.tau, layer.scaling, layer.draw.seed) == (True, 3.0, 7.0, 5)
        assert not layer.logits.any()


def test_replaces_with_fixed_masks(tiny_vit: nn.Module) -> None:
    replace_linear_with_(tiny_vit, MaskedLinear, N=1, M=2)
    assert list(masked_parameters(tiny_vit)) == [*BODY, "head"]
    assert all(type(one.module) is MaskedLinear for one in masked_parameters(tiny_vit).values())
    with pytest.raises(PatternError, match="no mask"):
        tiny_vit(torch.randn(IMAGES))


def test_misfit_reaches_replacement() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    with pytest.raises(PatternError, match="layer '1'"):
        replace_linear_with_(model, MaskedLinear)
    assert type(model[0]) is nn.Linear
    replace_linear_with_(model, MaskedLinear, on_misfit="skip")
    assert [type(layer) for layer in model] == [MaskedLinear, nn.Linear]


def test_shared_layer_stays_shared() -> None:
    model = replace_linear_with_(Twice(), LearnableMaskedLinear)
    assert type(model.first["fc"]) is LearnableMaskedLinear
    assert model.first["fc"] is model.second["fc"]
    x = torch.randn(2, 8)
    expected = model.eval()(x)
    fold_(model)
    assert type(model.first["fc"]) is nn.Linear
    assert model.first["fc"] is model.second["fc"]
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda: replace_linear_with_(nn.Linear(8, 8), LearnableMaskedLinear),
        lambda: make_learnable(nn.Linear(8, 8), None, pattern="2:4"),
        lambda: apply_masks_(nn.Linear(8, 8), {"": torch.tensor([1, 1, 0, 0] * 2).repeat(8, 1)}, "2:4"),
        lambda: maskllm4v.prune(nn.Linear(8, 8), "magnitude"),
        lambda: fold_(LearnableMaskedLinear(8, 8)),
    ],
    ids=["replace_linear_with_", "make_learnable", "apply_masks_", "prune", "fold_"],
)
def test_a_bare_linear_is_not_passed_over_in_silence(use: Callable[[], object]) -> None:
    # It cannot be replaced in place, and must not come back dense (or unfolded) without a word.
    with pytest.raises(UserError):
        use()


def test_generator_of_torch_is_left_alone(tiny_vit: nn.Module) -> None:
    before = torch.get_rng_state()
    replace_linear_with_(tiny_vit, LearnableMaskedLinear)
    assert torch.equal(torch.get_rng_state(), before)


# Masks in and out


def test_apply_masks(tiny_vit: nn.Module) -> None:
    masks = magnitude_masks(tiny_vit, BODY[1:3])
    dense = copy.deepcopy(tiny_vit)
    assert apply_masks_(tiny_vit, masks, "2:4") is tiny_vit
    assert current_masks(tiny_vit).keys() == masks.keys()
    for name, mask in masks.items():
        assert torch.equal(current_masks(tiny_vit)[name], mask)
        dense.get_submodule(name).weight.data.mul_(mask)
    x = torch.randn(IMAGES)
    assert torch.equal(tiny_vit(x), dense(x))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda masks: {}, ConfigError, "no masks"),
        (lambda masks: {"blocks.9.fc": masks["head"]}, ConfigError, r"no linear layer.*'blocks\.9\.fc'"),
        (lambda masks: {"norm": masks["head"]}, ConfigError, "no linear layer.*'norm'"),
        (lambda masks: {"blocks.0.mlp.fc1": masks["head"]}, PatternError, r"'blocks\.0\.mlp\.fc1'.*\(10, 32\)"),
        (lambda masks: {**masks, "head": torch.ones(10, 32).bool()}, PatternError, "'head': group 0 of row 0"),
        (lambda masks: {"head": NMPattern("1:4").topn_mask(torch.randn(10, 32))}, PatternError, "'head'.*keeps 1"),
    ],
    ids=["none", "name", "not-linear", "shape", "dense", "pattern"],
)
@pytest.mark.parametrize(
    "use",
    [lambda model, masks: apply_masks_(model, masks, "2:4"), lambda m, masks: make_learnable(m, masks, pattern="2:4")],
    ids=["apply_masks_", "make_learnable"],
)
def test_bad_masks(tiny_vit: nn.Module, use: Callable, change: Callable, error: type[Exception], message: str) -> None:
    before = types(tiny_vit)
    with pytest.raises(error, match=message):
        use(tiny_vit, change(magnitude_masks(tiny_vit, ["head"])))
    assert types(tiny_vit) == before


@pytest.mark.parametrize("layer_class", [MaskedLinear, LearnableMaskedLinear])
def test_fold_gives_plain_layers_with_the_same_outputs(tiny_vit: nn.Module, layer_class: type[nn.Linear]) -> None:
    if layer_class is MaskedLinear:
        apply_masks_(tiny_vit, magnitude_masks(tiny_vit, BODY), "2:4")
    else:
        replace_linear_with_(tiny_vit, LearnableMaskedLinear, exclude=["head"])
    masks, x = current_masks(tiny_vit), torch.randn(IMAGES)
    expected = tiny_vit.eval()(x)
    assert fold_(tiny_vit) is tiny_vit
    assert not masked_parameters(tiny_vit)
    assert list(prunable_linears(tiny_vit)) == [*BODY, "head"]
    for name, mask in masks.items():
        layer = tiny_vit.get_submodule(name)
        assert type(layer) is nn.Linear
        assert not layer.weight[~mask].any()
    assert torch.equal(tiny_vit(x), expected)
