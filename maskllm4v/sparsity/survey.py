"""What of a model can be pruned, and what stays dense and why: nothing is left out without a word."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import is_lazy

from maskllm4v.sparsity.masks import Mask
from maskllm4v.sparsity.parameters import Matrix, check_parameter, matrices
from maskllm4v.sparsity.patterns import NMPattern
from maskllm4v.utils.errors import ConfigError
from maskllm4v.utils.text import few

Exclude = Iterable[nn.Module | str]
OnMisfit = Literal["error", "skip"]
EXCLUDED, CONVOLUTION, OPTION = "excluded", "convolution", "convolution (an option)"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NO_MATRICES = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, Mask)  # looked up, or numbers side by side


@dataclass(frozen=True)
class Dense:
    """Weights that stay dense.

    Attributes:
        weights: how many.
        reason: why.
    """

    weights: int
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Which of a model's weights that multiply activations get masks, and which do not and why. Print it to read it.

    Attributes:
        sparse: how many weights each matrix under a mask has, by name.
        dense: those that stay dense, by name.
    """

    sparse: dict[str, int] = field(default_factory=dict)
    dense: dict[str, Dense] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Of all these weights, those under masks, from 0 to 1."""
        return self._share(self.dense)

    def check(self) -> None:
        """Warn where masks cover less than half of the weights that nobody has excluded."""
        rest = {name: one for name, one in self.dense.items() if one.reason != EXCLUDED}
        if self._share(rest) < 0.5:
            warnings.warn(
                f"masks cover only {_percent(self._share(rest))} of the weights that multiply activations and are not "
                f"excluded; dense: {'; '.join(self._reasons(rest))}",
                stacklevel=3,
            )

    def _share(self, dense: dict[str, Dense]) -> float:
        covered = sum(self.sparse.values())
        return covered / max(covered + sum(one.weights for one in dense.values()), 1)

    def _reasons(self, dense: dict[str, Dense]) -> Iterator[str]:
        """A line for each reason, with its share of these weights and the sparse ones; the largest first."""
        total = sum(self.sparse.values()) + sum(one.weights for one in dense.values())
        names: dict[str, list[str]] = {}
        for name, one in dense.items():
            names.setdefault(one.reason, []).append(name)
        lost = {reason: sum(dense[name].weights for name in found) for reason, found in names.items()}
        for reason in sorted(lost, key=lambda reason: -lost[reason]):
            yield f"{reason}: {few(names[reason])} ({_percent(lost[reason] / max(total, 1))})"

    def __str__(self) -> str:
        matrices = len(self.sparse) + len(self.dense)
        weights = sum(self.sparse.values()) + sum(one.weights for one in self.dense.values())
        head = (
            f"masks on {len(self.sparse):,} of {matrices:,} matrices, "
            f"{_percent(self.share)} of their {weights:,} weights"
        )
        return "\n".join([head, *(f"dense, {line}" for line in self._reasons(self.dense))])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


@dataclass(frozen=True)
class Survey:
    """What of a model can be pruned, by name, in the model's order.

    Attributes:
        prunable: what is to be pruned.
        dense: what stays dense, and why.
    """

    prunable: dict[str, Matrix] = field(default_factory=dict)
    dense: dict[str, Dense] = field(default_factory=dict)

    def warn_of_embeddings(self, pattern: NMPattern) -> None:
        """Warn where what is pruned is the table of an embedding, too."""
        if tables := [name for name, matrix in self.prunable.items() if matrix.not_multiplied_in]:
            lost = _percent(1 - pattern.n / pattern.m)
            warnings.warn(
                f"{few(tables, 'layer')}: tied to an embedding, whose table loses {lost} of its values, too",
                stacklevel=3,
            )

    @property
    def coverage(self) -> Coverage:
        """Once all that can be pruned is; holds nothing of the model."""
        return Coverage({name: matrix.weight.numel() for name, matrix in self.prunable.items()}, self.dense)


def survey(
    model: nn.Module,
    pattern: NMPattern | None = None,
    *,
    exclude: Exclude = (),
    on_misfit: OnMisfit = "error",
    convolutions: bool = False,
    tied: bool = False,
) -> Survey:
    """Look at all parameters of a model that multiply activations, or may do so.

    What multiplies them is known of linear layers and of the other kinds that can be pruned, and of convolutions. Any
    other parameter of two dimensions or more counts, too, and stays dense; embeddings, norms, and what is added to all
    samples (of a leading dimension of 1) do not.

    Args:
        model: any module.
        pattern: if given, matrices whose inputs it does not divide are an error or stay dense.
        exclude: modules, or name patterns as in shells (``"head"``, ``"blocks.0.*"``); all below an
            excluded module is excluded too.
        on_misfit: ``"error"`` or ``"skip"``.
        convolutions: whether those that multiply each patch once may be pruned, too
            (:func:`~maskllm4v.sparsity.parameters.multiplies_patches`).
        tied: whether a matrix may be pruned that is the table of an embedding, too.

    Raises:
        PatternError: a matrix does not fit and ``on_misfit`` is ``"error"``.
        ConfigError: an exclusion matches nothing, the model is a single linear layer, or a weight is computed from
            other tensors.
    """
    if on_misfit not in ("error", "skip"):
        raise ConfigError(f"on_misfit is {on_misfit!r}; allowed: 'error', 'skip'")
    excluded, found = _excluded(model, exclude), Survey()
    seen = set[int]()
    for matrix in matrices(model):
        seen.add(id(matrix.weight))
        width, others = matrix.in_features, matrix.not_multiplied_in
        optional = all(map(_may_be_masked, others))
        if any(module in excluded for module, _ in matrix.places) or matrix.key in excluded:
            reason = EXCLUDED
        elif matrix.layout == "patches" and not convolutions:
            reason = OPTION
        elif matrix.name == "":
            raise ConfigError("the model is a single linear layer, which cannot be replaced in place; wrap it")
        elif others and not (tied and optional):
            reason = f"shared with {', '.join(type(module).__name__ for module in others)}"
            reason += " (an option)" if optional else ""
        elif pattern is not None and not pattern.fits(width):
            if on_misfit == "error":
                pattern.check_fits(width, matrix.name)
            reason = f"{width} inputs, no multiple of {pattern.m}"
        else:
            found.prunable[matrix.name] = matrix
            continue
        found.dense[matrix.name] = Dense(matrix.weight.numel(), reason)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module not in excluded:
            check_parameter(module, path)
        for attribute, parameter in module._parameters.items():
            key = f"{path}.{attribute}".lstrip(".")
            if parameter is not None and id(parameter) not in seen and _may_multiply(module, parameter):
                seen.add(id(parameter))
                reason = EXCLUDED if module in excluded or key in excluded else _kind(module)
                found.dense[key.removesuffix(".weight")] = Dense(parameter.numel(), reason)
    return found


def _may_be_masked(module: nn.Module) -> bool:
    """Whether it is an embedding that does nothing to its table but look rows up."""
    return isinstance(module, nn.Embedding) and module.max_norm is None and not module.sparse


def _may_multiply(module: nn.Module, parameter: nn.Parameter) -> bool:
    if isinstance(module, _NO_MATRICES) or is_lazy(parameter) or parameter.dim() < 2:
        return False
    if isinstance(module, _CONVOLUTIONS):
        return True
    return min(parameter.shape[-2:]) > 1 and (parameter.dim() == 2 or parameter.shape[0] > 1)


def _kind(module: nn.Module) -> str:
    return CONVOLUTION if isinstance(module, _CONVOLUTIONS) else f"no kind that can be pruned ({type(module).__name__})"


def prunable_matrices(model: nn.Module, pattern: NMPattern | None = None, **how: Any) -> dict[str, Matrix]:
    """The parameters that may be masked, by name, in the model's order; arguments as of :func:`survey`."""
    return survey(model, pattern, **how).prunable


