"""Small copies of an image folder, for machines on which decoding the originals holds the GPU back.

The copy has the folders and file names of the original, so classes, labels and order stay the same. Pixels are
those that :func:`maskllm4v.data.decoded.decode` sees: turned as EXIF says, colour profiles ignored, and neither is
written; palettes, CMYK and transparency become RGB (grey stays grey).
"""

from __future__ import annotations

import io
import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from maskllm4v.data.decoded import ORIENTATION, decode, shown_size
from maskllm4v.data.folder import SUFFIXES, is_other_image, warn_of_others
from maskllm4v.data.manifest import Entry
from maskllm4v.utils.errors import ConfigError, DataError, UserError
from maskllm4v.utils.io import read_json, replacing, write_json
from maskllm4v.utils.processes import end_with_parent
from maskllm4v.utils.progress import bar
from maskllm4v.utils.text import one_line

RECORD = "shrunk.json"  # in the copy: what it was made from, and how
SMALLEST = 64  # pixels
CHUNK = 16  # images that a process takes at a time
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves twice the copy's: the rest of the reduction is
# then a good filter's, 49 dB from decoding it whole. At once the copy's size would be 41 dB, and 35 at worst.
SPARE = 2
# Chroma at full resolution: the originals' is halved already, and halving it once more would cost 3 dB of what an
# evaluation sees; lowering the quality saves the same bytes for less.
SUBSAMPLING = "4:4:4"
FORMATS = {"JPEG": "JPEG", "MPO": "JPEG", "BMP": "BMP", "WEBP": "WEBP"}  # by content, not name; all others: PNG


@dataclass(frozen=True)
class Recipe:
    """What to make.

    Attributes:
        source: a folder of images at any depth, e.g. ``<split>/<class>/<image>``.
        output: the folder of the copy.
        size: pixels of the shorter side; images that are no larger are copied byte for byte.
        quality: of JPEG (and WebP), 1 to 100.
        splits: top-level folders whose images are shrunk; None: all. Files elsewhere are copied byte for byte.
        link: the other top-level folders become symbolic links to the originals instead.
    """

    source: Path
    output: Path
    size: int = 288
    quality: int = 95
    splits: tuple[str, ...] | None = None
    link: bool = False

    def shrinks(self, name: str) -> bool:
        """Whether a file or folder is in one of the splits, by its path below the source."""
        return self.splits is None or PurePosixPath(name).parts[0] in self.splits

    def links(self, name: str) -> bool:
        """Whether a file is reached through a link, by its path below the source."""
        return self.link and "/" in name and not self.shrinks(name)


@dataclass(frozen=True)
class Shrunk:
    """What became of all images.

    Attributes:
        made, copied, kept: how many were made smaller, copied as they are, and lay there whole already.
        before, after: bytes of the originals and of the copy, faulty images left out.
        faults: what is wrong with the images that could not be read, each with its path.
    """

    made: int
    copied: int
    kept: int
    before: int
    after: int
    faults: tuple[str, ...]


@dataclass(frozen=True)
class _Outcome:
    kind: Literal["made", "copied", "kept", "fault"]
    before: int = 0
    after: int = 0
    fault: str = ""


def shrink(recipe: Recipe, workers: int = 1) -> Shrunk:
    """Make the copy, or what is missing of it; the bytes do not depend on ``workers`` (processes).

    An image that cannot be read is left out and told in the result; all others are done.

    Raises:
        ConfigError: a value is out of range, the output lies in the source, or holds something else.
        DataError: there is no image.
        UserError: the output cannot be written, or a process was killed; nothing is left half-written.
    """
    _check(recipe, workers)
    found = [name for name in bar(_images(recipe), "listing") if not recipe.links(name)]
    others = [name for name in found if is_other_image(name)]
    names = [name for name in found if not is_other_image(name)]
    warn_of_others(recipe.source, others)
    if not any(recipe.shrinks(name) for name in names):
        raise DataError(f"{recipe.source} holds no image to shrink ({', '.join(sorted(SUFFIXES))})")
    _claim(recipe)
    _clear(recipe.output, names)
    if recipe.link:
        _link_others(recipe)
    with _mapped(partial(_attempt, recipe), names, min(workers, len(names))) as outcomes:
        kinds, before, after, faults = Counter[str](), 0, 0, list[str]()
        for outcome in bar(outcomes, "shrinking", total=len(names)):
            kinds[outcome.kind] += 1
            before, after = before + outcome.before, after + outcome.after
            faults += [outcome.fault] if outcome.kind == "fault" else []
    return Shrunk(kinds["made"], kinds["copied"], kinds["kept"], before, after, tuple(faults))


