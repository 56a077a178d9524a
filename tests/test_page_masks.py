"""Pictures of masks on a page say what was counted."""

from __future__ import annotations

import csv
import itertools
import re
import shutil
from pathlib import Path

import pytest
from import_graph import ROOT
from made_records import make_records
from parsed_page import Page

from maskllm4v.config import Experiment
from maskllm4v.reporting.page import table_page
from maskllm4v.reporting.report import experiments
from maskllm4v.runs.paths import mask_statistics_file, tile_file
from maskllm4v.utils.io import read_json, write_csv

REPORTS = ROOT / "reports"
EXPERIMENTS = experiments(ROOT)
TABLES = ("digits", "digits_patterns", "cifar10")


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    return {table: Page(table_page(EXPERIMENTS[table], REPORTS, table)) for table in TABLES}


def statistics(table: str, row: str) -> list[dict[str, str]]:
    with mask_statistics_file(table, row, REPORTS).open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def candidates(line: dict[str, str]) -> list[str]:
    return [column for column in line if re.fullmatch("[01]+", column)]


@pytest.mark.parametrize("table", TABLES)
def test_tiles_show_both_masks_and_frame_what_changed(table: str, pages: dict[str, Page]) -> None:
    page, experiment = pages[table], EXPERIMENTS[table]
    tiles = page.find("svg", class_="tile")
    assert len(tiles) == 2 * len(experiment.learned)
    by_title = {page.text(tile + 1).rpartition(": ")[::2]: tile for tile in tiles}
    for row in experiment.learned:
        found = read_json(tile_file(table, row, REPORTS))
        m = int(found["pattern"].partition(":")[2])
        groups = [
            (old[start : start + m], new[start : start + m])
            for old, new in zip(found["before"], found["after"], strict=True)
            for start in range(0, len(old), m)
        ]
        source = experiment.row(row).source
        assert source is not None
        pattern = (
            f"{found['pattern']} " if len({experiment.row(r).pattern for r in experiment.rows} - {None}) > 1 else ""
        )
        label = f"{pattern}{experiment.row(row).label} ← {source.label}"
        for side, mask in (("before, the prior's mask", "before"), ("after learning", "after")):
            paths = [e.attributes for e in page.inside(by_title[label, side]) if e.tag == "path"]
            (frames,) = [path["d"] for path in paths if path.get("class") == "changed"]
            assert frames.count("M") == sum(old != new for old, new in groups)
            kept = [("h11v11" in path["d"]) for path in paths if path.get("class") != "changed"]
            assert "".join("01"[k] for k in kept) == "".join(found[mask])


@pytest.mark.parametrize("table", TABLES)
def test_bars_of_candidates_are_their_shares(table: str, pages: dict[str, Page]) -> None:
    page = pages[table]
    charts = page.find("svg", class_="candidates")
    rows = [row for row in EXPERIMENTS[table].rows if mask_statistics_file(table, row, REPORTS).exists()]
    assert len(charts) == len(rows)
    for chart, row in zip(charts, rows, strict=True):
        lines = statistics(table, row)
        groups = sum(int(line["groups"]) for line in lines)
        titles = [e.text for e in page.inside(chart) if e.tag == "title" and e.shows[0] == row]
        wanted = {
            name: 100 * sum(float(line[name]) * int(line["groups"]) for line in lines) / groups
            for name in candidates(lines[0])
        }
        found = {title.partition(":")[0]: float(title.partition(": ")[2].split(" %")[0]) for title in titles}
        assert found == pytest.approx(wanted, abs=0.051)
        heights = [float(e.attributes["height"]) for e in page.inside(chart) if e.tag == "rect"]
        assert [h / max(heights) for h in heights] == pytest.approx(
            [share / max(wanted.values()) for share in wanted.values()], abs=0.01
        )


@pytest.mark.parametrize("table", TABLES)
def test_agreement_of_seeds_beside_chance(table: str, pages: dict[str, Page]) -> None:
    page = pages[table]
    (chart,) = page.find("svg", class_="agreement")
    chances = [e.text for e in page.inside(chart) if e.tag == "title" and e.text.startswith("chance")]
    rows = [row for row in EXPERIMENTS[table].rows if mask_statistics_file(table, row, REPORTS).exists()]
    rows = [
        row for row in rows if statistics(table, row)[0]["seed_agreement"]
    ]  # not of channels in orders of their own
    assert chances == [f"chance: {1 / len(candidates(statistics(table, row)[0])):.3f}" for row in rows]
    means = {e.shows[0]: float(e.text) for e in page.inside(chart) if e.tag == "text" and e.shows[0]}
    for row in rows:
        agreed = [float(line["seed_agreement"]) for line in statistics(table, row)]
        assert means[row] == pytest.approx(sum(agreed) / len(agreed), abs=0.0051)
    shared = "All seeds share one dense model" in page.text(0)
    assert shared == (table == "cifar10")


