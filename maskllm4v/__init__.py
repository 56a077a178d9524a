"""maskllm4v: N:M sparsity for vision transformers, one-shot or learned.

Names are loaded on first use, so that ``import maskllm4v`` costs nothing and sets nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "NMPattern": "sparsity.patterns",
    "MaskedLinear": "sparsity.layers",
    "LearnableMaskedLinear": "sparsity.layers",
    "dense_weight": "sparsity.layers",
    "replace_linear_with_": "sparsity.surgery",
    "make_learnable": "sparsity.surgery",
    "apply_masks_": "sparsity.surgery",
    "current_masks": "sparsity.parameters",
    "fold_": "sparsity.surgery",
    "prune": "oneshot.prune",
    "permute_channels_": "oneshot.permute",
    "apply_permutations_": "sparsity.permutation",
    "invert_permutations": "sparsity.permutation",
    "Calibration": "sparsity.calibration",
    "register_pruner": "oneshot.prune",
    "each_mask_used": "sparsity.usage",
    "update_weights_": "oneshot.weight_update",
    "learn_masks": "training.mask_learning",
    "LearningSettings": "config",
    "load_packed": "checkpoints.packed",
    "save_packed": "export.files",
    "UserError": "utils.errors",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from maskllm4v.checkpoints.packed import load_packed as load_packed
    from maskllm4v.config import LearningSettings as LearningSettings
    from maskllm4v.export.files import save_packed as save_packed
    from maskllm4v.oneshot.permute import permute_channels_ as permute_channels_
    from maskllm4v.oneshot.prune import prune as prune
    from maskllm4v.oneshot.prune import register_pruner as register_pruner
    from maskllm4v.oneshot.weight_update import update_weights_ as update_weights_
    from maskllm4v.sparsity.calibration import Calibration as Calibration
    from maskllm4v.sparsity.layers import LearnableMaskedLinear as LearnableMaskedLinear
    from maskllm4v.sparsity.layers import MaskedLinear as MaskedLinear
    from maskllm4v.sparsity.layers import dense_weight as dense_weight
    from maskllm4v.sparsity.parameters import current_masks as current_masks
    from maskllm4v.sparsity.patterns import NMPattern as NMPattern
    from maskllm4v.sparsity.permutation import apply_permutations_ as apply_permutations_
    from maskllm4v.sparsity.permutation import invert_permutations as invert_permutations
    from maskllm4v.sparsity.surgery import apply_masks_ as apply_masks_
    from maskllm4v.sparsity.surgery import fold_ as fold_
    from maskllm4v.sparsity.surgery import make_learnable as make_learnable
    from maskllm4v.sparsity.surgery import replace_linear_with_ as replace_linear_with_
    from maskllm4v.sparsity.usage import each_mask_used as each_mask_used
    from maskllm4v.training.mask_learning import learn_masks as learn_masks
    from maskllm4v.utils.errors import UserError as UserError


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"maskllm4v.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'maskllm4v' has no attribute {name!r}")
