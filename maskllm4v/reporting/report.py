"""Everything a report consists of, built from committed records, written or compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from maskllm4v.config import Experiment, load_experiment
from maskllm4v.reporting.aggregate import aggregate, current_records
from maskllm4v.reporting.benchmarks.costs import cost_caption, row_costs
from maskllm4v.reporting.benchmarks.deployment import deployment_markdown, exports_markdown
from maskllm4v.reporting.benchmarks.performance import performance_markdown
from maskllm4v.reporting.comparison import comparison_markdown
from maskllm4v.reporting.curves import curves_csv
from maskllm4v.reporting.figures import draw_figures, figure_texts
from maskllm4v.reporting.metrics import METRICS
from maskllm4v.reporting.page import PAGE, index_page, table_page
from maskllm4v.reporting.paired import paired_sections
from maskllm4v.reporting.readme import splice
from maskllm4v.reporting.receipts import claim, receipts_markdown, reproduced_markdown
from maskllm4v.reporting.tables import caption, metrics_json, results_csv, results_markdown
from maskllm4v.utils.errors import ConfigError, UserError
from maskllm4v.utils.io import write_text

PUBLISHED = "published"  # the README section with the original's table
PERFORMANCE = "performance"  # the one with the benchmarks of training and pruning
DEPLOYMENT = "deployment"  # the one with sizes and speeds of what was exported
RECEIPTS = "receipts"  # the one with the CPUs on which tables were reproduced
REPRODUCED = "reproduced"  # the claim at the head, from the same receipts
FIGURES = "figures"  # the folder of a table's charts and pictures
FINDINGS = Path("docs/findings.md")


def experiment_files(root: Path) -> dict[str, Experiment]:
    """The experiments in ``experiments/`` by their files' names, without ``.yaml``."""
    return {path.stem: load_experiment(path) for path in sorted((root / "experiments").glob("*.yaml"))}


def experiments(root: Path) -> dict[str, Experiment]:
    """All experiments by table: those in ``experiments/``, and the active one in place of its original."""
    found = {experiment.table: experiment for experiment in experiment_files(root).values()}
    active = load_experiment(root / "params.yaml")
    return {**found, active.table: active}


def find_experiment(root: Path, table: str | None) -> Experiment:
    """The experiment of a table; without a name the active one.

    Raises:
        ConfigError: no experiment makes it.
    """
    if not table:
        return load_experiment(root / "params.yaml")
    found = experiments(root)
    if table not in found:
        raise ConfigError(f"no table {table!r}; allowed: {', '.join(found)}")
    return found[table]


def table_texts(experiment: Experiment, reports: Path) -> dict[str, str]:
    """The files of one table by name, relative to its folder."""
    records = current_records(experiment, reports)
    table = aggregate(experiment, records, row_costs(experiment.table, reports))
    metrics = METRICS[experiment.task.name]
    cost, reproduced = cost_caption(experiment.table, reports), claim(experiment, reports)
    text = caption(experiment, metrics, records, cost, reproduced)
    return {
        "table.md": results_markdown(table, metrics) + "\n" + text,
        "table.csv": results_csv(table, metrics),
        "exports.md": exports_markdown(experiment.table, reports),
        "curves.csv": curves_csv(experiment, reports),
        "metrics.json": json.dumps(metrics_json(table, metrics), indent=2) + "\n",
    }


def page_text(experiment: Experiment, reports: Path, files: Mapping[str, Experiment]) -> str:
    """The page of one table; ``files``: :func:`experiment_files`, for its commands to name one."""
    same = (name for name, e in files.items() if e.model_copy(update={"runtime": experiment.runtime}) == experiment)
    return table_page(experiment, reports, next(same, None))


def readme_sections(root: Path) -> dict[str, str]:
    """The README's generated sections by marker name."""
    reports = root / "reports"
    known = experiments(root)
    sections = {table: table_texts(e, reports)["table.md"] for table, e in known.items()}
    return {
        **sections,
        PUBLISHED: comparison_markdown(reports),
        PERFORMANCE: performance_markdown(reports),
        DEPLOYMENT: deployment_markdown(reports),
        RECEIPTS: receipts_markdown(known, reports),
        REPRODUCED: reproduced_markdown(known, reports),
    }


def documents(root: Path) -> dict[Path, str]:
    """What README and findings have to be, as far as they are there: with their generated sections as records are."""
    readme, findings = root / "README.md", root / FINDINGS
    texts = {path: path.read_text(encoding="utf-8") for path in (readme, findings) if path.exists()}
    sections: dict[Path, dict[str, str]] = {}
    if readme in texts:
        sections[readme] = readme_sections(root)
    if findings in texts:
        sections[findings] = paired_sections(texts[findings], experiments(root), root / "reports", findings.parent)
    return {path: splice(text, sections[path], path.name) for path, text in texts.items()}


def write_report(root: Path) -> list[Path]:
    """Render the active experiment's tables, figures and page, and what all tables share: README and index."""
    experiment = load_experiment(root / "params.yaml")
    reports, folder = root / "reports", root / "reports" / experiment.table
    written = []
    for name, text in table_texts(experiment, reports).items():
        write_text(folder / name, text)
        written.append(folder / name)
    written += draw_figures(experiment, reports, folder / FIGURES)
    page = page_text(experiment, reports, experiment_files(root))
    pages = {folder / PAGE: page, reports / PAGE: index_page(experiments(root), reports)}
    for path, text in pages.items():
        write_text(path, text)
        written.append(path)
    for path, text in documents(root).items():
        if path.read_text(encoding="utf-8") != text:
            write_text(path, text)
        written.append(path)
    return written


def check_report(root: Path) -> None:
    """Raise :class:`UserError` unless README, findings, tables, charts and pages are what the records give."""
    wrong, reports, files = [], root / "reports", experiment_files(root)
    expected = {**documents(root), reports / PAGE: index_page(experiments(root), reports)}
    for table, experiment in experiments(root).items():
        texts = {**table_texts(experiment, reports), PAGE: page_text(experiment, reports, files)}
        expected |= {reports / table / name: text for name, text in texts.items()}
        drawn = figure_texts(experiment, reports)
        expected |= {reports / table / FIGURES / name: text for name, text in drawn.items()}
    for path, text in expected.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            wrong.append(str(path.relative_to(root)))
    if wrong:
        raise UserError(f"{', '.join(wrong)}: not what the records give; run `python -m maskllm4v report`")
