"""The command update: what it calls, what of a mask file goes on, what other commands do with its files, mistakes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from commands import CLASSES, DENSE, MODEL, TRAIN, made_of, make_project, measured, run, well
from PIL import Image
from torch import Tensor, nn

from maskllm4v import apply_masks_, apply_permutations_, update_weights_
from maskllm4v.checkpoints.masks import MaskCheckpoint, load_masks, save_masks
from maskllm4v.checkpoints.packed import load_packed_file

ARCHITECTURE = MODEL[:6]  # no data, no workers
IMAGES = 9  # all of the training split
UPDATE = ("update", *MODEL, "-b", "5", "--nsamples", str(IMAGES))
PRIOR = ("--checkpoint", "prior.safetensors")
NEW = ("--save-model", "new.safetensors")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks on a permuted model and, in a folder of their own, on the model as it is; dense weights beside both."""
    folder = make_project(tmp_path_factory.mktemp("project"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prune = ("prune", *MODEL, *DENSE, "--pruner", "magnitude", "--save-model")
        well(*prune, "prior.safetensors", "--permutation", "greedy")
        well(*prune, "plain/prior.safetensors")
        well("export", *PRIOR, *ARCHITECTURE, "-o", "packed.safetensors")
        state = {"other.fc.weight": torch.ones(4, 8), "other.fc.mask": torch.tensor([[1, 1, 0, 0] * 2] * 4)}
        torch.save(state, "strange.pt")
        state = torch.load("dense.pt")
        state["head.bias"] += 1
        torch.save(state, "other.pt")
    return folder


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def dense_model() -> nn.Module:
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    model.load_state_dict(torch.load("dense.pt"))
    return model.eval()


def images(model: nn.Module) -> Tensor:
    """All training images, as timm prepares them."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model) | {"input_size": (3, 32, 32)})
    found = []
    for name in CLASSES:
        for path in sorted(Path("data/imagenet/train", name).iterdir()):
            with Image.open(path) as image:
                found.append(transform(image.convert("RGB")))
    assert len(found) == IMAGES
    return torch.stack(found)


@pytest.mark.parametrize(
    ("flags", "method", "target", "damping"),
    [
        ((), "least_squares", "asymmetric", 0.1),
        (("--target", "symmetric", "--damping", "0.3"), "least_squares", "symmetric", 0.3),
        (("--update", "sparsegpt"), "sparsegpt", "symmetric", 0.01),
    ],
)
def test_weights_are_those_of_the_library(
    flags: tuple[str, ...], method: str, target: str, damping: float, here: Path
) -> None:
    """Of the model whose channels stand in the masks' order; its permutations go on into the new file."""
    done = well(*UPDATE, *PRIOR, *flags, *NEW)
    prior, found = load_masks(here / "prior.safetensors"), load_masks(here / "new.safetensors")
    assert prior.permutations
    assert same(found.permutations, prior.permutations)
    assert same(found.masks, prior.masks)
    assert (found.base, str(found.pattern), found.method) == (prior.base, "2:4", method)
    dense = f"dense-{found.base[:16]}.safetensors"
    said = f"new.safetensors: 2:4 masks of 24 layers, weights updated by {method}"
    assert (done.out, done.err) == ("", f"dense weights: {dense}\n{said}\n")
    model = dense_model()
    batch = images(model)
    apply_masks_(apply_permutations_(model, prior.permutations), prior.masks, "2:4")
    update_weights_(model, method, calibration=batch, target=target, damping=damping)  # type: ignore[arg-type]
    for name in prior.masks:
        expected, weight = model.get_submodule(name).weight.detach(), found.weights[f"{name}.weight"]
        torch.testing.assert_close(weight, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        assert not weight[~found.masks[name]].any()


def test_calibration_draws_from_the_split_that_flags_say(here: Path) -> None:
    def updated(*flags: str) -> Mapping[str, Tensor]:
        well(*UPDATE, *PRIOR, *flags, *NEW)
        return load_masks(here / "new.safetensors").weights

    train, val = updated(), updated("--calibration-split", "val", "--train-split", "absent")
    assert not same(train, val)
    assert same(val, updated("--train-split", "val", "--val-split", "absent"))


def test_gate_and_prior_go_on(here: Path) -> None:
    prior = load_masks(here / "prior.safetensors")
    flipped = {name: mask.flip(1) for name, mask in prior.masks.items()}
    save_masks(here / "learned.safetensors", replace(prior, method="maskllm", gate="positions", prior=flipped))
    well(*UPDATE, "--checkpoint", "learned.safetensors", *NEW)
    found = load_masks(here / "new.safetensors")
    assert (found.gate, found.method) == ("positions", "least_squares")
    assert same(found.prior, flipped)
    well(*UPDATE, *PRIOR, "--save-model", "again.safetensors")
    assert same(found.weights, load_masks(here / "again.safetensors").weights)


def test_updated_weights_are_not_updated_again(here: Path) -> None:
    """The dense ones are, even where the file is the one to write."""
    well(*UPDATE, *PRIOR, *NEW)
    before = load_masks(here / "new.safetensors")
    done = well(*UPDATE, "--checkpoint", "new.safetensors", *NEW)
    assert "new.safetensors: other weights than the dense ones in 24 layers; unused\n" in done.err
    after = load_masks(here / "new.safetensors")
    assert after.digest == before.digest
    done = well("train", *TRAIN, "--checkpoint", "new.safetensors", "--output", "learned.safetensors")
    assert "new.safetensors: other weights than the dense ones in 24 layers; unused\n" in done.err
    assert load_masks(here / "learned.safetensors").weights == {}


def test_updated_weights_are_what_is_measured_and_exported(here: Path) -> None:
    sparse = ("--sparsity-mode", "sparse")

    def cross_entropy(path: str) -> str:
        return well("validate", *MODEL, "--checkpoint", path, *sparse).err.splitlines()[-1].partition(",")[0]

    well(*UPDATE, *PRIOR, *NEW)
    well("export", "--checkpoint", "new.safetensors", *ARCHITECTURE, "-o", "again.safetensors")
    found = measured("--checkpoint", "new.safetensors", *sparse)
    assert found == measured("--checkpoint", "again.safetensors", *sparse)
    assert cross_entropy("new.safetensors") == cross_entropy("again.safetensors") != cross_entropy("prior.safetensors")
    made, tensors = load_masks(here / "new.safetensors"), load_packed_file(here / "again.safetensors").tensors
    dense = apply_permutations_(dense_model(), made.permutations).state_dict()
    assert same(tensors, dense | dict(made.weights))
    done = run("export", "--checkpoint", "new.safetensors", *ARCHITECTURE, "--format", "mask", "-o", "m.safetensors")
    assert (done.code, "masks alone do not give the model" in done.err) == (1, True)


def test_masks_find_their_dense_weights(here: Path) -> None:
    well(*UPDATE, *PRIOR, "--save-model", "out/a.safetensors")
    found = load_masks(here / "out" / "a.safetensors")
    dense = f"dense-{found.base[:16]}.safetensors"
    assert made_of(here / "out") == {"a.safetensors", dense}
    (here / dense).unlink()
    done = run(*UPDATE, *PRIOR, "--save-model", "b/b.safetensors")
    message = f"prior.safetensors: {dense} is not beside it; say --pretrained or --dense-checkpoint"
    assert (done.code, done.err) == (1, f"update: {message}\n")
    assert not (here / "b").exists()
    well(*UPDATE, *PRIOR, *DENSE, "--save-model", "b/b.safetensors")
    assert made_of(here / "b") == {"b.safetensors", dense}
    assert load_masks(here / "b" / "b.safetensors").digest == found.digest


def original(masks: MaskCheckpoint, weights: Mapping[str, Tensor] = {}) -> dict[str, Tensor]:
    """Masks as the original's pruning script saves them."""
    state: dict[str, Tensor] = torch.load("dense.pt")
    return state | dict(weights) | {f"{name}.mask": mask.float() for name, mask in masks.masks.items()}


def test_files_of_the_original(here: Path) -> None:
    """Masks, logits whose masks are other ones than those beside them, and masks of weights that are no dense ones."""
    well(*UPDATE, "--checkpoint", "plain/prior.safetensors", *NEW)
    masks, expected = load_masks(here / "plain" / "prior.safetensors"), load_masks(here / "new.safetensors")
    assert masks.pattern is not None
    torch.save(original(masks), "pruned.pt")
    gates = {f"{n}.gate": masks.pattern.similarity(mask).t().contiguous() for n, mask in masks.masks.items()}
    flipped = replace(masks, masks={name: mask.flip(1) for name, mask in masks.masks.items()})
    torch.save({"state_dict": original(flipped) | gates}, "model_best.pth.tar")
    moved = {name: weight + 0.1 for name, weight in expected.weights.items()}
    torch.save(original(masks, moved), "updated.pt")
    torch.save(original(masks, expected.weights), "zeroed.pt")

    for name in ("pruned.pt", "model_best.pth.tar", "updated.pt", "zeroed.pt"):
        flags = ("--checkpoint", name, "--save-model", "out/it.safetensors")
        done = well(*UPDATE, *DENSE, *flags)
        found = load_masks(here / "out" / "it.safetensors")
        assert (found.digest, found.base, found.method) == (expected.digest, expected.base, "least_squares")
        said = f"{name}: other weights than the dense ones in 24 layers; unused"
        assert (said in done.err) == (name in ("updated.pt", "zeroed.pt"))
        if name == "zeroed.pt":
            continue
        done = well(*UPDATE, *flags)
        assert f"dense weights: those in {name}, as they are" in done.err
        assert (load_masks(here / "out" / "it.safetensors").digest == expected.digest) == (name != "updated.pt")
    done = run(*UPDATE, *flags)
    message = "update: zeroed.pt: pruned weights are zero in it, so the dense ones are lost\n"
    assert (done.code, done.err) == (1, message)


BAD = ("--save-model", "out/m.safetensors")
SPARSEGPT = (*PRIOR, "--update", "sparsegpt")
HEAD = "see maskllm4v update --help"


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--checkpoint", "dense.pt"), 1, "dense.pt holds no masks to start from; dense weights are --dense"),
        (("--checkpoint", "absent.pt"), 1, "absent.pt is missing"),
        ((*PRIOR, "--pattern", "1:4"), 1, "prior.safetensors holds 2:4 masks, not 1:4 ones"),
        ((*PRIOR, "--dense-checkpoint", "other.pt"), 1, "prior.safetensors belongs to another dense model ("),
        ((*PRIOR, "--num-classes", "4"), 1, "does not fit the model: size mismatch for 'head.bias'"),
        (("--checkpoint", "strange.pt", *DENSE), 1, "strange.pt: layer 'other.fc' does not fit the model"),
        (("--checkpoint", "strange.pt"), 1, "strange.pt does not fit the model: "),
        (("--checkpoint", "packed.safetensors"), 1, "packed.safetensors: pruned weights are zero in it, so the dense"),
        (("--checkpoint", "packed.safetensors", *DENSE), 1, "packed.safetensors: its channels are permuted; start"),
        ((*PRIOR, "--nsamples", "10"), 1, "--nsamples is 10, but the train split has 9 images"),
        ((*PRIOR, "--data-dir", "nowhere"), 1, "nowhere/train is no folder; expected nowhere/train/<class>/"),
        ((*PRIOR, "--damping", "-1"), 1, "--damping is -1.0; input should be greater than or equal to 0"),
        (
            (*PRIOR, "--damping", "0", "--nsamples", "1"),
            1,
            "kept weights is singular; calibrate on more samples, or raise --damping",
        ),
        ((*SPARSEGPT, "--target", "asymmetric"), 1, "update: --target is 'asymmetric'; allowed for update 'sparsegpt'"),
        ((*PRIOR, "--update", "none"), 2, "argument --update: invalid choice: 'none' (choose from "),
        ((*PRIOR, "--save-model", "out/m.pt"), 2, "'out/m.pt': masks are written as safetensors; end the name in"),
        ((*PRIOR, "--enable-update"), 2, f"update: unrecognized arguments: --enable-update; {HEAD}"),
        ((), 2, f"update: the following arguments are required: --checkpoint; {HEAD}"),
    ],
    ids=lambda value: "-".join(value[-2:]).strip("-") if isinstance(value, tuple) else "",
)
def test_mistakes_are_told_in_a_line(flags: tuple[str, ...], code: int, message: str, here: Path) -> None:
    before = made_of(here)
    done = run(*UPDATE, *BAD, *flags)
    assert (done.code, done.out) == (code, "")
    *notes, said = done.err.splitlines()
    assert said.startswith("update: ")
    assert message in said
    assert len(notes) <= 1
    assert all(note.startswith("dense weights: ") for note in notes)
    assert made_of(here) == before


@pytest.mark.filterwarnings("ignore:layer .* Hessian not positive definite")
def test_singular_hessian(here: Path) -> None:
    before = made_of(here)
    done = run(*UPDATE, *BAD, *PRIOR, "--damping", "0", "--nsamples", "1")
    assert done.code == 1
    assert "update: layer 'blocks.0.attn.qkv', row 0: the least-squares system" in done.err.splitlines()[-1]
    assert made_of(here) == before
