"""What has to hold for a model under masks, whatever its architecture.

Each property gives what is wrong, in words; an empty list says that it holds. A library that applies masks in a
layer's ``forward`` fails ``outputs`` and ``gradients`` wherever a model reads a weight itself.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from maskllm4v.checkpoints.packed import load_packed
from maskllm4v.export.files import save_packed
from maskllm4v.oneshot.methods.result import Pruned
from maskllm4v.oneshot.permute import permute_channels_
from maskllm4v.oneshot.prune import prune, register_pruner
from maskllm4v.sparsity.parameters import learnable_masks, masked_parameters
from maskllm4v.sparsity.surgery import fold_, make_learnable
from maskllm4v.sparsity.survey import survey
from maskllm4v.sparsity.usage import each_mask_used
from maskllm4v.utils.errors import ConfigError, UserError
from maskllm4v.utils.text import few
from scripts.sweep.models import Subject, run

N, M = 2, 4
PATTERN = f"{N}:{M}"
SAME, OTHER, ORDER = 1e-5, 1e-3, 1e-3  # relative distances: of equal outputs, of different ones, of another order's
LEARNING = 0.5  # of a mask's groups, those whose logits get a gradient: ReLUs and routers leave some without
WIDE = 10**8  # inputs² · outputs of a layer, from which on choosing an order takes seconds; those stay


class Checks:
    """The properties of one subject; dense outputs and pruned copies are made once."""

    def __init__(self, subject: Subject) -> None:
        self.dense = subject.model()
        torch.manual_seed(1)
        self.inputs = subject.inputs()
        self.keys = list(self.dense.state_dict())
        self.pruned = copy.deepcopy(self.dense)
        self.masks = prune(self.pruned, "magnitude", pattern=PATTERN, on_misfit="skip", tell=lambda text: None)
        self.folded = fold_(copy.deepcopy(self.pruned))

    def __call__(self) -> dict[str, list[str]]:
        """What is wrong, by property."""
        return {name: list(check(self)) for name, check in PROPERTIES.items()}

    def run(self, model: nn.Module, training: bool = False) -> Tensor:
        torch.manual_seed(2)
        with torch.no_grad():
            return run(model.train(training), self.inputs)


def distance(one: Tensor, other: Tensor) -> float:
    """The relative distance of two outputs."""
    return float((one - other).norm() / other.norm())


def outputs(checks: Checks) -> Iterator[str]:
    """The masked model computes what the folded one does, in both modes, and not what the dense one does."""
    for training in (False, True):
        mode = "training" if training else "evaluation"
        dense, masked, folded = (
            checks.run(copy.deepcopy(model), training) for model in (checks.dense, checks.pruned, checks.folded)
        )
        if not bool(torch.isfinite(dense).all()):
            yield f"outputs are not finite in {mode}"
        elif not (far := distance(masked, folded)) < SAME:
            yield f"masked differs from folded by {far:.1e} in {mode}"
        elif not (far := distance(masked, dense)) > OTHER:
            yield f"masked differs from dense by {far:.1e} only in {mode}"


def pattern(checks: Checks) -> Iterator[str]:
    """Every pruned parameter keeps exactly N of M along the dimension that its product sums over."""
    by_key = dict(checks.folded.named_parameters())
    for name, parameter in masked_parameters(checks.pruned).items():
        module, attribute = parameter.places[0]
        kept = by_key[parameter.key].detach().ne(0).movedim(summed_over(module, attribute), -1)
        if not bool((kept.unflatten(-1, (-1, M)).sum(-1) == N).all()):
            yield f"{name!r} is not {PATTERN}"


def summed_over(module: nn.Module, attribute: str) -> int:
    """The dimension of a parameter that its product sums over, told from the module's own numbers."""
    if hasattr(module, "nf"):  # transformers' Conv1D
        return 0
    if attribute in ("gate_up_proj", "down_proj"):  # transformers' experts
        return 1 if getattr(module, "is_transposed", False) else 2
    return 1


