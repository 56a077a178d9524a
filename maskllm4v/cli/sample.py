"""Draw samples from diffusion transformers, dense or under masks: a PNG each, all from the same initial noise.

Either rows of the pipeline, by default all that are made, or a checkpoint and any number of mask files:
a diffusers folder (transformer/, vae/, scheduler/), or one in the names of DiT's authors (DiT-XL-2-256x256.pt).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import model_validator

from maskllm4v.cli import options
from maskllm4v.config import (
    PARAMS,
    Experiment,
    Settings,
    TaskSpec,
    load_experiment,
    parse_experiment,
    parse_section,
)
from maskllm4v.runs.paths import checkpoint, data_folder
from maskllm4v.tasks.diffusion.settings import DiffusionSettings, DiTSettings, EvaluationSettings, check_sampling
from maskllm4v.utils.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import nn

    from maskllm4v.tasks.diffusion.task import Diffusion

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of DiT-S, -B, -L and -XL, by width: a state dict does not tell


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", nargs="*", metavar="ROW", help="of the experiment (default: all that are made)")
    parser.add_argument(
        "--params", type=Path, default=PARAMS, metavar="FILE", help=f"the experiment (default {PARAMS})"
    )
    parser.add_argument("--checkpoint", "--ckpt", type=Path, metavar="PATH", help="a folder or file instead of rows")
    parser.add_argument("--masks", type=Path, nargs="+", default=[], metavar="FILE", help="files of masks for it")
    parser.add_argument(
        "--vae", type=Path, metavar="FOLDER", help="autoencoder, if it is not in the checkpoint's folder"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("samples"), metavar="FOLDER", help="default samples/")
    group = parser.add_argument_group("sampling (default: what the experiment evaluates with; or DiT's authors' way)")
    group.add_argument("--sampler", choices=("ddpm", "ddim"))
    group.add_argument("--steps", "--num-sampling-steps", type=int, metavar="N")
    group.add_argument("--guidance", "--cfg-scale", type=float, metavar="X", help="classifier-free; 1: none")
    group.add_argument("--guided-channels", type=int, metavar="N", help="how many of the first channels are guided")
    group.add_argument("--clip", action=argparse.BooleanOptionalAction, help="predicted pixels to [-1, 1]")
    group.add_argument("--classes", type=int, nargs="+", metavar="N", help="one image each")
    group.add_argument("--columns", type=int, metavar="N", help="of the picture")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (default 0)")
    group.add_argument("--seed-of-row", type=int, metavar="N", help="whose model to take (default: the first)")
    parser.add_argument("--device", help="auto (a GPU if there is one), cpu, cuda, cuda:0, ...")


def run(arguments: argparse.Namespace) -> None:
    import torch

    from maskllm4v.cli.inputs import say
    from maskllm4v.tasks.diffusion.images import picture
    from maskllm4v.tasks.diffusion.task import Diffusion
    from maskllm4v.utils.images import write_picture

    a = arguments
    if not a.checkpoint and (a.masks or a.vae):
        raise ConfigError(f"{'--masks' if a.masks else '--vae'} goes with --checkpoint")
    experiment = None if a.checkpoint else load_experiment(a.params)
    spec = _of_checkpoint(a) if experiment is None else _of_rows(a, experiment)
    folder = None if experiment is None else data_folder(experiment.data.name)
    if a.device:
        spec = replace(spec, runtime=spec.runtime.model_copy(update={"device": a.device}))
    task = Diffusion(spec, folder)
    settings = task.evaluation
    grid = settings.pictured(task.classes)
    labels, sampler = torch.tensor(grid, device=task.device), task.sampler(settings)
    for name, model in _models(a, experiment, task):
        with task.autocast():
            samples = sampler(model, labels, range(len(grid)), seed=a.seed, purpose="picture", text=name)
        path = a.output / f"{name}.png"
        write_picture(path, picture(task.space.decode(samples.float()), settings.columns))
        say(str(path))


def _of_rows(a: argparse.Namespace, experiment: Experiment) -> TaskSpec:
    """An experiment's task, with what flags say of sampling on top."""
    if not isinstance(experiment.task, DiffusionSettings):
        raise ConfigError(f"{a.params} is an experiment of task {experiment.task.name!r}, which makes no images")
    raw = experiment.model_dump(exclude_unset=True)
    raw["evaluation"] = {**raw.get("evaluation", {}), **_sampling(a)}
    return parse_experiment(raw, "flags").task_spec()


