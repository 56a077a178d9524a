"""What the benchmarks measure, what they measure it against, and how the numbers are shown. No speed is asserted."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from import_graph import ROOT
from made_records import DIGITS, make_records
from torch import Tensor, nn

from benchmarks import mask_op, results, roofline, table_cost, train_step
from benchmarks.baselines import textbook
from benchmarks.baselines.dense import Dense
from benchmarks.baselines.textbook import Textbook, TextbookLinear
from benchmarks.measure import Ceilings, Timing, ceilings, interleaved, peak_bytes, ratio, saved_bytes, state_bytes
from benchmarks.roofline import least_seconds
from benchmarks.workloads import RandomImages, workloads
from maskllm4v.config import load_experiment
from maskllm4v.files import read_json, write_json
from maskllm4v.gumbel import masked_weight
from maskllm4v.reporting.performance import TARGETS, performance_markdown
from maskllm4v.reporting.report import readme_sections, table_texts
from maskllm4v.reporting.tables import MISSING, significant
from maskllm4v.weights import WeightLearner

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
    task, settings = RandomImages(workload.experiment, CPU), workload.learning
    ours, baseline = workload.build(CPU), workload.build(CPU)
    learners = WeightLearner(ours, settings, row="", new=False), Dense(baseline, lr=settings.lr)
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
    assert (workload.experiment, workload.learning) == (experiment, settings)
    task = RandomImages(experiment, CPU)
    images, labels = task.batch(3)
    outputs = task.forward(workload.build(CPU), (images, labels))
    assert outputs.shape == (3, 10)
    assert sum(len(labels) for _, labels in task.calibration_batches(100, 0)) == experiment.data.calibration


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
        assert cost["seconds"] > (1.0 if experiment.kind(row) == "learned" else 0.0)  # 800 steps


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


# --- rendering ---------------------------------------------------------------------------------------------------


def mask_json() -> dict[str, Any]:
    def rows(**columns: object) -> list[dict[str, Any]]:
        return [
            {**columns, "candidate": name, "n": 15, "ms": ms, "speedup": 40.0 / ms}
            for name, ms in (("textbook", 40.0), ("chunked", 10.0))
        ]

    return {
        **HERE,
        "name": "mask_op",
        "notes": [],
        "sections": {
            "layer": [*rows(threads=1, tau=1.0), *rows(threads=2, tau=1.0)],
            "width": [row for out in (16, 32) for row in rows(**{"out": out, "in": 8})],
            "patterns": [row for pattern in ("2:4", "4:8") for row in rows(pattern=pattern)],
            "memory": [
                {"candidate": "textbook", "saved_bytes": 10.0, "peak_bytes": 24.0},
                {"candidate": "chunked", "saved_bytes": 4.0, "peak_bytes": 12.0},
            ],
            "roofline": [{"threads": 1, "tau": 1.0, "candidate": "chunked", "n": 15, "share": 0.25}],
        },
    }


def step_json(model: str = "vit_tiny") -> dict[str, Any]:
    common = {"model": model, "batch": 8, "precision": "fp32", "threads": 2, "n": 7}
    rows = [
        {**common, "variant": name, "ms": ms, "ratio": ms / 100, "peak_mb": 512.0}
        for name, ms in (("dense", 100.0), ("ours", 125.0))
    ]
    return {**HERE, "name": "train_step", "notes": [], "sections": {"steps": rows}}


def oneshot_json() -> dict[str, Any]:
    models, layers = list[dict[str, Any]](), list[dict[str, Any]]()
    for method, factor in (("magnitude", 5.0), ("sparsegpt", 2.0), ("sparsegpt, update", 1.6)):
        for name, speedup in (("textbook", 1.0), ("ours", factor)):
            common = {"method": method, "candidate": name, "n": 3, "speedup": speedup}
            models.append({**common, "images": 128, "s": 80 / speedup, "solving_s": 30 / speedup**2})
            layers.append({**common, "layer": "qkv", "out": 2304, "in": 768, "ms": 400 / speedup})
    agreement = [{"sparsegpt": 1.0, "sparsegpt, update": share} for share in (0.9995, 0.998)]
    return {**HERE, "sections": {"models": models, "layers": layers, "agreement": agreement}}


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    write_json(tmp_path / "benchmarks" / "mask_op.json", mask_json())
    write_json(tmp_path / "benchmarks" / "train_step.json", step_json())
    write_json(tmp_path / "benchmarks" / "oneshot.json", oneshot_json())
    return tmp_path


def changed_lines(
    reports: Path, name: str, made: dict[str, Any], change: Callable[[dict[str, Any]], None]
) -> list[str]:
    """The lines that a change of one file changes, as they are afterwards."""
    write_json(reports / "benchmarks" / f"{name}.json", made)
    before = performance_markdown(reports).splitlines()
    change(made["sections"])
    write_json(reports / "benchmarks" / f"{name}.json", made)
    after = performance_markdown(reports).splitlines()
    return [new for old, new in zip(before, after, strict=True) if old != new]


def test_performance_shows_what_was_measured(reports: Path) -> None:
    text = performance_markdown(reports)
    assert "textbook's time to ours | 4.00× | ≥ 3.5× |" in text
    assert "| Kept for backward beyond dense, a weight | 4.00 B | ≤ 4 B |" in text
    assert "| Whole step, ViT-tiny, fp32, batch 8, CPU, to dense | 1.25× | ≤ 1.30× |" in text
    assert "| 2:4, τ = 1, 2 threads | 40.0 ms | 10.0 ms (4.00×) |" in text
    assert "| 2:4, 32×8 | 40.0 ms | 10.0 ms (4.00×) |" in text
    assert "| share of the roofline, 1 thread | – | 25 % |" in text
    assert "| ViT-tiny/16, fp32, batch 8 | 100 ms (1.00×), 512 MiB | 125 ms (1.25×), 512 MiB |" in text
    assert "| Magnitude, ViT-B/16, CPU, textbook's time to ours | 5.00× | ≥ 5× |" in text
    assert "column loop's time to ours | 1.60× (calibration aside: 2.56×) | ≥ 1.6× |" in text
    assert "least of all layers | 99.800 % | ≥ 99.9 % |" in text
    assert "| sparsegpt, update | 80.0 s | 50.0 s (1.60×) | 400 ms | 250 ms (1.60×) |" in text
    assert "*a machine, 2 threads; torch 9.9; median of 15 runs, all candidates in turn.*" in text


def test_a_number_changes_the_places_that_show_it(reports: Path) -> None:
    def speedup(sections: dict[str, Any]) -> None:
        sections["layer"][1]["speedup"] = 3.125

    def kept(sections: dict[str, Any]) -> None:
        sections["memory"][1]["saved_bytes"] = 6.0

    def share(sections: dict[str, Any]) -> None:
        sections["roofline"][0]["share"] = 0.5

    def step(sections: dict[str, Any]) -> None:
        sections["steps"][1]["ratio"] = 1.75

    def pruned(sections: dict[str, Any]) -> None:
        sections["models"][5]["speedup"] = 1.25

    def agreed(sections: dict[str, Any]) -> None:
        sections["agreement"][1]["sparsegpt, update"] = 0.75

    target, line = changed_lines(reports, "oneshot", oneshot_json(), pruned)
    assert ("1.25× (calibration aside: 2.56×)" in target, "50.0 s (1.25×)" in line) == (True, True)
    (target,) = changed_lines(reports, "oneshot", oneshot_json(), agreed)
    assert "75.000 %" in target
    target, line = changed_lines(reports, "mask_op", mask_json(), speedup)
    assert ("3.12×" in target, line) == (True, "| 2:4, τ = 1, 1 thread | 40.0 ms | 10.0 ms (3.12×) |")
    target, line = changed_lines(reports, "mask_op", mask_json(), kept)
    assert ("6.00 B" in target, "6.00 B" in line) == (True, True)
    assert changed_lines(reports, "mask_op", mask_json(), share) == ["| share of the roofline, 1 thread | – | 50 % |"]
    target, line = changed_lines(reports, "train_step", step_json(), step)
    assert target == "| Whole step, ViT-tiny, fp32, batch 8, CPU, to dense | 1.75× | ≤ 1.30× |"  # missed, and shown
    assert "(1.75×)" in line


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    lines = performance_markdown(tmp_path).splitlines()
    assert len(lines) == 2 + len(TARGETS)
    assert all(line.split(" | ")[1] == MISSING for line in lines[2:])
    write_json(tmp_path / "benchmarks" / "train_step_cuda.json", step_json("vit_base_128"))
    text = performance_markdown(tmp_path)
    assert [line.split(" | ")[1] for line in text.splitlines()[2 : 2 + len(TARGETS)]].count(MISSING) == len(TARGETS) - 1
    assert "| Whole step, ViT-B/16, bf16, batch 128, H200-class GPU, to dense | 1.25× | ≤ 1.05× |" in text


def write_costs(reports: Path, **seconds: float) -> None:
    rows = {row.replace("_", "-"): {"seconds": value, "n": 5} for row, value in seconds.items()}
    made = {"name": "table_cost", "tables": {"digits": {**HERE, "threads": 1, "exact": True, "rows": rows}}}
    write_json(reports / "benchmarks" / "table_cost.json", made)


def cells(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return line.strip("| ").split(" | ")


def test_cost_column(tmp_path: Path) -> None:
    make_records(DIGITS, tmp_path)
    without = table_texts(DIGITS, tmp_path)
    assert {line.split(" | ")[-1] for line in without["table.md"].splitlines()[2:-2]} == {f"{MISSING} |"}
    assert "Cost:" not in without["table.md"]

    write_costs(tmp_path, digits_wanda=0.0234, digits_magnitude=0.00712)
    one = table_texts(DIGITS, tmp_path)
    assert cells(one["table.md"], "Wanda")[-1] == "0.023"
    assert cells(one["table.md"], "ViT (dense)")[-1] == MISSING
    assert "measured by `python -m benchmarks.table_cost` on a machine, 1 thread.*" in one["table.md"]
    assert one["metrics.json"] == without["metrics.json"]

    write_costs(tmp_path, digits_wanda=123.4, digits_magnitude=0.00712)
    other = table_texts(DIGITS, tmp_path)
    for name in ("table.md", "table.csv"):
        pairs = zip(one[name].splitlines(), other[name].splitlines(), strict=True)
        ((old, new),) = [(a, b) for a, b in pairs if a != b]
        assert ("anda" in old, new.strip(" |").endswith("120" if name == "table.md" else ",123.4000")) == (True, True)
    assert other["table.csv"].splitlines()[0].endswith(",cost_seconds")


def test_readme_has_the_performance_section() -> None:
    assert readme_sections(ROOT)["performance"] == performance_markdown(ROOT / "reports")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00712, "0.0071"), (0.0999, "0.10"), (1.0, "1.0"), (9.96, "10"), (38.84, "39"), (12345.0, "12000")],
)
def test_two_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text
    assert significant(math.nan) == MISSING


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
