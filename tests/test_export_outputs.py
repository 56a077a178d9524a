"""Exports with several named outputs: models of any return value, and transformers' segmenters and detectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deployed
import pytest
import torch
from torch import Tensor, nn

import maskllm4v
import maskllm4v.export.onnx as exporter
from maskllm4v import dense_weight
from maskllm4v.export.folding import check_folded
from maskllm4v.export.onnx import about_graph, export_onnx, graph_weights
from maskllm4v.export.tracing import make_constant_
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.tasks.base import ExportableModel
from maskllm4v.tasks.detection import settings as detection
from maskllm4v.tasks.segmentation import settings as segmentation
from maskllm4v.tasks.shared.named_outputs import NamedOutputs
from maskllm4v.utils.errors import CheckpointError, ConfigError, PatternError

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
P24 = NMPattern("2:4")
X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


class Two(nn.Module):
    """Boxes and logits; ``give`` says in which form."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.give, self.classes, self.sides = give, nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.give(self.classes(x), self.sides(x).sigmoid())


def two(give: Callable[[Tensor, Tensor], Any]) -> Two:
    model = deployed.seeded(lambda: Two(give))
    assert isinstance(model, Two)
    return model


def run(path: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """All outputs by name, in the graph's order."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return dict(zip(names, map(torch.from_numpy, found), strict=True))


def test_the_form_of_outputs_leaves_no_trace(tmp_path: Path) -> None:
    """A tensor or a dict of one; a tuple, or a dict in another order: the same bytes."""
    forms: dict[tuple[str, ...], list[Callable[[Tensor, Tensor], Any]]] = {
        ("logits",): [lambda c, b: c + b, lambda c, b: {"logits": c + b}],
        ("logits", "boxes"): [lambda c, b: (c, b), lambda c, b: {"boxes": b, "logits": c}],
    }
    for outputs, gives in forms.items():
        made = set[bytes]()
        for give in gives:
            export_onnx(tmp_path / "m.onnx", ExportableModel(two(give), {"x": X}, outputs))
            made.add((tmp_path / "m.onnx").read_bytes())
            assert tuple(run(tmp_path / "m.onnx", {"x": X})) == outputs
        assert len(made) == 1
    model, found = two(lambda c, b: (c, b)), run(tmp_path / "m.onnx", {"x": X[:1]})
    torch.testing.assert_close(found["logits"], model.classes(X[:1]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["boxes"], model.sides(X[:1]).sigmoid(), rtol=1e-5, atol=1e-6)


def test_outputs_that_are_not_there_are_named(tmp_path: Path) -> None:
    both = {"logits": X, "boxes": X}
    for given, outputs, said in [
        (both, ("logits",), "Two gives logits, boxes; its outputs are logits"),
        (both, ("logits", "masks"), "Two gives logits, boxes; its outputs are logits, masks"),
        ((X, X), ("logits",), "Two gives 2 tensors; its outputs are logits"),
        (X, ("logits", "boxes"), "Two gives 1 tensors; its outputs are logits, boxes"),
    ]:
        exportable = ExportableModel(two(lambda c, b: c), {"x": X}, outputs)
        with pytest.raises(ConfigError, match=f"^{said}$"):
            exportable.named(given)
    export = ExportableModel(two(lambda c, b: (c, b)), {"x": X}, ("logits",))
    with pytest.raises(ConfigError, match="Two gives 2 tensors; its outputs are logits"):
        export_onnx(tmp_path / "m.onnx", export)


def test_the_output_that_differs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = exporter._export

    def wrong(*arguments: Any) -> Any:
        from onnx import numpy_helper

        model = export(*arguments)
        (bias,) = [tensor for tensor in model.graph.initializer if tensor.name == "module.sides.bias"]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 0.01, bias.name))
        return model

    monkeypatch.setattr(exporter, "_export", wrong)
    exportable = ExportableModel(two(lambda c, b: {"logits": c, "boxes": b}), {"x": X}, ("logits", "boxes"))
    with pytest.raises(CheckpointError, match=r"of the largest of torch's in 'boxes'; rounding explains 1e-05"):
        export_onnx(tmp_path / "m.onnx", exportable)
    assert not list(tmp_path.iterdir())


def test_folding_names_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """One head reads its weight past the mask, the other does not."""
    exportable = ExportableModel(two(lambda c, b: (c, b)), {"x": X}, ("logits", "boxes"))
    maskllm4v.prune(exportable.module, "magnitude")
    batch = tuple(exportable.inputs.values())

    def forward(module: nn.Module, batch: Any) -> Any:
        return exportable.named(module(*batch))

    check_folded(exportable.module, batch, forward=forward)

    def past(self: nn.Linear, x: Tensor) -> Tensor:
        weight = self.weight
        if self is exportable.module.sides:
            weight = dense_weight(self)
        return nn.functional.linear(x, weight, self.bias)

    monkeypatch.setattr(type(exportable.module.sides), "forward", past)
    with pytest.raises(PatternError, match=r"^layer 'sides': .*; outputs\['boxes'\] of the model is off by"):
        check_folded(exportable.module, batch, forward=forward)


def tiny(name: str, folder: Path) -> ExportableModel:
    """A model of transformers and two grey images."""
    transformers = pytest.importorskip("transformers")
    import tiny_detectors
    import tiny_segmenters

    detector = name.endswith("ObjectDetection")
    (tiny_detectors if detector else tiny_segmenters).save(name, folder, **SMALLER.get(name, {}))
    model = getattr(transformers, name).from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # as large as after training: without signals all tokens have the same score
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter, generator=generator)
    queries = ("class_queries_logits", "masks_queries_logits")
    outputs = ("logits", "pred_boxes") if detector else queries if "Universal" in name else ("logits",)
    images = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    return ExportableModel(NamedOutputs(model, outputs), {"images": images}, outputs)


FAMILIES = (
    "SegformerForSemanticSegmentation",  # logits alone
    "EomtForUniversalSegmentation",  # a tensor decides which operations run
    "RTDetrV2ForObjectDetection",  # boxes; queries of tokens that are chosen; a tensor's length; checks of shapes
)


SMALLER = {  # tracing is most of the time
    "RTDetrV2ForObjectDetection": {
        "num_queries": 6,
        "num_feature_levels": 2,
        "decoder_n_levels": 2,
        "encoder_in_channels": [16, 32],
        "decoder_in_channels": [16, 16],
        "feat_strides": [8, 16],
        "encode_proj_layers": [1],
        "backbone_config": {
            "model_type": "rt_detr_resnet",
            "num_channels": 1,
            "embedding_size": 8,
            "hidden_sizes": [8, 16, 32],
            "depths": [1, 1, 1],
            "out_features": ["stage2", "stage3"],
        },
    },
}


@pytest.mark.filterwarnings("ignore:masks cover only")  # the rest are convolutions
@pytest.mark.parametrize("name", FAMILIES)
def test_models_of_transformers(name: str, tmp_path: Path) -> None:
    exportable = tiny(name, tmp_path / "folder")
    model: Any = exportable.module.model  # type: ignore[union-attr]
    masks = maskllm4v.prune(model, "magnitude", exclude=(detection.TRANSFORMERS | segmentation.TRANSFORMERS)[name])
    maskllm4v.fold_(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    export_onnx(tmp_path / "m.onnx", exportable, masks=masks, pattern=P24)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    images = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    found = run(tmp_path / "m.onnx", {"images": images})
    with torch.no_grad():
        wanted = model(pixel_values=images)
    assert tuple(found) == exportable.outputs
    for output, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[output], rtol=1e-4, atol=1e-4)
    assert about_graph(tmp_path / "m.onnx")["weights"].keys() == masks.keys()
    sparse = {weight.layer: weight.weight for weight in graph_weights(tmp_path / "m.onnx") if weight.layer}
    assert sparse.keys() == masks.keys()
    assert all(bool((sparse[layer][~mask] == 0).all()) for layer, mask in masks.items())


def test_masks_of_eomt_that_are_drawn_are_refused(tmp_path: Path) -> None:
    exportable = tiny("EomtForUniversalSegmentation", tmp_path / "folder")
    exportable.module.model.attn_mask_probs.copy_(torch.tensor([1.0, 0.5]))  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"attn_mask_probs is \[1\.0, 0\.5\]: .* masks at random"):
        export_onnx(tmp_path / "m.onnx", exportable)
    plain = nn.Linear(2, 2)
    make_constant_(plain)
    assert set(plain.state_dict()) == {"weight", "bias"}
