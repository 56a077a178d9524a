"""Shrinking what cannot be read, and what is refused: damaged images, links, other people's files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import run, well
from PIL import Image
from small_copies import SIZE, content, draw, images, recipe

from maskllm4v.data.shrink import RECORD, shrink
from maskllm4v.utils.errors import ConfigError, DataError, UserError
from maskllm4v.utils.io import read_json


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drawn") / "pets")


@pytest.fixture
def source(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "pets"))


# Files that cannot be read


def test_damaged_files_are_listed_at_the_end_and_the_rest_is_done(source: Path) -> None:
    damaged = {
        "train/cat/b.png": lambda data: data[: len(data) // 2],
        "train/dog/tall.jpg": lambda data: b"this is text",
        "val/cat/small.jpg": lambda data: data[: len(data) // 2],  # small ones are read, too
        "val/dog/z.jpg": lambda data: b"",
    }
    for name, damage in damaged.items():
        (source / name).write_bytes(damage((source / name).read_bytes()))
    deep = Image.fromarray(np.full((100, 100), 1000, dtype=np.uint16))
    deep.save(source / "val" / "dog" / "sixteen.png")
    (source / "val" / "dog" / "missing.jpg").symlink_to("nowhere.jpg")
    flags = ("--data-dir", str(source), "--output", str(source.parent / "small"), "--size", "64", "-j", "2")
    done = run("shrink", *flags)
    assert done.code == 1
    assert "13 images made smaller, 2 copied, 0 there already" in done.out
    said = done.err.splitlines()
    assert said[0] == "shrink: 6 images cannot be read and are left out:"
    expected = [*sorted(damaged)[:3], "val/dog/missing.jpg", "val/dog/sixteen.png", "val/dog/z.jpg"]
    assert [line.split(" ")[0] for line in said[1:]] == [str(source / name) for name in expected]
    assert "has more than 8 bits a channel" in done.err
    assert "missing.jpg cannot be read: No such file" in done.err
    assert images(source.parent / "small").keys() == images(source).keys() - set(expected)
    for name in expected:  # mended
        (source / name).unlink()
        shutil.copy(source / "train/cat/a.JPEG", source / name)
    done = well("shrink", *flags)
    assert "6 images made smaller, 0 copied, 15 there already" in done.out


def test_errors_of_writing_end_the_run(source: Path) -> None:
    shrink(recipe(source))
    target = source.parent / "small" / "train" / "cat" / "b.png"
    target.unlink()
    target.mkdir()
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"cannot write .*b\.png"):
            shrink(recipe(source), workers)


# What is refused


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 63}, "size is 63; allowed: 64 pixels or more"),
        ({"quality": 0}, "quality is 0; allowed: 1 to 100"),
        ({"splits": ("test",)}, r"pets has no split 'test'; allowed: train, val"),
        ({"link": True}, "`link` is for the splits that are not shrunk"),
        ({"output": "pets"}, "lie one inside the other"),
        ({"output": "pets/small"}, "lie one inside the other"),
        ({"output": "pets/train/cat/small"}, "lie one inside the other"),
        ({"output": "."}, "lie one inside the other"),
        ({"output": "full"}, r"full is not empty and has no shrunk\.json"),
    ],
)
def test_mistakes(source: Path, values: dict[str, Any], message: str) -> None:
    (source.parent / "full").mkdir()
    (source.parent / "full" / "thesis.txt").write_text("mine")
    before = content(source.parent)
    with pytest.raises(ConfigError, match=message):
        shrink(recipe(source, **values))
    assert content(source.parent) == before


def test_no_workers(source: Path) -> None:
    with pytest.raises(ConfigError, match="workers is 0; allowed: 1 or more"):
        shrink(recipe(source), 0)


def test_output_inside_a_linked_split(source: Path) -> None:
    shutil.move(source / "val", source.parent / "elsewhere")
    (source / "val").symlink_to(source.parent / "elsewhere")
    with pytest.raises(ConfigError, match="lie one inside the other"):
        shrink(recipe(source, "elsewhere/small"))


def test_links_in_circles(source: Path) -> None:
    (source / "val" / "again").symlink_to(source)
    with pytest.raises(DataError, match=r"val/again links to a folder that it lies in"):
        shrink(recipe(source))


@pytest.mark.parametrize("folders", [[], ["train", "val/cat"]])
def test_no_images(folders: list[str], tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    for folder in folders:
        (tmp_path / "pets" / folder).mkdir(parents=True)
    with pytest.raises(DataError, match="pets holds no image to shrink"):
        shrink(recipe(tmp_path / "pets"))
    with pytest.raises(DataError, match="nowhere is no folder"):
        shrink(recipe(tmp_path / "nowhere"))
    assert not (tmp_path / "small").exists()


def test_other_settings_do_not_mix(source: Path) -> None:
    first = recipe(source)
    shrink(first)
    before = content(first.output)
    for other, said in (
        (replace(first, size=80), "size 64"),
        (replace(first, quality=90), "quality 95"),
        (replace(first, splits=("train",), link=True), "splits None, link False"),
        (replace(first, source=source.parent / "other"), "source /"),
    ):
        shutil.copytree(source, source.parent / "other", dirs_exist_ok=True)
        with pytest.raises(ConfigError, match=f"small was made otherwise: {said}"):
            shrink(other)
    assert content(first.output) == before
    assert read_json(first.output / RECORD)["size"] == SIZE


@pytest.mark.parametrize("place", ["val", "val/cat"])
def test_originals_are_not_written_through_links(source: Path, place: str) -> None:
    shrink(recipe(source))
    small = source.parent / "small"
    shutil.rmtree(small / place)
    (small / place).symlink_to(source / place)
    before = content(source)
    with pytest.raises(ConfigError, match="is a link or in one"):
        shrink(recipe(source))
    assert content(source) == before
