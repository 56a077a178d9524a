"""Rows whose dense model was permuted before it was pruned, through all stages and out to others."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import maskllm4v
import stages.dense
import stages.evaluate
import stages.export
import stages.finetune
import stages.prepare
import stages.prior
import stages.train
import stages.update
from maskllm4v.checkpoints.apply import install
from maskllm4v.checkpoints.format import load_verified
from maskllm4v.checkpoints.masks import MaskCheckpoint, load_dense, load_masks, save_masks
from maskllm4v.checkpoints.packed import load_packed
from maskllm4v.config import Experiment, parse_experiment
from maskllm4v.evaluation.evaluate import measure
from maskllm4v.export.verify import passes, verify_file
from maskllm4v.runs.paths import (
    checkpoint,
    data_folder,
    export_folder,
    layers_file,
    mask_statistics_file,
    record_file,
)
from maskllm4v.sparsity.surgery import fold_
from maskllm4v.tasks.base import open_task
from maskllm4v.tasks.classification.models import build_model
from maskllm4v.utils.errors import CheckpointError
from maskllm4v.utils.io import file_digest, read_json

pytestmark = pytest.mark.slow

READERS = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.proj", "mlp.fc2")]
PERMUTED = ["magnitude", "wanda", "updated", "learned", "tuned", "solved", "hybrid"]
RAW: dict[str, Any] = {
    "table": "t",
    "title": "T",
    "seeds": [0, 1],
    "data": {"name": "digits", "source": "digits", "calibration": 40},
    "task": {"eval_batch_size": 300},
    "model": {
        "name": "VisionTransformer",
        "args": {
            **{"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10, "embed_dim": 16, "depth": 2},
            **{"num_heads": 2, "class_token": False, "global_pool": "avg"},
        },
        "fused_attention": False,
    },
    "dense": {"row": "dense", "init": "scratch", "steps": 60, "batch_size": 64, "lr": 0.01},
    "priors": {
        "plain": {"method": "magnitude"},
        "magnitude": {"method": "magnitude", "permutation": "greedy"},
        "wanda": {"method": "wanda", "permutation": "greedy"},
        "updated": {"method": "sparsegpt", "update_weights": True, "permutation": "greedy"},
    },
    "learning": {"steps": 4, "batch_size": 32, "log_every": 2},
    "learned": {
        "learned": {"prior": "wanda", "lr": 0.3},
        "hybrid": {"prior": "solved", "weights": "updated", "distillation": 1.0, "lr": 0.5, "min_lr": 0.5},
    },
    "updated": {"solved": {"masks": "wanda", "update": "least_squares"}},
    "finetuned": {"tuned": {"start": "magnitude"}},
    "rows": dict.fromkeys(["dense", "plain", *PERMUTED], "a row"),
    "exports": {"learned": {"formats": ["packed", "mask", "dense", "onnx"], "dtypes": ["fp32"]}},
    "runtime": {"device": "cpu", "live": False},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all stages but ``report`` have run."""
    experiment, folder = parse_experiment(RAW), tmp_path_factory.mktemp("permuted")
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        stages.prepare.main(experiment, "digits")
        stages.dense.main(experiment, "dense")
        for row in experiment.priors:
            stages.prior.main(experiment, row)
        stages.update.main(experiment, "solved")
        for row in experiment.learned:
            stages.train.main(experiment, row)
        stages.finetune.main(experiment, "tuned")
        for row in experiment.rows:
            stages.evaluate.main(experiment, row)
        stages.export.main(experiment, "learned")
    return folder


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    monkeypatch.chdir(made)
    return parse_experiment(RAW)


def dense_model(experiment: Experiment, seed: int = 0) -> nn.Module:
    model = build_model(experiment.model, seed, pretrained=False)  # type: ignore[arg-type]
    load_dense(checkpoint("dense", seed), model, experiment.model.name)
    return model


def folded(experiment: Experiment, row: str, seed: int = 0) -> nn.Module:
    return fold_(install(dense_model(experiment, seed), load_masks(checkpoint(row, seed)), row))


