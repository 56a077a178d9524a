"""Odd input of every kind is one clear line: settings, files, records, arguments of the library."""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_records import make_records
from regression import Regression, learnable
from regression import settings as learning
from small_params import changed, fault, params
from torch import nn

import maskllm4v
from maskllm4v.checkpoints.format import METADATA_KEY, load_verified, save_verified
from maskllm4v.checkpoints.masks import load_dense, load_masks
from maskllm4v.checkpoints.packed import load_packed_file
from maskllm4v.checkpoints.third_party import load_any
from maskllm4v.config import Experiment, load_experiment, parse_experiment
from maskllm4v.reporting.report import page_text, table_texts
from maskllm4v.runs import records
from maskllm4v.runs.paths import curve_file, evaluation_folder, layers_file, record_file
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.training.mask_learning import learn_masks
from maskllm4v.utils.errors import CheckpointError, ConfigError, DataError, PatternError, UserError
from maskllm4v.utils.io import read_json, write_json

NINES = "9" * 5000


def said(error: type[UserError], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


# Patterns


@pytest.mark.parametrize("pattern", [f"{NINES}:{NINES}", "٢:٤", "２:４", "2_0:4", " 2:4", "2:4\n", "+2:4", "²:4"])
def test_a_pattern_is_two_plain_numbers(pattern: str) -> None:
    assert "is no N:M pattern; write it like '2:4'" in said(PatternError, lambda: NMPattern(pattern))
    assert fault(changed("pattern", pattern)).startswith("params.yaml: pattern is ")


@pytest.mark.parametrize("pattern", ["12345678:123456789", "1:1000000", (2, 10**400), (10**5000, 10**5001)])
def test_a_pattern_is_small(pattern: Any) -> None:
    said(PatternError, lambda: NMPattern(pattern))


# Settings


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a: " + "[" * 700 + "]" * 700, "nested too deep"),
        ("table: " + "[" * 60 + "]" * 60, "nested more than 50 deep"),
        ("&a {table: *a}", "a value holds itself, by an alias"),
        ("task: &b {name: classification, args: [1, *b]}", "a value holds itself, by an alias"),
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
        ), "holds more than 100,000 values"),
    ],
)  # fmt: skip
def test_yaml_without_end(text: str, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    assert wanted in said(ConfigError, lambda: load_experiment(path))


def test_aliases_are_no_fault() -> None:
    shared = {"steps": 5}
    assert parse_experiment(params() | {"learned": {row: {"prior": "one", **shared} for row in ("own", "plain")}})


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("table", "a" * 300, "should have at most 100 characters"),
        ("data.split_seed", -1, "greater than or equal to 0"),
        ("data.split_seed", 2**32, "less than 4294967296"),
        ("learning.gate_std", math.nan, "finite number"),
    ],
)
def test_odd_values(path: str, value: object, wanted: str) -> None:
    found = fault(changed(path, value))
    assert found.startswith(f"params.yaml: {path} is ")
    assert wanted in found


@pytest.mark.parametrize("path", ["table", "title", "rows.one", "model.args", "data.root"])
def test_lone_surrogates(path: str) -> None:
    value = {"img_size": 8, "a\ud800": 5} if path == "model.args" else "a\ud800"
    assert fault(changed(path, value)) == "params.yaml: 'a\\ud800' holds a lone surrogate, which is no character"


# Files


def sealed(path: Path, kind: str, **about: Any) -> Path:
    mask = NMPattern("2:4").pack(torch.tensor([[True, True, False, False]]), "a")
    save_verified(path, {"mask.a": mask, "a.weight.values": torch.ones(1, 2)}, {"kind": kind, **about})
    return path


