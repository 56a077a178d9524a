"""Tiny detectors of transformers with random weights, as folders that ``save_pretrained`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CLASSES = 10
SIZE = 64  # pixels a side, of one channel: scenes of digits
QUERIES = 8

_RESNET = {"num_channels": 1, "embedding_size": 8, "hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}
_HYBRID = {
    "encoder_in_channels": [16, 32, 64],
    "encoder_hidden_dim": 16,
    "d_model": 16,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 2,
    "encoder_attention_heads": 2,
    "num_queries": QUERIES,
    "decoder_layers": 2,
    "decoder_in_channels": [16, 16, 16],
}
_THREE = ["stage2", "stage3", "stage4"]


def _settings() -> dict[str, tuple[str, dict[str, Any]]]:
    """By name of the class: that of its configuration, and what that holds."""
    import transformers as t

    residual = t.RTDetrResNetConfig(**_RESNET, out_features=_THREE)
    hgnet = t.HGNetV2Config(
        num_channels=1,
        embedding_size=8,
        stem_channels=[1, 8, 8],
        hidden_sizes=[8, 16, 32, 64],
        depths=[1, 1, 1, 1],
        stage_in_channels=[8, 8, 16, 32],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 16, 32, 64],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        out_features=_THREE,
    )
    dinov2 = {
        "model_type": "rf_detr_dinov2",
        "num_channels": 1,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIZE,
        "patch_size": 8,
        "num_windows": 2,
        "out_indices": [1, 2],
    }
    return {
        "YolosForObjectDetection": (
            "YolosConfig",
            {
                "num_channels": 1,
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 32,
                "image_size": [SIZE, SIZE],
                "patch_size": 8,
                "num_detection_tokens": QUERIES,
                "use_mid_position_embeddings": False,
            },
        ),
        "DetrForObjectDetection": (
            "DetrConfig",
            {
                "num_channels": 1,
                "use_timm_backbone": False,
                "backbone_config": t.ResNetConfig(**_RESNET, out_features=["stage2"]),
                "d_model": 16,
                "encoder_layers": 1,
                "decoder_layers": 2,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "decoder_ffn_dim": 32,
                "num_queries": QUERIES,
            },
        ),
        "RTDetrForObjectDetection": ("RTDetrConfig", {"backbone_config": residual, **_HYBRID}),
        "RTDetrV2ForObjectDetection": ("RTDetrV2Config", {"backbone_config": residual, **_HYBRID}),
        "DFineForObjectDetection": ("DFineConfig", {"backbone_config": hgnet, **_HYBRID}),
        "RfDetrForObjectDetection": (
            "RfDetrConfig",
            {
                "backbone_config": dinov2,
                "d_model": 16,
                "decoder_layers": 2,
                "decoder_ffn_dim": 32,
                "decoder_self_attention_heads": 2,
                "decoder_cross_attention_heads": 2,
                "num_queries": QUERIES,
                "group_detr": 2,
            },
        ),
    }


def save_detector(name: str, folder: Path, **changed: Any) -> Path:
    """A model of that class, its weights the same each time; ``changed`` are keys of its configuration."""
    import transformers

    config, settings = _settings()[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        known = getattr(transformers, config)(**{"num_labels": CLASSES, **settings, **changed})
        model = getattr(transformers, name)(known)
        for parameter in model.parameters():  # so that scores differ from query to query, as those of trained models do
            if parameter.ndim == 2 and parameter.std() < 0.1:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder
