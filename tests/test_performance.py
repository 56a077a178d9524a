"""How the benchmarks' numbers are shown: the README's performance section and the tables' cost column."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from import_graph import ROOT
from made_records import DIGITS, make_records

from maskllm4v.reporting.benchmarks.performance import TARGETS, performance_markdown
from maskllm4v.reporting.report import experiments, readme_sections, table_texts
from maskllm4v.reporting.tables import MISSING, significant
from maskllm4v.utils.io import write_json

CPU = torch.device("cpu")
HERE = {"hardware": "a machine", "threads": 2, "versions": {"torch": "9.9"}}


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
    assert readme_sections(experiments(ROOT), ROOT / "reports")["performance"] == performance_markdown(ROOT / "reports")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00712, "0.0071"), (0.0999, "0.10"), (1.0, "1.0"), (9.96, "10"), (38.84, "39"), (12345.0, "12000")],
)
def test_two_significant_digits(value: float, text: str) -> None:
    assert significant(value) == text
    assert significant(math.nan) == MISSING
