"""N:M sparsity patterns on plain tensors: candidates, top-N masks, validity, packing.

``N`` counts the weights **kept** in each group of ``M`` consecutive input features of one output row
(Mishra et al. 2021, arXiv 2104.08378). Groups never straddle rows. Candidates stand in lexicographic
order of their kept positions: for 2:4 that is (0,1) (0,2) (0,3) (1,2) (1,3) (2,3).
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import torch
from torch import Tensor

from maskllm4v.utils.errors import PatternError

MAX_CANDIDATES = 70  # C(8, 4): beyond it one logit a candidate stops making sense
MAX_WIDE = 16  # positions of groups with more candidates: a table of all 2^M groups numbers them


class NMPattern:
    """Keep ``n`` of every ``m`` consecutive weights.

    Accepts ``NMPattern("2:4")``, ``NMPattern((2, 4))``, ``NMPattern(2, 4)`` and another pattern.
    Immutable, hashable, and equal by value; ``str(pattern)`` gives back ``"2:4"``.

    Raises:
        PatternError: not of the form N:M with 1 <= N < M and M <= 16 or C(M, N) <= 70.
    """

    __slots__ = ("m", "n")
    n: int
    m: int

    def __init__(self, pattern: str | tuple[int, int] | int | NMPattern, m: int | None = None) -> None:
        n_found, m_found = _parse(pattern, m)
        if not 1 <= n_found < m_found:
            raise PatternError(f"pattern {n_found}:{m_found}: N counts kept weights, so 1 <= N < M is needed")
        few = m_found <= MAX_CANDIDATES  # there are at least M, and of a huge one nobody counts them
        if not few or (m_found > MAX_WIDE and math.comb(m_found, n_found) > MAX_CANDIDATES):
            count = math.comb(m_found, n_found) if few else f"more than {MAX_CANDIDATES}"
            raise PatternError(
                f"pattern {n_found}:{m_found} has {count} candidate masks a group; "
                f"at most {MAX_CANDIDATES} are supported where M is above {MAX_WIDE}"
            )
        object.__setattr__(self, "n", n_found)
        object.__setattr__(self, "m", m_found)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("NMPattern is immutable")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("NMPattern is immutable")

    def __reduce__(self) -> tuple[type[NMPattern], tuple[int, int]]:
        return (NMPattern, (self.n, self.m))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NMPattern) and (self.n, self.m) == (other.n, other.m)

    def __hash__(self) -> int:
        return hash((self.n, self.m))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def __repr__(self) -> str:
        return f"NMPattern('{self}')"

    @property
    def num_candidates(self) -> int:
        """K = C(M, N), the number of masks that a group can take."""
        return math.comb(self.m, self.n)

    @property
    def bits(self) -> int:
        """Bits that name one candidate: 3 for the 6 masks of 2:4."""
        return (self.num_candidates - 1).bit_length()

    def candidates(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.bool) -> Tensor:
        """All candidate masks of one group, ``[K, M]``, in lexicographic order."""
        return _candidates(self.n, self.m).to(device=device, dtype=dtype, copy=True)

    def fits(self, in_features: int) -> bool:
        return in_features % self.m == 0

    def check_fits(self, in_features: int, layer: str = "weight") -> None:
        """Raise :class:`PatternError`, naming ``layer``, unless ``in_features`` is a multiple of M."""
        if not self.fits(in_features):
            raise PatternError(
                f"layer {layer!r}: its {in_features} input features are no multiple of {self.m}, as {self} needs; "
                "leave it dense with `exclude`, or all such layers with `on_misfit='skip'`"
            )

    def num_groups(self, weight: Tensor, layer: str = "weight") -> int:
        """How many groups a weight ``[out, in]`` has."""
        self.check_fits(weight.shape[-1], layer)
        return weight.numel() // self.m

    def topn_mask(self, scores: Tensor, layer: str = "weight") -> Tensor:
        """Keep the N highest scores of every group.

        Args:
            scores: ``[out, in]``, any real dtype; may be infinite, must not be NaN.
            layer: name for messages.

        Returns:
            Boolean mask ``[out, in]``. Ties go to the lexicographically first candidate.
        """
        self.check_fits(scores.shape[-1], layer)
        if scores.numel() and torch.isnan(scores.amax()):  # NaN is the largest of all, and cheaper to find so
            raise PatternError(f"layer {layer!r}: scores contain NaN, so no mask can be chosen")
        groups = scores.reshape(-1, self.m)
        # On a CPU as many groups at a time as stay in its caches and still keep all threads busy.
        size = 2**15 * torch.get_num_threads() if scores.device.type == "cpu" else max(len(groups), 1)
        kept = torch.cat([self._topn(part) for part in groups.split(size)])
        return kept.view(torch.bool).reshape(scores.shape)

    def _topn(self, scores: Tensor) -> Tensor:
        """The kept ones of groups ``[groups, M]``, as booleans or as the words of :func:`_groups_by_number`."""
        columns = scores.unbind(1)
        # Each weight's rank in its group less N, by comparing all pairs: exact on ties, and far cheaper than
        # sorting along so short a dimension. Arithmetic on single bytes costs next to nothing.
        start = torch.arange(-self.n, self.m - self.n, dtype=torch.int8, device=scores.device)
        ranks = start[:, None].repeat(1, len(scores))
        of = ranks.unbind()
        for i, j in itertools.combinations(range(self.m), 2):
            later_wins = (columns[j] > columns[i]).view(torch.int8)
            of[i].add_(later_wins)
            of[j].sub_(later_wins)
        kept = ranks.view(torch.uint8) >> 7  # the sign bit: 1 below rank N
        if self.m > 8:
            return kept.view(torch.bool).t()
        # A group's bits as one number, looked up: cheaper than transposing a matrix of M columns.
        number = kept[0]
        for j in range(1, self.m):
            number |= kept[j] << j
        return _groups_by_number(self.m, scores.device).index_select(0, number.int())

    def is_valid(self, mask: Tensor) -> bool:
        """Whether a mask ``[out, in]`` of zeros and ones keeps exactly N in each group."""
        if mask.shape[-1] % self.m:
            return False
        if mask.dtype is not torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            return False
        return bool((_kept_per_group(mask, self.m) == self.n).all())

    def validate(self, mask: Tensor, layer: str = "weight") -> None:
        """Raise :class:`PatternError`, naming the first group at fault, unless :meth:`is_valid`."""
        self.check_fits(mask.shape[-1], layer)
        if self.is_valid(mask):
            return
        if mask.dtype is not torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
            raise PatternError(f"layer {layer!r}: a mask holds values other than 0 and 1")
        kept = _kept_per_group(mask, self.m)
        at_fault = int((kept != self.n).nonzero()[0])
        row, group = divmod(at_fault, mask.shape[-1] // self.m)
        raise PatternError(
            f"layer {layer!r}: group {group} of row {row} keeps {int(kept[at_fault])} of {self.m} weights, not {self.n}"
        )

    def similarity(self, mask: Tensor) -> Tensor:
        """How many kept positions each candidate shares with the mask, ``[K, groups]`` (float32).

        Minus its mean over all candidates, N²/M, this is the direction in which a prior shifts the logits
        (MaskLLM, arXiv 2409.17481, Eq. 9).
        """
        groups = mask.reshape(-1, self.m).to(torch.float32)
        return self.candidates(mask.device, torch.float32) @ groups.t()

    def to_index(self, mask: Tensor, layer: str = "weight") -> Tensor:
        """Candidate index of each group, ``[groups]``, of a valid mask ``[out, in]``: uint8 or int16."""
        self.validate(mask, layer)
        if self.m > MAX_WIDE:
            return self.similarity(mask).argmax(0).to(torch.uint8)
        table = _index_by_number(self.n, self.m, mask.device)
        return table.index_select(0, _number(mask.reshape(-1, self.m))).to(self._index_dtype)

    @property
    def _index_dtype(self) -> torch.dtype:
        return torch.uint8 if self.bits <= 8 else torch.int16

    def from_index(self, index: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
        """Boolean mask ``[out, in]`` from candidate indices ``[groups]``."""
        return self.candidates(index.device)[index.long()].reshape(shape)

    def pack(self, mask: Tensor, layer: str = "weight") -> Tensor:
        """A valid mask as a stream of candidate indices, :attr:`bits` bits each, lowest bit first.

        Returns:
            uint8 ``[ceil(groups · bits / 8)]``: 0.75 bits a weight for 2:4. Unused last bits are zero.
        """
        index = self.to_index(mask, layer).cpu()
        shifts = torch.arange(self.bits, dtype=torch.uint8)
        stream = (index[:, None] >> shifts & 1).to(torch.uint8).reshape(-1)  # [groups · bits]
        stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).reshape(-1, 8)
        return (stream << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)

    def unpack(self, packed: Tensor, shape: tuple[int, ...] | torch.Size, layer: str = "weight") -> Tensor:
        """The boolean mask ``[..., out, in]`` that :meth:`pack` was given.

        Raises:
            PatternError: too few or too many bytes for the shape, or an index that names no candidate.
        """
        self.check_fits(shape[-1], layer)
        groups = math.prod(shape) // self.m
        expected = -(-groups * self.bits // 8)
        if packed.dtype is not torch.uint8 or packed.shape != (expected,):
            raise PatternError(
                f"layer {layer!r}: a packed {self} mask of shape {'x'.join(map(str, shape))} takes {expected} bytes, "
                f"found {tuple(packed.shape)} of {packed.dtype}"
            )
        stream = (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).reshape(-1)
        bits = stream[: groups * self.bits].reshape(groups, self.bits).to(self._index_dtype)
        index = (bits << torch.arange(self.bits, dtype=torch.uint8)).sum(1, dtype=self._index_dtype)
        if groups and int(index.max()) >= self.num_candidates:
            raise PatternError(f"layer {layer!r}: packed mask names candidate {int(index.max())}, {self} has fewer")
        return self.from_index(index, shape)


def _parse(pattern: object, m: object) -> tuple[int, int]:
    """``(n, m)`` from anything the constructor takes."""
    given = pattern if m is None else (pattern, m)
    if isinstance(given, NMPattern):
        return given.n, given.m
    if isinstance(given, str):
        given = tuple(given.split(":"))
    if isinstance(given, tuple | list) and len(given) == 2 and all(map(_is_count, given)):
        return int(given[0]), int(given[1])
    shown = repr(pattern) if isinstance(pattern, str) else "that"  # Python writes out no number of 5,000 digits
    raise PatternError(f"{shown[:80]} is no N:M pattern; write it like '2:4' or (2, 4)")


def _is_count(part: object) -> bool:
    """A fraction or a boolean would otherwise be rounded without a word, and Python reads digits of any script."""
    if isinstance(part, str):
        return part.isascii() and part.isdigit() and len(part) < 10
    return isinstance(part, int) and not isinstance(part, bool) and abs(part) < 10**9


@cache
def _candidates(n: int, m: int) -> Tensor:
    masks = torch.zeros(math.comb(m, n), m, dtype=torch.bool, device="cpu")
    for row, kept in enumerate(itertools.combinations(range(m), n)):
        masks[row, list(kept)] = True
    return masks


@cache
def _index_by_number(n: int, m: int, device: torch.device) -> Tensor:
    """The candidate's index of every :func:`_number` that is one, int16 ``[2^M]``."""
    candidates = NMPattern(n, m).candidates(device)
    table = torch.zeros(2**m, dtype=torch.int16, device=device)
    table[_number(candidates).long()] = torch.arange(len(candidates), dtype=torch.int16, device=device)
    return table


def _number(groups: Tensor) -> Tensor:
    """Each group ``[groups, M]``, of any type, as a number with a bit a position, the first one lowest: int32."""
    columns = groups.to(torch.uint8).unbind(1)
    number = columns[0].int()
    for j, column in enumerate(columns[1:], 1):
        number |= column.int() << j
    return number


@cache
def _groups_by_number(m: int, device: torch.device) -> Tensor:
    """All 2^M boolean groups, position j standing for the bit of value 2^j.

    Returns:
        ``[2^M, M]``, or ``[2^M]`` words of M bytes where there is such a type (one copy of a word an element).
    """
    numbers = torch.arange(2**m, dtype=torch.int32, device=device)
    groups = (numbers[:, None] >> torch.arange(m, dtype=torch.int32, device=device) & 1).bool()
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return groups.view(words[m]).squeeze(1) if m in words else groups


def _kept_per_group(mask: Tensor, m: int) -> Tensor:
    """How many ones each group holds, ``[groups]`` (uint8), of a mask of zeros and ones."""
    ones = mask.view(torch.uint8) if mask.dtype is torch.bool else mask  # a sum of booleans is several times slower
    return ones.reshape(-1, m).sum(1, dtype=torch.uint8)
