"""Folded models to export, and ONNX graphs read and run without our code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from import_graph import ROOT
from timm.models import VisionTransformer
from torch import Tensor, nn

import maskllm4v
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.tasks.base import ExportableModel

Case = tuple[ExportableModel, dict[str, Tensor]]


class Toy(nn.Module):
    """Linear layers on three dimensions and on two, with and without a bias; ``last`` shares the weight of ``tied``."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.free = nn.Linear(8, 16), nn.Linear(16, 24, bias=False)
        self.pooled, self.tied = nn.Linear(24, 16), nn.Linear(16, 16, bias=False)
        self.last, self.alone = nn.Linear(16, 16), nn.Linear(16, 5, bias=False)
        self.last.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.pooled(self.free(self.tokens(x).relu()).mean(1))
        return self.alone(self.last(x) + self.tied(x.relu()))


def toy(pattern: str = "2:4") -> Case:
    model = seeded(Toy)
    return ExportableModel(model, {"tokens": draw(4, 3, 8)}, ("scores",)), fold(model, pattern)


def digits() -> Case:
    """The model of the README's table, with random weights."""
    args = yaml.safe_load((ROOT / "experiments" / "digits.yaml").read_text())["model"]["args"]
    model = seeded(lambda: VisionTransformer(**args))
    return classifier(model, 1, 8)


def vit_tiny() -> Case:
    return classifier(seeded(lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10)), 3, 224)


def dit() -> Case:
    pytest.importorskip("diffusers")
    from small_diffusion import dit as build

    from maskllm4v.tasks.diffusion.task import Denoiser

    model = build()
    masks = fold(model, exclude=["pos_embed", "proj_out_*"])
    inputs = {"sample": draw(3, 1, 8, 8), "timestep": torch.tensor([999, 0, 417]), "class_labels": torch.arange(8, 11)}
    return ExportableModel(Denoiser(model), inputs, ("noise_pred",)), masks


CASES = {"digits": digits, "vit_tiny": vit_tiny, "dit": dit}


def classifier(model: nn.Module, channels: int, size: int) -> Case:
    """With a head whose logits differ."""
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return ExportableModel(model, {"images": draw(2, channels, size, size)}, ("logits",)), fold(model, exclude=["head"])


def fold(model: nn.Module, pattern: str = "2:4", exclude: list[str] | None = None) -> dict[str, Tensor]:
    masks = maskllm4v.prune(model, "magnitude", pattern=pattern, exclude=exclude or [])
    maskllm4v.fold_(model)
    if isinstance(model, Toy):
        model.last.weight, masks["last"] = model.tied.weight, masks["tied"]
    return masks


def seeded(build: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()  # type: ignore[operator]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def enlarged(exportable: ExportableModel, count: int) -> dict[str, Tensor]:
    """So many samples, other ones than the example where they are not integers."""
    inputs = {name: x.repeat(count, *[1] * (x.ndim - 1))[:count] for name, x in exportable.inputs.items()}
    return {name: x + draw(*x.shape) if x.is_floating_point() else x for name, x in inputs.items()}


def run(path: Path, inputs: dict[str, Tensor]) -> Tensor:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return torch.from_numpy(found)


@torch.no_grad()
def in_torch(exportable: ExportableModel, inputs: dict[str, Tensor]) -> Tensor:
    outputs: Tensor = exportable.module(*inputs.values())
    return outputs


def sparse_matrices(path: Path, pattern: str) -> dict[str, bool]:
    """Whether each initializer that a MatMul or Gemm multiplies by has at most N of M non-zero values along K."""
    import onnx

    n, m = NMPattern(pattern).n, NMPattern(pattern).m
    model = onnx.load(path)
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in arrays:
            array = arrays[node.input[1]]
            if any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
                array = array.T
            width = len(array) - len(array) % m
            groups = np.abs(array[:width].T.reshape(-1, m)).astype(bool).sum(1)
            found[node.input[1]] = bool(len(array) == width and (groups <= n).all())
    return found
