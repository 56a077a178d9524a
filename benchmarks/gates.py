"""What a logit a candidate mask and a logit a position cost while masks of ViT-B's MLP are learned.

    python -m benchmarks.gates [--width 768] [--repeats 7] [--quick]

One MLP, 768 to 3072 and back, on the 197 tokens of one image. Both gates of a pattern run in turn. The candidate form
of 8:16 would have 12,870 logits a group, and is refused.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.measure import Timing, interleaved, peak_bytes, ratio
from benchmarks.results import Row, save
from maskllm4v.sparsity.learnable import NoiseKey
from maskllm4v.sparsity.parameterization import GATES
from maskllm4v.sparsity.patterns import MAX_CANDIDATES, NMPattern
from maskllm4v.sparsity.surgery import make_learnable, set_noise_key
from maskllm4v.utils.devices import pick_device

PATTERNS = ("2:4", "4:8", "8:16")
TOKENS = 197
NOTES = [
    "mb: logits, Adam's two moments, and the most that a step allocates beside them, in MB.",
    "ratio: of a step's time to that of the candidate form of the same pattern, median of n repetitions.",
]


class Learning:
    """An MLP whose masks are learned with AdamW.

    Args:
        width: of its inputs; hidden units are four times as many.
        pattern: N:M.
        gate: what a logit stands for.
        device: where to compute.
    """

    def __init__(self, width: int, pattern: str, gate: str, device: torch.device) -> None:
        torch.manual_seed(0)
        mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)).to(device)
        self.model = make_learnable(mlp, None, pattern=pattern, gate=gate).train()
        self.logits = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.logits, lr=1e-3, fused=True)
        self.inputs = torch.randn(TOKENS, width, device=device)
        self.draws = itertools.count()

    def step(self) -> None:
        """Forward, backward and optimiser, with new noise."""
        set_noise_key(self.model, NoiseKey(0, next(self.draws)))
        self.model(self.inputs).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measured(width: int, pattern: str, device: torch.device, repeats: int) -> list[Row]:
    """A row a gate of one pattern."""
    gates = [g for g in GATES if g != "candidates" or NMPattern(pattern).num_candidates <= MAX_CANDIDATES]
    learning = {gate: Learning(width, pattern, gate, device) for gate in gates}
    steps: dict[str, Callable[[], None]] = {gate: one.step for gate, one in learning.items()}
    times: dict[str, Timing] = interleaved(steps, repeats=repeats, warmup=2)
    rows: list[Row] = []
    for gate, one in learning.items():
        logits = sum(parameter.nbytes for parameter in one.logits)
        peak, first = peak_bytes(one.step, device), times.get("candidates")
        row: Row = {"pattern": pattern, "gate": gate, "n": times[gate].n, "ms": 1e3 * times[gate].median}
        row |= {"ratio": ratio(times[gate], first).median} if first is not None else {}
        row |= {"logits_mb": logits / 1e6, "peak_mb": peak / 1e6, "mb": (3 * logits + peak) / 1e6}
        rows.append(row)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gates", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true", help="a tiny layer, two repetitions: does it run at all?")
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args(arguments)
    device, repeats = pick_device(given.device), 2 if given.quick else given.repeats
    width = 32 if given.quick else given.width
    rows = [row for pattern in PATTERNS for row in measured(width, pattern, device, repeats)]
    save("gates", {"gates": rows}, NOTES, given.out, device=device)


if __name__ == "__main__":
    main()
