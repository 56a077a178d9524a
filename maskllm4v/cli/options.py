"""Flags that commands share, and the settings that they add up to. Names are the original's and timm's.

A flag that is not given is no setting: what the library does by default stands in :mod:`maskllm4v.config`.
Of the original's flags some have a second name here, and those without a counterpart say what to do instead.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from maskllm4v.cli.wording import flag_of
from maskllm4v.config import DataSettings, RuntimeSettings, Settings, TaskSpec, parse_section
from maskllm4v.config.base import Number
from maskllm4v.tasks.classification.settings import ClassificationSettings, TimmSettings
from maskllm4v.utils.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without listing all flags."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.split()[-1]}: {message}; see {self.prog} --help\n")

    def has(self, flag: str) -> bool:
        """Whether a flag can be given."""
        return flag in self._option_string_actions and not isinstance(self._option_string_actions[flag], Replaced)


class Replaced(argparse.Action):
    """A flag of the original that is an error here; its ``const`` says what to do instead."""

    def __call__(self, parser: argparse.ArgumentParser, _: object, values: object, option: str | None = None) -> None:
        parser.error(f"no {option} here: {self.const}")


def add_replaced(parser: argparse.ArgumentParser, hints: Mapping[str, str]) -> None:
    for flag, hint in hints.items():
        parser.add_argument(
            flag, action=Replaced, nargs="*", const=hint, default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )


def add_model(parser: argparse.ArgumentParser, *, required: bool = True, images: bool = True) -> None:
    """``images``: with flags that say how images are prepared."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "-m", "--model", required=required, metavar="NAME", help="timm's name, e.g. vit_base_patch16_224"
    )
    group.add_argument(
        "--pretrained",
        action="store_true",
        help="take timm's weights; also done where no other dense weights are given",
    )
    group.add_argument(
        "--dense-checkpoint",
        "--ckpt",
        "--initial-checkpoint",
        type=Path,
        metavar="FILE",
        help="take the dense weights from a state dict: .safetensors, .pt, .pth.tar",
    )
    group.add_argument(
        "--num-classes", type=int, metavar="N", help="classes to tell apart, if not the model's own number"
    )
    group.add_argument(
        "--img-size", "--image-size", type=int, metavar="PIXELS", help="image size, if not the model's own"
    )
    if images:
        group.add_argument(
            "--mean", type=float, nargs="+", metavar="X", help="subtracted from images, a value a channel"
        )
        group.add_argument(
            "--std", type=float, nargs="+", metavar="X", help="images are divided by it, a value a channel"
        )
        group.add_argument(
            "--crop-pct", type=float, metavar="X", help="share of the resized image that the centre crop keeps"
        )
        group.add_argument(
            "--interpolation", metavar="KIND", help="bilinear, bicubic or nearest, when images are resized"
        )
    else:
        parser.set_defaults(mean=None, std=None, crop_pct=None, interpolation=None)
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of everything that is drawn (default 0)")


def add_data(parser: argparse.ArgumentParser, *splits: str) -> None:
    """``splits``: which of ``train`` and ``val`` the command reads."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data-dir",
        "--data-path",
        default="data/imagenet",
        metavar="FOLDER",
        help="holds a folder a split, which hold a folder a class (default data/imagenet); with --dataset: its root",
    )
    group.add_argument("--dataset", metavar="NAME", help="one of timm's instead of an image folder, e.g. torch/cifar10")
    for split in ("train", "val"):
        if split in splits:
            default = "validation" if split == "val" else "train"
            group.add_argument(
                f"--{split}-split",
                *(["--split"] if splits == (split,) else []),
                metavar="NAME",
                help=f"of the {'training' if split == 'train' else 'validation'} images "
                f"(default {split}; with --dataset {default})",
            )


def add_runtime(parser: argparse.ArgumentParser, batch_size: int, batch_help: str) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument(
        "-b", "--batch-size", type=int, default=batch_size, metavar="N", help=f"{batch_help} (default {batch_size})"
    )
    group.add_argument("-j", "--workers", type=int, default=4, metavar="N", help="that decode images (default 4)")
    group.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:0, ...")


def add_amp(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--amp", action="store_true", help="mixed precision")
    parser.add_argument(
        "--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="of --amp (default float16)"
    )


def amp(arguments: argparse.Namespace) -> str:
    """``--amp`` and ``--amp-dtype`` as a setting."""
    return {"float16": "fp16", "bfloat16": "bf16"}[arguments.amp_dtype] if arguments.amp else "no"


def mask_file(text: str) -> Path:
    """The name of a mask file to write."""
    if not text.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"{text!r}: masks are written as safetensors; end the name in .safetensors")
    return Path(text)


def add_pattern(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument("--pattern", metavar="N:M", help=f"weights kept of each group of M (default {default})")
    add_replaced(parser, dict.fromkeys(("--N", "--M"), "say --pattern N:M"))


def add_exclude(parser: argparse.ArgumentParser, when: str = "") -> None:
    parser.add_argument(
        "--exclude",
        nargs="*",
        default=["head"],
        metavar="LAYER",
        help=f"{when}stay dense (default head); one of a model's classifiers stands for all, e.g. also for head_dist",
    )


def add_convolutions(parser: argparse.ArgumentParser, when: str = "") -> None:
    parser.add_argument(
        "--convolutions",
        action="store_true",
        help=f"{when}prune 1×1 convolutions, and those with a kernel as wide as their stride (patch embeddings), too",
    )


def add_calibration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nsamples", type=int, default=128, metavar="N", help="images that calibrate (default 128)")
    parser.add_argument(
        "--calibration-split",
        choices=("train", "val"),
        default="train",
        help="they come from (default train); val, as in the original, leaks: it is what validate measures on",
    )


class Flags(Settings):
    """What flags say of a model and its images, as settings; commands add sections of their own."""

    data: DataSettings | None = None
    task: ClassificationSettings = ClassificationSettings()
    model: TimmSettings
    seed: Number
    runtime: RuntimeSettings

    @property
    def spec(self) -> TaskSpec:
        """What the command's task is made of."""
        return TaskSpec(self.task, self.model, data=self.data, seeds=[self.seed], runtime=self.runtime)


