"""Every kind of matrix that can be pruned comes through files, and through the original's first lines."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deployed
import pytest
import torch
from test_matrices import Conv1D, Experts
from torch import Tensor, nn

import maskllm4v
from maskllm4v import LearnableMaskedLinear, NMPattern, fold_, load_packed, prune, replace_linear_with_, save_packed
from maskllm4v.export.graph import graph_weights
from maskllm4v.export.onnx import export_onnx
from maskllm4v.export.verify import passes, verify_file
from maskllm4v.sparsity.parameters import find_matrix, learnable_masks, masked_parameters
from maskllm4v.tasks.base import ExportableModel
from maskllm4v.utils.errors import CheckpointError

P24 = NMPattern("2:4")


class Attention(nn.Module):
    """``own``: all of one sequence; ``other``: key and value of another; ``apart``: each of its own."""

    def __init__(self, how: str) -> None:
        super().__init__()
        sizes = {"kdim": 8, "vdim": 12} if how == "widths" else {}
        self.attention, self.how = nn.MultiheadAttention(16, 2, batch_first=True, **sizes), how

    def forward(self, x: Tensor) -> Tensor:
        memory = torch.tanh(x[:, :3])
        key, value = {"own": (x, x), "other": (memory, memory), "apart": (memory, 2 * memory)}.get(
            self.how, (x[..., :8], x[..., :12])
        )
        found: Tensor = self.attention(x, key, value, need_weights=False)[0]
        return found


class Stack(nn.Module):
    """All experts see all tokens, in one product."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = 3, transposed
        self.up_proj = nn.Parameter(torch.randn(3, 16, 24) if transposed else torch.randn(3, 24, 16))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.up_proj if self.is_transposed else self.up_proj.transpose(1, 2)
        return (x[:, None] @ weight).sum(1)


