"""Models that read the weights of layers, rather than calling the layers: masks hold there, too."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune
from torch.nn.utils.parametrizations import weight_norm

import maskllm4v
from maskllm4v import LearnableMaskedLinear, dense_weight, fold_, make_learnable, prune, replace_linear_with_
from maskllm4v.sparsity.parameters import learnable_masks, masked_parameters
from maskllm4v.utils.errors import ConfigError

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
SWIN: dict[str, Any] = {"patch_size": [2, 2], "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "num_classes": 5}


def beit() -> nn.Module:
    return timm.create_model("beit_base_patch16_224", **TINY)


def eva() -> nn.Module:
    return timm.create_model("eva_giant_patch14_224", mlp_ratio=4, **TINY)


def eva02() -> nn.Module:
    return timm.create_model("eva02_tiny_patch14_224", mlp_ratio=4, **TINY)


def swin_v2() -> nn.Module:
    how = {"img_size": 32, "patch_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}
    return timm.create_model("swinv2_tiny_window8_256", num_classes=5, **how)


def torchvision_swin(version: int) -> nn.Module:
    from torchvision.models import swin_transformer as swin

    if version == 1:
        return swin.SwinTransformer(window_size=[4, 4], **SWIN)
    v2: dict[str, Any] = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return swin.SwinTransformer(window_size=[4, 4], **SWIN, **v2)


def torchvision_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=5
    )


class Encoder(nn.Module):
    """torch's, which has a fast path of its own in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.flatten(1).unfold(1, 32, 32)).mean(1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "beit": beit,
    "eva": eva,
    "eva02": eva02,
    "swinv2": swin_v2,
    "torchvision swin": lambda: torchvision_swin(1),
    "torchvision swin v2": lambda: torchvision_swin(2),
    "torchvision vit": torchvision_vit,
    "encoder": Encoder,
}
every_model = pytest.mark.parametrize("kind", MODELS)


def made(kind: str) -> nn.Module:
    """With random weights that are all of some size: nothing starts at zero."""
    torch.manual_seed(0)
    model = MODELS[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and name.endswith("weight"):  # SwinV2's norms start at zero
                parameter.normal_(1, 0.1)
            elif parameter.dim() > 1:
                parameter.normal_(0, 0.5 / parameter.shape[-1] ** 0.5 + 0.02)
    return model.eval()


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@every_model
@torch.no_grad()
def test_masked_is_folded_and_not_dense(kind: str) -> None:
    dense = made(kind)
    masks = prune(model := copy.deepcopy(dense), "magnitude", on_misfit="skip")
    folded, outputs = fold_(copy.deepcopy(model)), model(IMAGES)
    torch.testing.assert_close(outputs, folded(IMAGES), rtol=0, atol=1e-6)
    assert not torch.allclose(outputs, dense(IMAGES), rtol=1e-2, atol=1e-3)
    assert {key.replace("_mask.mask", "") for key in model.state_dict()} == dense.state_dict().keys()
    for name, mask in masks.items():  # each of them has its part in it
        (parameter,) = (one for one in masked_parameters(model).values() if one.name == name)
        parameter.mask.dense_mode = True
        assert not torch.equal(model(IMAGES), outputs), name
        parameter.mask.dense_mode = False
        assert not parameter.rows.detach()[~mask].eq(0).all()


@every_model
def test_every_logit_learns(kind: str) -> None:
    model = make_learnable(made(kind), None, pattern="1:2").train()
    for mask in learnable_masks(model).values():
        mask.tau, mask.scaling = 1.0, 1.0
    model(IMAGES).square().sum().backward()
    for name, mask in learnable_masks(model).items():
        assert mask.logits.grad is not None, name
        assert mask.logits.grad.ne(0).any(0).float().mean() > 0.9, name


@every_model
@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt"])
def test_calibration_sees_what_is_read(kind: str, method: str) -> None:
    model = made(kind)
    masks = prune(model, method, calibration=[IMAGES], on_misfit="skip", update_weights=method == "sparsegpt")
    expected = {name for name, p in made(kind).named_parameters() if p.dim() == 2 and name.endswith("weight")}
    expected = {name.removesuffix(".weight") for name in expected if "table" not in name}
    assert masks.keys() >= {n for n in expected if "qkv" in n or ("proj" in n and "patch" not in n and "q_" not in n)}
    with torch.no_grad():
        assert torch.isfinite(model(IMAGES)).all()


# Tied parameters


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_a_parameter_of_two_layers_has_one_mask() -> None:
    dense, x = Tied(), torch.randn(9, 16)
    model = copy.deepcopy(dense)
    assert list(prune(model, "sparsegpt", calibration=[x], update_weights=True)) == ["a", "head"]
    assert model.a.weight_mask is model.b.weight_mask
    assert dense_weight(model.a) is dense_weight(model.b)
    outputs = model(x)
    folded = fold_(model)
    assert folded.a.weight is folded.b.weight
    assert torch.equal(folded(x), outputs)


def test_a_tied_parameter_is_packed(tmp_path: Path) -> None:
    model, x = Tied(), torch.randn(9, 16)
    masks = prune(model, "sparsegpt", calibration=[x], update_weights=True)
    maskllm4v.save_packed(fold_(model), masks, tmp_path / "tied.safetensors")
    loaded = maskllm4v.load_packed(Tied(), tmp_path / "tied.safetensors")
    assert loaded.a.weight is loaded.b.weight
    assert torch.equal(loaded(x), model(x))


def test_a_tied_parameter_is_calibrated_on_all_that_it_sees() -> None:
    model, x = Tied(), torch.randn(64, 16)
    hidden = torch.tanh(model.a(x))
    norms = torch.cat([x, hidden]).square().sum(0).sqrt()
    expected = maskllm4v.NMPattern("2:4").topn_mask(model.a.weight.detach().abs() * norms)
    assert torch.equal(prune(model, "wanda", calibration=[x])["a"], expected)


def test_a_tied_parameter_is_drawn_once() -> None:
    model = make_learnable(Tied(), None, pattern="2:4", exclude=["head"]).train()
    assert list(learnable_masks(model)) == ["a"]
    assert model.a.weight_mask.logits is model.b.weight_mask.logits
    seen: list[Tensor] = []
    model.a.register_forward_hook(lambda module, args, output: seen.append(module.weight))
    model.b.register_forward_hook(lambda module, args, output: seen.append(module.weight))
    model(torch.randn(3, 16)).sum().backward()
    assert seen[0] is seen[1]


def test_an_embedding_is_left_alone() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 16), "fc": nn.Linear(16, 16), "head": nn.Linear(16, 8)})
    model["head"].weight = model["embedding"].weight
    before = model["head"].weight.detach().clone()
    assert list(prune(model, "magnitude")) == ["fc"]
    fold_(model)
    assert torch.equal(model["embedding"].weight, before)