SomeFlags = TypeVar("SomeFlags", bound=Flags)


def settings(kind: type[SomeFlags], arguments: argparse.Namespace, **sections: dict[str, Any]) -> SomeFlags:
    """The flags as settings.

    Args:
        kind: which sections the command has.
        arguments: of :func:`add_model` and :func:`add_runtime`.
        sections: what only the command knows of each, as in ``params.yaml``; ``data``: of :func:`images`.

    Raises:
        ConfigError: a value is out of its range; names the flag.
    """
    a = arguments
    raw = {
        **sections,
        "model": _model(a, sections.get("model", {})),
        "seed": a.seed,
        "runtime": {"device": a.device, "loader_workers": a.workers, **sections.get("runtime", {})},
    }
    try:
        return parse_section(kind, raw)
    except ConfigError as error:  # say flags, not settings
        text = re.sub(r"^params: (\S+)(?= is )", lambda key: flag_of(key[1]), str(error), flags=re.MULTILINE)
        raise ConfigError(re.sub(r"^params: (\S+: )?", "", text, flags=re.MULTILINE)) from error


def images(arguments: argparse.Namespace, name: str, calibration: int = 1) -> dict[str, Any]:
    """Settings of the data: the ``"train"`` or ``"val"`` split of :func:`add_data`, the only one that is looked at."""
    a = arguments
    given: str | None = getattr(a, f"{name}_split")
    split = given or ("validation" if a.dataset and name == "val" else name)
    source = {"source": "timm", "dataset": a.dataset} if a.dataset else {"source": "folder"}
    return {"name": "cli", "root": a.data_dir, **source, "train": split, "test": split, "calibration": calibration}


def set_only(**values: Any) -> dict[str, Any]:
    """The values that were given."""
    return {key: value for key, value in values.items() if value is not None}


def _with_classifiers(model: str, exclude: list[str]) -> list[str]:
    """Layers to exclude, with the other classifiers of a distilled model where they name one of them."""
    import timm

    from maskllm4v.cli.inputs import say

    config = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    classifier = "" if config is None or config.classifier is None else config.classifier
    names = [classifier] if isinstance(classifier, str) else classifier
    tops = list(dict.fromkeys(name.partition(".")[0] for name in names))
    more = [top for top in tops if top not in exclude] if any(top in exclude for top in tops) else []
    if more:
        say(f"--exclude {' '.join(exclude)}: {', '.join(more)}, too, as {model} has several classifiers")
    return [*exclude, *more]


def _model(a: argparse.Namespace, more: dict[str, Any]) -> dict[str, Any]:
    import timm

    if (exclude := more.get("exclude")) is not None:
        more = {**more, "exclude": _with_classifiers(a.model, exclude)}
    args = {**more.get("args", {}), **set_only(num_classes=a.num_classes)}
    overruled = set_only(mean=a.mean, std=a.std, crop_pct=a.crop_pct, interpolation=a.interpolation)
    if a.img_size is not None:
        known = timm.get_pretrained_cfg(a.model) if timm.is_model(a.model) else None
        if known is not None and known.fixed_input_size:  # such a model is built for a size
            args["img_size"] = a.img_size
        else:
            overruled["img_size"] = a.img_size
    return {**more, "name": a.model, "args": args, "input": overruled}
