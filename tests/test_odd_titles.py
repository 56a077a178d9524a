"""Titles, labels and names of hardware are shown as they are, in every form of output, whatever is in them."""

from __future__ import annotations

import csv
import io
import re
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from import_graph import ROOT
from made_records import make_records
from markdown_it import MarkdownIt

from maskllm4v.config import Experiment, parse_experiment
from maskllm4v.reporting.aggregate import aggregate, current_records
from maskllm4v.reporting.figures import figure_texts
from maskllm4v.reporting.figures.samples import samples_file
from maskllm4v.reporting.marks import code, escaped, link, markdown, strong
from maskllm4v.reporting.metrics import metrics_of
from maskllm4v.reporting.page import table_page
from maskllm4v.reporting.page.pictures import KINDS
from maskllm4v.reporting.page.results import Results
from maskllm4v.reporting.paired import paired_markdown
from maskllm4v.reporting.readme import splice
from maskllm4v.reporting.report import table_texts
from maskllm4v.reporting.tables import results_csv
from maskllm4v.reporting.terminal import table_text
from maskllm4v.tracking.runs import record_tags, settings_tags
from maskllm4v.utils.images import write_picture
from maskllm4v.utils.text import plain

RAW = yaml.safe_load((ROOT / "params.yaml").read_text())
GITHUB = MarkdownIt("commonmark").enable(["table", "strikethrough"])
ODD = (
    "a | b",
    "a\nb\r\n\tc",
    "<script>alert(1)</script>",
    "<!-- digits --> & <!-- /digits --> &amp;",
    "**a** _b_ `c` [d](e) ~~f~~ ![g](h) \\| $x^$ __i__ j_k",
    "\x1b[31mred\x1b[0m [bold]x[/bold] \x07\x00 \u202eevil",
    '=1+1;"x",\'y\'',
    "-", "#", "1. x", "> q", "    code", "\\", "`", "*", "_", "|", "a\\", "a`", "\ufffe\ud800",
)  # fmt: skip
TEXTS = st.text(st.characters() | st.sampled_from("|\\`*_[]<>!&~$\n\r\x1b\u202e#-=\"'"), max_size=40)


def shown(text: str) -> str:
    """What a reader sees of a line of Markdown."""
    (inline,) = [token for token in GITHUB.parse(f"x{text}x") if token.type == "inline"]
    assert {child.type for child in inline.children or []} <= {"text", "text_special"}, text
    return "".join(child.content for child in inline.children or [])[1:-1]


def cells(table: str) -> list[list[str]]:
    """The cells of a table's lines, marks aside."""
    lines: list[list[str]] = []
    for token in GITHUB.parse(table):
        if token.type == "tr_open":
            lines.append([])
        elif token.type == "inline" and lines:
            lines[-1].append("".join(child.content for child in token.children or []))
    return lines


@settings(max_examples=300)
@given(TEXTS)
def test_any_text_is_shown_as_it_is(text: str) -> None:
    assert shown(escaped(text)) == plain(text)
    assert escaped(escaped(text)) == escaped(text)
    assert not re.search("[<>\n\r]", escaped(text))


@settings(max_examples=300)
@given(TEXTS)
def test_any_text_is_a_cell(text: str) -> None:
    table = markdown([text, "b"], [[text, strong(text)], [code(text), link(text, "runs/x.json")]])
    assert cells(table) == [[plain(text), "b"], [plain(text)] * 2, [plain(text)] * 2]


@settings(max_examples=300)
@given(TEXTS)
def test_plain_text_is_one_line_for_terminals_and_xml(text: str) -> None:
    found = plain(text)
    assert found == plain(found)
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e]", found)
    assert len(found.splitlines()) <= 1
    found.encode()


def odd_experiment(text: str) -> Experiment:
    """Three rows whose labels, as the table's title, hold a text, which has to be free of braces."""
    rows = ("digits-dense", "digits-magnitude", "digits-maskllm-short-magnitude")
    learned = {rows[2]: {**RAW["learned"][rows[2]], "steps": 20}}
    changes: dict[str, Any] = {"priors": {rows[1]: {"method": "magnitude"}}, "learned": learned, "updated": {}}
    changes |= {"rows": dict.fromkeys(rows, text), "title": text, "exports": {}}
    return parse_experiment({**RAW, **changes})


@pytest.mark.parametrize("text", [text for text in ODD if "\ud800" not in text])
def test_every_output_shows_it(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("made_records.HERE", {"hardware": text, "world_size": 1})
    experiment = odd_experiment(text)
    reports, wanted = make_records(experiment, tmp_path), plain(text)
    records = current_records(experiment, reports)
    label, learned = experiment.row("digits-magnitude").label, "digits-maskllm-short-magnitude"
    assert label == experiment.title == wanted

    table, _, caption = table_texts(experiment, reports)["table.md"].rpartition("\n\n")
    assert [line[0] for line in cells(table)[1:]] == [wanted] * 3
    assert cells(table)[3][3] == wanted  # its prior
    assert {len(line) for line in cells(table)} == {11}
    (inline,) = [token for token in GITHUB.parse(caption) if token.type == "inline"]
    said = "".join(child.content for child in inline.children or [])
    assert said.startswith(f"{wanted}. Mean ± ")
    assert f" Hardware: {wanted}. " in said
    document = splice("<!-- digits -->\n<!-- /digits -->\n", {"digits": f"{table}\n\n{caption}"})
    assert splice(document, {"digits": "x"}) == "<!-- digits -->\nx\n<!-- /digits -->\n"
    found = cells(paired_markdown(experiment, "digits-magnitude", reports, tmp_path))
    assert found[0][5] == f"Δ to {wanted}"
    assert [line[0] for line in found[1:]] == [wanted] * 2

    lines = list(csv.reader(io.StringIO(results_csv(aggregate(experiment, records), metrics_of("classification")))))
    assert [line[1] for line in lines[1:]] == [wanted] * 3

    printed = table_text(experiment, reports)
    assert "\x1b" not in printed
    assert sum(line.startswith(wanted) for line in printed.splitlines()) >= 3

    page = table_page(experiment, reports, None)
    assert f"<h1>{wanted}</h1>" in unescape(page)
    assert not re.search("<script>alert|<!-- |[\x00\x1b\u202e]", page)
    for chart in figure_texts(experiment, reports).values():
        assert ElementTree.fromstring(chart)[0].text.startswith(f"{wanted}: ")  # type: ignore[union-attr]

    tags = {**settings_tags(experiment, learned), **record_tags(tmp_path, records[learned])}
    assert (shown(tags["mlflow.note.content"]), tags["hardware"]) == (wanted, wanted)

    write_picture(tmp_path / "digits/runs/digits-dense/evaluation/samples.png", np.zeros((8, 8, 3), np.uint8))
    assert samples_file(Results(experiment, reports), KINDS[0])  # no formula is read out of it


@example("\\<!-- digits -->")
@given(TEXTS)
def test_no_title_is_a_marker(text: str) -> None:
    title = f"{text}<!-- digits -->{text}<!-- /digits -->"
    document = splice("<!-- digits -->\n<!-- /digits -->\n", {"digits": markdown([title], [[title]])})
    assert splice(document, {"digits": "x"}) == "<!-- digits -->\nx\n<!-- /digits -->\n"
