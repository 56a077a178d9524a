"""Whether models and annotated images go together."""

from __future__ import annotations

import pytest

from maskllm4v.data.fitting import check_divisible, class_places
from maskllm4v.utils.errors import ConfigError

COCO91 = {0: "N/A", 1: "person", 2: "bicycle", 3: "N/A", 4: "cat"}  # as in DETR's files


def test_names_decide_where_the_model_has_them() -> None:
    assert class_places(["cat", "person"], 5, COCO91, data="own") == [4, 1]


def test_numbers_decide_where_it_has_none() -> None:
    assert class_places(["b", "a"], 2, data="own") == [0, 1]
    assert class_places(["b", "a"], 2, {0: "LABEL_0", 1: "LABEL_1"}, data="own") == [0, 1]
    for known in (None, {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}):
        with pytest.raises(ConfigError, match=r"model\.classes is 3, but own has 2 classes"):
            class_places(["b", "a"], 3, known, data="own")


def test_unknown_names_are_told_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"own has class names 'dog' and 'cow', .* own has not: 'N/A' and 'bicycle'"):
        class_places(["cat", "dog", "cow", "person"], 5, COCO91, data="own")
    with pytest.raises(ConfigError, match=r"several classes called 'N/A'"):
        class_places(["cat", "N/A"], 5, COCO91, data="own")


def test_sizes_that_patches_do_not_cover() -> None:
    check_divisible((512, 640), 16, "m")
    check_divisible((224, 252), (16, 14), "m")
    with pytest.raises(ConfigError, match=r"a width of 500 pixels is not .* of m, 16 pixels; near: 496 or 512"):
        check_divisible((512, 500), 16, "m")
    with pytest.raises(ConfigError, match=r"a height of 10 pixels .* near: 16$"):
        check_divisible((10, 16), 16, "m")
