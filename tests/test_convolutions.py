"""Convolutions that multiply each patch once: the same as a linear layer on patches, if somebody asks for them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from commands import DENSE, MODEL, make_project, well
from torch import Tensor, nn

import maskllm4v
from maskllm4v import NMPattern, current_masks, fold_, make_learnable, prune, update_weights_
from maskllm4v.checkpoints.masks import MaskCheckpoint, load_masks, save_masks
from maskllm4v.evaluation.layer_errors import layer_diagnostics
from maskllm4v.export.verify import passes, verify_file
from maskllm4v.sparsity.calibration import Calibration
from maskllm4v.sparsity.layout import from_rows, to_rows
from maskllm4v.sparsity.parameters import find_matrix, learnable_masks
from maskllm4v.sparsity.products import patches
from maskllm4v.sparsity.survey import survey

P24 = NMPattern("2:4")
METHODS = ["magnitude", "random", "wanda", "ria", "sparsegpt"]


class Standardised(nn.Conv2d):
    """As in BiT: what is multiplied is made of the weight, and has no zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("layer", "found"),
    [
        (nn.Conv2d(8, 8, 1), True),
        (nn.Conv2d(8, 8, 1, stride=2, bias=False), True),
        (nn.Conv2d(8, 8, 1, padding="same"), True),
        (nn.Conv2d(3, 8, 4, stride=4), True),
        (nn.Conv2d(3, 8, (2, 4), stride=(2, 4), padding="valid"), True),
        (nn.Conv1d(4, 8, 4, stride=4), True),
        (nn.Conv3d(3, 8, (1, 2, 2), stride=(1, 2, 2)), True),
        (nn.Conv2d(8, 8, 3), False),
        (nn.Conv2d(8, 8, 4, stride=2), False),
        (nn.Conv2d(8, 8, 2, stride=2, padding=1), False),
        (nn.Conv2d(8, 8, 2, stride=2, dilation=2), False),
        (nn.Conv2d(8, 8, 1, padding=1), False),
        (nn.Conv2d(8, 8, 1, groups=2), False),
        (nn.ConvTranspose2d(8, 8, 2, stride=2), False),
        (Standardised(8, 8, 1), False),
    ],
    ids=str,
)
def test_which_they_are(layer: nn.Module, found: bool) -> None:
    model = nn.Sequential(layer)
    by_default = survey(model, P24)
    assert not by_default.prunable
    assert by_default.dense["0"].reason == ("convolution (an option)" if found else "convolution")
    asked = survey(model, P24, convolutions=True)
    assert list(asked.prunable) == ["0"] * found
    assert [one.reason for one in asked.dense.values()] == ["convolution"] * (not found)
    assert survey(model, P24, convolutions=True, exclude=["0"]).dense["0"].reason == "excluded"


def test_odd_widths_are_told() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1))
    found = survey(model, P24, convolutions=True, on_misfit="skip")
    assert list(found.prunable) == ["1"]
    assert found.dense["0"].reason == "3 inputs, no multiple of 4"


def test_groups_lie_along_channels_at_each_position() -> None:
    weight = torch.randn(6, 8, 2, 3)
    rows = to_rows(weight, "patches")
    assert rows.shape == (6, 48)
    for y in range(2):
        for x in range(3):
            start = 8 * (3 * y + x)
            assert torch.equal(rows[:, start : start + 8], weight[:, :, y, x])
    again = from_rows(rows, "patches", weight.shape)
    assert torch.equal(again, weight)
    assert again.is_contiguous()
    model = nn.Sequential(nn.Conv2d(8, 6, (2, 3), stride=(2, 3)))
    prune(model, "magnitude", convolutions=True)
    assert fold_(model)[0].weight.ne(0).unflatten(1, (2, 4)).sum(2).eq(2).all()


# A convolution on images, and the linear layer on patches that it is


