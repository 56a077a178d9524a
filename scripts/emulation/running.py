"""Exact tables cut short, natively and on emulated CPUs: one call of each kind, whose files are compared."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from maskllm4v.config import Experiment
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import write_json
from scripts.emulation.comparing import Difference, differences, digest
from scripts.emulation.kinds import needed, representatives
from scripts.emulation.pipeline import Call, calls
from scripts.emulation.processes import NATIVE, Answer, Worker, emulator_version, last_lines
from scripts.emulation.worker import LOG

MADE, PROJECT = "made", "project"  # all native artifacts of a table; the folder that a call runs in


@dataclass(frozen=True)
class Outcome:
    """One call on one emulated CPU.

    Attributes:
        call: what was run.
        cpu: where.
        seconds: of CPU that it took there.
        native, digest: SHA-256 of all that it wrote, natively and there; empty if it failed.
        differences: from the files that it left natively.
        fault: why it gave no result, and the last lines that it printed; empty if it did.
    """

    call: Call
    cpu: str
    seconds: float
    native: str
    digest: str
    differences: tuple[Difference, ...] = ()
    fault: str = ""

    @property
    def equal(self) -> bool:
        return not self.fault and not self.differences

    def __str__(self) -> str:
        verdict = "equal" if self.equal else "FAILED" if self.fault else "DIFFERS"
        lines = self.fault.splitlines() or map(str, self.differences)
        return "\n    ".join((f"{verdict:8}{self.cpu:10}{self.seconds:7.1f} s  {self.call}", *lines))


@dataclass(frozen=True)
class Result:
    """All that was compared.

    Attributes:
        outcomes: of each call that was run on an emulated CPU.
        stands_for: for each call of all tables, the one of its kind that was run.
        emulator: its name and version, such as ``"QEMU 7.2"``.
        kernels: which instructions torch's and NumPy's kernels are of, by CPU, ``"native"`` included.
        seconds: of CPU in all, by CPU.
    """

    outcomes: list[Outcome]
    stands_for: dict[Call, Call]
    emulator: str
    kernels: dict[str, dict[str, str]]
    seconds: dict[str, float]

    @property
    def equal(self) -> bool:
        return all(outcome.equal for outcome in self.outcomes)

    def of_table(self, table: str, cpu: str) -> dict[str, Outcome]:
        """For each call of a table, by name, what the one of its kind came out as on a CPU."""
        run = {outcome.call: outcome for outcome in self.outcomes if outcome.cpu == cpu}
        return {call.name: run[other] for call, other in self.stands_for.items() if call.table == table}


def emulate(
    experiments: Mapping[str, Experiment],
    cpus: Sequence[str],
    folder: Path,
    *,
    root: Path,
    show: Callable[[str], None] = print,
) -> Result:
    """Run one call of each kind natively, then on each CPU from the same inputs, side by side.

    Args:
        experiments: by table, see :func:`scripts.emulation.shortened.shortened`.
        cpus: models that QEMU knows, such as ``"Haswell"``.
        folder: where all runs, one project for each call and CPU; what is in there already may be replaced.
        root: of the repository.
        show: is told how each call went.

    Raises:
        UserError: a stage failed natively, or a process could not be started or was killed.
    """
    listed = [call for experiment in experiments.values() for call in calls(experiment, root)]
    stands_for = representatives(experiments, listed)
    runs = _Runs(experiments, folder, show, set(stands_for.values()), needed(set(stands_for.values()), listed))
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(1 + len(cpus)))  # its threads end once the workers have
        native, *others = (stack.enter_context(Worker(cpu, root, folder / f"{cpu}.txt")) for cpu in (NATIVE, *cpus))
        for done in as_completed([pool.submit(runs.make, native), *(pool.submit(runs.compare, w) for w in others)]):
            done.result()
    return Result(
        runs.outcomes,
        stands_for,
        emulator_version(),
        {worker.cpu: worker.kernels for worker in (native, *others)},
        {worker.cpu: worker.seconds for worker in (native, *others)},
    )


class _Runs:
    """What workers do, each in a thread: one makes all artifacts, the others follow it."""

    def __init__(
        self,
        experiments: Mapping[str, Experiment],
        folder: Path,
        show: Callable[[str], None],
        compared: Collection[Call],
        needed: Sequence[Call],
    ) -> None:
        self._experiments, self._folder, self._show = experiments, folder, show
        self._compared = compared
        self._made: dict[Call, Future[Answer]] = {call: Future() for call in needed}  # in their order
        self.outcomes: list[Outcome] = []

    def make(self, worker: Worker) -> None:
        """Run all calls, natively; each is one that others may wait for."""
        imported: list[str] = []
        try:
            worker.wait()
            for call, made in self._made.items():
                project = self._project(worker.cpu, call)
                answer = worker.run(project, call, imported)
                if answer.status:
                    raise UserError(f"{call}: failed natively\n{_said(project, answer)}")
                imported = answer.modules
                for path in call.outputs:
                    _copy(project / path, self._artifacts(call) / path)
                made.set_result(answer)
        except BaseException as error:
            for made in self._made.values():
                if not made.done():
                    made.set_exception(error)
            raise

    def compare(self, worker: Worker) -> None:
        """Run one call of each kind once it was made natively, and compare."""
        imported: list[str] = []
        worker.wait()
        for call, made in self._made.items():
            imported += made.result().modules
            if call in self._compared:
                project = self._project(worker.cpu, call)
                answer = worker.run(project, call, imported)
                imported = answer.modules
                found = _outcome(worker.cpu, call, answer, project, _place(self._folder, NATIVE, call) / PROJECT)
                self.outcomes.append(found)
                self._show(str(found))

    def _project(self, cpu: str, call: Call) -> Path:
        """A new project that holds the parameters and the native artifacts that a call reads, and nothing else."""
        place = _place(self._folder, cpu, call)
        shutil.rmtree(place, ignore_errors=True)
        write_json(place / PROJECT / "params.yaml", self._experiments[call.table].model_dump(mode="json"))  # it is YAML
        for path in call.inputs:
            _copy(self._artifacts(call) / path, place / PROJECT / path)
        return place / PROJECT

    def _artifacts(self, call: Call) -> Path:
        """Where all artifacts of a call's table are kept, as they were made natively."""
        return self._folder / NATIVE / call.table / MADE


def _place(folder: Path, cpu: str, call: Call) -> Path:
    return folder / cpu / call.table / f"{call.stage}-{call.key}"


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copy(source, target)


def _outcome(cpu: str, call: Call, answer: Answer, project: Path, native: Path) -> Outcome:
    before = digest(native, call.outputs)
    if answer.status:
        return Outcome(call, cpu, answer.seconds, before, "", fault=_said(project, answer))
    after = digest(project, call.outputs)
    return Outcome(call, cpu, answer.seconds, before, after, tuple(differences(native, project)))


def _said(project: Path, answer: Answer) -> str:
    ended = f"status {answer.status}" if answer.status > 0 else f"signal {-answer.status}"
    return "\n".join((f"ended with {ended}", *last_lines(project.parent / LOG)))
