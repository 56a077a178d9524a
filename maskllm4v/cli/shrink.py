"""Copy an image folder with smaller images, for a GPU that waits for decoding. Train from the copy (--data-dir).

Names, classes and order stay the same. The shorter side of every image becomes --size pixels (Lanczos); smaller images
are copied as they are. JPEGs stay JPEGs (4:4:4), PNG, BMP and WebP stay what they are. The same command again goes on
where it was interrupted. Images that cannot be read are left out and listed at the end.

Training on a copy is not the same training: small random crops are enlarged from fewer pixels. Report numbers on the
original validation images (--splits train).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--data-dir",
        "--data-path",
        type=Path,
        default=Path("data/imagenet"),
        metavar="FOLDER",
        help="holds a folder a split, which hold a folder a class (default data/imagenet)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="to write: new, empty, or of the same command"
    )
    parser.add_argument(
        "--size",
        type=int,
        default=288,
        metavar="PIXELS",
        help="shorter side (default 288); below 248 an evaluation at 224 pixels and crop 0.9 would enlarge",
    )
    parser.add_argument("--quality", type=int, default=95, metavar="Q", help="of JPEG and WebP (default 95)")
    parser.add_argument(
        "--splits",
        nargs="+",
        metavar="NAME",
        help="shrink only these, e.g. train; the others are copied byte for byte (default: shrink all)",
    )
    parser.add_argument("--link", action="store_true", help="with --splits: link the others instead of copying them")
    parser.add_argument(
        "-j", "--workers", type=int, default=_cores(), metavar="N", help="processes (default: all cores)"
    )


def run(arguments: argparse.Namespace) -> None:
    from maskllm4v.data.shrink import Recipe, shrink
    from maskllm4v.utils.errors import DataError

    a = arguments
    splits = None if a.splits is None else tuple(a.splits)
    found = shrink(Recipe(a.data_dir, a.output, a.size, a.quality, splits, a.link), a.workers)
    print(
        f"{a.output}: {found.made:,} images made smaller, {found.copied:,} copied, {found.kept:,} there already; "
        f"{found.before / 1e6:,.1f} MB became {found.after / 1e6:,.1f} MB"
    )
    if found.faults:
        raise DataError(f"{len(found.faults):,} images cannot be read and are left out:\n" + "\n".join(found.faults))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
