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
    active = load_experiment(root / "params.yaml")
    found = {experiment.table: experiment for experiment in experiment_files(root).values()}
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


def readme_sections(known: Mapping[str, Experiment], reports: Path) -> dict[str, str]:
    """The README's generated sections by marker name, of these tables."""
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
    """What shows all tables: those of ``experiments/``, and the active one as ``params.yaml`` has it.

    README and findings, as far as they are there, with their generated sections; and the list of tables.
    """
    readme, findings, reports = root / "README.md", root / FINDINGS, root / "reports"
    known = experiments(root)
    texts = {path: path.read_text(encoding="utf-8") for path in (readme, findings) if path.exists()}
    sections: dict[Path, dict[str, str]] = {}
    if readme in texts:
        sections[readme] = readme_sections(known, reports)
    if findings in texts:
        sections[findings] = paired_sections(texts[findings], known, reports, findings.parent)
    spliced = {path: splice(text, sections[path], path.name) for path, text in texts.items()}
    return {**spliced, reports / PAGE: index_page(known, reports)}


def write_documents(root: Path) -> list[Path]:
    """Render what all tables share."""
    texts = documents(root)
    for path, text in texts.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
    return list(texts)


def write_table(root: Path) -> list[Path]:
    """Render the active experiment's tables, figures and page."""
    experiment = load_experiment(root / "params.yaml")
    reports, folder = root / "reports", root / "reports" / experiment.table
    written = []
    for name, text in table_texts(experiment, reports).items():
        write_text(folder / name, text)
        written.append(folder / name)
    written += draw_figures(experiment, reports, folder / FIGURES)
    write_text(folder / PAGE, page_text(experiment, reports, experiment_files(root)))
    return [*written, folder / PAGE]


def write_report(root: Path) -> list[Path]:
    """Render the active experiment's files, and what all tables share."""
    return write_table(root) + write_documents(root)


def check_documents(root: Path) -> None:
    """Raise :class:`UserError` unless README, findings and the list of tables are what the committed records give."""
    _compare(documents(root), root)


def check_report(root: Path) -> None:
    """Raise :class:`UserError` unless README, findings, tables, charts and pages are what the records give."""
    reports, files = root / "reports", experiment_files(root)
    expected = documents(root)
    for table, experiment in experiments(root).items():
        texts = {**table_texts(experiment, reports), PAGE: page_text(experiment, reports, files)}
        expected |= {reports / table / name: text for name, text in texts.items()}
        drawn = figure_texts(experiment, reports)
        expected |= {reports / table / FIGURES / name: text for name, text in drawn.items()}
    _compare(expected, root)


def _compare(expected: Mapping[Path, str], root: Path) -> None:
    """Raise :class:`UserError` unless the files that are there are these."""
    found = {path: path.read_text(encoding="utf-8") for path in expected if path.exists()}
    if wrong := [str(path.relative_to(root)) for path in found if found[path] != expected[path]]:
        raise UserError(
            f"{', '.join(wrong)}: not what the records give; run dvc repro, "
            "or `python -m maskllm4v report` where that finds nothing to do"
        )
