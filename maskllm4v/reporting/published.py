"""The original's results on ViT-B/16 and ImageNet-1k, as printed in its README (reference, not ours).

Kept literally: the printed cells follow no single rounding rule (79.158 became 79.15, 59.728 became
59.72, 79.456 became 79.46). ``json`` holds the fields of its evaluation output where it prints them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SOURCE = "MaskLLM-4V, ViT-B/16 (augreg_in1k, 224×224) on ImageNet-1k"
TABLE = "imagenet_vit_b16"  # the table of ours that reproduces it
_COMMON = {"img_size": 224, "crop_pct": 0.9, "interpolation": "bicubic"}


@dataclass(frozen=True)
class Published:
    """One line: our row key, its printed cells, and its printed JSON block."""

    row: str
    label: str
    pattern: str
    update: bool
    prior: str | None
    top1: str
    json: dict[str, Any] = field(default_factory=dict)


def _json(model: str, top1: float, top1_err: float, top5: float, top5_err: float, param_count: float) -> dict[str, Any]:
    values = {"top1": top1, "top1_err": top1_err, "top5": top5, "top5_err": top5_err, "param_count": param_count}
    return {"model": model, **values, **_COMMON}


_AUGREG = "vit_base_patch16_224.augreg_in1k"
_PLAIN = "vit_base_patch16_224"

ROWS = (
    Published("imagenet-dense", "ViT-B/16 (in1k)", "Dense", False, None, "79.15",
              _json(_AUGREG, 79.158, 20.842, 94.088, 5.912, 86.57)),
    Published("imagenet-magnitude", "Magnitude", "2:4", False, None, "65.92",
              _json(_PLAIN, 65.92, 34.08, 86.058, 13.942, 86.57)),
    Published("imagenet-wanda", "Wanda", "2:4", False, None, "63.28",
              _json(_PLAIN, 63.282, 36.718, 85.574, 14.426, 86.57)),
    Published("imagenet-sparsegpt-update", "SparseGPT", "2:4", True, None, "71.52",
              _json(_PLAIN, 71.52, 28.48, 90.246, 9.754, 86.57)),
    Published("imagenet-sparsegpt-noupdate", "SparseGPT w/o Update", "2:4", False, None, "59.72",
              _json(_PLAIN, 59.728, 40.272, 82.326, 17.674, 86.57)),
    Published("imagenet-maskllm-1ep-sparsegpt", "MaskLLM-4V (1 Epoch)", "2:4", False, "SparseGPT", "76.23"),
    Published("imagenet-maskllm-1ep-magnitude", "MaskLLM-4V (1 Epoch)", "2:4", False, "Magnitude", "76.18"),
    Published("imagenet-maskllm-20ep-sparsegpt", "MaskLLM-4V (20 Epochs)", "2:4", False, "SparseGPT", "79.46",
              _json(_PLAIN, 79.456, 20.544, 94.548, 5.452, 213.97)),
    Published("imagenet-maskllm-20ep-magnitude", "MaskLLM-4V (20 Epochs)", "2:4", False, "Magnitude", "79.28"),
)  # fmt: skip
