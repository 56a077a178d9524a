"""Segmenters from folders of transformers: settings, what folders say, losses of pixels, and scores at full size."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_segmenters
import torch
import torch.nn.functional as F
from test_query_segmentation import annotated, part
from tiny_segmenters import CLASSES, CONFIGS
from torch import Tensor, nn

from maskllm4v.config.reading import parse_section
from maskllm4v.data.annotated import IGNORED, AnnotatedBatch
from maskllm4v.tasks.segmentation.families import PixelFamily, SamFamily, TokenFamily, family_of
from maskllm4v.tasks.segmentation.folders import check_names, input_settings
from maskllm4v.tasks.segmentation.full_size import logits_at, places
from maskllm4v.tasks.segmentation.queries import QueryFamily
from maskllm4v.tasks.segmentation.settings import SAM, TRANSFORMERS, SegmenterSettings
from maskllm4v.utils.errors import ConfigError

pytest.importorskip("transformers")

SEGFORMER, EOMT = "SegformerForSemanticSegmentation", "EomtForUniversalSegmentation"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folders")


def settings(name: str = SEGFORMER, folder: Path | str | None = "data/model", **changes: Any) -> SegmenterSettings:
    own = {"stride": 4} if name == SAM else {}
    raw = {"name": name, "folder": folder and str(folder), "classes": CLASSES, **own, **changes}
    return parse_section(SegmenterSettings, {key: value for key, value in raw.items() if value is not None})


def folder_with(where: Path, config: dict[str, Any], preprocessor: dict[str, Any] | None = None) -> Path:
    where.mkdir(exist_ok=True)
    (where / "config.json").write_text(json.dumps(config))
    if preprocessor is not None:
        (where / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return where


# Settings


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_heads_stay_dense_unless_settings_say_otherwise(name: str) -> None:
    found = settings(name)
    assert found.excluded_layers == TRANSFORMERS[name] != []
    assert "exclude" not in found.beyond_defaults()
    other = settings(name, exclude=["neck"])
    assert other.excluded_layers == ["neck"]
    assert other.beyond_defaults()["exclude"] == ["neck"]


@pytest.mark.parametrize("name", CONFIGS)
def test_each_class_has_its_family(name: str) -> None:
    kinds = {SAM: SamFamily} | {one: QueryFamily for one in CONFIGS if "Universal" in one}
    assert type(family_of(settings(name))) is kinds.get(name, PixelFamily)


def test_other_names_are_timms() -> None:
    found = parse_section(SegmenterSettings, {"name": "Eva", "classes": 3, "stride": 4})
    assert type(family_of(found)) is TokenFamily
    assert "folder" not in found.model_dump()
    assert "mode" not in found.model_dump()["input"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"name": "DetrForObjectDetection"},
            "model.name|name is 'DetrForObjectDetection'; allowed for task 'segmentation'",
        ),
        ({"folder": None}, "folder is needed for a class of transformers"),
        ({"name": "Eva", "stride": 4}, "folder is needed for a class of transformers and for no other model"),
        ({"name": "Eva", "folder": None}, "stride is needed for a timm model"),
        ({"stride": 4}, "stride is needed for a timm model and SamModel, and for no other model"),
        ({"name": SAM, "stride": None}, "stride is needed for a timm model and SamModel"),
        ({"args": {"depth": 2}}, "args is not for 'SegformerForSemanticSegmentation'"),
        ({"input": {"crop_pct": 0.9}}, "crop_pct and crop_mode are for classification"),
        ({"input": {"mode": "stretch"}}, "mode is 'stretch'"),
        ({"input": {"img_size": [64]}}, "img_size"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(**changes)


# Folders


def test_another_number_of_classes(folders: Path) -> None:
    folder = tiny_segmenters.save(EOMT, folders / "eomt")
    task = tiny_segmenters.task(EOMT, folder, folders / "data", classes=12)
    with pytest.raises(ConfigError, match=r"model.classes is 12, but .*config.json has 11 \(num_labels\)"):
        task.build_model(0, pretrained=True)
    with pytest.raises(ConfigError, match=r"model.classes is 12, but the masks of s have 11 classes"):
        task.source  # noqa: B018


def test_masked_attention_without_draws(folders: Path) -> None:
    folder = tiny_segmenters.save(EOMT, folders / "annealed", masked=[1.0, 0.5])
    with pytest.raises(ConfigError, match=r"attn_mask_probs is \[1.0, 0.5\]; allowed: 0 and 1"):
        tiny_segmenters.task(EOMT, folder, folders / "data").build_model(0, pretrained=True)


def test_auxiliary_heads_are_left_out(folders: Path) -> None:
    name = "UperNetForSemanticSegmentation"
    folder = tiny_segmenters.save(name, folders / "upernet")
    model = tiny_segmenters.task(name, folder, folders / "data").build_model(0, pretrained=True)
    assert not [key for key in model.state_dict() if key.startswith("auxiliary_head")]


def test_names_of_classes(tmp_path: Path) -> None:
    names = ["wall", "sky", "tree"]
    folder = folder_with(tmp_path / "m", {"model_type": "segformer", "id2label": dict(enumerate(names))})
    model = settings(folder=folder, classes=3)
    check_names(model, "own", names)
    check_names(model, "own", [" Wall", "SKY", "tree"])
    check_names(model, "own", ["0", "1", "2"])
    with pytest.raises(ConfigError, match=f"class 1 is 'sky' in {folder}, but 'tree' in the masks of own"):
        check_names(model, "own", ["wall", "tree", "sky"])
    unnamed = folder_with(tmp_path / "u", {"model_type": "segformer", "id2label": {i: f"LABEL_{i}" for i in range(3)}})
    check_names(settings(folder=unnamed, classes=3), "own", ["a", "b", "c"])


STATED = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1], "size": {"height": 40, "width": 60}, "resample": 3}
GREY = sum((0.485, 0.456, 0.406)) / 3


@pytest.mark.parametrize(
    ("preprocessor", "own", "expected"),
    [
        (STATED, {}, {"input_size": (3, 40, 60), "mean": (0.1, 0.2, 0.3), "interpolation": "bicubic"}),
        (STATED, {"img_size": 64, "mean": [0.5]}, {"input_size": (3, 64, 64), "mean": (0.5, 0.5, 0.5)}),
        (STATED, {"img_size": [32, 64], "mode": "letterbox"}, {"input_size": (3, 32, 64), "mode": "letterbox"}),
        (None, {"img_size": 32}, {"mean": (0.485, 0.456, 0.406), "interpolation": "bilinear", "mode": "squash"}),
    ],
)
def test_input_of_a_folder(
    preprocessor: dict[str, Any] | None, own: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    folder = folder_with(tmp_path / "m", {"model_type": "segformer"}, preprocessor)
    found = input_settings(settings(folder=folder, input=own))
    assert found.items() >= expected.items()
    assert found.keys() == {"input_size", "mean", "std", "interpolation", "mode"}


def test_input_of_grey_images(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "m", {"model_type": "segformer", "num_channels": 1})
    found = input_settings(settings(folder=folder, input={"img_size": 32}))
    assert (found["input_size"], found["mean"]) == ((1, 32, 32), (pytest.approx(GREY),))


@pytest.mark.parametrize(
    ("name", "config", "own", "said"),
    [
        (SEGFORMER, {"model_type": "segformer"}, {}, "model.input.img_size is needed"),
        (EOMT, {"model_type": "eomt", "image_size": 32, "patch_size": 8}, {"img_size": 64}, r"takes \[32, 32\] alone"),
        (
            "DPTForSemanticSegmentation",
            {"model_type": "dpt", "image_size": 32, "patch_size": 8},
            {"img_size": 60},
            r"\[60, 60\], which patches of \[8, 8\] pixels do not divide",
        ),
        (
            SEGFORMER,
            {"model_type": "segformer"},
            {"img_size": 32, "std": [1, 1]},
            "input.std has 2 values, but .* 3 channels",
        ),
        (SEGFORMER, {"model_type": "dpt"}, {}, "model_type is 'dpt'"),
    ],
)
def test_input_that_does_not_fit(
    name: str, config: dict[str, Any], own: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path / "m", config)
    with pytest.raises(ConfigError, match=said):
        input_settings(settings(name, folder, input=own))


def test_timms_tokens_are_of_squares() -> None:
    raw = {"name": "Eva", "classes": 3, "stride": 4, "input": {"img_size": [32, 64]}}
    with pytest.raises(ConfigError, match=r"img_size is \[32, 64\]; allowed for a timm model: a square"):
        input_settings(parse_section(SegmenterSettings, raw))


# Losses of pixels, and scores


def batch(size: int = 8) -> AnnotatedBatch:
    masks = torch.randint(0, 3, (2, size, size))
    masks[0, :2] = IGNORED
    return annotated(masks)


def test_losses_of_pixels_are_those_of_plain_loops() -> None:
    family, data = PixelFamily(), batch()
    logits, teacher = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)
    loss, distance = 0.0, 0.0
    for i, y, x in itertools.product(range(2), range(8), range(8)):
        if (target := int(data.masks[i, y, x])) != IGNORED:
            own, other = (one[i, :, y, x].double().softmax(0) for one in (logits, teacher))
            loss -= float(own[target].log())
            own, other = ((one[i, :, y, x].double() / 2).softmax(0) for one in (logits, teacher))
            distance += 4 * float((other * (other / own).log()).sum())
    assert float(family.loss(logits, data)) == pytest.approx(loss, rel=1e-5)
    assert float(family.distillation_loss(logits, teacher, 2.0, data)) == pytest.approx(distance, rel=1e-5)
    assert family.weight(data) == 2 * 64 - 16


def test_small_outputs_are_resized_to_the_masks() -> None:
    family, data, small = PixelFamily(), batch(), torch.randn(2, 3, 4, 4)
    large = F.interpolate(small, (8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(family.loss(small, data), family.loss(large, data))


class Painter(nn.Module):
    """Logits of the classes 0 to 2: how dark, middling or bright a pixel is; at half the resolution."""

    def forward(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(-(images - torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1)).abs(), 2)


def stored_in_other_sizes() -> AnnotatedBatch:
    """A wide and a high picture with padding, one of which was scaled by 2, the other by 1/2."""
    random = np.random.default_rng(0)
    images, truth = torch.zeros(2, 1, 8, 8), torch.full((2, 12, 16), IGNORED)
    images[0, 0, :4] = torch.from_numpy(random.integers(0, 3, (4, 8)))
    images[1, 0, :, :6] = torch.from_numpy(random.integers(0, 3, (8, 6)))
    truth[0, :8, :16] = torch.from_numpy(random.integers(0, 3, (8, 16)))
    truth[1, :4, :3] = torch.from_numpy(random.integers(0, 3, (4, 3)))
    masks = torch.zeros(2, 8, 8, dtype=torch.int64)
    valid, sizes = torch.tensor([[4, 8], [8, 6]]), torch.tensor([[8, 16], [4, 3]])
    return annotated(masks)._replace(images=images, truth=truth, valid=valid, sizes=sizes)


def test_what_is_found_has_the_pictures_own_size() -> None:
    data, family = stored_in_other_sizes(), TokenFamily()
    outputs = Painter()(data.images)
    for i, place in enumerate(places(data)):
        height, width = data.sizes[i].tolist()
        factor = height / data.valid[i, 0].item()
        large = F.interpolate(outputs[i : i + 1], scale_factor=2 * factor, mode="bilinear", align_corners=False)
        found = logits_at(place, family, outputs)
        torch.testing.assert_close(found, large[..., :height, :width])
        assert place.size == (height, width)
    by_name = {"class_queries_logits": torch.randn(2, 4, 6), "masks_queries_logits": torch.randn(2, 4, 4, 4)}
    for i, place in enumerate(places(data)):
        height, width = place.size
        expected = QueryFamily().logits(part(by_name, slice(i, i + 1)), place.padded)[..., :height, :width]
        assert torch.equal(logits_at(place, QueryFamily(), by_name), expected)


def test_pictures_of_the_models_size_are_taken_at_once() -> None:
    data = batch()
    assert [place.images for place in places(data)] == [slice(None)]
    assert len(list(places(stored_in_other_sizes()))) == 2


def test_evaluation_counts_the_pixels_of_pictures_as_they_are_stored(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_segmenters.save(SEGFORMER, folders / "segformer")
    task = tiny_segmenters.task(SEGFORMER, folder, folders / "data")
    data = stored_in_other_sizes()
    monkeypatch.setattr(task, "family", TokenFamily())
    monkeypatch.setattr(task, "_split", lambda split: iter([data]))
    counts = np.zeros((CLASSES, CLASSES), int)
    outputs = Painter()(data.images)
    for i, (height, width) in enumerate(data.sizes.tolist()):
        scale = 2 * height / data.valid[i, 0].item()
        large = F.interpolate(outputs[i : i + 1], scale_factor=scale, mode="bilinear", align_corners=False)
        found = large[0, :, :height, :width].argmax(0)
        for y, x in itertools.product(range(height), range(width)):
            counts[data.truth[i, y, x], found[y, x]] += 1
    assert counts.sum() == 8 * 16 + 4 * 3
    ious = [counts[k, k] / (counts[k].sum() + counts[:, k].sum() - counts[k, k]) for k in range(3)]
    metrics = task.evaluate(Painter(), Painter())
    assert metrics["miou"] == pytest.approx(100 * np.mean(ious))
    assert metrics["pixel_accuracy"] == pytest.approx(100 * counts.trace() / counts.sum())
    assert metrics["agreement"] == 100
