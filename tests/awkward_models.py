"""Stacks of blocks that a careless stream of activations would trip over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, fc: nn.Linear | None = None) -> None:
        super().__init__()
        self.fc = fc or nn.Linear(8, 8)

    def forward(self, x: Tensor, shift: Tensor | float = 0.0, scale: dict[str, list[Tensor]] | None = None) -> Tensor:
        return x + torch.tanh(self.fc(x + shift)) * (sum(scale["by"]) if scale else 1)


class Awkward(nn.Module):
    """A stack of blocks with something in it that a careless stream would trip over."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(torch.tanh(self.embed(x)))

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Plain(Awkward):
    pass


class BetweenBlocks(Awkward):
    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = 2 * block(x)
        return x


class InPlaceBetweenBlocks(Awkward):
    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).mul_(2)  # the very same tensor, with other contents
        return x


class SkipsAlong(Awkward):
    def run(self, x: Tensor) -> Tensor:
        first = x
        for block in self.blocks:
            x = block(x)
        return x + first


class SecondArgument(Awkward):
    def run(self, x: Tensor) -> Tensor:
        shift = x.mean()
        for block in self.blocks:
            x = block(x, shift)
        return x


class ChangingArgument(Awkward):
    def run(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, float(i))
        return x


class Keyword(Awkward):
    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, shift=0.5)
        return x


class KeywordTensor(Awkward):
    def run(self, x: Tensor) -> Tensor:
        shift, scale = x.mean(), {"by": [x.std()]}
        for block in self.blocks:
            x = block(x, shift=shift, scale=scale)
        return x


class ChangingKeyword(Awkward):
    def run(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(x, shift=float(i))
        return x


class EqualKeyword(Awkward):
    """Other objects each time; that they are equal is not looked at."""

    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, shift=torch.ones(()))
        return x


class KeywordChangedInPlace(Awkward):
    def run(self, x: Tensor) -> Tensor:
        shift = x.mean()
        for block in self.blocks:
            x = block(x, shift=shift)
            shift += 1
        return x


class KeywordChangedInside(Awkward):
    """The very same dictionary, holding another tensor."""

    def run(self, x: Tensor) -> Tensor:
        scale = {"by": [x.std()]}
        for block in self.blocks:
            x = block(x, scale=scale)
            scale["by"][0] = scale["by"][0] + 1
        return x


class KeywordGrows(Awkward):
    """The very same dictionary, holding more."""

    def run(self, x: Tensor) -> Tensor:
        scale = {"by": [x.std()]}
        for block in self.blocks:
            x = block(x, scale=scale)
            scale["by"].append(x.std())
        return x


class OtherKeywords(Awkward):
    """The second block gets one argument less, or another one in its place."""

    def __init__(self, blocks: list[nn.Module], *, instead: bool) -> None:
        super().__init__(blocks)
        self.instead = instead

    def run(self, x: Tensor) -> Tensor:
        shift, shared = x.mean(), {"by": [x.std()]}
        for i, block in enumerate(self.blocks):
            if i == 1:
                x = block(x, shift=shift, scale=None) if self.instead else block(x, shift=shift)
            else:
                x = block(x, shift=shift, scale=shared)
        return x


class KeywordThenPosition(Awkward):
    """The very same objects, by keyword to one block and by position to the next."""

    def run(self, x: Tensor) -> Tensor:
        shift = x.mean()
        for i, block in enumerate(self.blocks):
            x = block(x, shift) if i % 2 else block(x, shift=shift)
        return x


class Renamed(Awkward):
    """The very same objects under other names, which is where they differ."""

    def run(self, x: Tensor) -> Tensor:
        shift = x.mean()
        for i, block in enumerate(self.blocks):
            x = block(x, stretch=shift) if i % 2 else block(x, shift=shift)
        return x


class NewContainer(Awkward):
    def run(self, x: Tensor) -> Tensor:
        std = x.std()
        for block in self.blocks:
            x = block(x, scale={"by": [std]})
        return x


class AllByKeyword(Awkward):
    def run(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x=x)
        return x


class Backwards(Awkward):
    def run(self, x: Tensor) -> Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return x


class TwiceThrough(Awkward):
    def run(self, x: Tensor) -> Tensor:
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return x


class InPlaceBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(torch.tanh(self.fc(x)))


class StretchingBlock(Block):
    def forward(self, x: Tensor, shift: Tensor | float = 0.0, stretch: Tensor | float = 1.0) -> Tensor:
        return super().forward(x, shift) * stretch


class SpoilingBlock(Block):
    """Changes its keyword argument in place, so that the next block is called with something else."""

    def forward(self, x: Tensor, shift: Tensor | float = 0.0, scale: Any = None) -> Tensor:
        y = super().forward(x, shift, scale)
        if isinstance(shift, Tensor):
            shift.mul_(2)
        return y


class Mixture(nn.Module):
    """A block with numbered blocks inside, and layers before and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.experts = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.second(torch.tanh(self.first(x))))
        return x + torch.tanh(self.last(sum(expert(y) for expert in self.experts)))


class Borrower(Block):
    """A block that calls a layer of somewhere else between two of its own."""

    def __init__(self, lent: nn.Linear) -> None:
        super().__init__()
        self.lent, self.last = lent, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.last(torch.tanh(self.lent(super().forward(x)))))


class Lender(Awkward):
    def __init__(self) -> None:
        lent = nn.Linear(8, 8)
        super().__init__([Borrower(lent), Mixture(), Mixture()])
        self.embed = nn.ModuleDict({"own": self.embed, "lent": lent})  # registered here first

    def forward(self, x: Tensor) -> Tensor:
        return self.run(torch.tanh(self.embed["own"](x)))


class FeedForward(nn.Module):
    """As in diffusers: a list of layers, the first of them wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleList([Block(), nn.Dropout(), nn.Linear(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.net:
            y = layer(y)
        return x + y


class TupleBlock(Block):
    def forward(self, x: Tensor | tuple[Tensor, int]) -> tuple[Tensor, int]:
        x, count = x if isinstance(x, tuple) else (x, 0)
        return x + torch.tanh(self.fc(x)), count + 1


class UnpackedTuples(Awkward):
    def run(self, x: Any) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x[0]


AWKWARD = {
    "plain": lambda: Plain([Block() for _ in range(3)]),
    "between blocks": lambda: BetweenBlocks([Block() for _ in range(3)]),
    "in place between blocks": lambda: InPlaceBetweenBlocks([Block() for _ in range(3)]),
    "skips along": lambda: SkipsAlong([Block() for _ in range(3)]),
    "second argument": lambda: SecondArgument([Block() for _ in range(3)]),
    "changing argument": lambda: ChangingArgument([Block() for _ in range(3)]),
    "keyword": lambda: Keyword([Block() for _ in range(3)]),
    "keyword tensor": lambda: KeywordTensor([Block() for _ in range(3)]),
    "changing keyword": lambda: ChangingKeyword([Block() for _ in range(3)]),
    "equal keyword": lambda: EqualKeyword([Block() for _ in range(3)]),
    "keyword changed in place": lambda: KeywordChangedInPlace([Block() for _ in range(3)]),
    "keyword changed by a block": lambda: KeywordTensor([SpoilingBlock() for _ in range(3)]),
    "keyword changed inside": lambda: KeywordChangedInside([Block() for _ in range(3)]),
    "keyword grows": lambda: KeywordGrows([Block() for _ in range(3)]),
    "a keyword less": lambda: OtherKeywords([Block() for _ in range(3)], instead=False),
    "another keyword": lambda: OtherKeywords([Block() for _ in range(3)], instead=True),
    "keyword then position": lambda: KeywordThenPosition([Block() for _ in range(3)]),
    "renamed": lambda: Renamed([StretchingBlock() for _ in range(3)]),
    "new container": lambda: NewContainer([Block() for _ in range(3)]),
    "all by keyword": lambda: AllByKeyword([Block() for _ in range(3)]),
    "mixtures": lambda: Plain([Mixture() for _ in range(3)]),
    "lender": Lender,
    "feed-forwards": lambda: Plain([FeedForward() for _ in range(3)]),
    "in place": lambda: Plain([InPlaceBlock() for _ in range(3)]),
    "tuples": lambda: UnpackedTuples([TupleBlock() for _ in range(3)]),
    "sequential": lambda: nn.Sequential(*[Block() for _ in range(3)]),
    "bare linears": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
}