class Used(Experts):
    """All of its experts get tokens."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i in range(3):
            up, down = self.up_proj[i], self.down_proj[i]
            y = y + (torch.tanh(x @ up) @ down if self.is_transposed else torch.tanh(x @ up.t()) @ down.t())
        return y


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(24, 16), nn.Linear(16, 16), nn.Linear(16, 24)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.body(self.embedding(tokens))))
        return found


class Together(nn.Module):
    """Most kinds in one model: a graph takes seconds to write."""

    def __init__(self) -> None:
        super().__init__()
        parts = {kind: KINDS[kind][0]() for kind in TOGETHER}
        self.parts, self.down = nn.ModuleDict(parts), Conv1D(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts.values():
            found = part(x)
            x = x + torch.tanh(self.down(found) if found.shape[-1] == 24 else found)
        return x


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 16, 2, stride=2), nn.Tanh(), nn.Conv2d(16, 8, 1), nn.Flatten(2), nn.Conv1d(8, 4, 1)
    )


X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(10).reshape(2, 5)
KINDS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "encoder": (encoder, X),
    "attention": (lambda: Attention("own"), X),
    "attention to another sequence": (lambda: Attention("other"), X),
    "attention to two others": (lambda: Attention("apart"), X),
    "attention of other widths": (lambda: Attention("widths"), X),
    "Conv1D": (lambda: nn.Sequential(Conv1D(24, 16), nn.Tanh(), Conv1D(16, 24)), X),
    "stack": (lambda: Stack(False), X),
    "stack, transposed": (lambda: Stack(True), X),
    "experts": (lambda: Used(transposed=False), X),
    "experts, transposed": (lambda: Used(transposed=True), X),
    "convolutions": (convolutions, IMAGES),
    "tied": (Tied, TOKENS),
}
TOGETHER = list(KINDS)[:1] + list(KINDS)[2:-2]
GRAPHS = {  # model, inputs, and how often a node multiplies by a masked matrix
    "most": (Together, X, 4 + 3 + 4 + 4 + 2 + 1 + 1 + 6 + 6 + 2),
    "convolutions": (convolutions, IMAGES, 3),
    "tied": (Tied, TOKENS, 2),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    return KINDS[kind][0]().eval(), KINDS[kind][1]


def pruned(model: nn.Module, kind: str) -> dict[str, Tensor]:
    return prune(model, "magnitude", convolutions=True, tied=kind == "tied")


pytestmark = pytest.mark.filterwarnings("ignore:.*tied to an embedding")


@pytest.mark.parametrize("kind", GRAPHS)
def test_graphs_compute_the_same_and_hold_the_masked_weights(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    build, inputs, products = GRAPHS[kind]
    masks = pruned(model := build().eval(), kind)
    outputs = model(inputs)
    exportable = ExportableModel(fold_(model), {"x": inputs}, ("y",))
    path = tmp_path / "m.onnx"
    export_onnx(path, exportable, masks=masks, pattern=P24)
    found = deployed.run(path, {"x": inputs})
    torch.testing.assert_close(found, outputs, rtol=1e-4, atol=1e-5)
    weights = [weight for weight in graph_weights(path) if weight.layer is not None]
    assert len(weights) == products
    for weight in weights:
        layer = weight.layer if weight.layer in masks else str(weight.layer).rpartition(".")[0]
        rows = find_matrix(model, layer).rows
        wanted = rows if layer == weight.layer else rows[int(str(weight.layer).rpartition(".")[2])]
        assert torch.equal(weight.weight, wanted.flatten(0, -2)), weight.layer
        assert layer in weight.name
    checks = verify_file(path)
    assert passes(checks)
    assert {check.layer for check in checks if check.required} == {weight.layer for weight in weights}


def test_a_graph_without_an_expert_is_refused(tmp_path: Path) -> None:
    """No token comes to the last one, so that no graph of the example has it."""
    pytest.importorskip("onnxscript")
    model = nn.Sequential(Experts(transposed=False))
    masks = prune(model, "magnitude")
    exportable = ExportableModel(fold_(model), {"x": X}, ("y",))
    with pytest.raises(CheckpointError, match=r"layer '0\.up_proj': no node of the graph multiplies by expert 2"):
        export_onnx(tmp_path / "m.onnx", exportable, masks=masks, pattern=P24)
    assert not list(tmp_path.iterdir())


@every_kind
def test_packed_files_load_with_the_same_outputs(kind: str, tmp_path: Path) -> None:
    model, inputs = made(kind)
    masks = pruned(model, kind)
    outputs = model(inputs)
    save_packed(fold_(model), masks, tmp_path / "packed.safetensors")
    again = load_packed(made(kind)[0], tmp_path / "packed.safetensors")
    assert torch.equal(again(inputs), model(inputs))
    torch.testing.assert_close(again(inputs), outputs, rtol=0, atol=1e-6)
    checks = verify_file(tmp_path / "packed.safetensors")
    assert passes(checks)
    assert {check.layer for check in checks if check.required} == set(masks)


def test_a_packed_file_of_two_layers_with_one_weight(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        model[2].weight = model[0].weight
        return model

    model, x = build(), torch.randn(3, 16)
    masks = prune(model, "magnitude")
    outputs = model(x)
    save_packed(fold_(model), masks, tmp_path / "packed.safetensors")
    again = load_packed(build(), tmp_path / "packed.safetensors")
    assert again[0].weight is again[2].weight
    assert torch.equal(again(x), outputs)


@every_kind
def test_the_originals_first_lines(kind: str) -> None:
    model, inputs = made(kind)
    how: dict[str, Any] = {"convolutions": True, "tied": kind == "tied"}
    names = list(prune(copy.deepcopy(model), "magnitude", **how))
    replace_linear_with_(model, LearnableMaskedLinear, N=2, M=4, hard=False, **how)
    assert list(learnable_masks(model)) == names
    assert list(masked_parameters(model)) == names
    for mask in learnable_masks(model).values():
        mask.tau, mask.scaling = 1.0, 1.0
    model.train()
    model(inputs).square().sum().backward()
    for name, mask in learnable_masks(model).items():
        assert mask.logits.grad.ne(0).any(0).float().mean() > 0.5, name
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.rpartition(".")[0] in names for name in trained)
    model.eval()
    with torch.no_grad():
        outputs = model(inputs)
        folded = fold_(copy.deepcopy(model))
        torch.testing.assert_close(folded(inputs), outputs, rtol=0, atol=1e-6)
    for name, mask in maskllm4v.current_masks(model).items():
        assert not find_matrix(folded, name).rows[~mask].any()
