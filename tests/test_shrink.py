"""Small copies of an image folder: names, order and pixels; resuming; other splits."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import run, well
from images import folder_settings
from PIL import Image, ImageOps
from small_copies import ORIENTATION, SIZE, content, decoded, draw, images, manifest, photograph, psnr, recipe

from maskllm4v.data.folder import reader
from maskllm4v.data.shrink import RECORD, shrink, small_copy, small_size
from maskllm4v.utils.io import read_json


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drawn") / "pets")


@pytest.fixture
def source(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "pets"))


# What is made


def test_copy_has_the_same_names_classes_and_order(source: Path) -> None:
    found = shrink(recipe(source))
    assert (found.made, found.copied, found.kept, found.faults) == (16, 3, 0, ())
    small = source.parent / "small"
    originals, copies = images(source), images(small)
    assert list(originals) == list(copies)
    assert (found.before, found.after) == tuple(sum(map(len, files.values())) for files in (originals, copies))
    assert set(content(small)) - set(copies) == {RECORD}
    a, b = manifest(source), manifest(small)
    assert a.classes == b.classes
    for split in ("train", "test"):
        assert [(e.path, e.label) for e in a.splits[split]] == [(e.path, e.label) for e in b.splits[split]]
    assert a.digest != b.digest
    assert reader(b, folder_settings(small))(b.splits["train"][0])[0] == small / "train/cat/a.JPEG"


def test_shorter_side_is_reduced_and_never_enlarged(source: Path) -> None:
    shrink(recipe(source))
    small = source.parent / "small"
    sizes = {}
    for name in images(source):
        with Image.open(source / name) as original, Image.open(small / name) as copy:
            sizes[name] = copy.size
            shown = ImageOps.exif_transpose(original).size
            assert ImageOps.exif_transpose(copy).size == small_size(shown, SIZE)
    assert (sizes["train/cat/a.JPEG"], sizes["train/dog/tall.jpg"]) == ((85, SIZE), (SIZE, 192))
    for name in ("val/cat/equal.jpg", "val/cat/small.jpg", "val/dog/small.png"):
        assert (small / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((500, 375), (384, 288)),
        ((375, 500), (288, 384)),
        ((289, 289), (288, 288)),
        ((5000, 289), (4983, 288)),
        ((288, 900), (288, 900)),
        ((1, 9), (1, 9)),
    ],
)
def test_sizes(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert small_size(size, 288) == expected


def test_copies_are_what_training_would_see_reduced(source: Path) -> None:
    """Both are turned by EXIF, ignore alpha and palettes' transparency, and CMYK and grey become RGB in both."""
    shrink(recipe(source))
    small = source.parent / "small"
    for name in images(source):
        for mode in ("RGB", "L"):
            original, copy = decoded(source, name, mode), decoded(small, name, mode)
            direct = original.resize(copy.size, Image.Resampling.LANCZOS)
            assert psnr(direct, copy) > (36 if name.endswith("webp") else 38), name  # WebP halves the chroma
    for name in ("train/cat/b.png", "train/dog/grey_alpha.png", "train/dog/png.JPEG", "train/dog/palette.png"):
        direct = decoded(source, name).resize((85, SIZE), Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(direct), np.asarray(decoded(small, name))), name


def test_formats_follow_the_content(source: Path) -> None:
    shrink(recipe(source))
    found = {}
    for name in images(source):
        with Image.open(source.parent / "small" / name) as image:
            found[name.split("/")[-1]] = (image.format, image.mode)
            if image.size[1] == SIZE and name.startswith("train"):
                assert ORIENTATION not in image.getexif()
                assert "icc_profile" not in image.info
    assert {name: kind for name, kind in found.items() if kind != ("JPEG", "RGB")} == {
        **{"b.png": ("PNG", "RGB"), "c.bmp": ("BMP", "RGB"), "d.webp": ("WEBP", "RGB"), "grey.jpg": ("JPEG", "L")},
        **{"bits.png": ("PNG", "L"), "palette.png": ("PNG", "RGB"), "alpha.png": ("PNG", "RGB")},
        **{"grey_alpha.png": ("PNG", "L"), "png.JPEG": ("PNG", "RGB"), "gif.jpg": ("PNG", "RGB")},
        "small.png": ("PNG", "RGB"),
    }