class Patches(nn.Module):
    """Cuts images without any of the functions under test: ``[B, C, ...]`` to ``[B, ..., in]``, channels last."""

    def __init__(self, *kernel: int, stride: int | None = None) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(1, -1)
        if self.stride:
            return x[:, :: self.stride, :: self.stride]
        counts = [size // k for size, k in zip(x.shape[1:-1], self.kernel, strict=True)]
        x = x[(slice(None), *(slice(n * k) for n, k in zip(counts, self.kernel, strict=True)))]
        split = x.reshape(len(x), *(part for pair in zip(counts, self.kernel, strict=True) for part in pair), -1)
        ends = [2 + 2 * i for i in range(len(counts))]
        return split.movedim(ends, list(range(-1 - len(ends), -1))).flatten(len(ends) + 1)


class Last(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


def pair(kernel: tuple[int, ...], stride: int | None = None) -> tuple[nn.Module, nn.Module, Tensor]:
    """A convolution before a 1×1 one, linear layers that compute the same, and images of a size that leaves a rest."""
    torch.manual_seed(len(kernel) + sum(kernel))
    kind: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)]
    first, second = kind(4, 8, kernel, stride=stride or kernel), kind(8, 12, 1)
    linears = [nn.Linear(to_rows(c.weight, "patches").shape[1], c.out_channels) for c in (first, second)]
    for linear, c in zip(linears, (first, second), strict=True):
        linear.weight.data.copy_(c.weight.detach().movedim(1, -1).flatten(1))
        linear.bias.data.copy_(c.bias.detach())
    cut = Patches(*kernel, stride=stride)
    twin = nn.Sequential(cut, linears[0], nn.Tanh(), linears[1], Last())
    images = torch.randn(7, 4, *(2 * k + 1 for k in kernel)) * torch.rand(4).view(-1, *[1] * len(kernel))
    return nn.Sequential(nn.Identity(), first, nn.Tanh(), second, nn.Identity()), twin, images


kinds = pytest.mark.parametrize(
    "make",
    [
        lambda: pair((1, 1)),
        lambda: pair((1, 1), stride=2),
        lambda: pair((4,)),
        lambda: pair((2, 2)),
        lambda: pair((4, 2)),
        lambda: pair((1, 2, 3)),
    ],
    ids=["1x1", "1x1 stride 2", "4", "2x2", "4x2", "1x2x3"],
)
Make = Callable[[], tuple[nn.Module, nn.Module, Tensor]]


@kinds
def test_patches_are_what_is_multiplied(make: Make) -> None:
    model, twin, images = make()
    convolution = model[1]
    found = patches(images.double(), convolution.kernel_size, convolution.stride)
    assert torch.equal(found, twin[0](images.double()))
    if len(convolution.kernel_size) == 2:
        columns = F.unfold(images.double(), convolution.kernel_size, stride=convolution.stride)  # channel by channel
        columns = columns.unflatten(1, (4, -1)).transpose(1, 2).flatten(1, 2).transpose(1, 2)
        assert torch.equal(found.flatten(1, -2), columns)
    one = patches(images[0], convolution.kernel_size, convolution.stride)  # without a batch
    assert torch.equal(one[0], found[0].float())


@kinds
@pytest.mark.parametrize("method", METHODS)
def test_masks_and_weights_are_those_of_linear_layers(make: Make, method: str) -> None:
    model, twin, images = make()
    torch.testing.assert_close(model(images), twin(images))
    how: dict[str, Any] = {"calibration": [images[:4], images[4:]], "update_weights": method == "sparsegpt"}
    masks, wanted = prune(model, method, convolutions=True, **how), prune(twin, method, **how)
    assert list(masks) == ["1", "3"]
    assert all(torch.equal(masks[name], wanted[name]) for name in masks)
    torch.testing.assert_close(model(images), twin(images))
    for name in masks:
        torch.testing.assert_close(find_matrix(model, name).rows, find_matrix(twin, name).rows)
        assert find_matrix(model, name).weight.is_contiguous()


@kinds
@pytest.mark.parametrize("target", ["symmetric", "asymmetric"])
def test_least_squares_is_that_of_float64(make: Make, target: Any) -> None:
    """Row by row (H + λ)_SS w_S = (G W + λ W)_S, both sums over patches."""
    model, twin, images = make()
    dense = copy.deepcopy(twin).double()
    masks = prune(model, "magnitude", convolutions=True)
    update_weights_(model, calibration=[images], target=target, damping=0.05)
    now, before = images.double(), images.double()
    for place in (1, 3):
        cut = (lambda x: dense[0](x)) if place == 1 else (lambda x: x.movedim(1, -1))
        x, reference = cut(now).flatten(0, -2), cut(before).flatten(0, -2)
        h = 2 / len(x) * x.T @ x
        g = 2 / len(x) * x.T @ (reference if target == "asymmetric" else x)
        ridge, weight = 0.05 * h.diagonal().mean(), dense[place].weight.detach()
        right = weight @ g.T + ridge * weight
        h = h + ridge * torch.eye(len(h))
        expected = torch.zeros_like(weight)
        for row, mask in enumerate(masks[str(place)]):
            expected[row, mask] = torch.linalg.solve(h[mask][:, mask], right[row, mask])
        found = find_matrix(model, str(place)).rows.detach().double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        now = torch.tanh((cut(now) @ found.T + dense[place].bias).movedim(-1, 1)).detach()
        before = torch.tanh((cut(before) @ weight.T + dense[place].bias).movedim(-1, 1)).detach()


