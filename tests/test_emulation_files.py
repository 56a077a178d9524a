"""Where two folders of files differ: the first place in each file, and the tensor in those that hold tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scripts.emulation.comparing import differences, digest


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
    return tmp_path / "one", tmp_path / "two"


def write(folder: Path, name: str, content: bytes | dict[str, torch.Tensor]) -> None:
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        save_file(content, folder / name)


TENSORS = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([1, 2]), "s": torch.tensor(2.5)}
CHANGED = torch.tensor([[1.0, 2.0], [3.25, 4.5]])
PAIRS: dict[str, tuple[Any, Any, str]] = {
    "a.txt": (b"a\nb\n", b"a\nc\n", "line 2: 'b' natively, 'c' there"),
    "shorter.txt": (b"a\nb\n", b"a\n", "2 lines natively, 1 there"),
    "long.json": (b"x" * 500 + b"1", b"x" * 500 + b"2", f"line 1: '{'x' * 30}1' natively, '{'x' * 30}2' there"),
    "a.png": (b"\x89\x00abc", b"\x89\x00abd", "byte 4 of 5"),
    "b.png": (b"\x89\x00ab", b"\x89\x00abd", "byte 4 of 4; 5 there"),
    "value.safetensors": (
        TENSORS,
        {**TENSORS, "w": CHANGED},
        "tensor 'w' at [1, 0]: 3.0 natively, 3.25 there; 2 of its 4 values differ, 1 of 3 tensors",
    ),
    "scalar.safetensors": (
        {"s": torch.tensor(2.5, dtype=torch.bfloat16)},
        {"s": torch.tensor(2.0, dtype=torch.bfloat16)},
        "tensor 's' at []: 2040 natively, 0040 there; 1 of its 1 values differ, 1 of 1 tensors",
    ),
    "zero.safetensors": (
        {"s": torch.tensor([0.0])},
        {"s": torch.tensor([-0.0])},
        "tensor 's' at [0]: 0.0 natively, -0.0 there; 1 of its 1 values differ, 1 of 1 tensors",
    ),
    "names.safetensors": (TENSORS, {"w": TENSORS["w"]}, "other tensors: b, s"),
    "shapes.safetensors": (
        {"w": torch.zeros(2, 3)},
        {"w": torch.zeros(3, 2)},
        "other tensors: of other types or shapes",
    ),
    "damaged.safetensors": (b"\x01", b"\x02", "byte 0 of 1"),
}


@pytest.mark.parametrize("name", PAIRS)
def test_the_first_difference_of_a_file(name: str, two: tuple[Path, Path]) -> None:
    one, other, where = PAIRS[name]
    write(two[0], name, one)
    write(two[1], name, other)
    write(two[0], "sub/same.txt", b"same")
    write(two[1], "sub/same.txt", b"same")
    (difference,) = differences(*two)
    assert str(difference) == f"{name}: {where}"
    assert differences(two[0], two[0]) == []


def test_metadata_of_tensors_counts(two: tuple[Path, Path]) -> None:
    for folder, value in zip(two, ("a", "b"), strict=True):
        save_file(TENSORS, folder / "t.safetensors", metadata={"key": value})
    assert [d.where for d in differences(*two)] == ["the tensors are equal, what the file says of itself is not"]


def test_files_of_one_side_and_files_that_are_no_results(two: tuple[Path, Path]) -> None:
    write(two[0], "sub/a.txt", b"a")
    write(two[1], "sub/b.txt", b"b")
    (two[0] / ".cache").mkdir()
    write(two[0], ".cache/timing.json", b"1")
    assert [str(d) for d in differences(*two)] == [
        "sub/a.txt: written natively only",
        "sub/b.txt: not written natively",
    ]


def test_digest_is_of_names_and_content_of_what_is_asked_for(two: tuple[Path, Path]) -> None:
    for folder in two:
        write(folder, "sub/a.txt", b"a")
        write(folder, "rest.txt", folder.name.encode())
    before = digest(two[0], ["sub"])
    assert before == digest(two[1], ["sub"]) == digest(two[1], ["sub/a.txt"])
    assert digest(two[0], ["sub", "rest.txt"]) != digest(two[1], ["sub", "rest.txt"])
    (two[1] / "sub" / "a.txt").rename(two[1] / "sub" / "b.txt")
    assert digest(two[1], ["sub"]) != before
