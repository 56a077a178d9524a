"""What the benchmarks measure, and what they measure it against. No speed is asserted."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from import_graph import ROOT
from torch import Tensor, nn

from benchmarks import gates, mask_op, results, roofline, row_cost, table_cost, train_step
from benchmarks.baselines import textbook
from benchmarks.baselines.dense import Dense
from benchmarks.baselines.textbook import Textbook, TextbookLinear
from benchmarks.measure import Ceilings, Timing, ceilings, interleaved, peak_bytes, ratio, saved_bytes, state_bytes
from benchmarks.roofline import least_seconds
from benchmarks.row_cost import Rows
from benchmarks.workloads import RandomImages, random_task, workloads
from maskllm4v.config import Experiment, load_experiment
from maskllm4v.sparsity.gumbel import masked_weight
from maskllm4v.training.finetuning import WeightLearner
from maskllm4v.utils.io import read_json, write_json

CPU = torch.device("cpu")
HERE = {"hardware": "a machine", "threads": 2, "versions": {"torch": "9.9"}}

# --- measuring ---------------------------------------------------------------------------------------------------


def test_candidates_take_turns() -> None:
    calls: list[str] = []
    times = interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, repeats=3, warmup=2)
    assert calls == list("abc") * 5
    assert {name: time.n for name, time in times.items()} == {"a": 3, "b": 3, "c": 3}
    for time in times.values():
        assert len(time.samples) == 3
        assert 0 < time.low <= time.median <= time.high


def test_ratios_are_of_the_same_repetition() -> None:
    slow, fast = Timing.of([2.0, 9.0, 8.0]), Timing.of([1.0, 3.0, 2.0])
    assert (ratio(slow, fast).median, ratio(slow, fast).low, ratio(slow, fast).high) == (3.0, 2.0, 4.0)
    assert slow.median / fast.median == 4.0  # which is something else


def test_saved_bytes_counts_each_storage_once() -> None:
    x, w = torch.randn(1000, requires_grad=True), torch.randn(1000)
    assert saved_bytes(lambda: x.exp()) == 4000  # its result
    assert saved_bytes(lambda: x * w) == 4000  # w; x needs no gradient of w's
    assert saved_bytes(lambda: x * w, beyond=[w]) == 0
    assert saved_bytes(lambda: (y := x.exp(), y * y, y.view(10, 100).sin())) == 4000  # one storage, kept thrice
    assert saved_bytes(lambda: (x.exp() * w).sin(), beyond=[w]) == 8000  # what exp gave, what sin took
    with torch.no_grad():
        assert saved_bytes(lambda: x.exp()) == 0


def test_peak_and_state_bytes() -> None:
    x = torch.randn(1000)
    assert peak_bytes(lambda: x.exp(), CPU) == 4000
    assert peak_bytes(lambda: x.exp().exp().exp(), CPU) == 8000  # two at a time
    assert peak_bytes(lambda: x.exp_(), CPU) == 0
    linear = nn.Linear(10, 5)
    optimizer = torch.optim.AdamW(linear.parameters())
    assert state_bytes(linear, optimizer, x) == 4 * (55 + 1000)
    linear(torch.randn(1, 10)).sum().backward()
    optimizer.step()
    assert state_bytes(linear, optimizer, x) == 4 * (3 * 55 + 2 + 1000)  # two moments each, and two counters


def test_ceilings_are_positive_and_the_roofline_divides_by_them() -> None:
    assert all(value > 0 for value in vars(ceilings(CPU, bf16=True, quick=True, repeats=1)).values())
    found = Ceilings(bandwidth=136.0, fp32=161.0, special=12.0)
    assert least_seconds(found, groups=10, tau=1.0) == {"memory": 10.0, "special": 20.0, "floating": 10.0}
    assert least_seconds(found, groups=10, tau=1.3)["special"] == 30.0


# --- baselines ---------------------------------------------------------------------------------------------------


def oracle(
    w: Tensor, logits: Tensor, table: Tensor, u: Tensor, tau: float, scaling: float, hard: bool
) -> tuple[Tensor, Tensor]:
    """MaskLLM, Eq. 5-7, of logits and noise ``[K, groups]``, one operation after the other."""
    z = (scaling * logits - torch.log(-torch.log(u))) / tau
    p = torch.exp(z) / torch.exp(z).sum(0)
    if hard:
        p = torch.eye(len(table), dtype=p.dtype)[p.argmax(0)].t() + (p - p.detach())
    masked = w * (p.t() @ table).reshape(w.shape)
    return masked, (masked**2).sum()


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
@pytest.mark.parametrize(("tau", "scaling"), [(1.0, 100.0), (1.3, 10.0)])
def test_textbook_is_the_oracle_and_our_operation(
    n: int, m: int, tau: float, scaling: float, hard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = torch.tensor(
        [[float(j in kept) for j in range(m)] for kept in itertools.combinations(range(m), n)]
    ).double()
    w = torch.randn(6, 5 * m, dtype=torch.float64)
    u = torch.rand(len(table), 30, dtype=torch.float64)
    logits = (0.02 * torch.randn(len(table), 30, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn_like(w)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_(-u.log().t()))
    found = []
    for masked, energy in (
        oracle(w, logits, table, u, tau, scaling, hard),
        textbook.masked_weight(w, logits.t(), table, tau=tau, scaling=scaling, hard=hard),
        masked_weight(w, logits, table, tau=tau, scaling=scaling, hard=hard, uniform=u),
    ):
        (gradient,) = torch.autograd.grad((masked * upstream).sum() - 0.4 * energy, logits)
        found.append((masked.detach(), energy.detach(), gradient))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_textbook_puts_its_layers_in_place_and_trains_logits_only(tiny_vit: nn.Module) -> None:
    before = copy.deepcopy(tiny_vit.state_dict())
    learner = Textbook(tiny_vit, "2:4", exclude=["head"], hard=True)
    assert sum(isinstance(layer, TextbookLinear) for layer in tiny_vit.modules()) == 2 * 4
    assert [p for p in tiny_vit.parameters() if p.requires_grad] == learner.tensors
    assert learner.layers[0].logits.shape == (96 * 32 // 4, 6)
    assert learner.optimizer.defaults["fused"] is None
    learner.train_mode()
    outputs = tiny_vit(torch.randn(2, 1, 8, 8))
    outputs.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.tensors)
    learner.optimizer.step()
    for name, value in before.items():
        assert torch.equal(tiny_vit.state_dict()[name], value)
    kept = learner.layers[0].kept_energy
    assert kept is not None
    assert 0 < float(kept.detach()) < float(learner.layers[0].weight.square().sum())


def test_dense_step_is_that_of_the_training_loop() -> None:
    workload = workloads(quick=True)["vit_tiny"]
    task, settings = RandomImages(workload.spec, CPU), workload.learning
    ours, baseline = workload.build(CPU), workload.build(CPU)
    learners = WeightLearner(ours, task, settings, row="", new=False), Dense(baseline, lr=settings.lr)
    steps = [train_step.Step(learner, task, settings) for learner in learners]
    steps[1].batch = steps[0].batch
    for step in steps:
        step()
    changed = False
    for (name, a), b, first in zip(
        ours.state_dict().items(),
        baseline.state_dict().values(),
        workload.build(CPU).state_dict().values(),
        strict=True,
    ):
        assert torch.equal(a, b), name
        changed |= not torch.equal(a, first)
    assert changed
    assert learners[1].optimizer.defaults["fused"] is True


@pytest.mark.parametrize("table", ["digits", "cifar10"])
def test_workloads_of_tables_are_those_of_their_experiments(table: str) -> None:
    workload, experiment = workloads()[table], load_experiment(ROOT / "experiments" / f"{table}.yaml")
    settings = next(iter(experiment.learned.values()))
    assert (workload.spec, workload.pattern) == (experiment.task_spec(), experiment.pattern)
    assert workload.learning == settings
    task = random_task(experiment, CPU)
    images, labels = task.batch(3)
    outputs = task.forward(workload.build(CPU), (images, labels))
    assert outputs.shape == (3, 10)
    (part,) = task.calibration(100, 0)
    assert sum(len(labels) for _, labels in part.batches) == experiment.data.calibration


# --- whole runs --------------------------------------------------------------------------------------------------


def test_mask_op_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask_op.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "x.json")])
    found = read_json(tmp_path / "x.json")
    assert list(found["sections"]) == ["layer", "memory", "patterns", "roofline", "width"]
    assert {(r["candidate"], r["tau"]) for r in found["sections"]["layer"] if r["threads"] == 1} == {
        *(("textbook", 1.0), ("textbook", 1.3), ("chunked", 1.0), ("chunked", 1.3))
    }
    saved = {row["candidate"]: row["saved_bytes"] for row in found["sections"]["memory"]}
    assert 4 <= saved["chunked"] < 4.2 < saved["textbook"]  # the masked weight itself, and a few scalars
    assert "speedup" in capsys.readouterr().out


def test_train_step_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.json"
    train_step.main(
        ["--quick", "--models", "vit_tiny", "vit_base", "--device", "cpu", "--threads", "1", "--out", str(out)]
    )
    rows = read_json(out)["sections"]["steps"]
    assert [row["variant"] for row in rows] == 2 * ["dense", "ours", "ours_distilled", "textbook"]
    assert [row["precision"] for row in rows] == 4 * ["fp32"] + 4 * ["bf16"]
    for row in rows:
        assert (row["n"], row["ratio"] == 1.0) == (2, row["variant"] == "dense")
        assert row["peak_mb"] > row["saved_mb"] > 0
    assert "ratio" in capsys.readouterr().out


def test_gates_runs_and_counts_logits(tmp_path: Path) -> None:
    gates.main(["--quick", "--device", "cpu", "--out", str(tmp_path / "x.json")])
    rows = {(row["pattern"], row["gate"]): row for row in read_json(tmp_path / "x.json")["sections"]["gates"]}
    assert len(rows) == 5
    for (pattern, gate), row in rows.items():
        n, m = map(int, pattern.split(":"))
        a_group = m if gate == "positions" else math.comb(m, n)
        assert row["logits_mb"] == pytest.approx(4e-6 * a_group * 2 * 4 * 32 * 32 / m, rel=1e-3)
        assert row["mb"] == pytest.approx(3 * row["logits_mb"] + row["peak_mb"], rel=1e-3)
        assert row["peak_mb"] > row["logits_mb"]  # their gradient, at least


def test_table_cost_runs_and_keeps_other_tables(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    write_json(out, {"name": "table_cost", "tables": {"other": {"rows": {}}}})
    table_cost.main(["digits_patterns", "--quick", "--out", str(out)])
    tables = read_json(out)["tables"]
    assert set(tables) == {"digits_patterns", "other"}
    experiment = load_experiment(ROOT / "experiments" / "digits_patterns.yaml")
    found = tables["digits_patterns"]
    assert (found["threads"], found["exact"]) == (1, True)
    assert set(found["rows"]) == set(experiment.rows) - {experiment.dense.row}
    for row, cost in found["rows"].items():
        assert cost["n"] == 1
        assert cost["seconds"] > (1.0 if experiment.row(row).kind == "learned" else 0.0)  # 800 steps


def test_rows_of_all_kinds_cost_something(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = load_experiment(ROOT / "experiments" / "digits.yaml").model_dump()
    raw["updated"]["undone"] = {"masks": "digits-sparsegpt-update", "update": "none"}
    raw["rows"]["undone"] = "Undone"
    permuted: list[object] = []
    monkeypatch.setattr(row_cost, "permute_channels_", lambda *given, **_: permuted.append(given))
    rows = Rows(Experiment.model_validate(raw), CPU, repeats=1, quick=True)
    for row in ("magnitude-ls", "magnitude-sgpt", "maskllm-long-ls", "hybrid-short", "maskllm-positions"):
        assert rows.cost(f"digits-{row}")["seconds"] > 0
    assert rows.cost("undone") == {"seconds": 0.0, "n": 0}
    assert not permuted
    rows.cost("digits-magnitude-permuted")
    assert permuted


def test_save_rounds_and_gives_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sections: dict[str, list[results.Row]] = {"b": [{"what": "x", "ms": 1.23456}], "a": [{"what": "yy", "s": 7}]}
    first, second = (results.save("t", sections, ["a note"], tmp_path / n, device=CPU) for n in "12")
    assert first.read_bytes() == second.read_bytes()
    found = json.loads(first.read_text())
    assert found["sections"] == {"a": [{"s": 7, "what": "yy"}], "b": [{"ms": 1.235, "what": "x"}]}
    assert set(found) == {"hardware", "name", "notes", "sections", "threads", "versions"}
    assert "a note" in capsys.readouterr().out


def test_text_tables_are_aligned() -> None:
    text = results.text_table([{"what": "a", "n": 1}, {"what": "bbb", "n": 12345.678, "more": "z"}])
    assert text.splitlines() == ["what      n  more", "a         1", "bbb   12346  z"]


# --- rooflines ---------------------------------------------------------------------------------------------------


def test_roofline_of_a_step_counts_products_and_what_adamw_moves() -> None:
    weight, inputs = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16)
    most = Ceilings(bandwidth=1e9, fp32=1e6, special=1.0)
    row = roofline.step_row(
        lambda: (inputs @ weight.t()).sum().backward(), Timing.of([0.5]), most, trained=100, masked=40, precision="fp32"
    )
    assert row["gflop"] == pytest.approx(2 * (2 * 4 * 8 * 16) / 1e9)  # forward, and the weight's gradient
    assert row["gb"] == pytest.approx((28 * 100 + roofline.BYTES * 10) / 1e9)
    assert row["share"] == pytest.approx((2048 / 1e6 + (2800 + 10 * roofline.BYTES) / 1e9) / 0.5)


def test_roofline_of_pruning_grows_with_what_a_method_does() -> None:
    layers, most = [torch.nn.Linear(16, 8)], Ceilings(bandwidth=1e9, fp32=1e6, special=1.0)
    work = [
        roofline.pruning_row(layers, method, 10, Timing.of([1.0]), most)["gflop"]
        for method in ("magnitude", "wanda", "sparsegpt", "sparsegpt, update")
    ]
    assert work[0] == 0
    assert work[1] == pytest.approx(2 * 8 * 16 * 10 / 1e9)
    assert work[2] == pytest.approx((2 * 2 * 8 * 16 * 10 + 16**2 * 10 + 16**3 / 3) / 1e9)
    assert work[3] == pytest.approx((float(str(work[2])) * 1e9 + 16**3 / 3 + 8 * 16**2) / 1e9)