def small_copy(path: Path, size: int, quality: int) -> bytes | None:
    """The file that stands for an image, or None where the original does, not being larger.

    Raises:
        DataError: it is no image that training could read.
    """
    from PIL import Image

    try:
        image = Image.open(path)
        whole = shown_size(image)
        target = small_size(whole, size)
        encoding = FORMATS.get(image.format or "", "PNG")
        as_stored = target != whole and image.getexif().get(ORIENTATION, 1) == 1  # or the box would have to be turned
        draft = image.draft(None, (SPARE * target[0], SPARE * target[1])) if as_stored else None
        mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
        pixels = decode(lambda _: (image, str(path)), Entry(str(path), 0, 0, ""), mode)
        if target == whole:  # decoded all the same: damaged files are found here, not in a training
            return None
        small = pixels.resize(target, Image.Resampling.LANCZOS, box=draft and draft[1])
        small.info.clear()  # profiles, comments, orientation
        stream, options = io.BytesIO(), {"subsampling": SUBSAMPLING} if encoding == "JPEG" else {}
        small.save(stream, encoding, quality=quality, **options)
        return stream.getvalue()
    except DataError:
        raise
    except Exception as error:  # decoders raise whatever they like, and one image must not end a million others
        raise DataError(f"{path} cannot be read as an image: {one_line(error)}") from error


