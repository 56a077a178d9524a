"""How exported files and the inference benchmark are shown, on made-up numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from maskllm4v.reporting.benchmarks.deployment import deployment_markdown, exports_markdown
from maskllm4v.reporting.tables import MISSING
from maskllm4v.utils.io import write_json

BASE, HUGE = "vit_base_patch16_224", "vit_huge_patch14_224"
MIB = 2**20


def file(format: str, dtype: str | None, size: float) -> dict[str, Any]:
    return {"file": f"x-{format}-{dtype}", "format": format, "dtype": dtype, "bytes": int(size), "sha256": "0" * 64}


def manifest(reports: Path, table: str, row: str, *files: dict[str, Any]) -> None:
    made = {"row": row, "seed": 0, "model": BASE, "pattern": "2:4", "record": None, "layers": 4, "files": files}
    write_json(reports / table / "runs" / row / "export.json", made)


def speed(candidate: str, ms: float, dense: float, **columns: Any) -> dict[str, Any]:
    return {"precision": "bf16", "candidate": candidate, "n": 15, "ms": ms, "speedup": dense / ms, **columns}


def gpu_json() -> dict[str, Any]:
    def rows(model: str, batch: int, mode: str, **ms: float) -> list[dict[str, Any]]:
        names = {"faster": "ours, faster only"}
        memory = {"weights_mb": 165.0, "peak_mb": 24.5 * batch} if mode == "eager" else {}
        where = {"model": model, "batch": batch, "mode": mode, **memory}
        return [speed(names.get(name, name), value, ms["dense"], **where) for name, value in ms.items()]

    latency = [
        *rows(BASE, 8, "eager", dense=2.7, torch=31.9, ours=32.0, faster=2.71),
        *rows(BASE, 128, "eager", dense=13.2, torch=38.5),
        *rows(BASE, 128, "graphed", dense=13.1, torch=37.9, ours=11.0, faster=10.5),
        *rows(HUGE, 1, "graphed", dense=5.0, ours=4.0),
    ]
    parts = [
        speed(name, ms, 1.0, model=BASE, batch=128, part=part)
        for part, name, ms in (("attention", "dense", 1.0), ("mlp", "dense", 1.0), ("mlp", "ours", 0.8))
    ]
    sections = {"latency": latency, "parts": parts, "layers": [], "size": [], "failed": [{"reason": "x"}]}
    return {"hardware": "a GPU", "threads": 16, "versions": {"torch": "9.9"}, "sections": sections}


def cpu_json() -> dict[str, Any]:
    common = {"model": BASE, "batch": 1, "precision": "fp32"}
    latency = [
        {**speed(name, ms, 100.0), **common, "mode": mode}
        for mode, name, ms in (
            *(("eager", "dense", 100.0), ("eager", "2:4 zeros", 101.0)),
            *(("onnxruntime", "dense", 100.0), ("onnxruntime", "2:4 zeros", 80.0)),
        )
    ]
    size = [
        {"model": BASE, "format": "dense", "dtype": "fp16", "bytes": 160 * MIB, "ratio": 1.0},
        {"model": BASE, "format": "packed", "dtype": "fp16", "bytes": 90 * MIB, "ratio": 0.5625},
        {"model": BASE, "format": "mask", "bytes": 7.5 * MIB},
    ]
    sections = {"latency": latency, "size": size}
    return {"hardware": "a CPU", "threads": 1, "versions": {"torch": "9.8"}, "sections": sections}


def cells(text: str, label: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ")[1:] for line in text.splitlines() if line.startswith(f"| {label} |")]


def test_sizes_of_exported_rows(tmp_path: Path) -> None:
    manifest(tmp_path, "cifar10", "masks", file("dense", "fp32", 4 * MIB), file("packed", "fp32", 2.25 * MIB))
    manifest(
        tmp_path, "digits", "masks", file("packed", "fp16", 9216), file("mask", None, 1536), file("onnx", None, 10)
    )
    manifest(tmp_path, "digits", "wanda", file("dense", "fp16", 16384), file("packed", "fp16", 9216))
    text = deployment_markdown(tmp_path)
    head, _, *lines = text.splitlines()
    assert head == "| On disk | dense fp32 | dense fp16 | packed fp32 | packed fp16 | mask | onnx |"
    assert lines == [
        "| cifar10, masks | 4.00 MiB | – | 2.25 MiB (0.56×) | – | – | – |",
        "| digits, masks | – | – | – | 9.00 KiB | 1.50 KiB | 0.00977 KiB |",
        "| digits, wanda | – | 16.0 KiB | – | 9.00 KiB (0.56×) | – | – |",
    ]


def test_speeds_and_losses_are_shown_as_they_are(tmp_path: Path) -> None:
    write_json(tmp_path / "benchmarks" / "inference_cuda.json", gpu_json())
    text = deployment_markdown(tmp_path)
    assert "| Whole model, eager | dense | 2:4, torch's conversion | 2:4, ours | 2:4, ours where faster |" in text
    assert cells(text, "ViT-B/16, bf16, batch 8") == [
        [MISSING] * 4,  # in a graph
        ["2.70 ms", "31.9 ms (0.08×)", "32.0 ms (0.08×)", "2.71 ms (1.00×)"],
    ]
    graphed, eager, attention, mlp, memory = cells(text, "ViT-B/16, bf16, batch 128")
    assert eager == ["13.2 ms", "38.5 ms (0.34×)", MISSING, MISSING]
    assert graphed == ["13.1 ms", "37.9 ms (0.35×)", "11.0 ms (1.19×)", "10.5 ms (1.25×)"]
    assert (attention, mlp) == (["1.00 ms"], ["1.00 ms", "0.800 ms (1.25×)"])
    assert memory == ["165 + 3140", "165 + 3140"]  # at the largest batch only
    assert cells(text, "ViT-H/14, bf16, batch 1") == [
        ["5.00 ms", MISSING, "4.00 ms (1.25×)", MISSING],
        [MISSING] * 4,  # eagerly
    ]
    assert "torch.compile" not in text
    # The way to run converted models stands in sight, all others are folded away.
    front, aside = text.split("<details>")
    assert "| Whole model, CUDA graph |" in front
    assert "| Whole model, eager |" in aside
    said = "*a GPU, 16 threads; torch 9.9; median of 15 runs, all candidates in turn.*\n"
    assert front.strip().endswith(said.strip())
    assert aside.startswith("<summary>More on a GPU, 16 threads</summary>\n\n| ")
    assert aside.endswith(f"{said}\n</details>\n")


def test_both_machines_and_the_sizes_of_the_benchmark(tmp_path: Path) -> None:
    write_json(tmp_path / "benchmarks" / "inference_cuda.json", gpu_json())
    write_json(tmp_path / "benchmarks" / "inference.json", cpu_json())
    text = deployment_markdown(tmp_path)
    assert cells(text, "ViT-B/16") == [["160 MiB", "90.0 MiB (0.56×)", "7.50 MiB"]]
    assert cells(text, "ViT-B/16, fp32, batch 1") == [["100 ms", "101 ms (0.99×)"], ["100 ms", "80.0 ms (1.25×)"]]
    assert text.index("| Whole model, ONNX Runtime | dense | 2:4, zeros in place |") < text.index("*a CPU, 1 thread;")
    assert text.index("*a GPU, 16 threads;") < text.index("*a CPU, 1 thread;")
    assert text.count("<details><summary>More on") == 2
    for line in text.splitlines():
        assert line == "" or line.startswith(("| ", "*a ", "<details><summary>", "</details>"))


def test_files_of_one_table_with_their_digests(tmp_path: Path) -> None:
    assert exports_markdown("digits", tmp_path) == "No row is exported.\n"
    manifest(tmp_path, "cifar10", "masks", file("dense", "fp32", 1000))
    manifest(tmp_path, "digits", "wanda", file("dense", "fp16", 1000), file("packed", "fp16", 625))
    manifest(tmp_path, "digits", "masks", file("mask", None, 12345))
    text = exports_markdown("digits", tmp_path)
    assert text.splitlines()[2:] == [
        f"| masks | x-mask-None | 12,345 | – | `{'0' * 64}` |",
        f"| wanda | x-dense-fp16 | 1,000 | 1.000 | `{'0' * 64}` |",
        f"| wanda | x-packed-fp16 | 625 | 0.625 | `{'0' * 64}` |",
        "",
        "*masks: seed 0, 4 layers 2:4; wanda: seed 0, 4 layers 2:4. In `artifacts/exports/<row>/`.*",
    ]


def test_a_number_changes_its_place_alone(tmp_path: Path) -> None:
    made = gpu_json()
    write_json(tmp_path / "benchmarks" / "inference_cuda.json", made)
    before = deployment_markdown(tmp_path).splitlines()
    made["sections"]["parts"][2]["speedup"] = 2.5
    write_json(tmp_path / "benchmarks" / "inference_cuda.json", made)
    after = deployment_markdown(tmp_path).splitlines()
    assert [new for old, new in zip(before, after, strict=True) if old != new] == [
        "| ViT-B/16, bf16, batch 128 | 1.00 ms | 0.800 ms (2.50×) |"
    ]


@pytest.mark.parametrize("sections", [{}, {"latency": [], "parts": [], "size": []}])
def test_nothing_to_show(tmp_path: Path, sections: dict[str, Any]) -> None:
    assert deployment_markdown(tmp_path) == ""
    write_json(tmp_path / "benchmarks" / "inference.json", {**cpu_json(), "sections": sections})
    assert deployment_markdown(tmp_path) == ""
