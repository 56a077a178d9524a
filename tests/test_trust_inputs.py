"""What somebody changed behind the pipeline's back: manifests, pictures, mask files under another row's name."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import draw_folder, folder_settings, prepared
from PIL import Image
from small_project import (
    Death,
    copied,
    ready_project,
    run_stage,
    said,
    stage_in,
    states,
    tiny_params,
    together,
)
from test_timm_datasets import timm_settings

from maskllm4v.config import load_experiment
from maskllm4v.data import prepare, read_manifest
from maskllm4v.runs.leftovers import sweep_states
from maskllm4v.runs.makers import check_maker, note_maker
from maskllm4v.utils.errors import CheckpointError, DataError
from maskllm4v.utils.io import file_digest
from maskllm4v.utils.locks import held

FILES = ("tiny-magnitude", "tiny-wanda")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = ready_project(tmp_path_factory.mktemp("inputs"), tiny_params())
    assert run_stage(folder, "prior", "tiny-wanda") == [0], said(folder)
    return folder


@pytest.fixture
def project(inputs: Path, tmp_path: Path) -> Path:
    """With what stages noted about its files."""
    folder = copied(inputs, tmp_path / "project")
    shutil.copytree(inputs / ".cache/made", folder / ".cache/made")
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "pets")


# Manifests


def edit(folder: Path, **values: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_an_edited_manifest_stops_the_next_stage(project: Path) -> None:
    """Its own file and folder are as they were without a seal: DVC hashes them."""
    folder = project / "artifacts/data/digits"
    assert sorted(path.name for path in folder.iterdir()) == ["holdout.csv", "manifest.json", "test.csv", "train.csv"]
    edit(folder, extra={"mean": 0.9, "std": 0.376})
    assert run_stage(project, "prior", "tiny-wanda") == [1]
    assert said(project).startswith("prior tiny-wanda: artifacts/data/digits/manifest.json was changed: ")
    assert "; run the prepare stage again, or delete that file" in said(project)
    assert said(project).count("\n") == 1
    assert run_stage(project, "prepare", "digits") == [0]
    assert run_stage(project, "prior", "tiny-wanda") == [0], said(project)


def test_all_manifests_that_were_written_are_known(source: Path, tmp_path: Path) -> None:
    """DVC brings back an older one from its run cache; one from a new clone has no seal."""
    folder, settings = tmp_path / "m", folder_settings(source)
    first = prepare(settings, folder)
    shutil.copytree(folder, tmp_path / "kept")
    prepare(settings.model_copy(update={"calibration_seed": 7}), folder)
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "kept", folder)
    assert read_manifest(folder).digest == first.digest
    assert read_manifest(tmp_path / "kept").digest == first.digest
    (tmp_path / "m.seal.json").write_text("[]")
    with pytest.raises(DataError, match=r"m\.seal\.json is no seal: .+; run the prepare stage again"):
        read_manifest(folder)
    assert prepare(settings, folder).digest == first.digest
    edit(folder, classes=["dog", "cat"])
    with pytest.raises(DataError, match=r"m/manifest\.json was changed"):
        read_manifest(folder)


# Pictures


def replace_by_another(path: Path) -> None:
    """Of the same size in bytes and in pixels."""
    size = path.stat().st_size
    blank(path)
    path.write_bytes(path.read_bytes() + bytes(size - path.stat().st_size))


def blank(path: Path) -> None:
    with Image.open(path) as image:
        size = image.size
    Image.new("RGB", size).save(path)


@pytest.mark.parametrize("kind", ["folder", "timm"])
def test_a_hashed_picture_is_checked_as_it_is_read(kind: str, source: Path, tmp_path: Path) -> None:
    make = folder_settings if kind == "folder" else timm_settings
    data, path = prepared(make(source, hash_files=True), tmp_path / "m"), source / "train/dog/3.png"
    before = data.images("train", np.arange(11), None)
    assert before.isfinite().all()
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    replace_by_another(path)
    os.utime(path, ns=times)
    for augment in (None, np.random.default_rng(0)):
        with pytest.raises(DataError, match=r"dog/3\.png.* has changed since"):
            data.images("train", np.arange(11), augment)
    assert data.images("train", np.array([0, 1, 2, 9, 10]), None).shape[0] == 5


def test_a_picture_of_another_size_is_noticed_without_a_hash(source: Path, tmp_path: Path) -> None:
    data, path = prepared(folder_settings(source), tmp_path / "m"), source / "train/dog/3.png"
    blank(path)
    with pytest.raises(DataError, match=r"dog/3\.png cannot be read as what was prepared: it has changed since"):
        data.images("train", np.arange(11), None)


@pytest.mark.parametrize("change", ["time", "size", "gone"])
def test_some_pictures_are_looked_at_before_anything_is_computed(change: str, source: Path, tmp_path: Path) -> None:
    settings, path = folder_settings(source), source / "train/dog/3.png"
    prepared(settings, tmp_path / "m")
    if change == "time":
        os.utime(path, ns=(1, 1))
    elif change == "size":
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        path.unlink()
    with pytest.raises(DataError, match=r"dog/3\.png (has changed since|cannot be read: No such file)"):
        reopened(settings, tmp_path / "m")
    if change != "gone":
        prepared(settings, tmp_path / "m")


def reopened(settings: Any, folder: Path) -> Any:
    """As a later stage opens it."""
    from maskllm4v.data.folder import reader

    return reader(read_manifest(folder), settings)


# Mask files


def test_masks_of_another_row_are_refused_by_both_names(project: Path) -> None:
    mine, others = (project / "artifacts" / row / "seed0.safetensors" for row in FILES)
    before = file_digest(mine)
    shutil.copy(others, mine)
    refusal = (
        "artifacts/tiny-magnitude/seed0.safetensors is not of row 'tiny-magnitude', seed 0: row 'tiny-wanda', seed 0 "
        "has made it; make the row again"
    )
    for stage, row in (
        ("evaluate", "tiny-magnitude"),
        ("train", "tiny-averaged"),
        ("finetune", "tiny-tuned"),
        ("update", "tiny-squares"),
    ):
        assert run_stage(project, stage, row) == [1]
        assert said(project).startswith(f"{stage} {row}: {refusal}"), said(project)
        assert said(project).count("\n") == 1
    assert not (project / "reports/tiny/runs/tiny-magnitude/evaluation/record.json").exists()
    assert run_stage(project, "prior", "tiny-magnitude") == [0]
    assert file_digest(mine) == before
    assert run_stage(project, "evaluate", "tiny-magnitude") == [0], said(project)


def test_dense_weights_of_another_seed_are_refused(inputs: Path, tmp_path: Path) -> None:
    """They fit the model, and nothing that was made of them lies there yet."""
    project = copied(inputs, tmp_path / "project")
    shutil.copytree(inputs / ".cache/made/tiny-dense", project / ".cache/made/tiny-dense")
    (project / ".cache/made/tiny-dense/seed0.txt").rename(project / ".cache/made/tiny-dense/seed1.txt")
    assert run_stage(project, "prior", "tiny-wanda") == [1]
    assert said(project).startswith(
        "prior tiny-wanda: artifacts/tiny-dense/seed0.safetensors is not of row 'tiny-dense', seed 0: "
        "row 'tiny-dense', seed 1 has made it; make the row again"
    )


def test_rows_that_made_the_same_are_both_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_maker("a", 0, "1" * 64)  # nobody noted it
    for row, seed in (("a", 0), ("b", 0), ("b", 0)):
        note_maker(row, seed, "1" * 64)
    for row in ("a", "b"):
        check_maker(row, 0, "1" * 64)
    with pytest.raises(CheckpointError, match=re.escape("is not of row 'b', seed 1: row 'a', seed 0 has made it")):
        check_maker("b", 1, "1" * 64)
    check_maker("c", 0, "1" * 64, kin={"a", "b"})  # restored by DVC; its masks are theirs (update: none)
    with pytest.raises(CheckpointError, match=re.escape("is not of row 'c', seed 0: row 'b', seed 0 has made it")):
        check_maker("c", 0, "1" * 64, kin={"a"})
    note_maker("a", 0, "2" * 64)  # with other settings
    check_maker("a", 0, "1" * 64)
    assert (tmp_path / ".cache/made/b/seed0.txt").read_text() == "1" * 64 + "\n"


# States of finished rows


def test_states_of_a_row_that_dvc_restored_go(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of a row that is unfinished, or is being trained."""
    row = "tiny-averaged"
    assert run_stage(project, "train", row) == [0]
    finished = project / "artifacts" / row
    finished.rename(project / "cached")  # as DVC does before it starts a stage
    assert run_stage(project, "train", row, dies=Death(9)) != [0]
    shutil.rmtree(finished, ignore_errors=True)
    monkeypatch.chdir(project)
    experiment = load_experiment()
    monkeypatch.setenv("DVC_STAGE", "evaluate@tiny-magnitude")
    sweep_states(experiment)
    assert states(project, row)
    (project / "cached").rename(finished)
    with held(project / f".cache/resume/{row}.lock", "it is trained"):
        sweep_states(experiment)
    assert states(project, row)
    monkeypatch.delenv("DVC_STAGE")  # a person trains it once more, by hand
    sweep_states(experiment)
    assert states(project, row)
    assert together(project, _under_dvc, "evaluate", "tiny-magnitude") == [0], said(project)
    assert not (project / f".cache/resume/{row}").exists()


def _under_dvc(stage: str, row: str) -> None:
    os.environ["DVC_STAGE"] = f"{stage}@{row}"
    stage_in(stage, row, None)
