"""What commands start from: prepared data, and the dense model that masks belong to.

Dense weights lie beside the masks that were made on them, as ``dense-<digest>.safetensors``: one file for any
number of masks, found by the digest that every mask file names. So a mask file can be used without saying
again where its weights came from, and never with others.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from torch import nn

from maskllm4v.checkpoints.apply import check_fits, install
from maskllm4v.checkpoints.format import tensors_digest
from maskllm4v.checkpoints.masks import MaskCheckpoint, load_state, save_dense
from maskllm4v.checkpoints.third_party import LoadedWeights, dense_state, load_any, unpruned
from maskllm4v.config import DataSettings, TaskSpec
from maskllm4v.data import prepare
from maskllm4v.sparsity.survey import prunable_linears
from maskllm4v.tasks.base import Task, open_task
from maskllm4v.tasks.classification.models import num_classes
from maskllm4v.tasks.classification.settings import TimmSettings
from maskllm4v.utils.devices import pick_device
from maskllm4v.utils.distributed import same_everywhere
from maskllm4v.utils.errors import CheckpointError, ConfigError, DataError
from maskllm4v.utils.io import value_digest
from maskllm4v.utils.processes import is_main

CACHE = Path(".cache/cli")  # git-ignored; nothing in it is a result


def say(text: str) -> None:
    """A line for the person at the terminal; standard output is for results."""
    if is_main():
        print(text, file=sys.stderr)


def data_folder(data: DataSettings) -> Path:
    """Where the manifest of a command's data is kept."""
    return CACHE / "data" / value_digest(data.beyond_defaults())[:16]


def task_of(spec: TaskSpec) -> Task:
    """The task of a command that has data; they need not be prepared yet."""
    assert spec.data is not None
    return open_task(spec, data_folder(spec.data))


def prepare_data(spec: TaskSpec, task: Task, *, labels: bool = True) -> str:
    """Write the manifest, anew each time: folders change. Returns its digest.

    Args:
        spec, task: whose data they are.
        labels: whether labels are looked at. Where they are not, as in calibration, a model without classes will do.

    Raises:
        DataError: the source is missing or empty, or has not as many classes as the model.
    """
    assert isinstance(spec.model, TimmSettings)
    assert spec.data is not None
    if is_main():
        found = len(prepare(spec.data, data_folder(spec.data), one_split=True).classes)
        wanted = num_classes(spec.model)
        if found != wanted and (labels or wanted):
            where = spec.data.dataset or spec.data.root
            raise DataError(
                f"{where} has {found} classes, but {spec.model.name} tells {wanted} apart; say --num-classes, "
                "or give a model of that many"
            )
    same_everywhere(None, pick_device(spec.runtime.device))  # the others wait for the manifest
    return task.data_digest


def beside(masks: Path, base: str) -> Path:
    """Where the dense weights of a mask file lie."""
    return masks.parent / f"dense-{base[:16]}.safetensors"


def keep_beside(masks: Path, dense: nn.Module, spec: TaskSpec) -> str:
    """Write the dense weights beside a mask file, if they are not there; returns their digest."""
    base = tensors_digest(dense.state_dict())
    path = beside(masks, base)
    if is_main() and not path.exists():
        save_dense(path, dense, spec.model.name)
    return base


def given_dense(arguments: argparse.Namespace) -> bool:
    """Whether flags say where the dense weights come from."""
    return arguments.pretrained or arguments.dense_checkpoint is not None


def dense_model(arguments: argparse.Namespace, spec: TaskSpec, task: Task) -> nn.Module:
    """The dense model that the flags say, or timm's pretrained one, on the task's device."""
    file: Path | None = arguments.dense_checkpoint
    model = task.build_model(spec.seeds[0], pretrained=file is None)
    if file is not None:
        load_state(model, task.read_weights(file), str(file))
    say(f"dense weights: {file or f'{spec.model.name}, pretrained'}")
    return model


