"""Folders of transformers' segmenters with random weights, small enough for tests: 32×32 grey images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from maskllm4v.config import DataSettings, RuntimeSettings, TaskSpec
from maskllm4v.data import prepare
from maskllm4v.tasks.base import open_task
from maskllm4v.tasks.segmentation.settings import SegmentationSettings, SegmenterSettings

SIZE, CLASSES = 32, 11  # pixels a side; the ground and ten digits
VIT = {"hidden_size": 16, "num_attention_heads": 2, "image_size": SIZE, "patch_size": 8, "num_channels": 1}
SWIN = {
    "num_channels": 1,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 2,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
EOMT = {"num_hidden_layers": 3, "num_blocks": 2, "num_queries": 6, "num_upscale_blocks": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "SegformerForSemanticSegmentation": {
        "num_channels": 1,
        "hidden_sizes": [8, 8, 8, 16],
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 2, 2],
        "decoder_hidden_size": 8,
    },
    "DPTForSemanticSegmentation": dict(
        **VIT,
        num_hidden_layers=4,
        intermediate_size=32,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        is_hybrid=False,
    ),
    "UperNetForSemanticSegmentation": {
        "backbone_config": ("SwinConfig", SWIN),
        "hidden_size": 8,
        "auxiliary_in_channels": 32,
        "auxiliary_channels": 8,
    },
    "Mask2FormerForUniversalSegmentation": {
        "backbone_config": ("SwinConfig", SWIN),
        "feature_size": 32,  # 32 groups are normalised
        "mask_feature_size": 16,
        "hidden_dim": 16,
        "encoder_feedforward_dim": 16,
        "dim_feedforward": 16,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "num_attention_heads": 2,
        "num_queries": 6,
    },
    "EomtForUniversalSegmentation": dict(**VIT, **EOMT),
    "EomtDinov3ForUniversalSegmentation": dict(**VIT, **EOMT, intermediate_size=32),
    "SamModel": {
        "vision_config": dict(
            **VIT, num_hidden_layers=2, output_channels=8, window_size=2, global_attn_indexes=[1], mlp_dim=32
        ),
        "prompt_encoder_config": {"hidden_size": 8, "image_size": SIZE, "patch_size": 8, "mask_input_channels": 4},
        "mask_decoder_config": {
            "hidden_size": 8,
            "mlp_dim": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 8,
            "attention_downsample_rate": 1,
        },
    },
}


def save(name: str, folder: Path, masked: list[float] | None = None) -> Path:
    """A folder of one of :data:`CONFIGS`; returns it. ``masked``: EoMT's shares of queries with masked attention."""
    import transformers

    kind = re.sub("(For(Semantic|Universal)Segmentation|Model)$", "", name)
    made = dict(CONFIGS[name])
    if "backbone_config" in made:
        of, how = made["backbone_config"]
        made["backbone_config"] = getattr(transformers, of)(**how)
    if name != "SamModel":
        made["num_labels"] = CLASSES
    config = getattr(transformers, f"{kind}Config")(**made)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, name)(config)
        for parameter in model.parameters():  # as far from its initialisation as training would bring it
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    if masked is not None:
        model.attn_mask_probs.copy_(torch.tensor(masked))
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    return folder


def spec(name: str, folder: Path, **model: Any) -> TaskSpec:
    """Segmentation of scenes by the model in a folder."""
    own: dict[str, Any] = {"input": {"img_size": SIZE}} | ({"stride": 1} if name == "SamModel" else {})
    scenes = {"train": 24, "test": 8}
    return TaskSpec(
        task=SegmentationSettings(eval_batch_size=8),
        model=SegmenterSettings.model_validate(
            {"name": name, "folder": str(folder), "classes": CLASSES, **own, **model}
        ),
        data=DataSettings.model_validate({"name": "s", "source": "scenes", "scenes": scenes, "calibration": 8}),
        runtime=RuntimeSettings(device="cpu"),
    )


def task(name: str, folder: Path, data: Path, **model: Any) -> Any:
    """The task, its data prepared."""
    made = spec(name, folder, **model)
    assert made.data is not None
    if not (data / "manifest.json").exists():
        prepare(made.data, data)
    return open_task(made, data)
