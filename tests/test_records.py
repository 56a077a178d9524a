"""Records: stable bytes, rounded numbers, and no reading of what was edited."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from maskllm4v.runs.paths import (
    checkpoint,
    cost_file,
    curve_file,
    data_folder,
    evaluation_folder,
    layers_file,
    origin_file,
    picture_file,
    record_file,
    resume_folder,
    run_folder,
)
from maskllm4v.runs.records import build_record, read_record, read_records, run_digest, sealed, versions, write_record
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import file_digest

Record = dict[str, Any]
ROOT = Path(__file__).parent.parent
REQUIRED = [
    *("format", "row", "table", "kind", "exact", "made", "evaluated", "metrics", "seeds"),
    *("settings", "settings_digest", "inputs", "versions"),
]


def record(row: str = "one", **changes: Any) -> Record:
    arguments: dict[str, Any] = {
        "row": row,
        "kind": "oneshot",
        "settings": {
            "table": "t",
            "exact": True,
            "data": {"name": "ä", "seed": 3},
            "pattern": "2:4",
            "task": {"name": "classification"},
        },
        "metrics": {3: {"top1": 0.12345678, "nll": 2.0}, 1: {"top1": 1 / 3, "nll": 1e-9}},
        "summaries": {3: {"top1": 12.3457, "img_size": 8}, 1: {"top1": 33.3333, "img_size": 8}},
        "inputs": {"manifest": "m", "dense": ["d3", "d1"]},
        "parameters": {"dense": 10, "kept": 5},
        "made": {"hardware": "there", "world_size": 2},
        "evaluated": {"hardware": "here", "world_size": 1},
    }
    return build_record(**{**arguments, **changes})


# Building


def test_numbers_are_rounded_to_six_digits() -> None:
    assert record()["metrics"] == {"3": {"top1": 0.123457, "nll": 2.0}, "1": {"top1": 0.333333, "nll": 0.0}}


def test_record_says_what_it_was_given() -> None:
    found = record()
    assert found["seeds"] == [3, 1]
    assert (found["row"], found["table"], found["kind"], found["exact"]) == ("one", "t", "oneshot", True)
    assert found["format"] == 4
    assert found["made"] == {"hardware": "there", "world_size": 2}
    assert found["evaluated"] == {"hardware": "here", "world_size": 1}
    assert found["summaries"] == {"3": {"top1": 12.3457, "img_size": 8}, "1": {"top1": 33.3333, "img_size": 8}}
    assert found["parameters"] == {"dense": 10, "kept": 5}
    assert found["inputs"] == {"manifest": "m", "dense": ["d3", "d1"]}
    assert found["settings"]["data"] == {"name": "ä", "seed": 3}
    assert set(REQUIRED) <= set(found)


def test_settings_digest_is_sha256_of_canonical_json() -> None:
    text = r'{"data":{"name":"\u00e4","seed":3},"exact":true,"pattern":"2:4","table":"t",'
    text += '"task":{"name":"classification"}}'
    assert record()["settings_digest"] == hashlib.sha256(text.encode()).hexdigest()


def test_versions_name_packages_and_python_without_patch_level() -> None:
    found = versions()
    assert set(found) == {"python", "accelerate", "numpy", "scikit-learn", "timm", "torch", "torchvision"}
    assert found["python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"
    for name in set(found) - {"python"}:
        assert found[name] == metadata.version(name)


def test_a_task_adds_the_packages_that_it_alone_needs() -> None:
    added = set(versions("diffusion")) - set(versions())
    assert added == {"diffusers", "torchmetrics"}
    assert versions("classification") == versions()
    of_diffusion = record(settings={"table": "t", "exact": True, "task": {"name": "diffusion"}})
    assert of_diffusion["versions"] == versions("diffusion")
    assert record()["versions"] == versions()


def test_two_digit_minor_version_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version_tuple", lambda: ("3", "14", "2rc1"))
    assert versions()["python"] == "3.14"


# Bytes


def test_round_trip(tmp_path: Path) -> None:
    write_record(tmp_path / "record.json", record())
    assert read_record(tmp_path / "record.json") == sealed(record())


def test_bytes_do_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    def backwards(value: Any) -> Any:
        return {k: backwards(v) for k, v in reversed(value.items())} if isinstance(value, dict) else value

    write_record(tmp_path / "a", record())
    write_record(tmp_path / "b", backwards(record()))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert file_digest(tmp_path / "a") == hashlib.sha256((tmp_path / "b").read_bytes()).hexdigest()


def test_bytes_are_canonical_json(tmp_path: Path) -> None:
    write_record(tmp_path / "a", record())
    expected = json.dumps(sealed(record()), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    assert (tmp_path / "a").read_bytes() == expected.encode("utf-8")


def test_bytes_are_the_same_in_another_process(tmp_path: Path) -> None:
    script = (
        f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]!r}\n"
        "from pathlib import Path\nfrom test_records import record, write_record\n"
        f"write_record(Path({str(tmp_path / 'b')!r}), record())"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    write_record(tmp_path / "a", record())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "change", [{"metrics": {3: {"top1": 0.2}}}, {"inputs": {}}, {"made": {}}, {"evaluated": {}}, {"summaries": {}}]
)
def test_digest_depends_on_what_was_measured(change: Record, tmp_path: Path) -> None:
    write_record(tmp_path / "a", record())
    write_record(tmp_path / "b", record(**change))
    assert file_digest(tmp_path / "a") != file_digest(tmp_path / "b")


def test_not_a_number_is_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_record(tmp_path / "a", record(metrics={0: {"nll": float("nan")}}))
    assert not list(tmp_path.iterdir())


def test_run_digest_is_of_names_and_bytes_of_all_files(tmp_path: Path) -> None:
    (tmp_path / "curves").mkdir()
    (tmp_path / "record.json").write_bytes(b"1")
    (tmp_path / "curves" / "seed0.csv").write_bytes(b"2")
    one, two = (hashlib.sha256(content).hexdigest() for content in (b"1", b"2"))
    text = f'{{"curves/seed0.csv":"{two}","record.json":"{one}"}}'
    assert run_digest(tmp_path) == hashlib.sha256(text.encode()).hexdigest()


def test_run_digest_does_not_depend_on_where_the_folder_is(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_record(tmp_path / folder / "record.json", record())
        write_record(tmp_path / folder / "curves" / "seed0.csv", record())
    assert run_digest(tmp_path / "a") == run_digest(tmp_path / "b")
    (tmp_path / "b" / "curves" / "seed0.csv").rename(tmp_path / "b" / "curves" / "seed1.csv")
    assert run_digest(tmp_path / "a") != run_digest(tmp_path / "b")


# Reading


def edited(path: Path, edit: Callable[[Record], object]) -> str:
    """The error that an edited record is answered with."""
    raw = json.loads(json.dumps(record()))
    edit(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError) as caught:
        read_record(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: raw["settings"].update(pattern="4:8"),
        lambda raw: raw["settings"]["data"].update(seed=4),
        lambda raw: raw["settings"].pop("pattern"),
        lambda raw: raw["settings"].update(extra=1),
        lambda raw: raw.update(settings_digest="0" * 64),
        lambda raw: raw.update(settings={}),
    ],
)
def test_edited_settings_are_found(edit: Callable[[Record], object], tmp_path: Path) -> None:
    assert "settings and their digest disagree" in edited(tmp_path / "record.json", edit)


def test_digest_is_sha256_of_all_else(tmp_path: Path) -> None:
    write_record(tmp_path / "a", record())
    found = json.loads((tmp_path / "a").read_text())
    digest = found.pop("digest")
    text = json.dumps(found, sort_keys=True, separators=(",", ":"))
    assert digest == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "edit",
    [
        lambda raw: raw["metrics"]["3"].update(top1=99.0),
        lambda raw: raw["inputs"].update(manifest="other"),
        lambda raw: raw["made"].update(hardware="elsewhere"),
        lambda raw: raw.update(row="two"),
        lambda raw: raw.update(digest="0" * 64),
        lambda raw: raw.pop("digest"),
    ],
)
def test_edited_content_is_found(edit: Callable[[Record], object], tmp_path: Path) -> None:
    def edit_sealed(raw: Record) -> None:
        raw |= sealed(raw)
        edit(raw)

    assert "content and digest disagree" in edited(tmp_path / "record.json", edit_sealed)


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key_is_named(key: str, tmp_path: Path) -> None:
    assert edited(tmp_path / "a", lambda raw: raw.pop(key)).endswith(f" is no record: {key} missing")


def test_all_missing_keys_are_named(tmp_path: Path) -> None:
    assert f": {', '.join(REQUIRED)} missing" in edited(tmp_path / "a", dict.clear)


@pytest.mark.parametrize("found", [0, 1, 2, 3, 5, "4", None])
def test_other_format_is_refused(found: Any, tmp_path: Path) -> None:
    said = edited(tmp_path / "a", lambda raw: raw.update(format=found))
    assert f"has format {found}; this version reads 4" in said
    older = found in (0, 1, 2, 3)
    assert said.endswith("; `python -m scripts.migrate_records` brings older records up to date") == older


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "null", "1"])
def test_what_is_no_record_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(UserError, match=r"record\.json"):
        read_record(tmp_path / "record.json")


def test_missing_record_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"record\.json: No such file"):
        read_record(tmp_path / "record.json")


# Tables


def test_rows_without_record_are_absent(tmp_path: Path) -> None:
    for row in ("two", "one"):
        write_record(record_file("t", row, tmp_path), record(row))
    write_record(record_file("other", "three", tmp_path), record("three"))
    run_folder("t", "empty", tmp_path).mkdir()
    (tmp_path / "t" / "runs" / "stray.txt").write_text("")
    assert read_records(tmp_path, "t") == {row: sealed(record(row)) for row in ("one", "two")}
    assert list(read_records(tmp_path, "other")) == ["three"]


def test_table_without_records_is_empty(tmp_path: Path) -> None:
    assert read_records(tmp_path, "t") == {}


def test_one_spoilt_record_is_named(tmp_path: Path) -> None:
    write_record(record_file("t", "one", tmp_path), record("one"))
    write_record(record_file("t", "two", tmp_path), {**record("two"), "settings": {}})
    with pytest.raises(UserError, match=r"two.evaluation.record\.json: settings"):
        read_records(tmp_path, "t")


@pytest.mark.parametrize(
    "table", ["cifar10", "digits", "digits_detection", "digits_patterns", "digits_segmentation", "dit_digits"]
)
def test_committed_records_can_be_read(table: str) -> None:
    found = read_records(ROOT / "reports", table)
    paths = list((ROOT / "reports" / table / "runs").glob("*/evaluation/record.json"))
    assert paths
    assert set(found) == {path.parent.parent.name for path in paths}


def test_layout_of_files() -> None:
    reports = Path("r")
    undeclared = (cost_file("one", 3), resume_folder("one"))
    assert [str(p) for p in (data_folder("d"), checkpoint("one", 3), origin_file("one"), *undeclared)] == [
        "artifacts/data/d",
        "artifacts/one/seed3.safetensors",
        "artifacts/one/made.json",
        ".cache/timings/one-seed3.json",
        ".cache/resume/one",
    ]
    assert str(record_file("t", "one")) == "reports/t/runs/one/evaluation/record.json"
    assert str(evaluation_folder("t", "one", reports)) == "r/t/runs/one/evaluation"
    assert str(record_file("t", "one", reports)) == "r/t/runs/one/evaluation/record.json"
    assert str(layers_file("t", "one", reports)) == "r/t/runs/one/evaluation/layers.csv"
    assert str(picture_file("t", "one", "samples", reports)) == "r/t/runs/one/evaluation/samples.png"
    assert str(curve_file("t", "one", 3, reports)) == "r/t/runs/one/curves/seed3.csv"