def small_size(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Width and height with the shorter of them reduced to ``short``, never enlarged."""
    width, height = size
    if min(size) <= short:
        return size
    return (short, round(height * short / width)) if width < height else (round(width * short / height), short)


def _attempt(recipe: Recipe, name: str) -> _Outcome:
    source, target = recipe.source / name, recipe.output / name
    try:
        before = source.stat().st_size
        whole = _reads_whole if recipe.shrinks(name) else _same_length
        if _newer(target, source) and whole(source, target, recipe.size):
            return _Outcome("kept", before, target.stat().st_size)
        small = small_copy(source, recipe.size, recipe.quality) if recipe.shrinks(name) else None
        content = source.read_bytes() if small is None else small
    except DataError as error:
        return _Outcome("fault", fault=str(error))
    except OSError as error:
        return _Outcome("fault", fault=f"{source} cannot be read: {error.strerror or error}")
    with replacing(target) as temporary:
        temporary.write_bytes(content)
    return _Outcome("copied" if small is None else "made", before, len(content))


def _newer(target: Path, source: Path) -> bool:
    return target.is_file() and target.stat().st_mtime >= source.stat().st_mtime


def _reads_whole(source: Path, target: Path, size: int) -> bool:
    """Whether a copy that lies there can be decoded to its end, and has the size that it should have."""
    from PIL import Image

    try:
        with Image.open(source) as original, Image.open(target) as copy:
            copy.load()
            whole = shown_size(original)
            expected = small_size(whole, size)
            return shown_size(copy) == expected and (expected != whole or _same_length(source, target, size))
    except Exception:  # damaged in whatever way: make it again, and say what is wrong if it is the source
        return False


def _same_length(source: Path, target: Path, _: int) -> bool:
    return source.stat().st_size == target.stat().st_size


def _check(recipe: Recipe, workers: int) -> None:
    if recipe.size < SMALLEST:
        raise ConfigError(f"size is {recipe.size}; allowed: {SMALLEST} pixels or more")
    if not 1 <= recipe.quality <= 100:
        raise ConfigError(f"quality is {recipe.quality}; allowed: 1 to 100")
    if workers < 1:
        raise ConfigError(f"workers is {workers}; allowed: 1 or more")
    if not recipe.source.is_dir():
        raise DataError(f"{recipe.source} is no folder")
    if recipe.link and recipe.splits is None:
        raise ConfigError("`link` is for the splits that are not shrunk; name those that are with `splits`")
    found = sorted(path.name for path in recipe.source.iterdir() if path.is_dir())
    if unknown := [name for name in recipe.splits or () if name not in found]:
        raise ConfigError(f"{recipe.source} has no split {unknown[0]!r}; allowed: {', '.join(found)}")


def _images(recipe: Recipe) -> Iterator[str]:
    """Paths of all images below the source, links followed; those of other types, too."""
    output = recipe.output.resolve()

    def walk(folder: Path, above: frozenset[Path]) -> Iterator[str]:
        real = folder.resolve()
        if output.is_relative_to(real) or real.is_relative_to(output):
            raise ConfigError(f"output {recipe.output} and {folder} lie one inside the other; choose another `output`")
        if real in above:
            raise DataError(f"{folder} links to a folder that it lies in")
        try:
            with os.scandir(folder) as listing:
                found = sorted(listing, key=lambda item: item.name)
        except OSError as error:
            raise DataError(f"{folder} cannot be read: {error.strerror}") from error
        for item in found:
            if item.is_dir():
                yield from walk(folder / item.name, above | {real})
            elif Path(item.name).suffix.lower() in SUFFIXES or is_other_image(item.name):
                yield (folder / item.name).relative_to(recipe.source).as_posix()

    return walk(recipe.source, frozenset())


def _claim(recipe: Recipe) -> None:
    """Take an empty folder, or one that the same recipe has been at work in."""
    record = recipe.output / RECORD
    about: dict[str, Any] = {
        "source": str(recipe.source.resolve()),
        "size": recipe.size,
        "quality": recipe.quality,
        "splits": None if recipe.splits is None else sorted(set(recipe.splits)),
        "link": recipe.link,
    }
    if record.exists():
        if (found := read_json(record)) != about:
            known = found if isinstance(found, dict) else {}
            other = ", ".join(f"{key} {known.get(key)}" for key in about if known.get(key) != about[key])
            raise ConfigError(f"{recipe.output} was made otherwise: {other}; delete it, or choose another `output`")
    elif recipe.output.is_dir() and any(recipe.output.iterdir()):
        raise ConfigError(f"{recipe.output} is not empty and has no {RECORD}; choose another `output`")
    else:
        write_json(record, about)


def _clear(output: Path, names: Iterable[str]) -> None:
    """Remove what a killed run left behind; refuse to write where a link leads, which may be to originals."""
    for folder in sorted({PurePosixPath(name).parent for name in names}):
        if (output / folder).resolve() != output.resolve() / folder:
            raise ConfigError(f"{output / folder} is a link or in one; delete the link, or choose another `output`")
        for leftover in (output / folder).glob(".*.part"):
            leftover.unlink(missing_ok=True)


def _link_others(recipe: Recipe) -> None:
    for original in sorted(recipe.source.iterdir()):
        link = recipe.output / original.name
        if not original.is_dir() or recipe.shrinks(original.name) or link.is_symlink():
            continue
        try:
            link.symlink_to(os.path.relpath(original.resolve(), recipe.output.resolve()), target_is_directory=True)
        except OSError as error:
            raise UserError(f"cannot link {link} to {original}: {error.strerror}") from error


@contextmanager
def _mapped(function: Callable[[str], _Outcome], names: Sequence[str], workers: int) -> Iterator[Iterable[_Outcome]]:
    """Results in the order of the names; leaving early drops what has not begun."""
    if workers == 1:
        yield map(function, names)
        return
    forks = "fork" in multiprocessing.get_all_start_methods()  # torch is imported already; no thread runs yet
    context = multiprocessing.get_context("fork" if forks else None)
    pool = ProcessPoolExecutor(workers, context, initializer=_leave_signals_to_main)
    try:
        yield pool.map(function, names, chunksize=CHUNK)
    except BrokenProcessPool:
        raise UserError(
            "a process was killed (out of memory? fewer `workers` need less); the same command goes on from there"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_signals_to_main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
