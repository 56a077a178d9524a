"""Records of older formats, as they were committed, become those of the present one; nothing else changes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from import_graph import ROOT

from maskllm4v.runs.paths import record_file
from maskllm4v.runs.records import FORMAT, read_record
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import file_digest, read_json, value_digest, write_json, write_text
from scripts import migrate_records
from scripts.lock_entries import dvc_entry
from scripts.migrate_records import migrate, outdated, relocked, without_defaults

FIXTURES = Path(__file__).parent / "old_records" / "format2"
OLD = sorted(FIXTURES.glob("*.json"))
Record = dict[str, Any]

VIT = {
    "name": "VisionTransformer",
    "args": {
        **{"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 4},
        **{"num_heads": 4, "class_token": False, "global_pool": "avg"},
    },
    "fused_attention": False,
}
CLASSIFICATION = {"name": "classification", "label_smoothing": 0.1, "shift": 1, "shift_probability": 0.5}
DIGITS = {
    **{"table": "digits", "exact": True, "seeds": [0, 1, 2], "pattern": "2:4", "task": CLASSIFICATION, "model": VIT},
    "data": {"name": "digits", "source": "digits", "split_seed": 1234},
    "dense": {"row": "digits-dense", "init": "scratch", "steps": 1000, "lr": 0.01, "betas": [0.9, 0.99]},
}
MADE_IMAGES = {"steps": 25, "guidance": 1.5, "clip": True}
SETTINGS: dict[str, Record] = {  # in format 3
    "digits-magnitude-sgpt": {
        **DIGITS,
        **{"prior": {"method": "magnitude"}, "update": {"masks": "digits-magnitude", "update": "sparsegpt"}},
    },
    "digits-hybrid-long": {
        **DIGITS,
        "start": {
            "prior": {"method": "magnitude"},
            "update": {"masks": "digits-magnitude", "update": "least_squares"},
        },
        "learning": {
            **{"prior": "digits-magnitude-ls", "weights": "updated", "distillation": 1.0, "steps": 800},
            **{"batch_size": 64, "lr": 0.01, "min_lr": 0.001},
        },
    },
    "cifar10-fixed-mask-finetune": {
        **{"table": "cifar10", "exact": False, "seeds": [0, 1, 2], "pattern": "2:4", "prior": {"method": "magnitude"}},
        "data": {
            **{"name": "cifar10", "source": "folder", "root": "data/cifar10", "test": "test", "classes": 10},
            **{"holdout": 2000, "in_memory": 32, "calibration": 512, "calibration_sets": 3},
        },
        "task": {
            **{"name": "classification", "label_smoothing": 0.1, "shift": 4, "hflip": 0.5, "eval_batch_size": 500},
        },
        "model": {
            "name": "VisionTransformer",
            "args": {
                **{"img_size": 32, "num_classes": 10, "embed_dim": 96, "depth": 6, "num_heads": 3, "mlp_ratio": 2},
                **{"class_token": False, "global_pool": "avg", "dynamic_img_size": True},
            },
            "stem": {"channels": [32, 64, 96], "strides": [1, 2, 2]},
            "input": {"crop_pct": 1.0, "mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]},
            "fused_attention": False,
        },
        "dense": {
            **{"row": "cifar10-dense", "init": "scratch", "shared": True, "steps": 6000, "batch_size": 256},
            **{"optimizer": "muon", "lr": 0.005, "betas": [0.9, 0.98], "warmup": 0.05, "amp": "bf16"},
            "optimizer_args": {"fallback_list": ["patch_embed", "pos_embed", "head"], "fallback_lr_scale": 0.4},
            "progressive": {"size": 24, "steps": 4000},
        },
        "finetuning": {"start": "cifar10-magnitude", "steps": 600, "amp": "bf16"},
    },
    "dit-maskllm": {
        **{
            "table": "dit_digits",
            "exact": True,
            "seeds": [0, 1, 2],
            "pattern": "2:4",
            "prior": {"method": "magnitude"},
        },
        "data": {"name": "dit_digits", "source": "digits", "split_seed": 1234, "calibration": 256},
        "task": {
            **{"name": "diffusion", "conditioning_samples": 1024, "bank": {**MADE_IMAGES, "samples": 480}},
            "judge": {
                "task": CLASSIFICATION,
                "model": VIT,
                "training": {
                    **{"steps": 1000, "batch_size": 64, "lr": 0.01, "betas": [0.9, 0.99], "weight_decay": 0.05},
                    **{"warmup": 0.1, "clip_grad": 1.0},
                },
            },
        },
        "model": {
            "name": "DiTTransformer2DModel",
            "args": {
                **{"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 1, "num_layers": 3},
                **{"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10},
            },
            "fused_attention": False,
        },
        "dense": {
            **{"row": "dit-dense", "init": "scratch", "steps": 1600, "lr": 0.004, "betas": [0.9, 0.99]},
            **{"weight_decay": 0.0, "warmup": 0.03},
        },
        "learning": {
            **{"prior": "dit-magnitude", "steps": 300, "batch_size": 64, "lr": 0.01, "min_lr": 0.001},
            **{"weight_decay": 0.0, "regularisation": 0.0, "distillation": 1.0},
        },
        "evaluation": {**MADE_IMAGES, "samples": 500, "grid": [*range(10)] * 4, "columns": 10},
    },
}


def old(row: str = "digits-hybrid-long") -> Record:
    found: Record = read_json(FIXTURES / f"{row}.json")
    return found


def place(record: Record, root: Path) -> Path:
    path = record_file(record["table"], record["row"], root / "reports")
    write_json(path, record)
    (path.parent / "layers.csv").write_text("seed,layer\n")
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project with four records of format 2, and what DVC wrote down of them."""
    (tmp_path / "reports").mkdir()
    for row in SETTINGS:
        place(old(row), tmp_path)
    (tmp_path / "dvc.lock").write_text(lock(tmp_path))
    return tmp_path


