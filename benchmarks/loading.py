"""How fast a core feeds a training, from the original images and from small copies, and how many cores a GPU needs.

    python -m benchmarks.loading [FOLDER] [--images 96] [--repeats 5] [--quick] [--out FILE]

FOLDER holds JPEGs at any depth; without it photograph-like ones are made, 500×375 pixels and 0.1 MB. Images go
through the ImageNet experiment's own loading code and augmentation, one at a time on one thread, as in a loader worker.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.measure import Timing, interleaved, ratio, threads
from benchmarks.results import Row, save
from maskllm4v.config import DataSettings, Experiment, load_experiment
from maskllm4v.data import ImageData, open_data, prepare
from maskllm4v.data.decoded import decode, seeded_globals, training_transform
from maskllm4v.data.folder import reader
from maskllm4v.data.shrink import Recipe, shrink
from maskllm4v.tasks.classification.models import image_settings
from maskllm4v.tasks.classification.settings import ClassificationSettings, TimmSettings
from maskllm4v.utils.rng import generator

EXPERIMENT = Path(__file__).resolve().parent.parent / "experiments" / "imagenet_vit_b16.yaml"
ORIGINALS, COPIES, WHOLE = "originals", {"288 px": 288, "256 px": 256}, "whole"
SPEED, STEPS, CORES, COST = (
    "One core, whole pipeline",
    "Milliseconds an image, by step",
    "Cores that a GPU needs",
    "Making and keeping the copies",
)
GPUS = (250, 500, 1000, 2000, 4000)  # images a second


@dataclass(frozen=True)
class Source:
    """One set of images, opened as a training opens it.

    Attributes:
        data: through the experiment's transforms.
        folder: that the files lie in.
        steps: what turns all of them into normalised tensors, step by step, by name.
        shrinking: one process's images a second while it was made; 0.0 for the originals.
    """

    data: ImageData
    folder: Path
    steps: dict[str, Callable[[], Any]]
    shrinking: float

    def train(self) -> Tensor:
        """All images, augmented."""
        indices = np.arange(len(self.data.manifest.splits["train"]))
        return self.data.images("train", indices, generator(0, "augment", 0))

    def plain(self) -> Iterator[Tensor]:
        """All images as an evaluation sees them, one at a time."""
        for index in range(len(self.data.manifest.splits["train"])):
            yield self.data.images("train", np.array([index]), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="of JPEGs; by default a sample is made")
    parser.add_argument("--images", type=int, default=96, metavar="N", help="at most (default 96)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="that count (default 5)")
    parser.add_argument("--quick", action="store_true", help="four images, once: numbers mean nothing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write")
    a = parser.parse_args()
    count, repeats = (4, 1) if a.quick else (a.images, a.repeats)
    experiment = load_experiment(EXPERIMENT)
    with tempfile.TemporaryDirectory(prefix="loading-") as name, threads(1):
        images = Path(name) / ORIGINALS / "train" / "all"
        if a.folder is None:
            draw(images, count)
        else:
            link(a.folder, images, count)
        sections = measured(all_sources(Path(name), experiment), repeats)
        save("loading", sections, notes(experiment, a.folder is None), a.out, device=torch.device("cpu"))


def notes(experiment: Experiment, made: bool) -> list[str]:
    task = experiment.task
    assert isinstance(task, ClassificationSettings)
    return [
        f"Images: {'made (noise of all scales over gradients)' if made else 'given'}, in the page cache: a disk may be "
        f"slower. Augmentation of experiments/{EXPERIMENT.name}: {task.auto_augment}, erasing {task.random_erasing}, "
        "224 pixels.",
        "Medians of n repetitions, sources in turn. A step is timed on what the step before gave; the rest is seeding "
        "and stacking. Cores are a loader's; a training's own, one a GPU, are not counted.",
        "PSNR: evaluation images (short side 248, centre 224) of what was made smaller against the originals'.",
    ]


def all_sources(root: Path, experiment: Experiment) -> dict[str, Source]:
    """The originals, which lie there, and the copies, which are made."""
    sources = {ORIGINALS: opened(root / ORIGINALS, root, experiment)}
    for label, size in COPIES.items():
        recipe = Recipe(root / ORIGINALS, root / str(size), size)
        taken = interleaved({label: partial(shrink, recipe)}, repeats=1, warmup=0)[label].median
        rate = len(sources[ORIGINALS].data.labels("train")) / taken
        sources[label] = opened(recipe.output, root, experiment, rate)
    return sources


def opened(folder: Path, root: Path, experiment: Experiment, shrinking: float = 0.0) -> Source:
    """A source and its steps, each of which starts from what the one before it gave."""
    settings = DataSettings(name="all", source="folder", root=str(folder), train="train", test="train", calibration=1)
    manifest = root / f"{folder.name}-manifest"
    prepare(settings, manifest, one_split=True)
    task, model = experiment.task, experiment.model
    assert isinstance(task, ClassificationSettings)
    assert isinstance(model, TimmSettings)
    transform = image_settings(model)
    data = open_data(manifest, settings, task, transform)
    read, entries = reader(data.manifest, settings), data.manifest.splits["train"]

    def decoded() -> list[Any]:
        return [decode(read, entry, "RGB") for entry in entries]

    found: list[Any] = decoded()
    steps: dict[str, Callable[[], Any]] = {"read and decode": decoded}
    for name, part in parts(training_transform(transform, task)).items():
        steps[name] = partial(applied, part, found)
        found = steps[name]()
    return Source(data, folder, steps, shrinking)


def parts(transform: Any) -> dict[str, Sequence[Callable[[Any], Any]]]:
    """timm's training transform: crop; flip and policy; then the tensor, and what is erased from it, in place."""
    whole = list(transform.transforms)
    tensor = [type(step).__name__ for step in whole].index("MaybeToTensor")
    return {
        "crop and resize": whole[:1],
        "flip and RandAugment": whole[1:tensor],
        "normalise and erase": whole[tensor:],
    }


