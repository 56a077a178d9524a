"""Four records of format 2, as they were committed, and what their settings are in format 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskllm4v.runs.paths import record_file
from maskllm4v.utils.io import read_json, write_json
from scripts.lock_entries import dvc_entry

FIXTURES = Path(__file__).parent / "old_records" / "format2"
OLD = sorted(FIXTURES.glob("*.json"))
Record = dict[str, Any]

VIT = {
    "name": "VisionTransformer",
    "args": {
        **{"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 32, "depth": 4},
        **{"num_heads": 4, "class_token": False, "global_pool": "avg"},
    },
    "fused_attention": False,
}
CLASSIFICATION = {"name": "classification", "label_smoothing": 0.1, "shift": 1, "shift_probability": 0.5}
DIGITS = {
    **{"table": "digits", "exact": True, "seeds": [0, 1, 2], "pattern": "2:4", "task": CLASSIFICATION, "model": VIT},
    "data": {"name": "digits", "source": "digits", "split_seed": 1234},
    "dense": {"row": "digits-dense", "init": "scratch", "steps": 1000, "lr": 0.01, "betas": [0.9, 0.99]},
}
MADE_IMAGES = {"steps": 25, "guidance": 1.5, "clip": True}
SETTINGS: dict[str, Record] = {  # in format 3
    "digits-magnitude-sgpt": {
        **DIGITS,
        **{"prior": {"method": "magnitude"}, "update": {"masks": "digits-magnitude", "update": "sparsegpt"}},
    },
    "digits-hybrid-long": {
        **DIGITS,
        "start": {
            "prior": {"method": "magnitude"},
            "update": {"masks": "digits-magnitude", "update": "least_squares"},
        },
        "learning": {
            **{"prior": "digits-magnitude-ls", "weights": "updated", "distillation": 1.0, "steps": 800},
            **{"batch_size": 64, "lr": 0.01, "min_lr": 0.001},
        },
    },
    "cifar10-fixed-mask-finetune": {
        **{"table": "cifar10", "exact": False, "seeds": [0, 1, 2], "pattern": "2:4", "prior": {"method": "magnitude"}},
        "data": {
            **{"name": "cifar10", "source": "folder", "root": "data/cifar10", "test": "test", "classes": 10},
            **{"holdout": 2000, "in_memory": 32, "calibration": 512, "calibration_sets": 3},
        },
        "task": {
            **{"name": "classification", "label_smoothing": 0.1, "shift": 4, "hflip": 0.5, "eval_batch_size": 500},
        },
        "model": {
            "name": "VisionTransformer",
            "args": {
                **{"img_size": 32, "num_classes": 10, "embed_dim": 96, "depth": 6, "num_heads": 3, "mlp_ratio": 2},
                **{"class_token": False, "global_pool": "avg", "dynamic_img_size": True},
            },
            "stem": {"channels": [32, 64, 96], "strides": [1, 2, 2]},
            "input": {"crop_pct": 1.0, "mean": [0.4914, 0.4822, 0.4465], "std": [0.247, 0.2435, 0.2616]},
            "fused_attention": False,
        },
        "dense": {
            **{"row": "cifar10-dense", "init": "scratch", "shared": True, "steps": 6000, "batch_size": 256},
            **{"optimizer": "muon", "lr": 0.005, "betas": [0.9, 0.98], "warmup": 0.05, "amp": "bf16"},
            "optimizer_args": {"fallback_list": ["patch_embed", "pos_embed", "head"], "fallback_lr_scale": 0.4},
            "progressive": {"size": 24, "steps": 4000},
        },
        "finetuning": {"start": "cifar10-magnitude", "steps": 600, "amp": "bf16"},
    },
    "dit-maskllm": {
        **{
            "table": "dit_digits",
            "exact": True,
            "seeds": [0, 1, 2],
            "pattern": "2:4",
            "prior": {"method": "magnitude"},
        },
        "data": {"name": "dit_digits", "source": "digits", "split_seed": 1234, "calibration": 256},
        "task": {
            **{"name": "diffusion", "conditioning_samples": 1024, "bank": {**MADE_IMAGES, "samples": 480}},
            "judge": {
                "task": CLASSIFICATION,
                "model": VIT,
                "training": {
                    **{"steps": 1000, "batch_size": 64, "lr": 0.01, "betas": [0.9, 0.99], "weight_decay": 0.05},
                    **{"warmup": 0.1, "clip_grad": 1.0},
                },
            },
        },
        "model": {
            "name": "DiTTransformer2DModel",
            "args": {
                **{"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 1, "num_layers": 3},
                **{"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10},
            },
            "fused_attention": False,
        },
        "dense": {
            **{"row": "dit-dense", "init": "scratch", "steps": 1600, "lr": 0.004, "betas": [0.9, 0.99]},
            **{"weight_decay": 0.0, "warmup": 0.03},
        },
        "learning": {
            **{"prior": "dit-magnitude", "steps": 300, "batch_size": 64, "lr": 0.01, "min_lr": 0.001},
            **{"weight_decay": 0.0, "regularisation": 0.0, "distillation": 1.0},
        },
        "evaluation": {**MADE_IMAGES, "samples": 500, "grid": [*range(10)] * 4, "columns": 10},
    },
}


def old(row: str = "digits-hybrid-long") -> Record:
    found: Record = read_json(FIXTURES / f"{row}.json")
    return found


def place(record: Record, root: Path) -> Path:
    path = record_file(record["table"], record["row"], root / "reports")
    write_json(path, record)
    (path.parent / "layers.csv").write_text("seed,layer\n")
    return path


def lock(root: Path) -> str:
    """As DVC writes it: an output of each row's evaluation, and a stage that depends on all rows of a table."""
    text = "schema: '2.0'\nstages:\n"
    for row in SETTINGS:
        table = old(row)["table"]
        text += f"  evaluate@{row}:\n    cmd: python -m stages.evaluate {row}\n    deps:\n"
        text += f"    - path: artifacts/{row}\n      hash: md5\n      md5: 0123.dir\n      size: 3\n      nfiles: 1\n"
        text += "    params:\n      params.yaml:\n        seeds:\n        - 0\n    outs:\n"
        text += entry(root, f"reports/{table}/runs/{row}/evaluation")
    text += "  report:\n    cmd: python -m stages.report\n    deps:\n" + entry(root, "reports/digits/runs")
    return text + "    - path: stages/report.py\n      hash: md5\n      md5: '0123'\n      size: 3\n"


def entry(root: Path, path: str) -> str:
    """Long paths stand on a line of their own."""
    shown = path if len(path) < 55 else f"\n        {path}"
    facts = {"hash": "md5", **dvc_entry(root, path, {})}
    return f"    - path: {shown}\n" + "".join(f"      {key}: {value}\n" for key, value in facts.items())
