"""Which blocks of a model feed one another, found by watching one batch pass.

In a chain each block's output is the next one's first argument and all other arguments, by position or keyword, are
the same for every block, as in ViT or DiT. Such blocks can be run one after the other without the model around them.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from maskllm4v.sparsity.calibration import hooks_run
from maskllm4v.sparsity.parameters import Matrix
from maskllm4v.sparsity.products import Product, ProductMode
from maskllm4v.utils.errors import DataError
from maskllm4v.utils.text import few

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments by position and by keyword
Contents = list[tuple[Any, int]]
Grouping = Callable[[str], str]


@dataclass
class Unit:
    """Layers that are pruned together, and the block to run for their inputs (None: the whole model)."""

    layers: dict[str, Matrix]
    block: nn.Module | None


def step(block: nn.Module, call: Call) -> Call:
    """How the next block of a chain is called, given how this one is."""
    args, kwargs = call
    return (block(*args, **kwargs), *args[1:]), kwargs


def never_reached(layers: Iterable[str]) -> DataError:
    """What is wrong where no batch has come to some layers."""
    names = list(layers)
    return DataError(
        f"calibration: {few(names, 'layer')} {'were' if len(names) > 1 else 'was'} never reached; "
        "show more batches or leave such layers dense with `exclude`"
    )


def find_sequential_blocks(
    model: nn.Module,
    layers: Mapping[str, Matrix],
    run: Callable[[], Any],
    others: Iterable[Callable[[], Any]] = (),
) -> tuple[list[Unit], list[nn.Module]]:
    """Units in the order of execution, and all blocks of the chain that holds most of the layers.

    Where no container of the layers' blocks is a chain (:class:`_Chain`), the second is empty, and every unit needs
    the whole model.

    Args:
        model: in evaluation mode.
        layers: the layers of interest, by module name.
        run: runs the model on one batch.
        others: on further ones, as far as they are needed to reach all layers: a mixture's experts, say.

    Raises:
        DataError: layers are never reached.
    """
    group = _grouping(model)
    order, chain = _probe(model, layers, run, group)
    order = _with_late(order, layers, others)
    found = {name: layers[name] for name in order}
    units = _units(found, chain, group)
    streamed = [unit.block for unit in units if unit.block is not None]
    if len(streamed) > len(set(streamed)):  # a block calls a layer of somewhere else between two of its own
        units, chain = _units(found, {}, group), {}
    return units, list(chain.values())


def _units(layers: Mapping[str, Matrix], chain: Mapping[str, nn.Module], group: Grouping) -> list[Unit]:
    """Layers of one block that follow one another make a unit; layers outside the chain keep their place.

    What lies in a block of the chain belongs to it however deep, such as the experts of a mixture.
    """

    def home(name: str) -> str:
        parts = name.split(".")
        around = (".".join(parts[:i]) for i in range(1, len(parts)))
        return next((block for block in around if block in chain), group(name))

    return [
        Unit({name: layers[name] for name in names}, chain.get(block))
        for block, names in itertools.groupby(layers, key=home)
    ]


def _grouping(model: nn.Module) -> Grouping:
    """Says which block a layer belongs to: its innermost numbered ancestor, such as ``layers.1.blocks.0``.

    The children of a container that holds linear layers itself are parts of a block, such as the ``ff.net.0`` of
    diffusers' feed-forwards, and count only if there is nothing numbered around them.
    """
    bare = {
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and any(isinstance(child, nn.Linear) for child in module.children())
    }

    def group(name: str) -> str:
        parts = name.split(".")
        numbered = [".".join(parts[: i + 1]) for i, part in enumerate(parts[:-1]) if part.isdigit()]
        blocks = [one for one in numbered if one[: one.rfind(".") + 1] not in bare]
        return (blocks or numbered or [name])[-1]

    return group


class _Chain:
    """Watches whether the children of a container feed one another, one tensor held at a time.

    They do if each runs once, in order, the one's output being the next one's first argument (the very same
    tensor, not changed in place meanwhile) and all other arguments, by position or keyword, staying the same
    objects with the same contents.
    """

    def __init__(self, blocks: Mapping[str, nn.Module]) -> None:
        self.blocks, self.ahead = blocks, list(blocks.values())
        self.unbroken = True
        self._entered: Contents = []
        self._fed: Contents | None = None  # what the next block must be called with

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.unbroken &= bool(self.ahead) and block is self.ahead.pop(0)
        self._entered = _contents(args, kwargs)
        self.unbroken &= self._fed is None or _equal(self._entered, self._fed)

    def leave(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        traceable = isinstance(output, Tensor) and not output.is_inference()  # those count no changes
        self.unbroken &= traceable and _equal(_contents(args, kwargs), self._entered)
        self._entered = []
        self._fed = _contents((output, *args[1:]), kwargs)


def _contents(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Contents:
    """Arguments, what they hold inside lists and dictionaries, and how often each tensor was changed in place."""
    found = [inner for value in (*args, *itertools.chain(*kwargs.items())) for inner in _with_inside(value)]
    return [(x, x._version if isinstance(x, Tensor) and not x.is_inference() else 0) for x in found]


def _with_inside(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, Mapping):
        value = list(itertools.chain(*value.items()))
    if isinstance(value, tuple | list):
        for inner in value:
            yield from _with_inside(inner)


def _equal(first: Contents, second: Contents) -> bool:
    if len(first) != len(second):
        return False
    return all(a is b and before == after for (a, before), (b, after) in zip(first, second, strict=True))


def _probe(
    model: nn.Module, layers: Mapping[str, Matrix], run: Callable[[], Any], group: Grouping
) -> tuple[Iterable[str], dict[str, nn.Module]]:
    """Run one batch: the layers in order of their first call, and the chain of blocks that holds most of them."""
    groups = {group(name) for name in layers}
    linears = {id(module) for layer in layers.values() for module, _ in layer.places}
    chains = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            blocks = {f"{name}.{child}".lstrip("."): block for child, block in module.named_children()}
            # A container of whole stages would be streamed too coarsely: its children must be the layers' blocks.
            if groups & blocks.keys() and not any(id(block) in linears for block in blocks.values()):
                chains.append(_Chain(blocks))
    calls: dict[str, Counter[int]] = {}  # of each block of a matrix
    handles = []

    def count(product: Product) -> None:
        calls.setdefault(product.name, Counter())[product.block] += 1

    for chain in chains:
        for block in chain.blocks.values():
            handles.append(block.register_forward_pre_hook(chain.enter, with_kwargs=True))
            handles.append(block.register_forward_hook(chain.leave, with_kwargs=True))
    try:
        with hooks_run(), ProductMode(layers, before=count):
            run()
    finally:
        for handle in handles:
            handle.remove()

    def held(chain: _Chain) -> int:
        return sum(group(name) in chain.blocks for name in layers)

    whole = [c for c in chains if c.unbroken and not c.ahead and 2 * held(c) > len(layers)]
    most = max((max(blocks.values()) for blocks in calls.values()), default=0)
    if not whole or most > 1:  # a layer shared between blocks needs the whole model
        return calls, {}
    return calls, dict(max(whole, key=held).blocks)


def _with_late(
    order: Iterable[str], layers: Mapping[str, Matrix], others: Iterable[Callable[[], Any]]
) -> Iterable[str]:
    """The same order with the layers that only other batches reach, each behind the one before it in the model."""
    found = list(order)
    ahead = {name for name in layers if name not in found}
    late = [name for name in layers if name in ahead]
    for run in others:
        if not ahead:
            break
        with (
            hooks_run(),
            ProductMode({name: layers[name] for name in late}, before=lambda product: ahead.discard(product.name)),
        ):
            run()
    if ahead:
        raise never_reached(name for name in layers if name in ahead)
    before = dict(zip(list(layers)[1:], layers, strict=False))
    for name in late:
        found.insert(found.index(before[name]) + 1 if name in before else 0, name)
    return found