def applied(part: Sequence[Callable[[Any], Any]], images: Sequence[Any]) -> list[Any]:
    """The same draws each time, and for each source."""
    found = []
    with seeded_globals(0):
        for image in images:
            for step in part:
                image = step(image)
            found.append(image)
    return found


def measured(sources: dict[str, Source], repeats: int) -> dict[str, list[Row]]:
    """All sections; all that is timed is timed in turn, so that sources and steps meet the same spells."""
    count, names = len(sources[ORIGINALS].data.labels("train")), list(sources[ORIGINALS].steps)
    candidates = {f"{WHOLE} {label}": source.train for label, source in sources.items()}
    for name in names:
        candidates |= {f"{name} {label}": source.steps[name] for label, source in sources.items()}
    times = interleaved(candidates, repeats=repeats)
    speed, split, cost = list[Row](), list[Row](), list[Row]()
    for label, source in sources.items():
        whole = times[f"{WHOLE} {label}"]
        gain = ratio(times[f"{WHOLE} {ORIGINALS}"], whole)
        speed.append({"images": label, **_rates(count, whole), "times": gain.median, "n": whole.n})
        milliseconds = {name: 1e3 * times[f"{name} {label}"].median / count for name in (*names, WHOLE)}
        rest = milliseconds.pop(WHOLE) - sum(milliseconds.values())
        split.append({"images": label, **milliseconds, "rest": rest, "n": whole.n})
        files = [path.stat().st_size for path in (source.folder / "train" / "all").iterdir()]
        about: Row = {"images": label, "count": count, "kB an image": sum(files) / count / 1e3}
        if source.shrinking:
            about |= {"made a second": source.shrinking, "n": 1, **_psnr(source, sources[ORIGINALS])}
        cost.append(about)
    seconds = {label: times[f"{WHOLE} {label}"].median / count for label in sources}
    cores: list[Row] = [
        {"GPU, images/s": gpu, **{label: gpu * each for label, each in seconds.items()}} for gpu in GPUS
    ]
    return {SPEED: speed, STEPS: split, CORES: cores, COST: cost}


def _rates(count: int, time: Timing) -> Row:
    return {"images/s": count / time.median, "lowest": count / time.high, "highest": count / time.low}


def _psnr(copy: Source, original: Source) -> Row:
    """Of the images that were made smaller, if any, in dB of the range of 8 bits."""
    errors = [float((a - b).square().mean()) / 4 for a, b in zip(copy.plain(), original.plain(), strict=True)]
    changed = [error for error in errors if error]  # pixels lie between -1 and 1, hence the 4
    return {"PSNR, dB": -10 * math.log10(sum(changed) / len(changed))} if changed else {}


def draw(folder: Path, count: int) -> None:
    """Photograph-like JPEGs: all scales of noise, the finer the weaker, over a gradient; 500×375, 0.1 MB."""
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    width, height = 500, 375
    across, down = np.meshgrid(np.linspace(-1, 1, width), np.linspace(-1, 1, height))
    for number in range(count):
        pixels = 128 + 40 * (across * draws.normal() + down * draws.normal())[..., None] * np.ones(3)
        detail = draws.uniform(1, 3)  # photographs differ
        for octave in range(9):
            cells = min(2 ** (octave + 1), height)
            grey = draws.integers(0, 256, size=(cells, cells * 4 // 3), dtype=np.uint8)
            colour = draws.integers(0, 256, size=(cells, cells * 4 // 3, 3), dtype=np.uint8)
            strength = 60 * 0.72**octave * (detail if octave > 4 else 1)
            for noise, share in ((grey, 1.0), (colour, 0.3)):
                layer = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
                values = np.asarray(layer, dtype=float) / 127.5 - 1
                pixels += share * strength * (values if values.ndim == 3 else values[..., None])
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:05d}.jpg", quality=95)


def link(source: Path, folder: Path, count: int) -> None:
    """Link so many of the JPEGs below a folder, from all over it."""
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    if not found:
        sys.exit(f"{source} holds no JPEG")
    folder.mkdir(parents=True)
    for number, path in enumerate(found[:: -(-len(found) // count)]):
        (folder / f"{number:05d}.jpg").symlink_to(path.resolve())


if __name__ == "__main__":
    main()
