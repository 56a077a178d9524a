"""Folders of transformers' segmenters and detectors with random weights, small enough for a rehearsal on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

SIZE = 64  # pixels a side of images
_VIT = {"hidden_size": 32, "num_attention_heads": 4, "image_size": SIZE, "patch_size": 8}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "SegformerForSemanticSegmentation": {
        "hidden_sizes": [16, 32, 40, 64],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 2, 5, 8],
        "decoder_hidden_size": 32,
    },
    "EomtForUniversalSegmentation": dict(
        **_VIT, num_hidden_layers=3, num_blocks=2, num_queries=10, num_upscale_blocks=1
    ),
    "EomtDinov3ForUniversalSegmentation": dict(
        **_VIT, intermediate_size=64, num_hidden_layers=3, num_blocks=2, num_queries=10, num_upscale_blocks=1
    ),
    "YolosForObjectDetection": dict(
        **{**_VIT, "image_size": [SIZE, SIZE]},
        num_hidden_layers=3,
        intermediate_size=64,
        num_detection_tokens=10,
        use_mid_position_embeddings=False,
    ),
    "RfDetrForObjectDetection": {
        "backbone_config": dict(
            **_VIT, model_type="rf_detr_dinov2", num_hidden_layers=4, num_windows=2, out_indices=[2, 4]
        ),
        "d_model": 32,
        "decoder_layers": 2,
        "decoder_ffn_dim": 64,
        "decoder_self_attention_heads": 4,
        "decoder_cross_attention_heads": 4,
        "num_queries": 10,
        "group_detr": 2,
    },
}


def save(name: str, classes: Sequence[str], folder: Path) -> None:
    """A model of a class of transformers, with classes of these names.

    Raises:
        SystemExit: there is no configuration for that class here.
    """
    import torch
    import transformers

    if name not in CONFIGURATIONS:
        raise SystemExit(f"{name} has no tiny configuration; there are {', '.join(CONFIGURATIONS)}")
    architecture: Any = getattr(transformers, name)
    torch.manual_seed(0)
    model = architecture(architecture.config_class(**CONFIGURATIONS[name], id2label=dict(enumerate(classes))))
    if hasattr(model, "attn_mask_probs"):  # EoMT's, as they are once it is trained
        model.attn_mask_probs.zero_()
    model.save_pretrained(folder)