def dense_of_masks(arguments: argparse.Namespace, spec: TaskSpec, task: Task, masks: Path, base: str) -> nn.Module:
    """The dense model that a mask file of ours belongs to.

    Raises:
        CheckpointError: it is not beside the file and no flag says where it is, or it is another one.
    """
    path = beside(masks, base)
    if given_dense(arguments):
        model = dense_model(arguments, spec, task)
    elif path.exists():
        model = task.build_model(spec.seeds[0])
        load_state(model, dense_state(path), str(path))
        say(f"dense weights: {path}")
    else:
        raise CheckpointError(f"{masks}: {path.name} is not beside it; say --pretrained or --dense-checkpoint")
    if (found := tensors_digest(model.state_dict())) != base:
        raise CheckpointError(f"{masks} belongs to another dense model ({base[:12]}, not {found[:12]})")
    return model


def masks_in(path: Path, pattern: str | None) -> LoadedWeights | MaskCheckpoint:
    """A file of masks, to start from.

    Raises:
        CheckpointError: it holds none, or see :func:`maskllm4v.checkpoints.third_party.load_any`.
    """
    found = load_any(path, pattern=pattern)
    if not found.masks:
        raise CheckpointError(f"{path} holds no masks to start from; dense weights are --dense-checkpoint")
    return found


def start_from(
    arguments: argparse.Namespace, spec: TaskSpec, task: Task, found: LoadedWeights | MaskCheckpoint, path: Path
) -> tuple[nn.Module, MaskCheckpoint]:
    """The dense model that the masks of a file belong to, not permuted yet, and the masks.

    Updated weights in the file, if any, stay unused.

    Raises:
        CheckpointError: the masks are of another model, or of one with permuted channels, or the dense weights are
            nowhere.
    """
    updated = list[str]()
    if isinstance(found, MaskCheckpoint):
        model, masks = dense_of_masks(arguments, spec, task, path, found.base), found
        updated = [name for name in found.masks if f"{name}.weight" in found.weights]
    else:
        if not given_dense(arguments):
            unpruned(found)
            model = load_original(found, spec, task)
            say(f"dense weights: those in {path}, as they are (updated ones, if it was made so)")
        elif found.about.get("permuted"):
            raise CheckpointError(f"{path}: its channels are permuted; start from the masks of prune or train")
        else:
            model = dense_model(arguments, spec, task)
            updated = found.updated(model.state_dict())
        masks = found.checkpoint(tensors_digest(model.state_dict()))
    check_fits(model, masks, str(path))
    if updated:
        say(f"{path}: other weights than the dense ones in {len(updated)} layers; unused")
    return model, masks


def masked_model(
    arguments: argparse.Namespace, spec: TaskSpec, task: Task, found: LoadedWeights | MaskCheckpoint, path: Path
) -> tuple[nn.Module, MaskCheckpoint | None]:
    """A dense model with the masks and weights of a file installed, and the masks; None if the file has none.

    Raises:
        CheckpointError: the file does not fit the model, or its dense weights are nowhere.
    """
    if isinstance(found, MaskCheckpoint):
        model = dense_of_masks(arguments, spec, task, path, found.base)
        return install(model, found, str(path)), found
    if arguments.dense_checkpoint is not None:
        raise ConfigError(f"{path} brings weights of its own; --dense-checkpoint is for masks of prune, train, update")
    model = load_original(found, spec, task)
    if not found.masks:
        return model, None
    masks = found.checkpoint(tensors_digest(model.state_dict()))
    return install(model, masks, str(path)), masks


def load_original(found: LoadedWeights, spec: TaskSpec, task: Task) -> nn.Module:
    """A dense model with the weights of a file that is none of ours.

    Raises:
        CheckpointError: they do not fit, or a layer that is not excluded has no mask where others have one.
    """
    model = task.build_model(spec.seeds[0])
    load_state(model, found.weights, str(found.path))
    if found.masks:
        layers = prunable_linears(model, exclude=spec.model.excluded_layers)
        if missing := [name for name in layers if name not in found.masks]:
            more = f" and {len(missing) - 1} more have" if len(missing) > 1 else " has"
            raise CheckpointError(
                f"{found.path}: layer {missing[0]!r}{more} no mask; name layers that stay dense with --exclude"
            )
    average = ", averaged (EMA)" if found.averaged else ""
    masks = f", {'logits' if found.learned else 'masks'} of {len(found.masks)} layers" if found.masks else ""
    say(f"weights: {found.path}{average}{masks}")
    return model
