"""What the library says, in the words of a command: options in place of settings and Python arguments."""

from __future__ import annotations

import re
from collections.abc import Callable

FLAGS = {  # settings whose flags have other names, and those that messages begin with
    "accumulate": "--grad-accum-steps",
    "amp": "--amp",
    "auto_augment": "--aa",
    "batch_size": "--batch-size",
    "calibration": "--nsamples",
    "damping": "--damping",
    "ema": "--model-ema-decay",
    "eval_batch_size": "--batch-size",
    "gate_std": "--gate-init-std",
    "label_smoothing": "--smoothing",
    "loader_workers": "--workers",
    "log_every": "--log-interval",
    "name": "--model",
    "checkpoint_minutes": "--save-minutes",
    "model.name": "--model",
    "optimizer": "--opt",
    "quality": "--quality",
    "random_erasing": "--reprob",
    "regularisation": "--sparse-weight-reg",
    "scaling": "--scaling-range",
    "seeds": "--seed",
    "size": "--size",
    "tau": "--tau-range",
    "target": "--target",
    "update_weights": "--enable-update",
    "workers": "--workers",
}
ARGUMENT = re.compile(r"`(\w+)(?:='?(\w+)'?)?`")  # of a Python function, as messages of the library write it
SETTING = re.compile(
    r"\b(?:data|model|runtime|task)(?:\.[a-z_]+)+\b"
    rf"|^(?:{'|'.join(key for key in FLAGS if '.' not in key)})(?= is )"
    rf"|(?<![\w./'-])(?:{'|'.join(key for key in FLAGS if '_' in key)})(?![\w./'-])"
)


def flag_of(key: str) -> str:
    """``--tau-range`` for ``learning.tau.0``."""
    if key in FLAGS:
        return FLAGS[key]
    name = [part for part in key.split(".") if not part.isdigit()][-1]
    return FLAGS.get(name, f"--{name.replace('_', '-')}")


def in_options(text: str, has: Callable[[str], bool]) -> str:
    """What the library says, in the words of a command: its options in place of arguments and settings.

    Arguments stand in back quotes, as in ```on_misfit='skip'```; advice comes behind the last semicolon, one way
    after the other behind ", or ". Ways that the command has no option for are left out.
    """

    def option(key: str) -> str:
        flag = flag_of(key)
        return flag if has(flag) else ""

    said, semicolon, advice = text.rpartition("; ")
    if semicolon:
        ways = [way for way in advice.split(", or ") if all(option(name) for name, _ in ARGUMENT.findall(way))]
        text = f"{said}; {', or '.join(ways)}" if ways else said
    text = ARGUMENT.sub(
        lambda found: f"{option(found[1])} {found[2] or ''}".strip() if option(found[1]) else found[0], text
    )
    return SETTING.sub(lambda found: option(found[0]) or found[0], text)
