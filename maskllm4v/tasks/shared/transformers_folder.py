"""Models of transformers from local folders: no network, no code of others, and no pickle.

A folder is what ``save_pretrained`` writes or what one downloads of a model: ``config.json``, ``model.safetensors`` or
its shards, and ``preprocessor_config.json`` if there is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from maskllm4v.utils.errors import CheckpointError, ConfigError, UserError
from maskllm4v.utils.rng import torch_seed
from maskllm4v.utils.text import few, one_line

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
RESAMPLING = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # numbers of Pillow's that torch has, too
PIXEL = 1 / 255  # what pixels are multiplied by before mean and std, here as in timm
# Keys of config.json that make transformers read other files than those that were checked.
REDIRECTING = ("auto_map", "transformers_weights", "quantization_config")


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as it stands there.

    Raises:
        CheckpointError: it is missing or damaged, wants code from outside to be run or its weights to be read from
            elsewhere, or contradicts itself in how many classes there are.
    """
    config = _read_json(folder, CONFIG)
    for key in REDIRECTING:
        if config.get(key) is not None:
            raise CheckpointError(
                f"{folder / CONFIG}: {key} is set; code from outside is not run, and only {WEIGHTS} is read"
            )
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder} holds an adapter (adapter_config.json); merge it into its model first")
    _label_map(folder, config)
    return config


def label_names(folder: Path) -> tuple[str, ...] | None:
    """The names of a model's classes in their order; None where ``config.json`` names none (``LABEL_0``, ...).

    Raises:
        CheckpointError: see :func:`read_config`.
    """
    names = _label_map(folder, read_config(folder))
    return None if names is None or all(name == f"LABEL_{i}" for i, name in enumerate(names)) else names


def num_labels(folder: Path) -> int:
    """How many classes a model tells apart; 2, as transformers has it, where ``config.json`` says nothing.

    Raises:
        CheckpointError: see :func:`read_config`.
    """
    config = read_config(folder)
    names = _label_map(folder, config)
    return int(config.get("num_labels", 2)) if names is None else len(names)


def check_folder(folder: Path) -> None:
    """Look whether weights are there that transformers may be let loose on; no tensor is read.

    Without them it would fall back to pickles (``pytorch_model.bin``), or name a file that nobody asked for.

    Raises:
        CheckpointError: see :func:`read_config`; there are no safetensors; a shard is missing, is damaged, or does not
            hold what the index says.
    """
    read_config(folder)
    if (folder / WEIGHTS).is_file():
        _keys(folder / WEIGHTS)
        return
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder}: {WEIGHTS} is missing{_others(folder)}")
    where = _read_json(folder, INDEX).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(shard, str) for shard in where.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map is not a shard's name for each tensor")
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX}: {shard!r} is not the name of a safetensors file in this folder")
        expected, found = {key for key, name in where.items() if name == shard}, _keys(folder / shard)
        if lost := sorted(expected - found):
            raise CheckpointError(f"{folder / shard} lacks {few(lost)}, which {INDEX} has there")
        if more := sorted(found - expected):
            raise CheckpointError(f"{folder / shard} holds {few(more)}, which {INDEX} does not have there")


def build(name: str, folder: Path, seed: int, *, pretrained: bool, fused_attention: bool = True) -> nn.Module:
    """A model in evaluation mode, in float32, on the CPU.

    Args:
        name: its class, e.g. ``"SegformerForSemanticSegmentation"``.
        folder: see above; without ``pretrained`` only ``config.json`` is read.
        seed: of the initial weights, without ``pretrained``.
        pretrained: load the folder's weights, each of them.
        fused_attention: False: one attention kernel, chosen explicitly (transformers' ``eager``).

    Raises:
        ConfigError: transformers is not installed or has no such class, or the folder is another class's.
        CheckpointError: see :func:`check_folder`; or tensors are missing, left over, or of other sizes than the model
            has them.
    """
    settings, architecture = load_config(name, folder), _architecture(name)
    if pretrained:
        check_folder(folder)
    how = {} if fused_attention else {"attn_implementation": "eager"}
    with torch.random.fork_rng(devices=[]), _alone(), _explained(f"{folder} is no {name}"):
        torch.manual_seed(torch_seed(seed, "weights"))
        if pretrained:
            model, told = architecture.from_pretrained(
                str(folder),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # told, and refused below, with all their names
                output_loading_info=True,
                **how,
            )
        else:
            model, told = architecture._from_config(settings, dtype=torch.float32, **how), {}
    _check_loaded(folder, told)
    _own_memory(model)
    model.eval()
    return model


def load_config(name: str, folder: Path) -> Any:
    """``config.json`` as transformers has it, with its defaults.

    Raises:
        ConfigError: as :func:`build`.
        CheckpointError: see :func:`read_config`; or transformers refuses a value.
    """
    architecture, raw = _architecture(name), read_config(folder)
    _check_class(name, architecture, folder, raw)
    with _alone(), _explained(str(folder / CONFIG)):
        return architecture.config_class.from_pretrained(str(folder), local_files_only=True)