# Hooks, copies


def test_hooks_stay_through_pruning_learning_and_folding() -> None:
    model, calls = made("torchvision vit"), []
    layer = model.encoder.layers[0].mlp[0]
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    masks = prune(model, "magnitude")
    make_learnable(model, masks, pattern="2:4").train()
    model(IMAGES).sum().backward()
    assert calls == ["before", "forward", "backward"]
    fold_(model)
    with torch.no_grad():
        model(IMAGES)
    assert calls[3:] == ["before", "forward"]
    assert model.encoder.layers[0].mlp[0] is layer
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("kind", ["beit", "encoder"])
@pytest.mark.parametrize("trained", [False, True])
def test_copies_and_pickles(kind: str, trained: bool) -> None:
    model = replace_linear_with_(made(kind), LearnableMaskedLinear, N=1, M=2).train()
    if trained:
        model(IMAGES).sum().backward()
        getattr(*next(iter(masked_parameters(model).values())).places[0])  # a graph hangs on what was read
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    torch.manual_seed(2)
    expected = model(IMAGES)
    for other in copies:
        torch.manual_seed(2)
        assert torch.equal(other(IMAGES), expected)
        assert type(other) is type(model)
        assert set(learnable_masks(other).values()).isdisjoint(learnable_masks(model).values())
    torch.manual_seed(2)
    assert not torch.equal(model(IMAGES), expected)  # the noise has moved on
    torch.manual_seed(2)
    assert not torch.equal(copies[0](IMAGES), expected)  # the copy's, too


# What computes weights itself


def state(model: nn.Module) -> dict[str, Any]:
    return {name: (type(module), module.training, sorted(module.__dict__)) for name, module in model.named_modules()}


COMPUTED: dict[str, Callable[[nn.Linear], object]] = {
    "prune": lambda layer: torch_prune.l1_unstructured(layer, "weight", amount=0.5),
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "parametrized": weight_norm,
}


@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize(
    "use",
    [
        lambda model: prune(model, "magnitude"),
        lambda model: make_learnable(model, None, pattern="2:4"),
        lambda model: replace_linear_with_(model, LearnableMaskedLinear),
        lambda model: maskllm4v.apply_masks_(model, {"1": torch.tensor([1, 1, 0, 0] * 2).repeat(8, 1)}, "2:4"),
    ],
    ids=["prune", "make_learnable", "replace_linear_with_", "apply_masks_"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_is_computed_is_named(how: str, use: Callable[[nn.Module], object]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    COMPUTED[how](model[1])
    before, tensors = state(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"layer '1'.*weight is computed from other tensors"):
        use(model)
    assert state(model) == before
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_such_a_layer_can_be_excluded() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    torch_prune.l1_unstructured(model[1], "weight", amount=0.5)
    assert list(prune(model, "magnitude", exclude=["1"])) == ["0"]


# State dicts


def test_todays_keys_and_those_of_before_load() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    learned, fixed = copy.deepcopy(model), copy.deepcopy(model)
    make_learnable(learned, None, pattern="2:4")
    prune(fixed, "magnitude")
    for masked in (learned, fixed):
        old = {key.replace("weight_mask.", ""): tensor.clone() for key, tensor in masked.state_dict().items()}
        assert {"0.logits", "0.mask"} & old.keys()
        other = copy.deepcopy(masked)
        for key, tensor in other.state_dict().items():
            if "mask" in key:
                tensor.zero_()
        for given in (old, masked.state_dict()):
            assert other.load_state_dict(given) == ([], [])
            x = torch.randn(3, 8)
            assert torch.equal(other.eval()(x), masked.eval()(x))


def test_linear_of_a_read_weight() -> None:
    layer, x = LearnableMaskedLinear(8, 6).eval(), torch.randn(3, 8)
    assert torch.equal(F.linear(x, layer.weight, layer.bias), layer(x))
    assert torch.equal(layer.weight, dense_weight(layer) * layer.current_mask())
