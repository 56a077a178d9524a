"""Listing an image folder: which files, which classes, and what is wrong with them."""

from __future__ import annotations

import builtins
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from images import draw_folder, folder_settings

from maskllm4v.data import prepare
from maskllm4v.utils.errors import DataError, UserError
from maskllm4v.utils.io import write_json


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "pets")


@pytest.mark.parametrize("hashed", [False, True])
def test_folder_manifest(source: Path, tmp_path: Path, hashed: bool) -> None:
    (source / "train" / "cat" / "notes.txt").write_text("no image")
    found = prepare(folder_settings(source, hash_files=hashed), tmp_path / "m")
    assert found.classes == ("cat", "dog")
    train = [f"train/cat/{i}.png" for i in range(5)] + [f"train/dog/{i}.png" for i in range(6)]
    assert [e.path for e in found.splits["train"]] == train
    assert [e.path for e in found.splits["test"]] == [f"val/{name}/{i}.png" for name in ("cat", "dog") for i in (0, 1)]
    assert found.labels("train").tolist() == [0] * 5 + [1] * 6
    assert all(e.bytes == (source / e.path).stat().st_size for e in found.splits["train"])
    assert {len(e.sha256) for e in found.splits["train"]} == {64 if hashed else 0}
    chosen = found.calibration[0].tolist()
    assert len(set(chosen)) == len(chosen) == 2
    assert set(chosen) <= set(range(11))
    assert prepare(folder_settings(source, hash_files=hashed), tmp_path / "again").digest == found.digest


@pytest.mark.parametrize("hashed", [False, True])
def test_changed_image_changes_the_digest(source: Path, tmp_path: Path, hashed: bool) -> None:
    before = prepare(folder_settings(source, hash_files=hashed), tmp_path / "a").digest
    path = source / "train" / "dog" / "3.png"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if hashed else content + b"x")
    assert prepare(folder_settings(source, hash_files=hashed), tmp_path / "b").digest != before


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        empty(path)
        path.rmdir()
    folder.rmdir()


def link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing.png")


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty class": (lambda root: empty(root / "train" / "dog"), r"train/dog holds no image"),
    "empty class in test": (lambda root: empty(root / "val" / "cat"), r"val/cat holds no image"),
    "zero bytes": (lambda root: (root / "train" / "cat" / "3.png").write_bytes(b""), r"cat/3\.png is empty"),
    "missing split": (lambda root: remove(root / "val"), r"val is no folder"),
    "no classes": (lambda root: (remove(root / "train"), (root / "train").mkdir()), r"train has no class folders"),
    "broken link": (lambda root: link(root / "train" / "cat" / "3.png"), r"cat/3\.png No such file"),
    "folder": (lambda root: (root / "train" / "cat" / "9.png").mkdir(), r"cat/9\.png is no file"),
    "one class more": (
        lambda root: (root / "val" / "emu").mkdir(),
        r"train has 2 classes and val 3; they differ in emu$",
    ),
    "other class": (lambda root: (root / "val" / "cat").rename(root / "val" / "cow"), r"they differ in cat, cow$"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_faulty_folder_raises(source: Path, tmp_path: Path, fault: Callable[[Path], object], message: str) -> None:
    fault(source)
    with pytest.raises(DataError, match=message):
        prepare(folder_settings(source), tmp_path / "m")
    assert not (tmp_path / "m" / "manifest.json").exists()


def test_missing_root_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere"):
        prepare(folder_settings(tmp_path / "nowhere"), tmp_path / "m")


def test_calibration_larger_than_the_folder_raises(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"12, .* 11 images"):
        prepare(folder_settings(source, calibration=12), tmp_path / "m")


def test_a_few_faults_are_named_and_the_rest_counted(source: Path, tmp_path: Path) -> None:
    for path in (source / "train").glob("*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"train/cat/0\.png is empty, .*4\.png is empty, and 6 more$"):
        prepare(folder_settings(source), tmp_path / "m")


def test_file_without_permission_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith("dog/2.png") and allowed(path, mode))
    with pytest.raises(DataError, match=r"train/dog/2\.png cannot be read: permission denied$"):
        prepare(folder_settings(source), tmp_path / "m")


@pytest.mark.parametrize("content", [b"this is text", b"\x89PNG\r\n\x1a\n"], ids=["text", "header only"])
def test_only_hashing_finds_files_that_are_no_images(content: bytes, source: Path, tmp_path: Path) -> None:
    for name in ("cat/3.png", "dog/0.png"):
        (source / "train" / name).write_bytes(content)
    assert len(prepare(folder_settings(source), tmp_path / "m").splits["train"]) == 11
    with pytest.raises(DataError, match=r"cat/3\.png cannot be read as an image: .*dog/0\.png cannot be read"):
        prepare(folder_settings(source, hash_files=True), tmp_path / "hashed")


@pytest.mark.parametrize("hashed", [False, True])
def test_files_are_opened_for_hashing_only(
    hashed: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, plain = set[str](), builtins.open

    def noted(file: Any, *args: Any, **how: Any) -> Any:
        opened.add(Path(str(file)).name)
        return plain(file, *args, **how)

    monkeypatch.setattr(builtins, "open", noted)
    monkeypatch.setattr(io, "open", noted)
    prepare(folder_settings(source, hash_files=hashed), tmp_path / "m")
    assert {name for name in opened if name.endswith(".png")} == ({f"{i}.png" for i in range(6)} if hashed else set())
    assert "train.csv" in opened


# Names and types


@pytest.mark.parametrize("place", ["train/cat/{}.png", "train/{}/1.png", "{}/train/cat/1.png"])
def test_name_that_is_not_utf8_is_told(place: str, tmp_path: Path) -> None:
    odd = place.format(os.fsdecode(b"f\xfcr"))  # Latin-1
    root = draw_folder(tmp_path / (Path(odd).parts[0] if odd[0] == "f" else "pets"))
    if odd[0] != "f":
        (root / odd).parent.mkdir(exist_ok=True)
        shutil.copy(root / "train" / "cat" / "0.png", root / odd)
    with pytest.raises(DataError, match=r"f\\xfcr(\.png)? is a name that is not UTF-8; rename it$"):
        prepare(folder_settings(root), tmp_path / "m")


def test_text_that_is_not_utf8_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*/a\.json: '.*f\\udcfcr.*' is not UTF-8"):
        write_json(tmp_path / "a.json", {"root": os.fsdecode(b"f\xfcr")})
    assert not list(tmp_path.iterdir())


def test_images_of_other_types_are_counted_and_named(source: Path, tmp_path: Path) -> None:
    for name in ("a.tif", "b.GIF", "c.heic", "d.tiff", "e.txt", "f.webp.part"):
        (source / "train" / "dog" / name).write_bytes(b"x")
    said = r"train: 4 image files of other types are left out: 'dog/a.tif', 'dog/b.GIF', 'dog/c.heic' and 1 more; read"
    with pytest.warns(UserWarning, match=said) as told:
        found = prepare(folder_settings(source), tmp_path / "m")
    assert len(told) == 1
    assert len(found.splits["train"]) == 11


def test_class_of_images_of_other_types_is_an_error_that_names_them(source: Path, tmp_path: Path) -> None:
    for path in (source / "val" / "cat").iterdir():
        path.rename(path.with_suffix(".tif"))
    with pytest.raises(DataError, match=r"val/cat holds no image \(.*\), but 'cat/0.tif' and 'cat/1.tif'$"):
        prepare(folder_settings(source), tmp_path / "m")
