"""diffusers' DiT, whose blocks take their conditions by keyword: streamed, and calibrated in two parts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from streaming import both_ways, check, check_stream, shrink, whole_model_inputs
from torch import Tensor, nn

pytest.importorskip("diffusers")

from diffusers import DiTTransformer2DModel

from maskllm4v import prune
from maskllm4v.oneshot.activations.blocks import find_sequential_blocks
from maskllm4v.oneshot.activations.sequential import part_statistics, stream_statistics
from maskllm4v.oneshot.activations.statistics import Hessian, InputNorm
from maskllm4v.sparsity.calibration import Calibration, names_by_part
from maskllm4v.sparsity.survey import prunable_matrices

DENSE = ["transformer_blocks.*.norm1.emb", "proj_out_1", "proj_out_2"]
BODY = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"]  # as they are run


def dit(depth: int = 3) -> nn.Module:
    """Width 16, 4x4 pixels in 2 channels, 5 classes."""
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        num_layers=depth,
        attention_bias=True,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=5,
    ).eval()


def noisy(*sizes: int) -> list[dict[str, Tensor]]:
    return [
        {
            "hidden_states": torch.randn(n, 2, 4, 4),
            "timestep": torch.randint(1000, (n,)),
            "class_labels": torch.randint(5, (n,)),
        }
        for n in sizes
    ]


def condition(model: Any, batch: dict[str, Tensor]) -> None:
    """Only what the modulation layers' inputs depend on."""
    for block in model.transformer_blocks:
        embedded = block.norm1.emb(batch["timestep"], batch["class_labels"], hidden_dtype=torch.float32)
        block.norm1.linear(block.norm1.silu(embedded))


def two_parts() -> list[Calibration]:
    modulation = ("transformer_blocks.*.norm1.linear",)
    return [Calibration(noisy(30, 20), condition, modulation, independent=True), Calibration(noisy(3, 1, 2))]


@both_ways
@pytest.mark.parametrize("statistic", [InputNorm, Hessian])
def test_dit_is_streamed(statistic: type, propagate: str) -> None:
    model = dit()
    layers = prunable_matrices(model, exclude=DENSE)
    units = check_stream(model, noisy(3, 1, 2), propagate, statistic, layers)
    assert units == [[f"transformer_blocks.{i}.{name}" for name in ["norm1.linear", *BODY]] for i in range(3)]


@pytest.mark.parametrize("alone", ["norm1.linear", "attn1", "ff.net", "ff.net.0", "ff.net.2"])
def test_blocks_are_a_chain_whichever_of_their_layers_are_of_interest(alone: str) -> None:
    model, (batch,) = dit(), noisy(2)
    layers = {name: layer for name, layer in prunable_matrices(model, exclude=DENSE).items() if alone in name}
    with torch.no_grad():
        units, chain = find_sequential_blocks(model, layers, lambda: model(**batch))
    assert chain == list(model.transformer_blocks) == [unit.block for unit in units]


@both_ways
def test_no_block_needs_a_run_of_the_whole_model(propagate: str) -> None:
    def runs(depth: int) -> int:
        model, found = dit(depth), []
        model.transformer_blocks[0].attn1.to_q.register_forward_hook(lambda *_: found.append(1))
        layers = prunable_matrices(model, exclude=DENSE)
        for _ in stream_statistics(model, layers, noisy(2), InputNorm, propagate=propagate):
            pass
        return len(found)

    assert runs(2) == runs(5) == (3 if propagate == "pruned" else 2)


@both_ways
def test_embedders_are_seen_outside_the_blocks_too(propagate: str) -> None:
    """The first block's embedder is called once more after the blocks, for the output's modulation."""
    model, batches = dit(2), noisy(3, 2)
    layers = prunable_matrices(model)
    if propagate == "dense":
        check_stream(model, batches, propagate, layers=layers)
    with torch.no_grad():
        assert find_sequential_blocks(model, layers, lambda: model(**batches[0]))[1] == []


@both_ways
@pytest.mark.parametrize("statistic", [InputNorm, Hessian])
def test_two_parts(statistic: type, propagate: str) -> None:
    model, parts = dit(), two_parts()
    layers, untouched = prunable_matrices(model, exclude=DENSE), copy.deepcopy(model)
    rows = set()
    for unit in part_statistics(model, layers, parts, statistic, propagate=propagate):
        seen_by = untouched if propagate == "dense" else model
        for part, names in zip(parts, names_by_part(unit, parts), strict=True):
            expected = whole_model_inputs(seen_by, names, part.batches, part.forward)
            for name in names:
                check(unit[name], expected[name])
                shrink(layers[name])
                rows.add((name.endswith("norm1.linear"), unit[name].rows))
    assert rows == {(True, 50), (False, 6 * 4)}  # samples, tokens


@both_ways
def test_pruned_in_two_parts(propagate: str) -> None:
    model, (batch,) = dit(2), noisy(2)
    masks = prune(model, "sparsegpt", calibration=two_parts(), exclude=DENSE, update_weights=True, propagate=propagate)
    assert len(masks) == 2 * 7
    assert all(mask.float().mean() == 0.5 for mask in masks.values())
    assert model(**batch).sample.isfinite().all()