def test_one_seed_agrees_with_nobody(tmp_path: Path) -> None:
    shutil.copytree(REPORTS / "digits" / "runs", tmp_path / "digits" / "runs")
    for path in tmp_path.rglob("masks.csv"):
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        first = [line.split(",") for line in lines if line.startswith("0,")]
        path.write_text("\n".join([header, *(",".join([*c[:3], "", *c[4:]]) for c in first)]) + "\n", encoding="utf-8")
    page = Page(table_page(EXPERIMENTS["digits"], tmp_path, None))
    assert not page.find("svg", class_="agreement")
    assert len(page.find("svg", class_="candidates")) == len(EXPERIMENTS["digits"].rows) - 1


def test_rows_without_statistics_show_nothing(tmp_path: Path) -> None:
    shutil.copytree(REPORTS / "digits" / "runs", tmp_path / "digits" / "runs")
    for name in ("masks.csv", "tile.json"):
        for path in tmp_path.rglob(name):
            path.unlink()
    experiment: Experiment = EXPERIMENTS["digits"]
    page = Page(table_page(experiment, tmp_path, None))
    assert not page.find("section", id="masks")
    assert page.find("section", id="layers")


# Patterns with too many candidates for a column each

WIDE, NARROW = "digits-patterns-4of8-sparsegpt-update", "digits-patterns-4of8-magnitude"
GROUPS = {"early": 64, "late": 192}  # by layer


def write_masks(reports: Path, row: str, shares: dict[str, dict[str, float]]) -> None:
    """A row's ``masks.csv``: shares by layer and column, alike in all seeds, a quarter of whose masks agree."""
    lines = [
        [seed, layer, GROUPS[layer], 0.25, *(f"{share:.6g}" for share in found.values())]
        for seed in (0, 1, 2)
        for layer, found in shares.items()
    ]
    header = ["seed", "layer", "groups", "seed_agreement", *shares["early"]]
    write_csv(mask_statistics_file("digits_patterns", row, reports), header, lines)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """A page with one row of 8:16, whose later positions are kept more often, and one of 4:8."""
    raw = EXPERIMENTS["digits_patterns"].model_dump()
    raw["priors"][WIDE]["pattern"] = "8:16"
    experiment = Experiment.model_validate(raw)
    reports = make_records(experiment, tmp_path_factory.mktemp("wide"), [experiment.dense.row, NARROW, WIDE])
    positions = [f"{1 << (15 - place):016b}" for place in range(16)]
    slopes = {"early": 0.01, "late": 0.02}
    rising = {
        layer: {name: 0.5 + slope * (i - 7.5) for i, name in enumerate(positions)} for layer, slope in slopes.items()
    }
    write_masks(reports, WIDE, rising)
    masks = ["".join("01"[i in kept] for i in range(8)) for kept in itertools.combinations(range(8), 4)]
    write_masks(reports, NARROW, dict.fromkeys(GROUPS, dict.fromkeys(masks, 1 / 70)))
    return Page(table_page(experiment, reports, None))


def test_positions_are_called_so_where_candidates_are_too_many(wide: Page) -> None:
    candidates, positions = wide.find("svg", class_="candidates")
    assert wide.find("svg", class_="positions") == [positions]
    assert wide.text(candidates + 1).startswith("Candidate masks of 4:8")
    assert wide.text(positions + 1).startswith("Positions that masks keep of 8:16")
    assert "candidate" not in wide.text(positions).lower()
    assert [e.text for e in wide.elements if e.tag == "h3" and "frequencies" in e.text] == [
        "Candidate frequencies",
        "Position frequencies",
    ]
    inside = wide.inside(positions)
    titles = [e.text for e in inside if e.tag == "title" and e.shows == (WIDE, "positions", None)]
    means = {f"position {i + 1}": 50 + 1.75 * (i - 7.5) for i in range(16)}  # a quarter of all groups is early
    assert {title.partition(":")[0]: float(title.split()[2]) for title in titles} == pytest.approx(means, abs=0.051)
    assert titles[15] == "position 16: 63.1 % of groups, in layers 57.5 to 65.0 %"
    assert [e.text for e in inside if e.tag == "text"][-16:] == [str(i) for i in range(1, 17)]


def test_all_alike_is_the_share_that_is_kept(wide: Page) -> None:
    alike = []
    for chart in wide.find("svg", class_="candidates"):
        inside = wide.inside(chart)
        (line,) = [e.attributes["d"] for e in inside if e.attributes.get("class") == "chance"]
        alike += [e.text for e in inside if e.text.startswith("uniform")]
        share = float(next(e.text for e in inside if e.tag == "title" and e.shows[0]).split("%")[0].split()[-1])
        bar = next(e.attributes for e in inside if e.tag == "rect")
        above = float(bar["y"]) + float(bar["height"]) - float(re.split("[ H]", line)[1])
        uniform = float(alike[-1].split()[1])
        assert above / float(bar["height"]) == pytest.approx(uniform / share, rel=0.05)
    assert alike == ["uniform: 1.4 %", "uniform: 50.0 %"]


def test_chance_is_that_of_one_candidate(wide: Page) -> None:
    (chart,) = wide.find("svg", class_="agreement")
    chances = [e.text for e in wide.inside(chart) if e.tag == "title" and e.text.startswith("chance")]
    in_order = [row for row in EXPERIMENTS["digits_patterns"].rows if row in (WIDE, NARROW)]
    assert chances == [{WIDE: f"chance: {1 / 12870:.6f}", NARROW: "chance: 0.014"}[row] for row in in_order]
