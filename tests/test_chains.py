"""Models that are chains of blocks are streamed block by block; all others are run as a whole."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import timm
import torch
from awkward_models import AWKWARD, Backwards, Block, Plain, TwiceThrough
from streaming import both_ways, check, check_stream, images, shrink, whole_model_inputs
from timm.models import VisionTransformer
from torch import Tensor, nn

from maskllm4v.oneshot.activations.blocks import find_sequential_blocks
from maskllm4v.oneshot.activations.sequential import stream_statistics
from maskllm4v.oneshot.activations.statistics import Hessian, InputNorm
from maskllm4v.sparsity.calibration import default_forward
from maskllm4v.sparsity.survey import prunable_matrices

# Models that are chains of blocks, and such that are not


@both_ways
@pytest.mark.parametrize("statistic", [InputNorm, Hessian])
def test_vit(tiny_vit: nn.Module, propagate: str, statistic: type) -> None:
    units = check_stream(tiny_vit, images(), propagate, statistic)
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert units == [[f"blocks.{i}.{name}" for name in block] for i in range(2)] + [["head"]]


@both_ways
def test_swin(tiny_swin: nn.Module, propagate: str) -> None:
    check_stream(tiny_swin, images(3, 64), propagate)


@both_ways
def test_convnext(tiny_convnext: nn.Module, propagate: str) -> None:
    check_stream(tiny_convnext, images(3, 64), propagate)


@both_ways
def test_chain_amid_other_layers(propagate: str) -> None:
    # 24 of the 40 layers stand in stage 3, as in a real Swin-S or Swin-B.
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        embed_dim=8,
        depths=(1, 1, 6, 1),
        num_heads=(1, 1, 1, 1),
        img_size=64,
        window_size=2,
        num_classes=4,
    ).eval()
    check_stream(model, images(3, 64), propagate)


@both_ways
def test_some_layers_only(tiny_vit: nn.Module, propagate: str) -> None:
    layers = prunable_matrices(tiny_vit, exclude=["head", "*.attn", "blocks.0.mlp.fc2"])
    units = check_stream(tiny_vit, images(), propagate, layers=layers)
    assert units == [["blocks.0.mlp.fc1"], ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]]


def runs_of_first_block(model: nn.Module, blocks: Callable[[nn.Module], nn.Module], propagate: str) -> int:
    """How often the first layer of the first block is computed while all statistics are streamed over one batch."""
    runs = []
    first = next(layer for layer in blocks(model)[0].modules() if isinstance(layer, nn.Linear))
    first.register_forward_hook(lambda *_: runs.append(1))
    layers = prunable_matrices(model, exclude=["head*"])
    size = (2, 1, 8, 8) if isinstance(model, VisionTransformer) else (2, 3, 64, 64)
    for _ in stream_statistics(model, layers, [torch.randn(size)], InputNorm, propagate=propagate):
        pass
    return len(runs)


@both_ways
def test_vit_is_streamed_block_by_block(propagate: str) -> None:
    def runs(depth: int) -> int:
        model = VisionTransformer(
            img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=depth, num_heads=1, num_classes=2
        )
        return runs_of_first_block(model, lambda m: m.blocks, propagate)

    # Once to see what feeds what, once to observe, once more where it has been pruned; however deep.
    assert runs(2) == runs(6) == (3 if propagate == "pruned" else 2)


@pytest.mark.parametrize("kind", ["swin", "convnext"])
def test_hierarchical_models_are_run_as_a_whole(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(f"tiny_{kind}")
    first = (lambda m: m.layers[0].blocks) if kind == "swin" else (lambda m: m.stages[0].blocks)
    # Dense: all at once, after at most one look for a chain; pruned: once per unit, and there are ≥ 5.
    assert runs_of_first_block(copy.deepcopy(model), first, "dense") <= 2
    assert runs_of_first_block(model, first, "pruned") >= 5


@both_ways
@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_models(kind: str, propagate: str) -> None:
    check_stream(AWKWARD[kind]().eval(), [torch.randn(n, 8) for n in (3, 2)], propagate)


CHAINS = {"plain", "second argument", "keyword", "keyword tensor", "sequential", "mixtures", "feed-forwards"}
NO_CHAINS = {  # some only because the proof asks for the very same objects
    *("between blocks", "in place between blocks", "changing argument", "changing keyword", "keyword changed in place"),
    *("keyword changed by a block", "keyword changed inside", "keyword grows", "a keyword less", "another keyword"),
    *(
        "new container",
        "in place",
        "tuples",
        "bare linears",
        "equal keyword",
        "keyword then position",
        "all by keyword",
        "lender",
        "renamed",
    ),
}


@pytest.mark.parametrize("kind", AWKWARD)
def test_chains_are_found_where_nothing_speaks_against_them(kind: str) -> None:
    model = AWKWARD[kind]().eval()
    with torch.no_grad():
        units, chain = find_sequential_blocks(model, prunable_matrices(model), lambda: model(torch.randn(2, 8)))
    blocks = [block for name, block in model.named_modules() if re.fullmatch(r"(blocks\.)?\d", name)]
    if kind == "skips along":
        assert chain in ([], blocks)
        return
    assert kind in CHAINS | NO_CHAINS
    assert chain == (blocks if kind in CHAINS else [])
    assert [unit.block for unit in units if unit.block is not None] == chain
    if kind == "mixtures":
        parts = ("first", "second", "experts.0.fc", "experts.1.fc", "last")
        assert [list(unit.layers) for unit in units[1:]] == [[f"blocks.{i}.{part}" for part in parts] for i in range(3)]


def test_parts_of_feed_forwards_are_streamed_alone_too() -> None:
    model = AWKWARD["feed-forwards"]().eval()
    layers = prunable_matrices(model, exclude=["embed", "blocks.*.net.2"])
    assert len(layers) == 3
    units, chain = find_sequential_blocks(model, layers, lambda: model(torch.randn(2, 8)))
    assert chain == list(model.blocks) == [unit.block for unit in units]


@both_ways
@pytest.mark.parametrize("excluded", ["blocks.0", "blocks.1", "blocks.2"])
@pytest.mark.parametrize("kind", ["plain", "second argument", "between blocks"])
def test_block_without_layers_of_interest_still_counts(kind: str, excluded: str, propagate: str) -> None:
    model = AWKWARD[kind]().eval()
    layers = prunable_matrices(model, exclude=[excluded, "embed"])
    assert len(layers) == 2
    check_stream(model, [torch.randn(n, 8) for n in (3, 2)], propagate, layers=layers)


@both_ways
@pytest.mark.parametrize("kind", ["plain", "between blocks", "bare linears"])
def test_layers_may_be_replaced_on_the_way(kind: str, propagate: str) -> None:
    model = AWKWARD[kind]().eval()
    untouched, batches = copy.deepcopy(model), [torch.randn(n, 8) for n in (3, 2)]
    for unit in stream_statistics(model, prunable_matrices(model), batches, InputNorm, propagate=propagate):
        seen_by = untouched if propagate == "dense" else model
        expected = whole_model_inputs(seen_by, unit, batches, default_forward)
        for name, found in unit.items():
            check(found, expected[name])
        for name in unit:
            layer = copy.deepcopy(model.get_submodule(name))
            shrink(layer)
            model.set_submodule(name, layer)


@pytest.mark.parametrize("kind", ["twice through", "shared layer"])
def test_layer_used_more_than_once_is_seen_each_time(kind: str) -> None:
    shared = nn.Linear(8, 8)
    model = TwiceThrough([Block() for _ in range(3)]) if kind == "twice through" else None
    model = model or Plain([Block(shared), Block(), Block(shared)])
    check_stream(model.eval(), [torch.randn(n, 8) for n in (3, 2)], "dense")


class HeadFirst(Plain):
    """Registers its head before its body."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__(blocks)
        modules = list(self._modules.items())
        self._modules.clear()
        self._modules.update([("head", nn.Linear(8, 4)), *modules])

    def run(self, x: Tensor) -> Tensor:
        return self.head(super().run(x))


@pytest.mark.parametrize(
    ("model", "order"),
    [
        (lambda: HeadFirst([Block() for _ in range(2)]), ["embed", "blocks.0.fc", "blocks.1.fc", "head"]),
        (lambda: Backwards([Block() for _ in range(2)]), ["embed", "blocks.1.fc", "blocks.0.fc"]),
    ],
    ids=["head first", "backwards"],
)
@both_ways
def test_units_come_in_order_of_execution(model: Callable[[], nn.Module], order: list[str], propagate: str) -> None:
    units = check_stream(model().eval(), [torch.randn(4, 8)], propagate)
    assert [name for unit in units for name in unit] == order
