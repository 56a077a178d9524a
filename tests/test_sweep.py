"""Masks hold for any architecture: the sweep's properties on the models that cover its mechanisms.

``make sweep`` runs them on all families. Exceptions are those of docs/models.md, and fail.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

import pytest
import torch
from import_graph import ROOT
from timm.models._registry import _module_to_models
from torch import Tensor, nn

from maskllm4v.sparsity.survey import survey
from scripts.sweep.__main__ import SUBJECTS, main
from scripts.sweep.covering import COVERING
from scripts.sweep.exceptions import EXCEPTIONS, Known, unexpected
from scripts.sweep.models import Subject
from scripts.sweep.properties import PROPERTIES, check
from scripts.sweep.timm_models import MEMBERS, WITHOUT

DOCUMENT = ROOT / "docs/models.md"


@pytest.mark.parametrize("name", COVERING)
def test_masks_hold(name: str) -> None:
    assert unexpected(name, check(SUBJECTS[name])) == []


# What the sweep consists of


def test_every_family_of_timm_is_swept_or_has_no_matrices() -> None:
    swept = {family.partition(" ")[0] for family in MEMBERS}
    assert swept | WITHOUT == set(_module_to_models), "timm has other families: see scripts/sweep/timm_models.py"
    assert not swept & WITHOUT
    assert all(name in _module_to_models[family.partition(" ")[0]] for family, (name, _, _) in MEMBERS.items())


def test_exceptions_are_those_of_the_document() -> None:
    text = DOCUMENT.read_text()
    rows = re.findall(r"^\| `([^`]+)` \| ([a-z]+) \| (.+) \|$", text, re.M)
    assert rows == [(one.model, one.property, one.why) for one in EXCEPTIONS]
    assert ("At present there is none." in text) == (not EXCEPTIONS)
    assert all(one.model in SUBJECTS and one.property in PROPERTIES for one in EXCEPTIONS)


def test_the_document_names_all_that_is_swept() -> None:
    text = DOCUMENT.read_text()
    assert [name for name in SUBJECTS if f"`{name.partition(' ')[2]}`" not in text] == []
    assert [family for family in sorted(WITHOUT) if f"`{family}`" not in text] == []


# That it can fail


class Copying(nn.Module):
    """Multiplies by a copy that it keeps of a weight: a mask on the weight has no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.register_buffer("kept", torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(x @ self.kept) + self.used(x))
        return y


def subject(make: type[nn.Module] = Copying) -> Subject:
    return Subject("copying", make, lambda: torch.randn(6, 16))


def test_a_mask_without_effect_is_found() -> None:
    found = check(subject())
    assert found.keys() == {"gradients", "calibration"}
    assert all("'idle'" in fault for faults in found.values() for fault in faults)


@pytest.mark.parametrize("broken", ["forward", "fold", "hooks", "keys"])
def test_masks_of_layers_would_be_found(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The faults of a design that replaces layers, each on a model that reads its weights itself."""
    from maskllm4v.sparsity import masks, surgery

    if broken == "forward":
        monkeypatch.setattr(masks.Mask, "read", lambda self, weight: weight)
    elif broken == "fold":
        monkeypatch.setattr(masks.Mask, "fold", lambda self, weight: weight.detach().clone())
    elif broken == "hooks":
        real = surgery.settle_

        def lose(model: nn.Module) -> None:
            real(model)
            for module in model.modules():
                module._forward_hooks.clear()

        monkeypatch.setattr("maskllm4v.oneshot.prune.settle_", lose)
    else:
        monkeypatch.setattr("maskllm4v.sparsity.layers.mask_name", lambda attribute: f"{attribute}_cover")
    expected = {"forward": "outputs", "fold": "pattern", "hooks": "hooks", "keys": "keys"}[broken]
    assert expected in check(SUBJECTS["torch encoder"])


def test_only_listed_faults_are_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = Known("copying", "gradients", "layer 'idle'*", "it is idle")
    monkeypatch.setattr("scripts.sweep.exceptions.EXCEPTIONS", (listed,))
    assert unexpected("copying", {"gradients": ["layer 'idle': nothing"]}) == []
    assert unexpected("copying", {"gradients": ["layer 'idle': nothing", "more"]}) == ["gradients: more"]
    assert unexpected("copying", {"keys": ["layer 'idle'"], "gradients": ["layer 'idle'"]}) == ["keys: layer 'idle'"]
    (fault,) = unexpected("copying", {})
    assert fault.startswith("gradients: holds by now")
    assert unexpected("another", {}) == []


def test_the_command_says_what_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(SUBJECTS, "copying", subject())
    assert main(["copying"]) == 1
    assert re.search(r"^copying +\d+\.\d s  fails\n    gradients: layer 'idle'", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        main(["no such model"])


# What it stands on


def test_families_without_matrices_have_none() -> None:
    import timm

    for family in ("resnet", "efficientvim", "repvit"):
        name = min(_module_to_models[family])
        with torch.device("meta"):
            model = timm.create_model(name)
        heads = model.pretrained_cfg["classifier"]
        found = survey(model, on_misfit="skip").prunable
        assert all(
            any(fnmatchcase(one, f"{head}*") for head in ([heads] if isinstance(heads, str) else heads))
            for one in found
        )
