"""Pages: what stands on them for each table, measured or not, and that they need nothing but themselves."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from import_graph import ROOT
from made_diffusion import diffusion
from made_diffusion import make_records as make_diffusion_records
from made_records import DIGITS, make_records, with_controls
from parsed_page import Page

from maskllm4v.config import Experiment
from maskllm4v.reporting.page import index_page, table_page
from maskllm4v.reporting.report import check_report, experiment_files, experiments, page_text, table_texts
from maskllm4v.runs.paths import record_file
from maskllm4v.runs.records import write_record
from maskllm4v.utils.errors import UserError
from maskllm4v.utils.io import read_json

REPORTS = ROOT / "reports"
EXPERIMENTS = experiments(ROOT)
MIB = 2**20


def page_of(experiment: Experiment, reports: Path) -> Page:
    return Page(table_page(experiment, reports, experiment.table))


@pytest.fixture(scope="module")
def committed() -> dict[str, str]:
    """Pages of all tables, from the committed records."""
    files = experiment_files(ROOT)
    return {table: page_text(experiment, REPORTS, files) for table, experiment in EXPERIMENTS.items()}


def results(page: Page) -> list[list[str]]:
    """The cells of the table at the top, number of the row aside."""
    (table,) = page.find("table", class_="results")
    lines = []
    for place in [p for p in page.find("tr") if page.within(p, table)]:
        cells = [p for tag in ("th", "td") for p in page.find(tag) if page.elements[p].parent == place]
        lines.append([page.text(cell).strip() for cell in sorted(cells)][1:])
    return lines


def markdown_cells(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip().strip("*") for cell in line.split("|")[1:-1]] for line in lines]
    return [cells[0], *cells[2:]]


# The headline table


@pytest.mark.parametrize("table", EXPERIMENTS)
def test_cells_are_those_of_the_markdown_table(table: str, committed: dict[str, str]) -> None:
    texts = table_texts(EXPERIMENTS[table], REPORTS)
    page = Page(committed[table])
    assert results(page) == markdown_cells(texts["table.md"].split("\n\n")[0])
    (caption,) = page.find("p", id="results-caption")
    plain = re.sub(r"[*`]", "", texts["table.md"].split("\n\n")[1].strip())
    assert page.text(caption) == plain


def marked_best(page: Page) -> dict[str, set[str]]:
    """Rows by the metric that they are the best in."""
    found: dict[str, set[str]] = {}
    for place in page.find("td", class_="best"):
        row, metric, _ = page.elements[place].shows
        found.setdefault(metric, set()).add(row)
    return found


def test_best_of_the_sparse_rows_are_marked(tmp_path: Path) -> None:
    """Of the made records each row is better than the one before, and top-5 is the same in all."""
    experiment = with_controls()
    found = marked_best(page_of(experiment, make_records(experiment, tmp_path)))
    sparse = {row for row in experiment.rows if experiment.row(row).pattern}
    best = {"digits-magnitude-more"}  # the last one of the sparse rows
    assert found == {
        "top1": found["delta"],
        "delta": found["delta"],
        "top5": sparse,
        "nll": best,
        "ece": best,
        "agreement": best,
    }
    means = {line["row"]: line["top1_mean"] for line in _csv(experiment, tmp_path)}
    assert found["top1"] == {max(sparse, key=lambda row: float(means[row]))}


def test_lower_is_better_in_errors(tmp_path: Path) -> None:
    experiment = diffusion()
    found = marked_best(page_of(experiment, make_diffusion_records(experiment, tmp_path)))
    first = {"tiny-magnitude"}
    assert found == dict.fromkeys(("eps_mse", "delta", "dense_mse", "accuracy", "fd", "kd"), first)


def _csv(experiment: Experiment, reports: Path) -> list[dict[str, str]]:
    header, *lines = table_texts(experiment, reports)["table.csv"].splitlines()
    return [dict(zip(header.split(","), re.split(r",(?! )", line), strict=False)) for line in lines]


def test_the_first_sentence_is_about_the_best_rows(committed: dict[str, str]) -> None:
    page = Page(committed["digits"])
    (lead,) = page.find("p", class_="lead")
    lines = {line[0] + line[3]: line for line in results(page)}
    best, one_shot = lines["MaskLLM-4V (800 steps)Magnitude"], lines["SparseGPT–"]
    text = " ".join(page.text(lead).split())
    assert text.startswith(
        f"MaskLLM-4V (800 steps) ← Magnitude is the best sparse row: top-1 {best[4]} %, {best[5]} to dense"
    )
    assert f"The best one-shot row, SparseGPT, reaches {one_shot[4]} % ({one_shot[5]})" in text


# Whatever is measured


@pytest.mark.parametrize("experiment", [DIGITS, diffusion(), *EXPERIMENTS.values()], ids=lambda e: e.table)
def test_nothing_measured_no_charts(experiment: Experiment, tmp_path: Path) -> None:
    page = page_of(experiment, tmp_path)
    assert not page.find("svg")
    assert not page.find("img")
    assert not page.find("details")
    lines = results(page)[1:]
    assert len(lines) == len(experiment.rows)
    assert {cell for line in lines for cell in line[4:]} == {"–"}
    assert "Not measured yet" in page.text(page.find("main")[0])


def test_single_seed_has_no_spread(tmp_path: Path) -> None:
    raw = DIGITS.model_dump()
    one = Experiment.model_validate({**raw, "seeds": [0]})
    page = page_of(one, make_records(one, tmp_path))
    assert "±" not in page.text(page.find("main")[0])
    charts = [place for name in ("bars", "budget") for place in page.find("svg", class_=name)]
    assert charts
    assert not [e for place in charts for e in page.inside(place) if e.attributes.get("class") == "spread"]
    assert not page.find("path", class_="range")


def test_rows_without_costs_are_placed_by_their_steps(tmp_path: Path) -> None:
    page = page_of(DIGITS, make_records(DIGITS, tmp_path))
    (chart,) = page.find("svg", class_="budget")
    assert "steps of training" in page.text(chart)
    points = {e.shows[0]: float(e.attributes["cx"]) for e in page.inside(chart) if e.tag == "circle"}
    assert len(points) == len(DIGITS.rows) - 1
    assert (
        points["digits-magnitude"] < points["digits-maskllm-short-magnitude"] < points["digits-maskllm-long-magnitude"]
    )


@pytest.mark.parametrize("judged", [True, False])
def test_diffusion_has_timesteps_and_samples(judged: bool, tmp_path: Path) -> None:
    experiment = diffusion()
    page = page_of(experiment, make_diffusion_records(experiment, tmp_path, judged=judged))
    assert len(page.find("svg", class_="bars")) == 1 + judged
    assert len(page.find("img")) == len(experiment.rows)
    lines = {e.shows[:2] for e in page.elements if e.tag == "path"}
    assert ("tiny-dense", "eps_mse/t") in lines
    assert ("tiny-dense", "dense_mse/t") not in lines


def test_stale_rows_have_no_marks(tmp_path: Path) -> None:
    make_records(DIGITS, tmp_path)
    longer = DIGITS.model_dump()
    longer["priors"]["digits-wanda"]["batch_size"] = 7
    page = page_of(Experiment.model_validate(longer), tmp_path)
    shown = [e for e in page.elements if e.shows[0] == "digits-wanda"]
    assert {e.tag for e in shown} == {"td"}
    assert {e.text for e in shown} == {"–"}


def test_negative_numbers_have_their_place(tmp_path: Path) -> None:
    experiment = diffusion()
    make_diffusion_records(experiment, tmp_path)
    path = record_file("tiny", "tiny-long", tmp_path)
    record: dict[str, Any] = read_json(path)
    for of_seed in record["metrics"].values():
        of_seed["kd"] = -0.0033
    write_record(path, record)
    page = page_of(experiment, tmp_path)
    assert marked_best(page)["kd"] == {"tiny-long"}
    assert [line[-2] for line in results(page)][-1] == "-0.0033 ± 0.0000"


# Markup


HOSTILE = 'a<b>&"c"</td><script>x</script>'


def test_names_cannot_break_out(tmp_path: Path) -> None:
    raw = DIGITS.model_dump()
    raw["title"] = HOSTILE
    raw["rows"] |= {"digits-wanda": HOSTILE, "digits-maskllm-long-magnitude": HOSTILE}
    experiment = Experiment.model_validate(raw)
    page = page_of(experiment, make_records(experiment, tmp_path))
    assert len(page.find("script")) == 1
    assert page.text(page.find("h1")[0]) == HOSTILE
    assert [line[0] for line in results(page)].count(HOSTILE) == 2
    assert HOSTILE in " ".join(e.text for e in page.elements if e.tag == "title")
    assert HOSTILE in Page(index_page({"digits": experiment}, tmp_path)).text(0)


@pytest.mark.parametrize("table", EXPERIMENTS)
def test_pages_are_whole(table: str, committed: dict[str, str]) -> None:
    """Balanced (the parser says), drawings XML, ids unique, links to what is there, pictures and tables named."""
    text, page = committed[table], Page(committed[table])
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        root = ElementTree.fromstring(drawing)
        assert root[0].tag == "title"
        assert root[1].tag == "desc"
        assert "nan" not in drawing.lower().replace("nance", "")
    ids = [e.attributes["id"] for e in page.elements if "id" in e.attributes]
    assert len(set(ids)) == len(ids)
    anchors = {e.attributes["href"][1:] for e in page.elements if e.attributes.get("href", "").startswith("#")}
    assert anchors <= set(ids)
    assert all(e.attributes.get("alt") for e in page.elements if e.tag == "img")
    assert all(e.attributes.get("scope") for e in page.elements if e.tag == "th")


@pytest.mark.parametrize("table", EXPERIMENTS)
def test_pages_ask_for_nothing(table: str, committed: dict[str, str]) -> None:
    text, page = committed[table], Page(committed[table])
    sources = [
        e.attributes[name]
        for e in page.elements
        for name in ("src", "srcset", "data", "xlink:href")
        if name in e.attributes
    ]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    links = [e.attributes["href"] for e in page.elements if e.tag == "link"]
    assert links == ["data:,"]
    hrefs = {e.attributes["href"] for e in page.elements if e.tag == "a" and not e.attributes["href"].startswith("#")}
    assert hrefs == {"../index.html", "table.md", "table.csv"}
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest|import\(", text)
    assert str(ROOT) not in text


def test_pages_are_small(committed: dict[str, str]) -> None:
    sizes = {table: len(text.encode()) for table, text in committed.items()}
    assert max(sizes.values()) < 3 * MIB, sizes


def test_same_bytes_whatever_the_order_of_sets(committed: dict[str, str]) -> None:
    code = (
        "import sys; from pathlib import Path; from maskllm4v.reporting.report import *\n"
        "text = page_text(experiments(Path())['cifar10'], Path('reports'), experiment_files(Path()))\n"
        "sys.stdout.buffer.write(text.encode())"
    )
    for seed in ("1", "2"):
        environment = {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
        assert done.stdout.decode() == committed["cifar10"]


@pytest.mark.parametrize("table", [table for table in EXPERIMENTS if (REPORTS / table / "runs").exists()])
def test_numbers_of_points_do_not_collide(table: str, committed: dict[str, str]) -> None:
    page = Page(committed[table])
    charts = page.find("svg", class_="budget")
    assert charts
    for chart in charts:
        numbers = [e for e in page.inside(chart) if e.tag == "text" and e.attributes.get("class") == "number"]
        places = [(float(e.attributes["x"]), float(e.attributes["y"])) for e in numbers]
        for n, (x, y) in enumerate(places):
            assert all(abs(x - a) > 9 or abs(y - b) > 11 for a, b in places[:n])


# Rows in detail


def test_commands_reproduce_a_row(committed: dict[str, str]) -> None:
    """For every row, with the file that makes the table; where only params.yaml makes it, there is nothing to use."""
    page = Page(committed["cifar10"])
    commands = [page.text(place) for place in page.find("pre") if "dvc repro" in page.text(place)]
    assert commands == [
        f"make use EXPERIMENT=cifar10 && \\\n  dvc repro evaluate@{row}" for row in EXPERIMENTS["cifar10"].rows
    ]
    assert "make use" not in table_page(EXPERIMENTS["cifar10"], REPORTS, None)


def test_settings_that_set_a_row_apart_are_marked(committed: dict[str, str]) -> None:
    page = Page(committed["digits"])
    (row,) = [p for p in page.find("details", class_="row") if "digits-maskllm-distilled-prior" in page.text(p)[:200]]
    marks = {e.text for e in page.inside(row) if e.tag == "mark"}
    assert {"learning.distillation: 1.0", "distillation: 1.0", "learning.steps: 200", "steps: 200"} <= marks
    assert "learning.lr: 0.01" not in marks
    settings = [page.text(p) for p in page.find("pre", class_="tall") if page.within(p, row)]
    assert "  calibration: 128\n" in settings[0]


# With the report


def test_check_finds_an_edited_page(tmp_path: Path) -> None:
    for name in ("params.yaml", "README.md"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    shutil.copytree(REPORTS, tmp_path / "reports")
    pages = ["reports/index.html", "reports/digits/index.html"]
    for path in pages:
        text = (tmp_path / path).read_text(encoding="utf-8")
        edited = re.sub(r"\d\d\.\d\d ±", "12.34 ±", text, count=1)
        assert edited != text
        (tmp_path / path).write_text(edited, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        check_report(tmp_path)
    assert str(caught.value).partition(":")[0].split(", ") == pages
    assert "python -m maskllm4v report" in str(caught.value)


def test_index_lists_all_tables() -> None:
    page = Page(index_page(EXPERIMENTS, REPORTS))
    lines = [page.text(place) for place in page.find("tr")][1:]
    assert len(lines) == len(EXPERIMENTS)
    linked = [e.attributes["href"] for e in page.elements if e.tag == "a"]
    measured = [table for table in EXPERIMENTS if (REPORTS / table / "runs").exists()]
    assert linked == [f"{table}/index.html" for table in measured]
    for line, (table, experiment) in zip(lines, EXPERIMENTS.items(), strict=True):
        assert experiment.title in line
        assert ("not measured" in line) == (table not in measured)


def test_every_class_has_a_style(committed: dict[str, str]) -> None:
    for text in committed.values():
        style, _, body = text.partition("</style>")
        used = {name for group in re.findall(r'class="([^"]*)"', body) for name in group.split()}
        assert used - set(re.findall(r"\.([a-zA-Z][\w-]*)", style)) <= {"sortable"}  # for the script