def gradients(checks: Checks) -> Iterator[str]:
    """Every mask is read, and every mask's logits get a gradient, for most of its groups."""
    model = make_learnable(copy.deepcopy(checks.dense), checks.masks, pattern=PATTERN).train()
    masks = learnable_masks(model)
    for mask in masks.values():
        mask.scaling = 1.0  # soft, so that rounding hides nothing
    try:
        with each_mask_used(model):
            output = run(model, checks.inputs)
            if not output.requires_grad:
                yield "outputs depend on no logit"
                return
            (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    except ConfigError as error:
        yield str(error)
        return
    for name, mask in masks.items():
        gradient = mask.logits.grad
        if gradient is None or not bool(torch.isfinite(gradient).all()):
            yield f"{name!r}: no finite gradient"
        elif (share := float(gradient.ne(0).any(0).float().mean())) < LEARNING:
            yield f"{name!r}: a gradient for {share:.0%} of its groups only"


def hooks(checks: Checks) -> Iterator[str]:
    """Forward hooks that a user has put on layers fire as often on the masked and on the folded model as before."""
    model, calls = copy.deepcopy(checks.dense), dict[str, int]()
    for name in checks.masks:
        module = dict(model.named_modules()).get(name)
        if module is not None:
            module.register_forward_hook(lambda *_, name=name: calls.update({name: calls.get(name, 0) + 1}))

    def counted() -> dict[str, int]:
        calls.clear()
        checks.run(model)
        return dict(calls)

    before = counted()
    prune(model, "magnitude", pattern=PATTERN, on_misfit="skip", tell=lambda text: None)
    pruned = counted()
    fold_(model)
    for stage, now in (("pruning", pruned), ("folding", counted())):
        if lost := [name for name in before if now.get(name) != before[name]]:
            yield f"after {stage}, hooks fire another number of times: {few(lost)}"


def keys(checks: Checks) -> Iterator[str]:
    """Keys of the state dict are those of before, and next to them there are masks."""
    masked = list(checks.pruned.state_dict())
    expected = {f"{parameter.key}_mask.mask" for parameter in masked_parameters(checks.pruned).values()}
    if [key for key in masked if not key.endswith("_mask.mask")] != checks.keys or not expected <= set(masked):
        yield f"keys of the masked model: {few(sorted(set(masked) ^ set(checks.keys)))}"
    if list(checks.folded.state_dict()) != checks.keys:
        yield f"keys of the folded model: {few(sorted(set(checks.folded.state_dict()) ^ set(checks.keys)))}"


def calibration(checks: Checks) -> Iterator[str]:
    """Wanda sees the inputs of every matrix."""
    model = copy.deepcopy(checks.dense)
    batch: Any = checks.inputs if isinstance(checks.inputs, dict) else [checks.inputs]
    try:
        masks = prune(model, "wanda", pattern=PATTERN, calibration=[batch], on_misfit="skip", tell=lambda text: None)
    except UserError as error:
        yield str(error)
        return
    if masks.keys() != checks.masks.keys():
        yield f"no inputs of {few(sorted(checks.masks.keys() - masks.keys()))}"


def files(checks: Checks) -> Iterator[str]:
    """A packed file gives the folded model back, bit for bit."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        try:
            save_packed(checks.folded, checks.masks, path, pattern=PATTERN)
            loaded = load_packed(copy.deepcopy(checks.dense), path)
        except UserError as error:
            yield str(error).replace(folder, "")
            return
    expected = checks.folded.state_dict()
    if changed := [key for key, value in loaded.state_dict().items() if not torch.equal(value, expected[key])]:
        yield f"values changed: {few(changed)}"


def permutation(checks: Checks) -> Iterator[str]:
    """Permuting channels leaves outputs alone, where there are any to permute."""
    model = copy.deepcopy(checks.dense)
    layers = survey(model, on_misfit="skip").prunable.values()
    wide = [matrix.key for matrix in layers if matrix.in_features * matrix.weight.numel() > WIDE]
    try:
        permute_channels_(model, PATTERN, exclude=wide, on_misfit="skip", sweeps=1)
    except ConfigError as error:
        if not str(error).startswith("no layer to prune reads channels"):
            yield str(error)
        return
    if not (far := distance(checks.run(model), checks.run(checks.dense))) < ORDER:
        yield f"outputs of the permuted model differ by {far:.1e}"


class StoppedError(Exception):
    """Somebody stops while the last matrix is being pruned."""


def rollback(checks: Checks) -> Iterator[str]:
    """A model whose pruning stops half way is what it was."""
    model = copy.deepcopy(checks.dense)
    before, values = _look(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    left = len(checks.masks)

    def until_the_last(weight: Tensor, statistic: Any, pattern: Any, **_: Any) -> Pruned:
        nonlocal left
        left -= 1
        if left <= 0:
            raise StoppedError
        return Pruned(pattern.topn_mask(weight.abs()), torch.zeros_like(weight))

    with _method(until_the_last) as method:
        try:
            prune(model, method, pattern=PATTERN, on_misfit="skip", update_weights=True, tell=lambda text: None)
        except StoppedError:
            pass
        else:
            yield "pruning did not stop"
    now = model.state_dict()
    if _look(model) != before or now.keys() != values.keys():
        yield "modules are not what they were"
    elif changed := [key for key in values if not torch.equal(now[key], values[key])]:
        yield f"values changed: {few(changed)}"


def _look(model: nn.Module) -> list[Any]:
    return [
        (name, type(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


@contextmanager
def _method(pruner: Any) -> Iterator[str]:
    from maskllm4v.oneshot import prune as module

    register_pruner("sweep", updates=True)(pruner)
    try:
        yield "sweep"
    finally:
        del module._METHODS["sweep"]


PROPERTIES: dict[str, Callable[[Checks], Iterator[str]]] = {
    check.__name__: check
    for check in (outputs, pattern, gradients, hooks, keys, calibration, files, permutation, rollback)
}


def check(subject: Subject) -> dict[str, list[str]]:
    """What is wrong with a model under masks, by property; properties that hold are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of coverage, of channels that stay, of libraries
        return {name: faults for name, faults in Checks(subject)().items() if faults}