def test_quality_is_that_of_the_file(source: Path) -> None:
    sizes = [len(small_copy(source / "train/dog/huge.jpg", 200, quality) or b"") for quality in (60, 80, 95)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


@pytest.mark.parametrize("size", [64, 90])
def test_large_images_decoded_at_a_fraction_are_close_to_whole_ones(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a.png.jpg"
    photograph(1203, 801).save(path, format="JPEG", quality=95)
    with Image.open(path) as image:
        whole = image.convert("RGB").resize(small_size(image.size, size), Image.Resampling.LANCZOS)
    (tmp_path / "b.jpg").write_bytes(small_copy(path, size, 100) or b"")
    assert psnr(whole, decoded(tmp_path, "b.jpg")) > 42


def test_any_depth_and_links(source: Path) -> None:
    deep = source / "train" / "cat" / "more" / "deep"
    deep.mkdir(parents=True)
    shutil.copy(source / "train/cat/a.JPEG", deep / "a.jpg")
    shutil.copy(source / "train/cat/a.JPEG", source / "top.jpg")
    shutil.move(source / "val", source.parent / "elsewhere")
    (source / "val").symlink_to(source.parent / "elsewhere")
    shrink(recipe(source))
    small = source.parent / "small"
    assert not any(path.is_symlink() for path in small.rglob("*"))
    copies = images(small)
    assert next(iter(copies)) == "top.jpg"
    assert copies["train/cat/more/deep/a.jpg"] == copies["top.jpg"] == copies["train/cat/a.JPEG"]
    assert len(copies) == 21


# Again, and again after an interruption


@pytest.mark.parametrize("splits", [None, ("train",)])
def test_processes_change_no_byte_and_a_second_run_nothing(source: Path, splits: tuple[str, ...] | None) -> None:
    one, two = recipe(source, "one", splits=splits), recipe(source, "two", splits=splits)
    assert shrink(one, 1) == shrink(two, 2)
    made = content(two.output)
    assert content(one.output) == made
    times = {path: path.stat().st_mtime_ns for path in two.output.rglob("*")}
    again = shrink(two, 2)
    assert (again.made, again.copied, again.kept) == (0, 0, 19)
    assert (again.before, again.after) == (
        sum(map(len, images(source).values())),
        sum(map(len, images(two.output).values())),
    )
    assert {path: path.stat().st_mtime_ns for path in two.output.rglob("*")} == times


@pytest.mark.parametrize("kept", [0, 0.5, 0.98])  # of a file's bytes
def test_resumed_after_a_kill(source: Path, kept: float) -> None:
    whole, killed = recipe(source, "whole"), recipe(source, "killed")
    shrink(whole)
    expected = content(whole.output)
    shrink(killed)
    for path in (killed.output / "train" / "cat").iterdir():
        data = path.read_bytes()
        path.write_bytes(data[: int(kept * len(data))])
    small = killed.output / "val" / "cat" / "small.jpg"
    small.write_bytes(small.read_bytes()[:-1])
    (killed.output / "val" / "dog" / "z.jpg").unlink()
    (killed.output / "train" / "dog" / ".exif.jpg.x7_.part").write_bytes(b"half")
    again = shrink(killed, 2)
    assert content(killed.output) == expected
    assert again.kept == 19 - 5 - 2


def test_changed_originals_are_made_anew(source: Path) -> None:
    shrink(recipe(source))
    other = source / "train" / "cat" / "a.JPEG"
    photograph(200, 150, seed=1).save(other)
    later = os.stat(source.parent / "small" / RECORD).st_mtime + 10
    os.utime(other, (later, later))
    assert shrink(recipe(source)).made == 1
    assert (
        psnr(
            decoded(source, "train/cat/a.JPEG").resize((85, SIZE)), decoded(source.parent / "small", "train/cat/a.JPEG")
        )
        > 30
    )


def test_original_gone_bad_after_it_was_shrunk_is_told(source: Path) -> None:
    shrink(recipe(source))
    bad = source / "train" / "cat" / "a.JPEG"
    bad.write_bytes(b"nothing of the kind")
    os.utime(bad, (1, 1))
    assert len(shrink(recipe(source)).faults) == 1


# Splits


def test_other_splits_are_copied_byte_for_byte(source: Path) -> None:
    odd = source / "val" / "dog" / "odd.jpg"
    odd.write_bytes(b"whatever it is")
    found = shrink(recipe(source, splits=("train",)))
    assert (found.made, found.copied, found.faults) == (15, 5, ())
    for path in (source / "val").rglob("*.[jp][pn]g"):
        assert (source.parent / "small" / path.relative_to(source)).read_bytes() == path.read_bytes()


def test_other_splits_are_linked_if_asked_for(source: Path) -> None:
    linked = recipe(source, splits=("train",), link=True)
    shutil.copy(source / "val/dog/z.jpg", source / "top.jpg")  # in no split
    found = shrink(linked)
    assert (found.made, found.copied) == (15, 1)
    link = linked.output / "val"
    assert os.readlink(link) == os.path.join("..", "pets", "val")
    a, b = manifest(source), manifest(linked.output)
    assert a.splits["test"] == b.splits["test"]
    assert shrink(linked).kept == 16  # again: nothing to do
    shutil.move(source.parent, source.parent.parent / "moved")
    assert (source.parent.parent / "moved" / "small" / "val" / "dog" / "z.jpg").is_file()


# The command


def test_command(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)
    done = well("shrink", "--data-dir", "pets", "--output", "a/b", "--size", "64", "--splits", "train", "--link")
    assert done.out.startswith("a/b: 15 images made smaller, 0 copied, 0 there already; ")
    assert (source.parent / "a" / "b" / "val").resolve() == source / "val"
    done = run("shrink", "--data-dir", "pets", "--output", "pets/small")
    assert (done.code, done.out) == (1, "")
    assert done.err == "shrink: output pets/small and pets lie one inside the other; choose another --output\n"
    assert run("shrink", "--data-dir", "pets").code == 2
    assert run("shrink", "--output", "x").err == "shrink: data/imagenet is no folder\n"


# The benchmark


@pytest.mark.parametrize("given", [False, True])
def test_benchmark_runs(given: bool, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import loading

    out = source.parent / "found.json"
    folder = [str(source / "val")] if given else []
    monkeypatch.setattr(sys, "argv", ["loading", *folder, "--quick", "--out", str(out)])
    loading.main()
    found = read_json(out)
    steps = found["sections"][loading.STEPS]
    assert [row["images"] for row in steps] == ["originals", "288 px", "256 px"]
    assert all(row["n"] == 1 for row in steps)


def test_images_of_other_types_are_counted_and_named(source: Path, tmp_path: Path) -> None:
    for name in ("a.tif", "b.gif", "notes.txt"):
        (source / "val" / "dog" / name).write_bytes(b"x")
    with pytest.warns(
        UserWarning, match=r"2 image files of other types are left out: 'val/dog/a\.tif' and '.*/b\.gif'"
    ):
        found = shrink(recipe(source))
    assert (found.made, found.copied, found.faults) == (16, 3, ())
    assert not [path for path in (tmp_path / "small").rglob("*") if path.suffix in (".tif", ".gif", ".txt")]
