"""Files are written whole or not at all, and the same value gives the same bytes."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import (
    empty_folder,
    file_digest,
    read_json,
    read_text,
    replacing,
    value_digest,
    write_csv,
    write_files,
    write_json,
    write_text,
)


def full_disk(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_new_file_appears_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    with replacing(path) as temporary:
        assert temporary.parent == path.parent
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, ValueError])
def test_failure_midway_leaves_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_full_disk_while_writing_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UserError, match="No space left on device") as caught, replacing(path):
        full_disk()
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["mkdir", "replace", "chmod"])
def test_failing_system_call_is_a_user_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(Path, name, full_disk)
    with pytest.raises(UserError, match=r"cannot write .*file: No space"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_read_only_folder_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(UserError, match="Permission denied"):
        write_text(tmp_path / "file", "new")


def test_path_below_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / "file" / "below", {})
    assert (tmp_path / "file").read_text() == "old"


def test_folder_in_the_way_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / "taken", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_text_is_utf8_with_its_own_line_ends(tmp_path: Path) -> None:
    write_text(tmp_path / "file", "8×8\nß\r\n")
    assert (tmp_path / "file").read_bytes() == b"8\xc3\x978\n\xc3\x9f\r\n"


def test_json_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "a", {"b": [1, 2.5], "a": {"ü": None, "n": True}})
    expected = '{\n  "a": {\n    "n": true,\n    "ü": null\n  },\n  "b": [\n    1,\n    2.5\n  ]\n}\n'
    assert (tmp_path / "a").read_bytes() == expected.encode()
    write_json(tmp_path / "b", {"a": {"n": True, "ü": None}, "b": (1, 2.5)})
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()
    assert read_json(tmp_path / "a") == {"b": [1, 2.5], "a": {"ü": None, "n": True}}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_json_takes_no_nan(value: float, tmp_path: Path) -> None:
    write_json(tmp_path / "file", 1)
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file", {"nll": value})
    assert (tmp_path / "file").read_bytes() == b"1\n"


def test_csv_bytes(tmp_path: Path) -> None:
    write_csv(tmp_path / "file", ("a", "b"), [(1, "x,y"), ("", 'q"'), (0.1, "é")])
    assert (tmp_path / "file").read_bytes() == 'a,b\n1,"x,y"\n,"q"""\n0.1,é\n'.encode()


def test_csv_rows_that_fail_leave_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError):
        write_csv(tmp_path / "file", ("a",), ((1 / n,) for n in (1, 0)))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe", b"{'a': 1}"])
def test_unreadable_json_is_a_user_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_emptied_folder_holds_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    empty_folder(folder)
    assert folder.is_dir()
    (folder / "old" / "deep").mkdir(parents=True)
    (folder / "old" / "deep" / "file").write_text("stale")
    (folder / ".hidden").write_text("stale")
    (tmp_path / "beside").write_text("kept")
    empty_folder(folder)
    assert list(folder.iterdir()) == []
    assert (tmp_path / "beside").read_text() == "kept"


def test_folder_that_cannot_be_emptied_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot empty .*file: Not a directory"):
        empty_folder(tmp_path / "file")


def test_file_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_digest(tmp_path / "file") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_value_digest_is_of_the_canonical_form() -> None:
    expected = hashlib.sha256(b'{"a":[1,2.5],"b":"\\u00fc"}').hexdigest()
    assert value_digest({"b": "ü", "a": [1, 2.5]}) == expected
    assert value_digest({"a": (1, 2.5), "b": "ü"}) == expected
    assert value_digest({"a": [1, 2], "b": "ü"}) != expected


def test_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    file, link, outer = tmp_path / "elsewhere" / "file", tmp_path / "link", tmp_path / "outer"
    file.write_text("old")
    link.symlink_to("elsewhere/file")
    outer.symlink_to(link)
    write_text(outer, "new")
    assert outer.is_symlink()
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert {path.name for path in tmp_path.rglob("*")} == {"elsewhere", "file", "link", "outer"}


def test_link_to_nothing_gets_its_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("folder/file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "file").read_text() == "new"


def test_links_in_a_circle_are_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError, match=r"cannot write .*a: Too many levels of symbolic links"):
        write_text(tmp_path / "a", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_link_into_a_cache_is_replaced_itself(tmp_path: Path) -> None:
    """DVC links outputs to its cache, write-protected; what it holds there is no one's to change."""
    cached, link = tmp_path / "cached", tmp_path / "link"
    cached.write_text("old")
    cached.chmod(0o444)
    link.symlink_to(cached)
    write_text(link, "new")
    assert cached.read_text() == "old"
    assert not link.is_symlink()
    assert link.read_text() == "new"


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755, 0o444])
@pytest.mark.parametrize("linked", [False, True])
def test_mode_stays(mode: int, linked: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    if linked and mode != 0o444:
        path = tmp_path / "link"
        path.symlink_to("file")
    write_text(path, "new")
    assert path.stat().st_mode & 0o7777 == mode


def test_several_files_are_written_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / name for name in "abc"]
    write_files(dict.fromkeys(paths, b"old"))
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        return int(full_disk()) if path.name.startswith(".b.") else write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot write .*b: No space"):
        write_files(dict.fromkeys(paths, b"new"))
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys("abc", b"old")
    write_files(dict.fromkeys(paths, b"new"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == dict.fromkeys("abc", b"new")


@pytest.mark.parametrize(
    ("content", "said"), [(b"\xff\xfe\x00", "is no text in UTF-8"), (None, "cannot read .*: Is a directory")]
)
def test_text_that_cannot_be_read_is_a_user_error(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_text(path)