ABOUT: dict[str, Any] = {"pattern": "2:4", "method": "wanda", "base": "", "shapes": {"a": [1, 4]}, "layers": ["a"]}
READERS: dict[str, Callable[[Path], object]] = {
    "masks": load_masks,
    "packed": load_packed_file,
    "dense": lambda path: load_dense(path, nn.Linear(4, 1), "m"),
}


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        *(("masks", key) for key in ("pattern", "method", "base", "shapes")),
        *(("packed", key) for key in ("pattern", "layers")),
        ("dense", "model"),
    ],
)
def test_sealed_files_without_a_key(kind: str, key: str, tmp_path: Path) -> None:
    path = sealed(tmp_path / "file", kind, **{k: v for k, v in ABOUT.items() if k != key})
    assert said(CheckpointError, lambda: READERS[kind](path)).endswith(f"file: its header has no {key!r}")


@pytest.mark.parametrize("odd", [5, [5], {"a": 5}, "９:９", True, ["b"], {"a": [1, 5]}, {"b": [1, 4]}, {"a": [-1, 4]}])
@pytest.mark.parametrize(("kind", "key"), [("masks", "pattern"), ("masks", "shapes"), ("packed", "layers")])
def test_sealed_files_with_an_odd_key(kind: str, key: str, odd: Any, tmp_path: Path) -> None:
    path = sealed(tmp_path / "file", kind, **{**ABOUT, key: odd})
    assert str(path) in said(CheckpointError, lambda: READERS[kind](path))


@pytest.mark.parametrize("text", ["[]", "5", "null", '{"seal": 5}', '{"kind": "masks"}', "{"])
def test_headers_that_are_none(text: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "file", metadata={METADATA_KEY: text})
    assert str(tmp_path / "file") in said(CheckpointError, lambda: load_verified(tmp_path / "file", "masks"))


