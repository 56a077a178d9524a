"""What a receipt holds, checked as it is read: a receipt may come from anybody, and ends up in the README.

Texts are held to few letters, so that no Markdown, no path and no name of a person fits into them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from maskllm4v.utils.text import plain

FORMAT = 1  # of the file

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # SHA-256
Text = Annotated[str, Field(pattern=r"^[A-Za-z0-9 ()@.,:+=-]{1,80}$")]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.@:/-]{1,160}$")]  # of rows, files below the root, packages, metrics
Setting = Annotated[str, Field(pattern=r"^[A-Za-z0-9_ ().,:=+-]{0,64}$")]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f<>|`]{1,300}$")]
Number = Annotated[int, Field(ge=0)]
Verdict = Literal["equal", "differs", "other settings", "not made", "not committed"]
Stage = Literal["dense", "prior", "train", "update", "finetune", "evaluate", "export"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class CPU(_Part):
    """A processor, as it calls itself; None: it does not say."""

    name: Text
    architecture: Name
    vendor: Text | None = None
    family: Number | None = None
    model: Number | None = None
    stepping: Number | None = None
    avx2: bool | None = None

    def __str__(self) -> str:
        """``AMD EPYC (family 25, model 17)``."""
        if self.family is None or self.model is None:
            return self.name
        return f"{self.name} (family {self.family}, model {self.model})"


class Difference(_Part):
    """A metric whose values differ.

    Attributes:
        digit: the significant digit from which on they do, from 1; see :func:`maskllm4v.receipts.digits.first_digit`.
    """

    metric: Name
    seed: Number
    committed: float
    here: float
    digit: Annotated[int, Field(ge=1)]


class Row(_Part):
    """One row of a table, as it came out here, and how it compares with the committed one.

    Attributes:
        committed, here: digests of all that is committed of the row (``reports/<table>/runs/<row>``).
        artifacts: digests of its weights, masks and exports here, by folder, as in ``dvc.lock``.
        metrics: here, by seed, then by name.
        ran: the row's stages that ran on this machine; DVC skips or restores what it finds made.
        differences: metrics that differ.
        differing: files and folders that differ beside them, and ``record.json: <key>`` for other keys of the record.
    """

    verdict: Verdict
    committed: Digest | None = None
    here: Digest | None = None
    artifacts: dict[Name, Name] = {}
    metrics: dict[Name, dict[Name, float]] = {}
    ran: list[Stage] = []
    differences: list[Difference] = []
    differing: list[Line] = []

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Row:
        found = {
            "equal": self.here is not None and self.here == self.committed and not self.differences,
            "not made": self.here is None,
            "not committed": self.committed is None and self.here is not None,
        }
        if not found.get(self.verdict, self.here is not None and self.committed is not None):
            raise ValueError(f"its verdict is {self.verdict!r}, but its digests say otherwise")
        if self.verdict == "equal" and self.differing:
            raise ValueError("its verdict is 'equal', but it lists files that differ")
        if self.verdict == "differs" and not (self.differences or self.differing or self.here != self.committed):
            raise ValueError("its verdict is 'differs', but nothing does")
        return self

    @property
    def computed(self) -> bool:
        """Whether the stage that makes its weights or masks ran on that machine."""
        return not {"evaluate", "export"}.issuperset(self.ran)

    @property
    def measured(self) -> bool:
        """Whether it was evaluated there; DVC skips that where weights and masks came out as committed."""
        return "evaluate" in self.ran

    @classmethod
    def compared(cls, committed: str, here: str) -> Row:
        """A row of which two digests (SHA-256, in hex) are all that is known."""
        return cls(verdict="equal" if committed == here else "differs", committed=committed, here=here)


class Receipt(_Part):
    """What came out on one machine.

    Attributes:
        chain: ``"full"``, or ``"shortened"``: trainings cut to a few steps, as is done on emulated CPUs.
        commit: the one that rows were compared with; None where there is none.
        clean: whether the code and settings were those of the commit.
        results: digest of all rows of the table in that commit; see :func:`maskllm4v.receipts.rows.results_digest`.
        emulator: what emulated the CPU, such as ``QEMU 7.2``.
        versions: releases that the table's results may depend on; None: not installed.
        locked: whether the environment is that of ``requirements.lock``; None where that file is missing.
        unlocked: the packages that are not, as ``[here, locked]``.
        settings: environment variables that choose kernels, as the user had exported them.
        seconds, stages: how long the run took, and how many stages ran in it; None: not known.
    """

    format: Literal[1] = 1
    table: Name
    exact: bool
    chain: Literal["full", "shortened"] = "full"
    package: Text
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{40,64}$")] | None
    clean: bool | None
    results: Digest | None
    cpu: CPU
    emulator: Text | None = None
    cores: Number | None = None
    system: Text
    python: Text
    versions: dict[Name, Text | None]
    locked: bool | None
    unlocked: dict[Name, tuple[Text | None, Text]] = {}
    settings: dict[Name, Setting] = {}
    seconds: Annotated[float, Field(ge=0)] | None = None
    stages: Number | None = None
    warnings: list[Line] = []
    rows: Annotated[dict[Name, Row], Field(min_length=1)]

    def named(self, verdict: Verdict) -> list[str]:
        """Rows with a verdict, in order."""
        return [row for row, found in self.rows.items() if found.verdict == verdict]

    @property
    def agrees(self) -> bool:
        """Whether all rows came out as committed."""
        return len(self.named("equal")) == len(self.rows)

    @property
    def complete(self) -> bool:
        """Whether all rows were computed and measured on that machine, or all of a shortened chain was."""
        return self.chain == "shortened" or all(row.computed and row.measured for row in self.rows.values())

    @property
    def machine(self) -> str:
        """The CPU in words, and what emulated it."""
        return plain(f"{self.cpu}, emulated by {self.emulator}" if self.emulator else str(self.cpu))
