"""Draw the README's figures into docs/figures/, as SVG and PNG: ``python -m scripts.draw_figures``.

They depend on the code, on ``params.yaml`` and ``dvc.yaml`` alone, and come out byte for byte the same.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib import rc_context

from scripts.drawings import framework, sampling, stages
from scripts.drawings.card import STYLE

FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
DRAWINGS = {"framework": framework.draw, "sampling": sampling.draw, "stages": stages.draw}


def main(folder: Path = FIGURES) -> None:
    for name, draw in DRAWINGS.items():
        with rc_context(STYLE):
            card = draw()
        for path in card.save(folder / name):
            print(path)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