def lock(root: Path) -> str:
    """As DVC writes it: an output of each row's evaluation, and a stage that depends on all rows of a table."""
    text = "schema: '2.0'\nstages:\n"
    for row in SETTINGS:
        table = old(row)["table"]
        text += f"  evaluate@{row}:\n    cmd: python -m stages.evaluate {row}\n    deps:\n"
        text += f"    - path: artifacts/{row}\n      hash: md5\n      md5: 0123.dir\n      size: 3\n      nfiles: 1\n"
        text += "    params:\n      params.yaml:\n        seeds:\n        - 0\n    outs:\n"
        text += entry(root, f"reports/{table}/runs/{row}/evaluation")
    text += "  report:\n    cmd: python -m stages.report\n    deps:\n" + entry(root, "reports/digits/runs")
    return text + "    - path: stages/report.py\n      hash: md5\n      md5: '0123'\n      size: 3\n"


def entry(root: Path, path: str) -> str:
    """Long paths stand on a line of their own."""
    shown = path if len(path) < 55 else f"\n        {path}"
    facts = {"hash": "md5", **dvc_entry(root, path, {})}
    return f"    - path: {shown}\n" + "".join(f"      {key}: {value}\n" for key, value in facts.items())


# From format 2 to 3


@pytest.mark.parametrize("path", OLD, ids=[path.stem for path in OLD])
def test_settings_lose_their_defaults(path: Path) -> None:
    record = read_json(path)
    assert without_defaults(record) == {**record, "settings": SETTINGS[record["row"]]}


def test_all_old_records_are_tried() -> None:
    assert {path.stem for path in OLD} == set(SETTINGS)
    assert {read_json(path)["format"] for path in OLD} == {2}


@pytest.mark.parametrize(
    ("row", "change", "found"),
    [
        ("digits-magnitude-sgpt", ("update", "damping", 0.1), {"damping": 0.1}),  # not the default of SparseGPT's
        ("digits-magnitude-sgpt", ("update", "batch_size", 64), {"batch_size": 64}),
        ("digits-magnitude-sgpt", ("prior", "permutation", "greedy"), {"permutation": "greedy"}),
        ("digits-hybrid-long", ("learning", "gate", "positions"), {"gate": "positions"}),
        ("dit-maskllm", ("evaluation", "steps", 250), {}),
        ("dit-maskllm", ("learning", "distillation", 0.0), {}),
    ],
)
def test_what_differs_stays(row: str, change: tuple[str, str, Any], found: Record) -> None:
    record, (section, key, value) = old(row), change
    record["settings"][section][key] = value
    settings = without_defaults(record)["settings"][section]
    assert settings == {k: v for k, v in SETTINGS[row][section].items() if k != key} | found


def test_judge_at_its_defaults() -> None:
    record = old("dit-maskllm")
    assert (
        migrate_records.DEFAULTS["task classification"].keys() | {"name"}
        == record["settings"]["task"]["judge"]["task"].keys()
    )
    record["settings"]["task"]["judge"]["task"] |= migrate_records.DEFAULTS["task classification"]
    assert without_defaults(record)["settings"]["task"]["judge"].keys() == {"model", "training"}


# All records


def test_everything_else_stays(root: Path) -> None:
    files = {path: file_digest(path) for path in root.rglob("*") if path.is_file()}
    assert len(migrate(root)) == len(SETTINGS)
    changed = {path.name for path, digest in files.items() if file_digest(path) != digest}
    assert changed == {"record.json", "dvc.lock"}
    assert {path for path in root.rglob("*") if path.is_file()} == files.keys()
    for row in SETTINGS:
        before = old(row)
        found = read_record(record_file(before["table"], row, root / "reports"))
        assert found["format"] == FORMAT
        assert found["metrics"] == before["metrics"]
        assert found["settings_digest"] == value_digest(found["settings"]) != before["settings_digest"]
        form = {"format", "settings", "settings_digest"}
        assert {k: v for k, v in found.items() if k not in form} == {k: v for k, v in before.items() if k not in form}