def _sampling(a: argparse.Namespace) -> dict[str, Any]:
    """What flags say of sampling, as in the section ``evaluation``."""
    return options.set_only(
        sampler=a.sampler,
        steps=a.steps,
        guidance=a.guidance,
        guided_channels=a.guided_channels,
        clip=a.clip,
        grid=a.classes,
        columns=a.columns,
    )


def _models(a: argparse.Namespace, experiment: Experiment | None, task: Diffusion) -> Iterator[tuple[str, nn.Module]]:
    """One model after the other, with its name."""
    from maskllm4v.checkpoints.apply import install
    from maskllm4v.checkpoints.format import tensors_digest
    from maskllm4v.checkpoints.masks import load_dense, load_masks, load_state
    from maskllm4v.sparsity.surgery import fold_

    if experiment is None:
        names: dict[str, Path | None] = {a.checkpoint.stem: None, **{_name(path): path for path in a.masks}}
        if len(names) <= len(a.masks):
            raise ConfigError("two files of the same name: their pictures would be one")
    else:
        seed = experiment.seeds[0] if a.seed_of_row is None else a.seed_of_row
        if seed not in experiment.seeds:
            raise ConfigError(f"no seed {seed}; allowed: {', '.join(map(str, experiment.seeds))}")
        dense = checkpoint(experiment.dense.row, experiment.dense_seed(seed))
        masked = {
            row: checkpoint(row, seed) for row in a.rows or experiment.rows if experiment.row(row).kind != "dense"
        }
        files = {row: masked.get(row, dense) for row in a.rows or experiment.rows}
        names = {row: masked.get(row) for row, path in files.items() if a.rows or path.exists()}
        if not names:
            raise CheckpointError(f"no row of {a.params} is made yet; run `dvc repro`")
    for name, masks in names.items():
        model = task.build_model(task.spec.seeds[0])
        if experiment is None:
            load_state(model, task.read_weights(a.checkpoint), str(a.checkpoint))
            base = tensors_digest(model.state_dict()) if masks else ""
        else:
            base = load_dense(dense, model, task.model.name)
        if masks is not None:
            fold_(install(model, load_masks(masks, base=base), str(masks)))
        yield name, model


def _name(masks: Path) -> str:
    """Of a picture: the file's, after its row's in the pipeline, whose files are all called alike."""
    return f"{masks.absolute().parent.name}-{masks.stem}" if re.fullmatch(r"seed\d+", masks.stem) else masks.stem


class Sampled(Settings):
    """A checkpoint and how it is sampled, as settings."""

    task: DiffusionSettings
    model: DiTSettings
    evaluation: EvaluationSettings

    @model_validator(mode="after")
    def _pictures_can_be_made(self) -> Self:
        check_sampling(self.model, self.evaluation)
        return self


def _of_checkpoint(a: argparse.Namespace) -> TaskSpec:
    """The task of a folder or file of weights, which is sampled as DiT's authors do unless flags say otherwise."""
    if a.rows:
        raise ConfigError(f"either rows or --checkpoint; found {a.rows[0]!r} and {a.checkpoint}")
    args, folder = _architecture(a.checkpoint), a.checkpoint if a.checkpoint.is_dir() else None
    vae = a.vae or (folder / "vae" if folder and (folder / "vae").is_dir() else None)
    latent = args.get("in_channels", 4) == 4
    if latent and vae is None:
        raise ConfigError(f"{a.checkpoint} makes latents; say --vae FOLDER, a diffusers AutoencoderKL")
    scheduler = folder / "scheduler" if folder and (folder / "scheduler").is_dir() else None
    places = {key: str(path) for key, path in (("vae", vae), ("scheduler", scheduler)) if path is not None}
    raw = {
        "task": places,
        "model": {"name": "DiTTransformer2DModel", "args": args},
        "evaluation": {**({"guided_channels": 3} if latent else {}), **_sampling(a)},
    }
    found = parse_section(Sampled, raw, "flags")
    return TaskSpec(found.task, found.model, found.evaluation)


def _architecture(path: Path) -> dict[str, Any]:
    """diffusers' arguments of a checkpoint's model."""
    from maskllm4v.tasks.diffusion.classic import classic_config, read_classic
    from maskllm4v.tasks.diffusion.dit import read_config

    if path.is_dir():
        return {**read_config(path), "norm_eps": 1e-6}  # as DiT's authors have it, and so all published weights
    state = read_classic(path)
    width = state["x_embedder.proj.weight"].shape[0]
    if width not in HEADS:
        raise ConfigError(f"{path}: no DiT is {width} wide, so its heads are unknown; give a diffusers folder")
    return classic_config(state, HEADS[width])
