"""Recipes with masks or boxes: made pictures lie where they look, and their shortened settings fit a tiny model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from import_graph import ROOT

from maskllm4v.config import load_experiment
from maskllm4v.data import prepare
from maskllm4v.tasks.base import open_task
from maskllm4v.utils.errors import DataError

pytest.importorskip("transformers")
RECIPES = [
    path.stem
    for path in sorted((ROOT / "experiments").glob("*.yaml"))
    if yaml.safe_load(path.read_text())["data"]["source"] in ("masks", "coco")
]


def test_there_are_recipes_of_both_kinds() -> None:
    assert {"own_masks", "own_coco"} <= set(RECIPES)


@pytest.mark.filterwarnings("ignore:.*no training mask has a pixel")  # of most classes of a benchmark
@pytest.mark.parametrize("recipe", RECIPES)
def test_made_pictures_and_a_tiny_model_suit_a_recipe(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    import annotated_rehearsal
    import made_pictures
    import rehearsal

    params: dict[str, Any] = rehearsal.experiment(recipe)
    made_pictures.lay_out(params, tmp_path)
    with pytest.raises(SystemExit, match="is there; nothing was made"):
        made_pictures.lay_out(params, tmp_path)
    shortened = rehearsal.overridden(params, annotated_rehearsal.shortened(params, 2, 2))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(shortened))
    experiment = load_experiment(tmp_path / "params.yaml")
    manifest = prepare(experiment.data, tmp_path / "prepared")
    held = experiment.data.holdout
    assert {split: len(entries) for split, entries in manifest.splits.items() if entries} == {
        "train": 20 - held,
        "test": 8,
        **({"holdout": held} if held else {}),
    }
    task: Any = open_task(experiment.task_spec(), tmp_path / "prepared")
    model = task.build_model(0, pretrained=True)
    (batch,) = task.train_batches(seed=0, batch_size=2, steps=1)
    assert batch.images.shape[0] == 2
    assert task.loss(task.forward(model, batch), batch).isfinite()


@pytest.mark.parametrize("recipe", ["own_masks", "own_coco"])
def test_own_files_are_known_by_their_bytes(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    import made_pictures
    import rehearsal

    params: dict[str, Any] = rehearsal.experiment(recipe)
    made_pictures.lay_out(params, tmp_path)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    data = load_experiment(tmp_path / "params.yaml").data
    before = prepare(data, tmp_path / "prepared").splits["train"]
    picture = max((tmp_path / params["data"]["root"]).rglob("train_*.jpg"))
    picture.write_bytes(picture.read_bytes() + b"\0")
    assert prepare(data, tmp_path / "prepared").splits["train"] != before
    picture.write_bytes(b"no picture")
    with pytest.raises(DataError, match=picture.name):
        prepare(data, tmp_path / "prepared")