def test_an_archive_that_is_large_inside_is_not_loaded(tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain.pt", tmp_path / "packed.pt"
    torch.save({"a": torch.zeros(1000, 1000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert packed.stat().st_size < 20_000
    assert "bytes and would take 4,00" in said(CheckpointError, lambda: load_any(packed))
    load_any(plain)


# Records


@pytest.fixture
def experiment() -> Experiment:
    return parse_experiment(params())


@pytest.fixture
def reports(experiment: Experiment, tmp_path: Path) -> Path:
    return make_records(experiment, tmp_path / "reports")


def render(experiment: Experiment, reports: Path) -> None:
    table_texts(experiment, reports)
    page_text(experiment, reports, {})


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "it lacks the metric 'top1'": lambda r: [values.pop("top1") for values in r["metrics"].values()],
    "metrics of seed 1 are others than those of the first seed": lambda r: r["metrics"]["1"].pop("nll"),
    "metrics of seed 1 are others": lambda r: r["metrics"]["1"].update(more=1.0),
    "top1 of seed 0 is '93', not a finite number": lambda r: r["metrics"]["0"].update(top1="93"),
    "nll of seed 1 is nan, not a finite number": lambda r: r["metrics"]["1"].update(nll=math.nan),
    "nll of seed 1 is True": lambda r: r["metrics"]["1"].update(nll=True),
    "seeds are [0, 1], metrics those of 0": lambda r: r["metrics"].pop("1"),
    "seeds are [0, 1], metrics those of none": lambda r: r["metrics"].clear(),
    "seeds are [0, 1], metrics those of 0, 1, x": lambda r: r["metrics"].update(x={}),
    "metrics is [], not a dict": lambda r: r.update(metrics=[]),
    "made has to say hardware and world_size": lambda r: r["made"].pop("hardware"),
    "is the record of row 'two', not of 'one'": lambda r: r.update(row="two"),
    "settings and their digest disagree": lambda r: r.update(settings=None),
    "is no record: versions missing": lambda r: r.pop("versions"),
    "content and digest disagree": lambda r: r["metrics"]["0"].update(top1=93.25),
    "content and digest disagree; the record was edited": lambda r: r.pop("digest"),
}
CONSISTENT = {
    "it lacks the metric 'top1'",
    "is the record of row 'two', not of 'one'",
}  # whoever wrote them sealed them


@pytest.mark.parametrize("wanted", CHANGES)
def test_damaged_records_are_named(wanted: str, experiment: Experiment, reports: Path) -> None:
    path = record_file("t", "one", reports)
    record = read_json(path)
    CHANGES[wanted](record)
    path.write_text(json.dumps(records.sealed(record) if wanted in CONSISTENT else record))
    found = said(UserError, lambda: render(experiment, reports))
    assert str(path) in found
    assert wanted in found


def test_swapped_evaluations_are_named(experiment: Experiment, reports: Path) -> None:
    one, own = (evaluation_folder("t", row, reports) for row in ("one", "own"))
    shutil.move(one, one.with_name("aside"))
    shutil.move(own, one)
    shutil.move(one.with_name("aside"), own)
    assert "is the record of row" in said(UserError, lambda: render(experiment, reports))


@pytest.mark.parametrize("cut", ["within a line", "between lines", "all", "binary", "words"])
def test_damaged_curves_are_named(cut: str, experiment: Experiment, reports: Path) -> None:
    path = curve_file("t", "own", 1, reports)
    lines = path.read_bytes().splitlines(keepends=True)
    cuts = {"within a line": b"".join(lines)[:-4], "between lines": b"".join(lines[:-1]), "all": b""}
    path.write_bytes({**cuts, "binary": b"\xff\xfe\x00", "words": lines[0] + lines[0]}[cut])
    assert str(path.parent) in said(UserError, lambda: render(experiment, reports))


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"seed\n0\n", b"seed,layer\n0,a,b,c\n1,2\n"])
def test_damaged_diagnostics_are_named(content: bytes, experiment: Experiment, reports: Path) -> None:
    path = layers_file("t", "own", reports)
    path.write_bytes(content)
    if content.count(b"\n") < 3:
        assert str(path) in said(UserError, lambda: render(experiment, reports))


def test_what_is_whole_is_rendered(experiment: Experiment, reports: Path) -> None:
    render(experiment, reports)
    write_json(record_file("t", "one", reports), read_json(record_file("t", "one", reports)))
    render(experiment, reports)


# The library


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def masked() -> nn.Module:
    found = model()
    return maskllm4v.apply_masks_(found, maskllm4v.prune(found, "magnitude"), "2:4")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("key", ["gate_std", "prior_strength"])
def test_spreads_are_numbers(key: str, value: float) -> None:
    found = said(ConfigError, lambda: maskllm4v.make_learnable(model(), None, pattern="2:4", **{key: value}))
    assert found == f"{key} is {value}; allowed: 0 or more"


@pytest.mark.parametrize("calibration", [None, 5])
def test_a_calibration_is_something(calibration: Any) -> None:
    found = said(ConfigError, lambda: maskllm4v.update_weights_(masked(), calibration=calibration))
    assert found == f"calibration is {calibration}; allowed: an input tensor, batches, parts"


@pytest.mark.parametrize("width", [7, 16])
def test_a_calibration_has_the_model_s_width(width: int) -> None:
    inputs = torch.ones(5, width)
    for call in (
        lambda: maskllm4v.update_weights_(masked(), calibration=inputs),
        lambda: maskllm4v.prune(model(), "wanda", calibration=inputs),
    ):
        assert "calibration: the model cannot take a batch: " in said(DataError, call)


class Empty(Regression):
    """A task with so many steps an epoch, and fewer batches than it is asked for."""

    def __init__(self, epoch: int, batches: int) -> None:
        super().__init__()
        self.epoch, self.batches = epoch, batches

    def steps_per_epoch(self, batch_size: int) -> int:
        return self.epoch

    def train_batches(self, *, steps: int, **options: Any) -> Any:
        return super().train_batches(steps=min(steps, self.batches), **options)


@pytest.mark.parametrize(
    ("epoch", "batches", "wanted"),
    [(0, 9, "an epoch has no step"), (4, 0, "has no batch for step 0"), (4, 2, "has no batch for step 2")],
)
def test_tasks_that_yield_nothing(epoch: int, batches: int, wanted: str) -> None:
    assert wanted in said(DataError, lambda: learn_masks(learnable(), Empty(epoch, batches), learning(steps=5)))