def prunable_linears(
    model: nn.Module,
    pattern: NMPattern | None = None,
    *,
    exclude: Exclude = (),
    on_misfit: OnMisfit = "error",
) -> dict[str, nn.Linear]:
    """The linear layers that may be masked, by module name, in the model's order; see :func:`survey`."""
    found = survey(model, pattern, exclude=exclude, on_misfit=on_misfit).prunable
    return {name: matrix.module for name, matrix in found.items() if isinstance(matrix.module, nn.Linear)}


def _excluded(model: nn.Module, exclude: Exclude) -> set[nn.Module | str]:
    """The excluded modules and all below them, by whichever of their names they were meant; and parameters, by key."""
    if isinstance(exclude, str | nn.Module):
        raise ConfigError("exclude is a list of modules or name patterns, not a single one")
    modules = list(model.named_modules(remove_duplicate=False))
    keys = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found: set[nn.Module | str] = set()
    for item in exclude:
        named = list[str]()
        if isinstance(item, str):
            hits = [module for name, module in modules if name and fnmatchcase(name, item)]
            named = [name for name in keys if fnmatchcase(name, item)]
        else:
            hits = [module for _, module in modules if module is item]
        if not hits and not named:
            raise ConfigError(f"exclude: {item if isinstance(item, str) else type(item).__name__!r} matches no layer")
        found.update(below for module in hits for below in module.modules())
        found.update(named)
    return found