@kinds
@pytest.mark.parametrize("gate", ["candidates", "positions"])
def test_their_masks_are_learned_as_those_of_linear_layers(make: Make, gate: str) -> None:
    model, twin, images = make()
    for one in (model, twin):
        make_learnable(one, None, pattern="2:4", gate=gate, convolutions=True).train()
        for mask in learnable_masks(one).values():
            mask.tau, mask.scaling = 1.0, 1.0
        one(images).square().sum().backward()
    torch.testing.assert_close(model(images), twin(images))
    wanted = learnable_masks(twin)
    for name, mask in learnable_masks(model).items():
        torch.testing.assert_close(mask.logits.grad, wanted[name].logits.grad, rtol=1e-4, atol=1e-4)
        assert mask.logits.grad.ne(0).any(0).float().mean() > 0.9
    assert all(torch.equal(mask, current_masks(twin)[name]) for name, mask in current_masks(model).items())
    for one in (model, twin):
        one.eval()
    torch.testing.assert_close(model(images), twin(images))
    assert model(images).stride() == fold_(copy.deepcopy(model))(images).stride()


@kinds
def test_files_hold_them(make: Make, tmp_path: Path) -> None:
    model, _, images = make()
    dense = copy.deepcopy(model)
    masks = prune(model, "magnitude", convolutions=True)
    outputs = model(images)
    save_masks(tmp_path / "masks.safetensors", MaskCheckpoint(P24, masks, "base", "magnitude", {}, {}))
    found = load_masks(tmp_path / "masks.safetensors").masks
    assert torch.equal(maskllm4v.apply_masks_(copy.deepcopy(dense), found, "2:4")(images), outputs)
    path = tmp_path / "packed.safetensors"
    maskllm4v.save_packed(fold_(model), masks, path)
    assert torch.equal(maskllm4v.load_packed(dense, path)(images), model(images))
    torch.testing.assert_close(model(images), outputs, rtol=0, atol=1e-6)
    checks = verify_file(path)
    assert passes(checks)
    assert [check.layer for check in checks if check.verdict == "holds"] == ["1", "3"]


@kinds
def test_errors_of_outputs_are_those_of_linear_layers(make: Make) -> None:
    model, twin, images = make()
    with torch.no_grad():
        masks = {name: P24.topn_mask(find_matrix(twin, name).weight.abs()) for name in ("1", "3")}
        part = Calibration([images])
        found, wanted = (
            layer_diagnostics(one, MaskCheckpoint(P24, masks, "", "", {}, {}), [part]) for one in (model, twin)
        )
    assert [row[:3] for row in found] == [row[:3] for row in wanted]
    assert [float(row[3]) for row in found] == pytest.approx([float(row[3]) for row in wanted], rel=1e-5)


def test_a_weight_that_is_read_in_another_order_is_never_reached() -> None:
    """Patches that a model cuts itself come channel by channel; statistics would be those of other inputs."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Conv2d(4, 8, 2, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.unfold(x, 2, stride=2).transpose(1, 2), self.proj.weight.flatten(1))

    with pytest.raises(maskllm4v.UserError, match="proj"):
        prune(Own(), "wanda", calibration=[torch.randn(3, 4, 4, 4)], convolutions=True)


def test_the_flag_of_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    model = MODEL[:6]
    said = well("prune", *MODEL, *DENSE, "--convolutions", "--save-model", "m.safetensors").err
    assert "dense, excluded: 'head'" in said
    assert "convolution" not in said
    assert "patch_embed.proj" in load_masks(tmp_path / "m.safetensors").masks
    well("verify", "m.safetensors", *model)
    well("export", "--checkpoint", "m.safetensors", *model, "--format", "packed", "-o", "packed.safetensors")
    assert "patch_embed.proj" in well("verify", "packed.safetensors").out
