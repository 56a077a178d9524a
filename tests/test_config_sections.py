"""Keys of one section that depend on one another."""

from __future__ import annotations

from typing import Any

import pytest
from small_params import changed, fault, params

from maskllm4v.config import parse_experiment


@pytest.mark.parametrize(
    ("path", "value"), [("data.root", "/images"), ("data.source", "folder"), ("dense.init", "checkpoint")]
)
def test_source_and_its_path_go_together(path: str, value: str) -> None:
    section = path.split(".")[0]
    assert fault(changed(path, value)).startswith(f"params.yaml: {section}: ")


def test_checkpoint_without_its_init_is_refused() -> None:
    assert "checkpoint is needed for init 'checkpoint'" in fault(changed("dense.checkpoint", "a.safetensors"))


MASKS: dict[str, Any] = {"source": "masks", "root": "/images", "masks": {"train": "a", "test": "b"}}
COCO: dict[str, Any] = {"source": "coco", "root": "/images", "annotations": {"train": "a.json", "test": "b.json"}}


def data(**values: Any) -> dict[str, Any]:
    return {**params(), "data": {"name": "pets", **values}}


@pytest.mark.parametrize(
    "values",
    [
        {"source": "folder", "root": "/images"},
        {"source": "folder", "root": "/images", "in_memory": 32, "classes": 2},
        {"source": "timm", "dataset": "torch/cifar10"},
        {"source": "timm", "dataset": "hfds/org/name", "root": "/cache"},
        {"source": "timm", "dataset": "", "root": "/images", "in_memory": 32},
        {**MASKS, "classes": ["road", "sky"]},
        {**MASKS, "classes": "classes.txt", "zero_is_ignored": True, "suffix": "_ids.png", "image_suffix": "_left.png"},
        {**COCO, "classes": 80, "empty_boxes": "drop", "hash_files": True},
    ],
)
def test_sources_with_their_keys(values: dict[str, Any]) -> None:
    found = parse_experiment(data(**values)).data.model_dump()
    assert {key: found[key] for key in values} == values


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"source": "folder"}, "root is needed for source 'folder'"),
        ({"source": "digits", "root": "/images"}, "root is not for source 'digits'"),
        ({"source": "digits", "in_memory": 8}, "in_memory is not for source 'digits'"),
        ({"source": "timm"}, "dataset is needed for source 'timm' and for no other; found source 'timm'"),
        ({"source": "folder", "root": "/images", "dataset": ""}, "for no other; found source 'folder'"),
        ({"source": "digits", "dataset": "torch/mnist"}, "for no other; found source 'digits'"),
        ({**MASKS, "root": None, "classes": ["a"]}, "root is needed for source 'masks'"),
        (MASKS, "classes is needed for source 'masks': a list of names, or a file"),
        ({**MASKS, "classes": 3}, "classes is needed for source 'masks'"),
        ({**MASKS, "classes": ["a"], "in_memory": 32}, "in_memory is not for source 'masks'"),
        ({**MASKS, "classes": ["a"], "masks": None}, "masks is needed for source 'masks' and for no other"),
        ({**MASKS, "classes": ["a"], "empty_boxes": "drop"}, "empty_boxes is for source 'coco' only"),
        ({**MASKS, "source": "folder"}, "masks is needed for source 'masks' and for no other; found source 'folder'"),
        ({**COCO, "root": None}, "root is needed for source 'coco'"),
        ({**COCO, "classes": ["a", "b"]}, "classes is ['a', 'b']; allowed for source 'coco': how many there are"),
        ({**COCO, "annotations": None}, "annotations is needed for source 'coco' and for no other"),
        ({**COCO, "annotations": {"train": "a", "test": "a"}}, "annotations.train and annotations.test are both 'a'"),
        ({**COCO, "zero_is_ignored": True}, "zero_is_ignored is for source 'masks' only; found source 'coco'"),
        ({"source": "digits", "ignored": 0}, "ignored is for source 'masks' only; found source 'digits'"),
        ({"source": "timm", "dataset": "hfds/org/name", "classes": "a.txt"}, "allowed for source 'timm': how many"),
    ],
)
def test_keys_of_another_source_are_refused(values: dict[str, Any], expected: str) -> None:
    message = fault(data(**values))
    assert message.startswith("params.yaml: data: ")
    assert expected in message
    assert "\n" not in message


@pytest.mark.parametrize(("channels", "strides"), [([4, 8], [2]), ([4], [2, 1])])
def test_stem_has_a_stride_for_each_convolution(channels: list[int], strides: list[int]) -> None:
    message = fault(changed("model.stem", {"channels": channels, "strides": strides}))
    assert message == f"params.yaml: model.stem: {len(channels)} channels, but {len(strides)} strides"


@pytest.mark.parametrize("section", ["model.stem", "dense.progressive"])
def test_optional_sections_may_be_left_out(section: str) -> None:
    assert parse_experiment(changed(section, None))


def test_unknown_key_of_an_optional_section_is_named() -> None:
    message = fault(changed("model.stem", {"channels": [4], "stride": [2]}))
    assert "unknown key 'model.stem.stride'; did you mean 'strides'? allowed: channels, strides" in message
    assert "key 'model.stem.strides' is missing" in message


@pytest.mark.parametrize("key", ["crop_scale", "crop_ratio"])
def test_ranges_of_crops_are_pairs(key: str) -> None:
    assert getattr(parse_experiment(changed(f"task.{key}", [0.5, 1])).task, key) == (0.5, 1.0)
    assert fault(changed(f"task.{key}", [0.5])) == f"params.yaml: key 'task.{key}.1' is missing"
    assert fault(changed(f"task.{key}", [0.5, 0])).startswith(f"params.yaml: task.{key}.1 is 0; ")


@pytest.mark.parametrize("value", [0, -1, True, 1.5, [], ["a", 3], [""], " ", {}])
def test_classes_are_a_number_names_or_a_file(value: Any) -> None:
    message = fault(data(source="folder", root="/images", classes=value))
    allowed = "a number, a list of names, or a file with one name per line"
    assert message == f"params.yaml: data.classes is {value!r}; allowed: {allowed}"