def test_a_second_time_changes_nothing(root: Path) -> None:
    migrate(root)
    files = {path: (file_digest(path), path.stat().st_mtime_ns) for path in root.rglob("*") if path.is_file()}
    assert migrate(root) == []
    assert {p: (file_digest(p), p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file()} == files


def spoilt(key: str, value: Any) -> Record:
    record = old()
    record[key] = value
    return record


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (spoilt("settings", {}), "settings and their digest disagree; the record was edited"),
        (spoilt("format", 1), f"has format 1, from which no way leads to {FORMAT}"),
        (spoilt("format", FORMAT + 1), f"has format {FORMAT + 1}, from which no way leads to {FORMAT}"),
        (spoilt("format", "2"), f"has format 2, from which no way leads to {FORMAT}"),
        ({"row": "digits-hybrid-long", "table": "digits"}, "is not a record"),
    ],
)
def test_if_one_cannot_be_migrated_none_is(record: Record, said: str, root: Path) -> None:
    place(record, root)
    files = {path: file_digest(path) for path in root.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=re.escape(said)):
        migrate(root)
    assert {path: file_digest(path) for path in root.rglob("*") if path.is_file()} == files


def test_later_formats_take_a_step_more(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_old_default(record: Record) -> Record:
        """A default that changed: what was meant then is written down."""
        settings = record["settings"]
        return {**record, "settings": {**settings, "dense": {"weight_decay": 0.05, **settings["dense"]}}}

    migrate(root)
    place(old(), root)  # one that comes from another branch
    monkeypatch.setattr(migrate_records, "FORMAT", FORMAT + 1)
    monkeypatch.setitem(migrate_records.STEPS, FORMAT, with_old_default)
    assert len(migrate(root)) == len(SETTINGS)
    for row, decay in (("digits-hybrid-long", 0.05), ("dit-maskllm", 0.0)):
        found = read_json(record_file(old(row)["table"], row, root / "reports"))
        assert (found["format"], found["settings"]["dense"]["weight_decay"]) == (FORMAT + 1, decay)
        assert found["settings_digest"] == value_digest(found["settings"])


def test_a_step_must_not_touch_what_was_measured(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(migrate_records.STEPS, 2, lambda record: {**record, "metrics": {}})
    with pytest.raises(AssertionError):
        migrate(root)
    assert all(read_json(path)["format"] == 2 for path in root.rglob("record.json"))


# dvc.lock


def test_lock_says_what_lies_there_afterwards(root: Path) -> None:
    before = (root / "dvc.lock").read_text()
    assert "path: \n        reports/cifar10/" in before
    migrate(root)
    after = (root / "dvc.lock").read_text()
    assert after == lock(root) != before
    changed = [new for old, new in zip(before.split("\n"), after.split("\n"), strict=True) if old != new]
    assert {line.split(":")[0].strip() for line in changed} == {"md5", "size"}
    assert len(changed) == 2 * (len(SETTINGS) + 1)


def test_an_entry_that_was_wrong_before_stays(root: Path) -> None:
    (root / "reports/digits/runs/digits-hybrid-long/evaluation/layers.csv").write_text("other\n")
    before = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    migrate(root)
    after = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    assert {stage for stage in before if before[stage] == after[stage]} == {"evaluate@digits-hybrid-long", "report"}


def test_what_was_interrupted_is_finished(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, count = write_text, 0

    def dying(path: Path, text: str) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(migrate_records, "write_text", dying)
    with pytest.raises(KeyboardInterrupt):
        migrate(root)
    monkeypatch.undo()
    assert len(migrate(root)) == len(SETTINGS) - 1
    assert (root / "dvc.lock").read_text() == lock(root)


def test_without_a_lock(root: Path) -> None:
    (root / "dvc.lock").unlink()
    assert len(migrate(root)) == len(SETTINGS)
    assert not (root / "dvc.lock").exists()


def test_entries_are_those_that_dvc_writes() -> None:
    found = [
        out
        for name, stage in yaml.load((ROOT / "dvc.lock").read_text(), yaml.CSafeLoader)["stages"].items()
        for out in stage.get("outs", [])
        if name.startswith("evaluate@")
    ]
    assert len(found) > 50
    for out in found:
        assert out == {"path": out["path"], "hash": "md5", **dvc_entry(ROOT, out["path"], {})}


# What is committed


def test_committed_records_are_of_the_present_format() -> None:
    assert outdated(ROOT) == {}
    assert relocked(ROOT, "text", {}) == "text"


def test_command_line(root: Path) -> None:
    def called(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "scripts.migrate_records", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})

    row = "reports/digits/runs/digits-hybrid-long/evaluation/record.json"
    found = called("--check")
    assert (found.returncode, found.stderr) == (1, "")
    assert row in found.stdout.splitlines()
    assert found.stdout.endswith(f"\n4 records are not of format {FORMAT}\n")
    assert read_json(root / row)["format"] == 2
    found = called()
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.endswith(f"\n4 records were brought to format {FORMAT}\n")
    assert called("--check").stdout == f"0 records are not of format {FORMAT}\n"
    shutil.copy(OLD[0], root / row)
    (root / row).write_text(json.dumps({**read_json(OLD[0]), "settings": {}}))
    found = called()
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith(f"migrate_records: {row}: settings and their digest disagree")
