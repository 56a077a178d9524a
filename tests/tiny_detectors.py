"""Tiny detectors of transformers with random weights, as folders that ``save_pretrained`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from maskllm4v.config import DataSettings, RuntimeSettings, TaskSpec
from maskllm4v.data import prepare
from maskllm4v.tasks.base import open_task
from maskllm4v.tasks.detection.settings import DetectionSettings, DetectorSettings

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


def save(name: str, folder: Path, **changed: Any) -> Path:
    """A folder of the class of that name, its weights the same each time; ``changed`` are keys of its configuration."""
    import transformers

    config, settings = _settings()[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        known = getattr(transformers, config)(**{"num_labels": CLASSES, **settings, **changed})
        model = getattr(transformers, name)(known)
        for parameter in model.parameters():  # as far from its initialisation as training would bring it
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    return folder


def task(name: str, folder: Path, data: Path, **model: Any) -> Any:
    """Detection in scenes by the model in a folder, the data prepared."""
    own = {"name": name, "folder": str(folder), "classes": CLASSES, "input": {"img_size": SIZE}}
    scenes = {"train": 24, "test": 8, "size": SIZE}
    made = TaskSpec(
        task=DetectionSettings(eval_batch_size=8),
        model=DetectorSettings.model_validate(own | model),
        data=DataSettings.model_validate({"name": "s", "source": "scenes", "scenes": scenes, "calibration": 16}),
        runtime=RuntimeSettings(device="cpu"),
    )
    assert made.data is not None
    if not (data / "manifest.json").exists():
        prepare(made.data, data)
    return open_task(made, data)
