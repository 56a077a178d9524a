"""timm's families: a small member of each that has a matrix besides its head, and the families that have none.

A family is a module of ``timm.models``; a second word names another way to compute in it. Members are made smaller
still where their arguments allow it, which changes sizes and never what is computed.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from scripts.sweep.models import Subject
from scripts.sweep.others import images

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
HEADS, WIDTHS = (1, 2, 2, 4), (16, 32, 32, 64)
Member = tuple[str, int, dict[str, Any]]  # of the registry, size of images, arguments

MEMBERS: dict[str, Member] = {
    "beit": ("beit_base_patch16_224", 32, VIT),
    "byobnet": ("resnet50_mlp", 64, {}),
    "byobnet attention": ("resnet50_clip", 64, {"img_size": 64}),
    "cait": ("cait_xxs24_224", 32, VIT),
    "coat": ("coat_tiny", 64, {"img_size": 64, "embed_dims": [64] * 4, "parallel_depth": 1}),
    "convit": ("convit_tiny", 32, {**VIT, "embed_dim": 16, "num_heads": 4, "local_up_to_layer": 1}),
    "convnext": ("test_convnext", 64, {}),
    "cpubone": ("cpubone_nano", 64, {}),
    "crossvit": ("crossvit_tiny_240", 240, {"embed_dim": [48, 96], "depth": [[1, 1, 0], [1, 1, 0]]}),
    "csatv2": ("csatv2", 128, {"dims": (32, 32, 64, 64), "depths": (1, 1, 2, 2), "transformer_depths": (0, 0, 1, 1)}),
    "davit": ("davit_tiny", 64, {"depths": (1, 1, 1, 1), "embed_dims": WIDTHS, "num_heads": HEADS, "window_size": 2}),
    "deepseek_vit": ("deepseek_vit_412m", 48, {**VIT, "patch_size": 8, "img_size": 48}),
    "deit": ("deit_tiny_distilled_patch16_224", 32, VIT),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "efficientformer": ("efficientformer_l1", 224, {"depths": (1, 1, 1, 2), "embed_dims": WIDTHS}),
    "efficientnet": ("efficientnet_cc_b0_4e", 64, {}),
    "efficientvit_mit": ("efficientvit_b0", 64, {}),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 32, VIT),
    "eva 02": ("eva02_tiny_patch14_224", 32, {**VIT, "mlp_ratio": 4}),
    "fastvit": ("fastvit_mci0", 64, {"layers": (1, 1, 1, 1), "embed_dims": WIDTHS}),
    "gcvit": ("gcvit_xxtiny", 64, {"img_size": 64}),
    "gemma4_vit": ("gemma4_vit_167m", 96, {**VIT, "patch_size": 16, "img_size": 96, "head_dim": 32}),
    "hiera": (
        "hiera_tiny_224",
        64,
        {"img_size": (64, 64), "embed_dim": 16, "stages": (1, 1, 1, 1), "mask_unit_size": (4, 4)},
    ),
    "hieradet_sam2": ("sam2_hiera_tiny", 224, {"embed_dim": 16, "stages": (1, 1, 2, 1), "global_att_blocks": (3,)}),
    "levit": ("levit_128s", 224, {}),
    "lowformer": ("lowformer_b0", 64, {}),
    "mambaout": ("test_mambaout", 64, {}),
    "maxxvit": ("test_maxvit", 160, {}),
    "metaformer": ("caformer_s18", 64, {}),
    "mlp_mixer": ("gmlp_ti16_224", 64, {"img_size": 64}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "mvitv2": ("mvitv2_tiny", 64, {"img_size": (64, 64)}),
    "naflexvit": ("naflexvit_base_patch16_gap", 64, {"embed_dim": 64, "depth": 2, "num_heads": 2}),
    "nest": ("nest_tiny_jx", 64, {"img_size": 64}),
    "nextvit": ("nextvit_small", 64, {}),
    "pit": ("pit_ti_224", 96, {"img_size": 96, "depth": (1, 1, 1)}),
    "pvt_v2": ("pvt_v2_b0", 64, {}),
    "qwen3_vit": ("qwen3_vit_88m", 64, {"embed_dim": 64, "depth": 2, "num_heads": 2}),
    "sequencer": ("sequencer2d_s", 56, {"img_size": 56, "layers": [1, 1, 1, 1]}),
    "swiftformer": ("swiftformer_xs", 64, {}),
    "swin_transformer": (
        "swin_tiny_patch4_window7_224",
        64,
        {
            "img_size": 64,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 16,
            "depths": (2, 2, 1, 1),
            "num_heads": HEADS,
        },
    ),
    "swin_transformer_v2": (
        "swinv2_tiny_window8_256",
        64,
        {
            "img_size": 64,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 16,
            "depths": (2, 2, 1, 1),
            "num_heads": HEADS,
        },
    ),
    "swin_transformer_v2_cr": (
        "swinv2_cr_tiny_224",
        64,
        {"img_size": 64, "window_size": 2, "embed_dim": 16, "depths": (2, 2, 1, 1), "num_heads": HEADS},
    ),
    "tiny_vit": ("tiny_vit_5m_224", 64, {"depths": (1, 1, 2, 1), "window_sizes": (2, 2, 2, 2)}),
    "tnt": ("tnt_s_legacy_patch16_224", 32, {"img_size": 32, "embed_dim": 96, "depth": 2, "num_heads_outer": 2}),
    "twins": ("twins_svt_small", 64, {"depths": [1, 2, 1, 1], "embed_dims": [32, 32, 64, 64], "num_heads": HEADS}),
    "vision_transformer": ("test_vit", 32, {"img_size": 32, "patch_size": 8}),
    "vision_transformer features": ("test_vit", 32, {"img_size": 32, "patch_size": 8, "features_only": True}),
    "vision_transformer pooling": ("vit_base_patch16_siglip_224", 32, VIT),
    "vision_transformer gated": ("vit_giant_patch14_dinov2", 32, {**VIT, "mlp_ratio": 4}),
    "vision_transformer parallel": ("vit_base_patch16_xp_224", 32, VIT),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 224, {"depth": 2}),
    "vision_transformer_relpos": ("test_vit_relpos", 32, {"img_size": 32, "patch_size": 8, "depth": 2}),
    "vision_transformer_sam": ("samvit_base_patch16_224", 32, {**VIT, "window_size": 2, "global_attn_indexes": (1,)}),
    "vitamin": ("vitamin_small_224", 64, {"img_size": 64, "depth": 2}),
    "volo": ("volo_d1_224", 64, {"img_size": 64}),
    "xcit": ("xcit_nano_12_p8_224", 32, {"img_size": 32, "depth": 2}),
}

WITHOUT = frozenset(
    {
        *("byoanet", "convmixer", "cspnet", "cspnext", "densenet", "dla", "dpn", "efficientformer_v2", "efficientvim"),
        *("efficientvit_msra", "fasternet", "focalnet", "ghostnet", "hardcorenas", "hgnet", "hrnet", "iformer"),
        *("inception_next", "inception_resnet_v2", "inception_v3", "inception_v4", "lcnetv2", "mobilenetv3"),
        *("mobilenetv5", "nasnet", "nfnet", "pnasnet", "rdnet", "regnet", "repghost", "repvit", "res2net", "resnest"),
        *("resnet", "resnetv2", "rexnet", "selecsls", "senet", "shvit", "sknet", "starnet", "tresnet", "vgg"),
        *("visformer", "vovnet", "xception", "xception_aligned"),
    }
)
"""Families whose members multiply by convolutions alone, their classifiers aside."""


def subject(family: str) -> Subject:
    """A family's member, with ten classes."""
    name, size, arguments = MEMBERS[family]

    def make() -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(name, num_classes=10, **arguments)
        return model

    return Subject(f"timm {family}", make, images(size), name)


TIMM = tuple(map(subject, MEMBERS))