def preprocessing(folder: Path) -> dict[str, Any]:
    """What the model expects of images, in terms of pixels from 0 to 1.

    Returns:
        Of these, what ``preprocessor_config.json`` says (nothing without that file): ``size`` ``(height, width)`` in
        pixels, where a shortest edge alone is given the square of it; ``mean`` and ``std``, a tuple of a value per
        channel (of another ``rescale_factor`` than 1/255, recomputed to the same effect); ``interpolation``.

    Raises:
        CheckpointError: the file is damaged, wants code from outside to be run, or holds values of other kinds.
    """
    if not (folder / PREPROCESSOR).exists():
        return {}
    found = _read_json(folder, PREPROCESSOR)
    if found.get("auto_map") is not None:
        raise CheckpointError(f"{folder / PREPROCESSOR}: auto_map is set; code from outside is not run")
    told: dict[str, Any] = {}
    try:
        told |= _normalisation(found)
        if found.get("do_resize", True):
            if (size := _size(found.get("size"))) is not None:
                told["size"] = size
            if (number := found.get("resample")) is not None:
                if number not in RESAMPLING:
                    raise ValueError(f"resample is {number!r}; allowed: {RESAMPLING}")
                told["interpolation"] = RESAMPLING[number]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder / PREPROCESSOR}: cannot be made sense of: {one_line(error)[:200]}") from error
    return told


def _normalisation(found: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """(x·factor − mean) / std of pixels x from 0 to 255, with 1/255 in the place of the factor."""
    rescaled, normalised = found.get("do_rescale", True), found.get("do_normalize", True)
    factor = float(found.get("rescale_factor", PIXEL)) if rescaled else 1.0
    keys = ("image_mean", "image_std")
    if normalised and not all(key in found for key in keys):
        if factor == PIXEL:
            return {}
        raise ValueError(f"rescale_factor is {factor}, but image_mean and image_std are missing")
    mean, std = (tuple(float(v) for v in found[key]) for key in keys) if normalised else ((0.0,) * 3, (1.0,) * 3)
    if len(mean) != len(std) or not all(v > 0 for v in std):
        raise ValueError(f"image_mean is {list(mean)}, image_std {list(std)}")
    scale = 1.0 if factor == PIXEL else PIXEL / factor
    return {"mean": tuple(v * scale for v in mean), "std": tuple(v * scale for v in std)}


def _size(size: Any) -> tuple[int, int] | None:
    if isinstance(size, dict):
        size = [size["height"], size["width"]] if "height" in size else size.get("shortest_edge")
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, list) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size is {size!r}")
    return sides[0], sides[1]


def _label_map(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The values of ``id2label`` in order, if there is one."""
    names = config.get("id2label")
    if names is None:
        return None
    try:
        by_number = {int(key): str(name) for key, name in names.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG}: id2label is not a name for each class's number") from error
    if sorted(by_number) != list(range(len(names))):
        raise CheckpointError(f"{folder / CONFIG}: the numbers in id2label are not 0 to {len(names) - 1}")
    if config.get("num_labels", len(names)) != len(names):
        raise CheckpointError(
            f"{folder / CONFIG}: num_labels is {config['num_labels']}, but id2label has {len(names)} names"
        )
    return tuple(by_number[i] for i in range(len(names)))


def _architecture(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"model.name {name!r} needs transformers: pip install 'maskllm4v[transformers]' ({error})"
        ) from error
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        raise ConfigError(f"model.name is {name!r}, of which transformers {transformers.__version__} has no model")
    return found


def _check_class(name: str, architecture: Any, folder: Path, config: Mapping[str, Any]) -> None:
    kind, expected = config.get("model_type"), architecture.config_class.model_type
    if kind != expected:
        raise ConfigError(f"{folder / CONFIG}: model_type is {kind!r}, but model.name is {name!r}, a {expected!r}")
    saved = config.get("architectures")
    if saved and name not in saved:
        raise ConfigError(f"{folder / CONFIG} is of a {', '.join(map(str, saved))}, but model.name is {name!r}")


def _check_loaded(folder: Path, told: Mapping[str, Any]) -> None:
    sizes = [f"{key!r}: {tuple(a)}, not {tuple(b)}" for key, a, b in sorted(told.get("mismatched_keys", ()))]
    faults = {
        "size mismatch for": few(sizes, quoted=False),
        "it lacks": few(sorted(told.get("missing_keys", ()))),
        "the model has no": few(sorted(told.get("unexpected_keys", ()))),
        "transformers says": few(list(told.get("error_msgs", ())), quoted=False),
    }
    if any(faults.values()):
        said = "; ".join(f"{what} {names}" for what, names in faults.items() if names)
        raise CheckpointError(f"{folder} does not fit the model: {said}")


def _own_memory(model: nn.Module) -> None:
    """Give each parameter memory of its own: of some checkpoints transformers cuts one matrix into several (q, k, v).

    Matrices are told apart by their memory when products are watched.
    """
    for parameter in model.parameters():
        if parameter.untyped_storage().nbytes() != parameter.nbytes:
            parameter.data = parameter.data.clone()


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Inside, an error of transformers is one of ours: a configuration makes a model's parts stumble in any way."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise CheckpointError(f"{what}: {one_line(error)[:300]}") from error


@contextmanager
def _alone() -> Iterator[None]:
    """Inside, transformers reaches no network, and says nothing that we say ourselves."""
    from huggingface_hub import constants
    from transformers.utils import logging

    before, verbosity, bars = constants.HF_HUB_OFFLINE, logging.get_verbosity(), logging.is_progress_bar_enabled()
    constants.HF_HUB_OFFLINE = True
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _keys(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from error


def _others(folder: Path) -> str:
    """What there is of weights in forms that are not read, for the message."""
    found = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack") for path in folder.glob(kind))
    if not found:
        return ""
    return f"; {few(found)} can hold code and is not read: save the model again with save_pretrained"


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"model.folder is {str(folder)!r}, which is no folder")
    path = folder / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)[:200]}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a {type(found).__name__}, not an object")
    return found
