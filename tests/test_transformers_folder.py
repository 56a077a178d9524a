"""Folders of transformers: what is read of them, and what is refused before transformers sees it."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_segmenters
import torch
from safetensors.torch import load_file, save_file

from maskllm4v.tasks.shared.transformers_folder import (
    build,
    check_folder,
    label_names,
    num_labels,
    preprocessing,
    read_config,
)
from maskllm4v.utils.errors import CheckpointError, ConfigError

pytest.importorskip("transformers")

NAME = "EomtForUniversalSegmentation"  # the quickest to build


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_segmenters.save(NAME, tmp_path_factory.mktemp("folder") / "model")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(path: Path, **changes: Any) -> None:
    """Put values into a JSON file; None takes a key out."""
    found = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def tensors(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of a folder."""
    path = folder / "model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path, metadata={"format": "pt"})


def shard(folder: Path) -> dict[str, str]:
    """Two shards in the place of one file; returns where each tensor lies."""
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    half = len(names) // 2
    where = dict[str, str]()
    for i, part in enumerate((names[:half], names[half:]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()
    return where


def test_a_folder_gives_its_own_weights(saved: Path) -> None:
    model, expected = build(NAME, saved, 3, pretrained=True), load_file(saved / "model.safetensors")
    state = model.state_dict()
    assert not model.training
    assert expected.keys() <= state.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_a_seed_draws_the_weights(saved: Path) -> None:
    before = torch.random.get_rng_state()
    one, same, other = (build(NAME, saved, seed, pretrained=False).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
    assert not torch.equal(one["class_predictor.weight"], other["class_predictor.weight"])


def test_only_the_configuration_is_needed_for_other_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    build(NAME, folder, 0, pretrained=False)


def test_weights_of_half_precision_are_widened(folder: Path) -> None:
    tensors(folder, lambda state: state.update({name: tensor.half() for name, tensor in state.items()}))
    assert build(NAME, folder, 0, pretrained=True).class_predictor.weight.dtype == torch.float32


def test_one_attention_kernel(saved: Path) -> None:
    model = build(NAME, saved, 0, pretrained=True, fused_attention=False)
    assert model.config._attn_implementation == "eager"


def test_shards(saved: Path, folder: Path) -> None:
    shard(folder)
    expected, found = (build(NAME, where, 0, pretrained=True).state_dict() for where in (saved, folder))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_no_network_whatever_the_environment_says(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    from huggingface_hub import constants

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    build(NAME, saved, 0, pretrained=True)
    assert constants.HF_HUB_OFFLINE is False


# What is refused


def only_bin(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:1000])


def without_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def misplaced(folder: Path) -> None:
    where = shard(folder)
    where["class_predictor.bias"] = "model-00002-of-00002.safetensors"
    change(folder / "model.safetensors.index.json", weight_map=where)


def elsewhere(folder: Path) -> None:
    where = shard(folder)
    where["class_predictor.bias"] = "../model.safetensors"
    change(folder / "model.safetensors.index.json", weight_map=where)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "bin": (only_bin, "model.safetensors is missing; 'pytorch_model.bin' can hold code and is not read"),
    "nothing": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing$"),
    "cut": (cut, "model.safetensors is damaged or no safetensors file"),
    "no shard": (without_shard, "model-00002-of-00002.safetensors is missing"),
    "misplaced": (misplaced, "00001-of-00002.safetensors holds 'class_predictor.bias', which .* does not have there"),
    "elsewhere": (elsewhere, "'../model.safetensors' is not the name of a safetensors file in this folder"),
    "code": (lambda f: change(f / "config.json", auto_map={"AutoModel": "own.Net"}), "config.json: auto_map is set"),
    "file": (
        lambda f: change(f / "config.json", transformers_weights="pytorch_model.bin"),
        "config.json: transformers_weights is set",
    ),
    "quantised": (lambda f: change(f / "config.json", quantization_config={}), "quantization_config is set"),
    "adapter": (lambda f: change(f / "adapter_config.json", r=4), "holds an adapter"),
    "missing": (lambda f: tensors(f, lambda s: s.pop("mask_head.fc2.bias")), "model: it lacks 'mask_head.fc2.bias'$"),
    "unknown": (
        lambda f: tensors(f, lambda s: s.update({"neck.weight": torch.zeros(2)})),
        "model: the model has no 'neck.weight'$",
    ),
    "size": (
        lambda f: tensors(f, lambda s: s.update({"class_predictor.bias": torch.zeros(5)})),
        r"model: size mismatch for 'class_predictor.bias': \(5,\), not \(12,\)$",
    ),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "config.json holds a list, not an object"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "names": (lambda f: change(f / "config.json", id2label={"0": "a", "2": "b"}), "id2label are not 0 to 1"),
    "counts": (
        lambda f: change(f / "config.json", id2label={"0": "a"}, num_labels=3),
        "num_labels is 3, but id2label has 1 names",
    ),
    "value": (lambda f: change(f / "config.json", hidden_size="wide"), "config.json: "),
    "parts": (lambda f: change(f / "config.json", num_attention_heads=3), f"is no {NAME}: "),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused(fault: str, folder: Path) -> None:
    break_, said = FAULTS[fault]
    break_(folder)
    with pytest.raises(CheckpointError, match=said) as error:
        build(NAME, folder, 0, pretrained=True)
    assert str(folder) in str(error.value)


def test_no_folder() -> None:
    with pytest.raises(CheckpointError, match="'absent', which is no folder"):
        check_folder(Path("absent"))


def test_another_class(saved: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model_type is 'eomt', but model.name is 'DPTForSemanticSegmentation'"):
        build("DPTForSemanticSegmentation", saved, 0, pretrained=True)
    with pytest.raises(ConfigError, match=r"of which transformers .* has no model"):
        build("EomtConfig", saved, 0, pretrained=True)
    change(folder / "config.json", architectures=["EomtForSomethingElse"])
    with pytest.raises(ConfigError, match=f"is of a EomtForSomethingElse, but model.name is '{NAME}'"):
        build(NAME, folder, 0, pretrained=True)


def test_transformers_are_optional(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"needs transformers: pip install 'maskllm4v\[transformers\]'"):
        build(NAME, saved, 0, pretrained=True)


# What is told


def test_labels(folder: Path) -> None:
    assert (num_labels(folder), label_names(folder)) == (11, None)  # LABEL_0 and so on
    change(folder / "config.json", id2label={"1": "sky", "0": "wall"}, label2id=None)
    assert (num_labels(folder), label_names(folder)) == (2, ("wall", "sky"))
    change(folder / "config.json", id2label=None)
    assert (num_labels(folder), label_names(folder)) == (2, None)
    assert read_config(folder)["model_type"] == "eomt"


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
STATED = {"image_mean": MEAN, "image_std": STD}


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ({**STATED, "size": {"height": 20, "width": 30}}, {"size": (20, 30), "mean": (0.5, 0.4, 0.3)}),
        ({**STATED, "size": {"shortest_edge": 64, "longest_edge": 99}, "resample": 3}, {"size": (64, 64)}),
        ({**STATED, "size": 48, "resample": 2}, {"size": (48, 48), "interpolation": "bilinear"}),
        ({**STATED, "size": 48, "do_resize": False}, {"std": (0.2, 0.25, 0.5)}),
        ({"do_normalize": False}, {"mean": (0, 0, 0), "std": (1, 1, 1)}),
        ({}, {}),
    ],
)
def test_preprocessing(file: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    assert preprocessing(tmp_path) == {}
    change(tmp_path / "preprocessor_config.json", **file)
    found = preprocessing(tmp_path)
    assert found.items() >= expected.items()
    assert ("size" in found) == ("size" in expected)


@pytest.mark.parametrize("stated", [{"rescale_factor": 1 / 127.5}, {"do_rescale": False}, {"do_normalize": False}])
def test_normalisation_is_that_of_transformers(stated: dict[str, Any], tmp_path: Path) -> None:
    """Against transformers' own processor on pixels from 0 to 255."""
    from transformers import SegformerImageProcessor

    change(tmp_path / "preprocessor_config.json", **STATED, **stated)
    pixels = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    processor = SegformerImageProcessor.from_pretrained(tmp_path, do_resize=False)
    expected = processor(pixels, return_tensors="pt", input_data_format="channels_first")["pixel_values"][0]
    found = preprocessing(tmp_path)
    mean, std = (torch.tensor(found[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close((pixels / 255 - mean) / std, expected)


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ({"auto_map": {}}, "auto_map is set"),
        ({**STATED, "image_std": [0, 1, 1]}, "image_std"),
        ({**STATED, "size": "large"}, "size is 'large'"),
        ({**STATED, "resample": 1}, "resample is 1; allowed"),
        ({"rescale_factor": 1}, "image_mean and image_std are missing"),
    ],
)
def test_preprocessing_that_is_refused(file: dict[str, Any], said: str, tmp_path: Path) -> None:
    change(tmp_path / "preprocessor_config.json", **file)
    with pytest.raises(CheckpointError, match=said):
        preprocessing(tmp_path)
