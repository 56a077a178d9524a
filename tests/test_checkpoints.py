"""Our safetensors files: what goes in comes out, and files of something else are refused by name."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mask_files import BASE, checkpoint, model, random_mask, same
from safetensors.torch import save_file
from torch import nn

from maskllm4v.checkpoints.format import load_verified, tensors_digest
from maskllm4v.checkpoints.masks import (
    MaskCheckpoint,
    load_dense,
    load_masks,
    load_plain_state,
    load_state,
    save_dense,
    save_masks,
)
from maskllm4v.checkpoints.third_party import dense_state, load_any
from maskllm4v.export.verify import verify_file
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import CheckpointError

# Round trips


def test_dense_round_trip(tmp_path: Path) -> None:
    first, second = model(), model()
    with torch.no_grad():
        first[1].running_mean.add_(3)
        first[1].num_batches_tracked.add_(5)
    digest = save_dense(tmp_path / "a", first, "mlp")
    assert not same(first.state_dict(), second.state_dict())
    assert load_dense(tmp_path / "a", second, "mlp") == digest
    assert same(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "3:4"])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("prior", [False, True])
def test_masks_round_trip(pattern: str, weights: bool, prior: bool, tmp_path: Path) -> None:
    wanted = checkpoint(pattern, weights=weights, prior=prior)
    digest = save_masks(tmp_path / "a", wanted)
    found = load_masks(tmp_path / "a", pattern=pattern, base=BASE)
    assert (found.pattern, found.base, found.method, found.digest) == (NMPattern(pattern), BASE, "wanda", digest)
    assert same(found.masks, wanted.masks)
    assert same(found.weights, wanted.weights)
    assert same(found.prior, wanted.prior)
    assert all(mask.dtype is torch.bool for mask in found.masks.values())


def test_gate_round_trip(tmp_path: Path) -> None:
    given = checkpoint("4:8")
    for name, gate in (("a", "candidates"), ("b", "positions")):
        save_masks(tmp_path / name, dataclasses.replace(given, gate=gate))
        assert load_masks(tmp_path / name).gate == gate
    save_masks(tmp_path / "c", given)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()  # as before there was a choice
    assert "gate" not in load_verified(tmp_path / "a", "masks")[1]


def test_masks_take_less_than_a_bit_a_weight(tmp_path: Path) -> None:
    mask = random_mask(256, 256, 2, 4)
    save_masks(tmp_path / "a", MaskCheckpoint(NMPattern("2:4"), {"fc": mask}, BASE, "wanda", {}, {}))
    assert (tmp_path / "a").stat().st_size < 0.75 * mask.numel() / 8 + 1024


def test_updated_weights_may_be_parameters_and_views(tmp_path: Path) -> None:
    wanted = checkpoint()
    parameter = nn.Parameter(torch.randn(16, 6).t())
    save_masks(tmp_path / "a", MaskCheckpoint(**{**vars(wanted), "weights": {"blocks.0.fc": parameter}}))
    assert torch.equal(load_masks(tmp_path / "a").weights["blocks.0.fc"], parameter.detach())


def test_layers_that_share_a_weight_round_trip(tmp_path: Path) -> None:
    first, second = (nn.ModuleList([nn.Linear(8, 8)]) for _ in range(2))
    for tied in (first, second):
        tied.append(tied[0])
    save_dense(tmp_path / "a", first, "tied")
    load_dense(tmp_path / "a", second, "tied")
    assert same(first.state_dict(), second.state_dict())


def test_trained_weights_without_masks_round_trip(tmp_path: Path) -> None:
    state = {"mask.head": torch.randn(3), **model().state_dict()}
    digest = save_masks(tmp_path / "a", MaskCheckpoint(None, {}, BASE, "finetuned", state, {}))
    found = load_masks(tmp_path / "a", base=BASE)
    assert (found.pattern, found.masks, found.prior, found.digest) == (None, {}, {}, digest)
    assert same(found.weights, state)
    with pytest.raises(CheckpointError, match="a holds None masks, not 2:4 ones"):
        load_masks(tmp_path / "a", pattern="2:4")


@pytest.mark.parametrize("kind", ["masks", "prior"])
def test_masks_need_a_pattern(kind: str, tmp_path: Path) -> None:
    facts = {"masks": {}, "prior": {}, kind: checkpoint().masks}
    with pytest.raises(CheckpointError, match="a: masks without a pattern"):
        save_masks(tmp_path / "a", MaskCheckpoint(None, base=BASE, method="wanda", weights={}, **facts))
    assert not (tmp_path / "a").exists()


def test_weights_of_layers_without_masks_round_trip(tmp_path: Path) -> None:
    weights = {"norm.bias": torch.randn(5), "head.weight": torch.randn(3, 8), "odd.mask": torch.ones(2)}
    save_masks(tmp_path / "a", MaskCheckpoint(**{**vars(checkpoint(prior=True)), "weights": weights}))
    found = load_masks(tmp_path / "a")
    assert same(found.weights, weights)
    assert same(found.masks, checkpoint(prior=True).masks)
    assert same(found.prior, checkpoint(prior=True).prior)


# Bytes


def test_same_content_gives_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    for name, order in (("a", 1), ("b", -1)):
        save_masks(tmp_path / name, checkpoint(weights=True, prior=True, order=order))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_same_content_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path[:0] = {[str(Path(__file__).parent.parent), str(Path(__file__).parent)]!r}
from pathlib import Path
from test_checkpoints import *
torch.manual_seed(3)
save_dense(Path({str(tmp_path / "dense2")!r}), model(), "mlp")
save_masks(Path({str(tmp_path / "masks2")!r}), checkpoint(weights=True, prior=True))
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    torch.manual_seed(3)
    save_dense(tmp_path / "dense1", model(), "mlp")
    save_masks(tmp_path / "masks1", checkpoint(weights=True, prior=True))
    for kind in ("dense", "masks"):
        assert (tmp_path / f"{kind}1").read_bytes() == (tmp_path / f"{kind}2").read_bytes()


def test_method_and_base_are_part_of_the_bytes(tmp_path: Path) -> None:
    for method in ("wanda", "maskllm"):
        save_masks(tmp_path / method, checkpoint(method=method))
    assert (tmp_path / "wanda").read_bytes() != (tmp_path / "maskllm").read_bytes()
    assert load_masks(tmp_path / "maskllm").method == "maskllm"


def test_digest_knows_names_types_shapes_and_values() -> None:
    values = torch.arange(6, dtype=torch.int32)
    digests = [
        tensors_digest(tensors)
        for tensors in (
            {"a": values},
            {"b": values},
            {"a": values.view(torch.float32)},
            {"a": values.view(2, 3)},
            {"a": values.flip(0)},
            {"a": values, "b": values},
            {},
        )
    ]
    assert len(set(digests)) == len(digests)
    assert tensors_digest({"b": values, "a": values}) == digests[5]
    assert tensors_digest({"a": torch.stack([values, values], 1)[:, 0]}) == digests[0]  # a view


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float64, torch.int64, torch.uint8])
def test_digest_takes_all_types_and_scalars(dtype: torch.dtype) -> None:
    assert tensors_digest({"a": torch.tensor(1, dtype=dtype)}) != tensors_digest({"a": torch.tensor(0, dtype=dtype)})


# Files of something else


def test_dense_and_masks_are_told_apart(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", model(), "mlp")
    save_masks(tmp_path / "masks", checkpoint())
    with pytest.raises(CheckpointError, match="dense is a file of 'dense', not of 'masks'"):
        load_masks(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="masks is a file of 'masks', not of 'dense'"):
        load_dense(tmp_path / "masks", model(), "mlp")


def test_dense_of_another_name_is_refused(tmp_path: Path) -> None:
    save_dense(tmp_path / "a", model(), "mlp")
    with pytest.raises(CheckpointError, match="a holds a 'mlp', not a 'vit'"):
        load_dense(tmp_path / "a", model(), "vit")


def test_dense_of_another_shape_is_refused_on_one_line(tmp_path: Path) -> None:
    save_dense(tmp_path / "a", model(), "mlp")
    with pytest.raises(CheckpointError, match=r"a does not fit the model: .*0\.weight") as caught:
        load_dense(tmp_path / "a", model(32), "mlp")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_state_is_loaded_strictly(change: str) -> None:
    state = dict(model().state_dict())
    state.pop("0.bias") if change == "missing" else state.update(odd=torch.ones(1))
    with pytest.raises(CheckpointError, match=r"here does not fit the model: .*(0\.bias|odd)"):
        load_state(model(), state, "here")


def test_state_of_a_large_other_model_is_refused_in_one_short_line() -> None:
    big = nn.Sequential(*(nn.Linear(3, 3) for _ in range(200)))
    with pytest.raises(CheckpointError, match=r"^here does not fit the model: .") as caught:
        load_state(big, model().state_dict(), "here")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_masks_of_another_pattern_are_refused(tmp_path: Path) -> None:
    save_masks(tmp_path / "a", checkpoint("2:4"))
    with pytest.raises(CheckpointError, match="a holds 2:4 masks, not 4:8 ones"):
        load_masks(tmp_path / "a", pattern="4:8")
    assert load_masks(tmp_path / "a", pattern=NMPattern(2, 4)).masks


def test_masks_of_another_base_are_refused(tmp_path: Path) -> None:
    save_masks(tmp_path / "a", checkpoint())
    with pytest.raises(CheckpointError, match=r"a belongs to another dense model \(abababababab, not cdcdcdcdcdcd\)"):
        load_masks(tmp_path / "a", base="cd" * 32)


def test_plain_state_is_any_safetensors_file_and_no_pickle(tmp_path: Path) -> None:
    state = {"w": torch.randn(3), "b": torch.arange(4)}
    save_file(state, tmp_path / "plain")
    assert same(load_plain_state(tmp_path / "plain"), state)
    torch.save(state, tmp_path / "plain.pt")
    for name in ("plain.pt", "nothing"):
        with pytest.raises(CheckpointError, match=name):
            load_plain_state(tmp_path / name)


def test_plain_state_of_our_own_is_verified(tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", model(), "mlp")
    assert load_plain_state(tmp_path / "dense").keys() == model().state_dict().keys()
    save_masks(tmp_path / "masks", checkpoint())
    with pytest.raises(CheckpointError, match="masks is a file of 'masks', not of 'dense'"):
        load_plain_state(tmp_path / "masks")
    content = (tmp_path / "dense").read_bytes()
    (tmp_path / "dense").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="dense is damaged"):
        load_plain_state(tmp_path / "dense")


# Names with a prefix


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_prefixes_of_wrappers_are_left_off(prefix: str, suffix: str, tmp_path: Path) -> None:
    path, plain = tmp_path / f"wrapped{suffix}", model().state_dict()
    state = {f"{prefix}{name}": tensor for name, tensor in plain.items()}
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    assert same(dense_state(path), plain)
    assert same(load_any(path).weights, plain)
    assert [check.layer for check in verify_file(path, layers=["*"])] == ["0", "2"]


def test_prefix_of_some_names_stays(tmp_path: Path) -> None:
    state = {"module.weight": torch.ones(2), "bias": torch.ones(2)}
    save_file(state, tmp_path / "odd")
    assert same(load_plain_state(tmp_path / "odd"), state)


@pytest.mark.parametrize("prefix", ["model.", "net.", "backbone.", "student.backbone."])
@pytest.mark.parametrize("more", [{}, {"head.extra": torch.ones(2)}], ids=["all", "most"])
def test_a_prefix_that_would_fit_is_named(prefix: str, more: dict[str, torch.Tensor]) -> None:
    own = model()
    named = {f"{prefix}{name}": tensor for name, tensor in own.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_state(own, {**named, **more}, "here")
    wanted, found = (", ".join(map(repr, list(names)[:3])) for names in (own.state_dict(), named))
    assert str(caught.value) == (  # of 8 tensors
        f"here does not fit the model: it lacks {wanted} and 5 more; the model has no {found} and {5 + len(more)} "
        f"more; without the prefix {prefix!r}, 8 of its {8 + len(more)} names would fit"
    )
    wrapped = nn.ModuleDict({"body": own})
    with pytest.raises(CheckpointError, match=r"; behind the prefix 'body\.', 8 of its 8 names would fit$"):
        load_state(wrapped, own.state_dict(), "here")


def test_no_prefix_is_named_where_it_would_help_little() -> None:
    state = {"model.0.weight": torch.ones(2), "other": torch.ones(2), "third": torch.ones(2)}
    with pytest.raises(CheckpointError) as caught:
        load_state(model(), state, "here")
    assert "prefix" not in str(caught.value)