def images(experiment: Experiment) -> Tensor:
    task = open_task(experiment.task_spec(), data_folder("digits"))
    return task.source.images("test", np.arange(32), None)  # type: ignore[attr-defined]


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], tensor) for name, tensor in b.items())


def diagnostics(row: str, column: str) -> dict[str, float]:
    """Of the first seed, by layer."""
    with layers_file("t", row).open() as lines:
        return {line["layer"]: float(line[column]) for line in csv.DictReader(lines) if line["seed"] == "0"}


@pytest.mark.parametrize("row", PERMUTED)
@pytest.mark.parametrize("seed", [0, 1])
def test_files_hold_permutations_that_keep_the_outputs(row: str, seed: int, here: Experiment) -> None:
    found = load_masks(checkpoint(row, seed))
    assert sorted(found.permutations) == READERS
    dense = dense_model(here, seed)
    assert found.base == load_dense(checkpoint("dense", seed), dense, here.model.name)
    batch = images(here).double()
    with torch.no_grad():
        wanted = dense.double()(batch)
        permuted = maskllm4v.apply_permutations_(dense, found.permutations)(batch)
    assert float((permuted - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


def test_rows_start_from_their_priors_order(here: Experiment) -> None:
    for row, prior in (("learned", "wanda"), ("tuned", "magnitude"), ("solved", "wanda"), ("hybrid", "solved")):
        a, b = load_masks(checkpoint(row, 1)).permutations, load_masks(checkpoint(prior, 1)).permutations
        assert all(torch.equal(a[name], b[name]) for name in READERS)


@pytest.mark.parametrize("permuted", [True, False])
def test_masks_are_learned_on_the_permuted_weights(permuted: bool, here: Experiment) -> None:
    """What the library learns there is in the file; without the permutation it is something else."""
    task, prior = open_task(here.task_spec(), data_folder("digits")), load_masks(checkpoint("wanda", 0))
    model = dense_model(here)
    if permuted:
        maskllm4v.apply_permutations_(model, prior.permutations)
    maskllm4v.make_learnable(model, prior.masks, pattern="2:4")
    learned = maskllm4v.learn_masks(model, task, here.learned["learned"], prior=prior.masks).masks
    found = load_masks(checkpoint("learned", 0)).masks
    assert all(torch.equal(found[name], mask) for name, mask in learned.items()) == permuted


def start_of(experiment: Experiment, *, permuted: bool = True) -> tuple[nn.Module, MaskCheckpoint]:
    """The dense model, in Wanda's order or in its own, and what Wanda's file holds."""
    found, model = load_masks(checkpoint("wanda", 0)), dense_model(experiment)
    return maskllm4v.apply_permutations_(model, found.permutations if permuted else {}), found


@pytest.mark.parametrize("permuted", [True, False])
def test_weights_are_solved_for_on_the_permuted_model(permuted: bool, here: Experiment) -> None:
    task, (model, prior) = open_task(here.task_spec(), data_folder("digits")), start_of(here, permuted=permuted)
    maskllm4v.apply_masks_(model, prior.masks, "2:4")
    maskllm4v.update_weights_(model, "least_squares", calibration=task.calibration(128, 0))
    found = load_masks(checkpoint("solved", 0))
    assert same(found.masks, prior.masks)
    weights = {f"{name}.weight": model.get_submodule(name).weight for name in found.masks}
    assert same(found.weights, weights) == permuted


def test_hybrids_learn_on_the_permuted_model(here: Experiment) -> None:
    """From updated weights, taught by the dense model; what they keep is updated or dense, in the same order."""
    task, (model, _) = open_task(here.task_spec(), data_folder("digits")), start_of(here)
    solved, found, dense = load_masks(checkpoint("solved", 0)), load_masks(checkpoint("hybrid", 0)), start_of(here)[0]
    started = {
        f"{name}.weight": torch.where(mask, solved.weights[f"{name}.weight"], dense.get_submodule(name).weight)
        for name, mask in solved.masks.items()
    }
    model.load_state_dict(started, strict=False)
    maskllm4v.make_learnable(model, solved.masks, pattern="2:4")
    settings = here.learned["hybrid"]
    learned = maskllm4v.learn_masks(model, task, settings, prior=solved.masks, teacher=dense.eval()).masks
    assert same(found.masks, learned)
    assert not same(found.masks, solved.masks)
    assert same(found.prior, solved.masks)
    assert same(found.weights, {n: w * learned[n.removesuffix(".weight")] for n, w in started.items()})


def test_folded_hybrid_is_its_file_put_back_by_hand(here: Experiment) -> None:
    """Into the dense model's own order, tensor by tensor; biases then stay where they are."""
    found, model = load_masks(checkpoint("hybrid", 0)), dense_model(here)
    weights = {name: weight * found.masks[name.removesuffix(".weight")] for name, weight in found.weights.items()}
    for block in ("blocks.0", "blocks.1"):
        hidden, values = (found.permutations[f"{block}.{name}"].argsort() for name in ("mlp.fc2", "attn.proj"))
        q_and_k, v = weights[f"{block}.attn.qkv.weight"].split([32, 16])
        weights[f"{block}.attn.qkv.weight"] = torch.cat([q_and_k, v[values]])
        weights[f"{block}.attn.proj.weight"] = weights[f"{block}.attn.proj.weight"][:, values]
        weights[f"{block}.mlp.fc1.weight"] = weights[f"{block}.mlp.fc1.weight"][hidden]
        weights[f"{block}.mlp.fc2.weight"] = weights[f"{block}.mlp.fc2.weight"][:, hidden]
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    batch = images(here).double()
    with torch.no_grad():
        wanted, outputs = model.double()(batch), folded(here, "hybrid").double()(batch)
    assert float((outputs - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


def test_rows_without_permutation_are_as_they_were(here: Experiment) -> None:
    tensors = load_verified(checkpoint("plain", 0), "masks")[0]
    assert not load_masks(checkpoint("plain", 0)).permutations
    assert {name.partition(".")[0] for name in tensors} == {"mask"}
    assert "permutation" not in here.row("plain").made_with()["prior"]
    settings = {row: here.row(row).made_with() for row in PERMUTED}
    settings["hybrid"] = settings["hybrid"]["start"]
    assert {row: found["prior"]["permutation"] for row, found in settings.items()} == dict.fromkeys(PERMUTED, "greedy")


def test_layers_are_compared_with_the_permuted_dense_model(here: Experiment) -> None:
    """Masks keep more of it, and no layer's error is that of channels that do not belong together."""
    energy = {row: diagnostics(row, "kept_energy") for row in ("plain", "magnitude")}
    assert all(energy["magnitude"][name] > energy["plain"][name] + 0.002 for name in READERS)
    others = energy["plain"].keys() - set(READERS)
    assert all(energy["magnitude"][name] == pytest.approx(energy["plain"][name], abs=2e-6) for name in others)
    for row in ("magnitude", "wanda", "updated", "solved", "hybrid"):
        assert max(diagnostics(row, "output_error").values()) < 0.7
    assert max(diagnostics("tuned", "output_error").values()) < 0.7
    assert min(diagnostics("learned", "prior_agreement").values()) > 0.5


@pytest.mark.parametrize("row", PERMUTED)
def test_what_was_measured_is_what_the_file_gives(row: str, here: Experiment) -> None:
    task = open_task(here.task_spec(), data_folder("digits"))
    record = read_json(record_file("t", row))
    assert record["inputs"]["dense"] == [load_verified(checkpoint("dense", s), "dense")[1]["digest"] for s in (0, 1)]
    found = task.evaluate(folded(here, row, 1))
    assert record["summaries"]["1"]["top1"] == pytest.approx(found["top1"], abs=1e-3)


def test_every_export_is_an_ordinary_model(here: Experiment) -> None:
    wanted = folded(here, "learned")
    batch = images(here)
    with torch.no_grad():
        outputs = wanted(batch)
    files = {path.name.split("-", 1)[1]: path for path in export_folder("learned").iterdir()}
    plain = load_packed(build_model(here.model, 7, pretrained=False), files["packed-fp32.safetensors"])  # type: ignore[arg-type]
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor)
    tensors, about = load_verified(files["dense-fp32.safetensors"], "dense")
    assert sorted(about["permuted"]) == READERS
    plain.load_state_dict(tensors)
    with torch.no_grad():
        assert torch.equal(plain(batch), outputs)
    assert passes(verify_file(files["dense-fp32.safetensors"]))
    masks = load_masks(files["mask.safetensors"])
    again = fold_(install(dense_model(here), masks, "masks alone"))
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in wanted.state_dict().items())

    import onnxruntime

    session = onnxruntime.InferenceSession(files["fp32.onnx"], providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    found = session.run(None, {given.name: batch.numpy()})[0]
    np.testing.assert_allclose(found, outputs.numpy(), atol=1e-4)


def test_seeds_whose_channels_stand_in_other_orders_are_not_compared(here: Experiment) -> None:
    def agreements(row: str) -> set[str]:
        with mask_statistics_file("t", row).open() as lines:
            return {line["seed_agreement"] for line in csv.DictReader(lines)}

    assert agreements("wanda") == {""}
    assert "" not in agreements("plain")


def test_weight_that_is_shown_is_the_one_its_mask_lies_on(here: Experiment) -> None:
    """Values stand in the last third of its rows."""
    task = open_task(here.task_spec(), data_folder("digits"))
    found = measure(here, task, 0, checkpoint("dense", 0), checkpoint("wanda", 0))
    model, weight = dense_model(here), torch.from_numpy(found.weight)
    assert found.layers[0][0] == "blocks.0.attn.qkv"
    assert not torch.equal(weight, model.blocks[0].attn.qkv.weight)
    maskllm4v.apply_permutations_(model, load_masks(checkpoint("wanda", 0)).permutations)
    assert torch.equal(weight, model.blocks[0].attn.qkv.weight)
    assert measure(here, task, 1, checkpoint("dense", 1), checkpoint("wanda", 1)).weight is None  # one is enough


def test_the_same_bytes_again(here: Experiment, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file_digest(made / checkpoint("wanda", 1))
    (tmp_path / "artifacts").mkdir()
    for name in ("data", "dense"):
        (tmp_path / "artifacts" / name).symlink_to(made / "artifacts" / name)
    monkeypatch.chdir(tmp_path)
    stages.prior.main(here, "wanda")
    assert file_digest(checkpoint("wanda", 1)) == before


# Files


def test_permutations_go_round(here: Experiment, tmp_path: Path) -> None:
    found = load_masks(checkpoint("updated", 0))
    digest = save_masks(tmp_path / "a.safetensors", found)
    again = load_masks(tmp_path / "a.safetensors")
    assert (again.digest, digest) == (found.digest, found.digest)
    assert all(torch.equal(again.permutations[name], found.permutations[name]) for name in READERS)
    unpermuted = save_masks(tmp_path / "b.safetensors", replace(found, permutations={}))
    assert unpermuted != digest


def wrong(found: MaskCheckpoint, **permutations: Tensor) -> MaskCheckpoint:
    return replace(found, permutations={**found.permutations, **permutations})


@pytest.mark.parametrize(
    ("layer", "order", "said"),
    [
        ("blocks.0.mlp.fc2", torch.zeros(64, dtype=torch.long), "not a permutation of its 64 input channels"),
        ("blocks.0.mlp.fc2", torch.arange(16), "not a permutation of its 64 input channels"),
        ("blocks.1.attn.proj", torch.arange(16).flip(0), "moves channels between its 2 heads"),
        ("blocks.0.mlp.fc1", torch.arange(16), "no channels of the model that can be permuted"),
        ("blocks.9.mlp.fc2", torch.arange(64), "no channels of the model that can be permuted"),
    ],
)
def test_permutations_that_do_not_fit_are_refused(
    layer: str, order: Tensor, said: str, here: Experiment, tmp_path: Path
) -> None:
    save_masks(tmp_path / "a.safetensors", wrong(load_masks(checkpoint("wanda", 0)), **{layer: order}))
    model = dense_model(here)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"^a file: layer '{layer}': .*{said}"):
        install(model, load_masks(tmp_path / "a.safetensors"), "a file")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
