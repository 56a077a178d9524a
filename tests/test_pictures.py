"""Pictures: what is read is what was written, and the same pixels give the same bytes."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from maskllm4v.utils.errors import UserError
from maskllm4v.utils.images import read_picture, write_picture


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def chunks(content: bytes) -> list[bytes]:
    """Names of a PNG's parts."""
    found, at = [], 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        found.append(content[at + 4 : at + 8])
        at += 12 + length
    return found


@pytest.mark.parametrize("shape", [(1, 1), (8, 24), (5, 7, 3)])
def test_round_trip(shape: tuple[int, ...], tmp_path: Path) -> None:
    wanted = pixels(*shape)
    write_picture(tmp_path / "new" / "a.png", wanted)
    found = read_picture(tmp_path / "new" / "a.png")
    assert found.dtype == np.uint8
    assert np.array_equal(found, wanted if wanted.ndim == 3 else np.stack([wanted] * 3, 2))


def test_bytes_depend_on_the_pixels_alone(tmp_path: Path) -> None:
    write_picture(tmp_path / "a.png", pixels(9, 9, 3))
    write_picture(tmp_path / "other-name.png", np.asfortranarray(pixels(9, 9, 3)))
    content = (tmp_path / "a.png").read_bytes()
    assert content == (tmp_path / "other-name.png").read_bytes()
    assert set(chunks(content)) == {b"IHDR", b"IDAT", b"IEND"}  # no time, no software, no text


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((4, 4, 3)), np.zeros((4, 4), np.int64), pixels(4), pixels(4, 4, 1), pixels(4, 4, 4), pixels(2, 4, 4, 3)],
    ids=lambda wrong: f"{wrong.dtype}{list(wrong.shape)}",
)
def test_other_arrays_are_no_pictures(wrong: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a picture is uint8 \[H, W\] or \[H, W, 3\]"):
        write_picture(tmp_path / "a.png", wrong)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_unreadable_picture_is_a_user_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.png"):
        read_picture(path)
