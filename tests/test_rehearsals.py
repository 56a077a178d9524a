"""Rehearsals: the settings that they shorten are those of an experiment."""

from __future__ import annotations

import pytest
from import_graph import ROOT

from maskllm4v.config import parse_experiment


def test_imagenet_is_shortened_in_the_units_that_labels_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import imagenet_rehearsal
    import rehearsal

    params = rehearsal.experiment(imagenet_rehearsal.TABLE)
    overrides = imagenet_rehearsal.shortened(params, 3, images=24, batch_size=4, steps=2)
    found = parse_experiment(rehearsal.overridden(params, overrides))
    trained = [*found.learned.values(), *found.finetuned.values()]
    assert len(trained) == 8
    for settings in trained:
        assert settings.total_steps(24 // 4) == 2
