"""maskllm4v: N:M sparsity for vision transformers, one-shot or learned.

Names are loaded on first use, so that ``import maskllm4v`` costs nothing and sets nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "NMPattern": "patterns",
    "MaskedLinear": "layers",
    "LearnableMaskedLinear": "layers",
    "replace_linear_with_": "surgery",
    "make_learnable": "surgery",
    "apply_masks_": "surgery",
    "current_masks": "surgery",
    "fold_": "surgery",
    "prune": "pruners",
    "permute_channels_": "permutation",
    "apply_permutations_": "channels",
    "invert_permutations": "channels",
    "Calibration": "calibration",
    "register_pruner": "pruners",
    "update_weights_": "updates",
    "learn_masks": "training",
    "LearningSettings": "config",
    "load_packed": "packed",
    "save_packed": "export.files",
    "UserError": "errors",
}

__all__ = list(_HOMES)

if TYPE_CHECKING:
    from maskllm4v.calibration import Calibration as Calibration
    from maskllm4v.channels import apply_permutations_ as apply_permutations_
    from maskllm4v.channels import invert_permutations as invert_permutations
    from maskllm4v.config import LearningSettings as LearningSettings
    from maskllm4v.errors import UserError as UserError
    from maskllm4v.export.files import save_packed as save_packed
    from maskllm4v.layers import LearnableMaskedLinear as LearnableMaskedLinear
    from maskllm4v.layers import MaskedLinear as MaskedLinear
    from maskllm4v.packed import load_packed as load_packed
    from maskllm4v.patterns import NMPattern as NMPattern
    from maskllm4v.permutation import permute_channels_ as permute_channels_
    from maskllm4v.pruners import prune as prune
    from maskllm4v.pruners import register_pruner as register_pruner
    from maskllm4v.surgery import apply_masks_ as apply_masks_
    from maskllm4v.surgery import current_masks as current_masks
    from maskllm4v.surgery import fold_ as fold_
    from maskllm4v.surgery import make_learnable as make_learnable
    from maskllm4v.surgery import replace_linear_with_ as replace_linear_with_
    from maskllm4v.training import learn_masks as learn_masks
    from maskllm4v.updates import update_weights_ as update_weights_


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"maskllm4v.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'maskllm4v' has no attribute {name!r}")
