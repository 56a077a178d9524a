"""Everything a report consists of, built from committed records, written or compared."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from maskllm4v.config import Experiment, load_experiment
from maskllm4v.reporting.aggregate import aggregate, current_records
from maskllm4v.reporting.benchmarks.costs import cost_caption, row_costs
from maskllm4v.reporting.benchmarks.deployment import deployment_markdown, exports_markdown
from maskllm4v.reporting.benchmarks.performance import performance_markdown
from maskllm4v.reporting.comparison import comparison_markdown
from maskllm4v.reporting.curves import curves_csv
from maskllm4v.reporting.figures import figure_files, figure_texts
from maskllm4v.reporting.metrics import metrics_of
from maskllm4v.reporting.page import PAGE, index_page, table_page
from maskllm4v.reporting.paired import paired_sections
from maskllm4v.reporting.parts import parts_markdown
from maskllm4v.reporting.readme import splice, spliced
from maskllm4v.reporting.receipts import claim, receipts_markdown, reproduced_markdown
from maskllm4v.reporting.tables import NOT_MEASURED, caption, metrics_json, results_csv, results_markdown
from maskllm4v.utils.errors import ConfigError, UserError
from maskllm4v.utils.io import read_text, write_files

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
    metrics = metrics_of(experiment.task.name)
    cost, reproduced = cost_caption(experiment.table, reports), claim(experiment, reports)
    text, broken = caption(experiment, metrics, records, cost, reproduced), parts_markdown(experiment, records, table)
    return {
        "table.md": "\n".join(filter(None, [results_markdown(table, metrics), text, broken])),
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


def documents(root: Path, *, allow_empty: bool = True) -> dict[Path, str]:
    """What shows all tables: those of ``experiments/``, and the active one as ``params.yaml`` has it.

    README and findings, as far as they are there, with their generated sections; and the list of tables.

    Raises:
        UserError: a document cannot be read, or its markers are broken; without ``allow_empty``, too, a section that
            has numbers would lose them all.
    """
    readme, findings, reports = root / "README.md", root / FINDINGS, root / "reports"
    known = experiments(root)
    texts = {path: read_text(path) for path in (readme, findings) if path.exists()}
    sections: dict[Path, dict[str, str]] = {}
    if readme in texts:
        sections[readme] = readme_sections(known, reports)
    if findings in texts:
        sections[findings] = paired_sections(texts[findings], known, reports, findings.parent)
    for path, text in texts.items():
        before = spliced(text, sections[path], path.name)
        if not allow_empty:
            _check_kept({f"{path.name}, {name}": (found, sections[path][name]) for name, found in before.items()})
    new = {path: splice(text, sections[path], path.name) for path, text in texts.items()}
    return {**new, reports / PAGE: index_page(known, reports)}


def write_documents(root: Path) -> list[Path]:
    """Render what all tables share."""
    return _write(_encoded(documents(root, allow_empty=False)))


def write_table(root: Path) -> list[Path]:
    """Render the active experiment's tables, figures and page."""
    return _write(_table_files(root))


def write_report(root: Path, *, allow_empty: bool = False) -> list[Path]:
    """Render the active experiment's files, and what all tables share.

    Args:
        root: the repository's root.
        allow_empty: write a table of which nothing is measured where one with numbers stands, too.
    """
    return _write({**_table_files(root, allow_empty), **_encoded(documents(root, allow_empty=allow_empty))})


def _table_files(root: Path, allow_empty: bool = False) -> dict[Path, bytes | None]:
    """The active experiment's files; None for figures that it has no more."""
    experiment, reports = load_experiment(root / "params.yaml"), root / "reports"
    folder, texts = reports / experiment.table, table_texts(experiment, reports)
    table = folder / "table.md"
    if table.exists() and not allow_empty:
        _check_kept({str(table.relative_to(root)): (read_text(table), texts["table.md"])})
    drawn = figure_files(experiment, reports)
    stale = {path: None for path in sorted((folder / FIGURES).glob("*")) if path.is_file() and path.name not in drawn}
    page = {folder / PAGE: page_text(experiment, reports, experiment_files(root))}
    return {
        **_encoded({folder / name: text for name, text in texts.items()}),
        **{folder / FIGURES / name: content for name, content in drawn.items()},
        **_encoded(page),
        **stale,
    }


def _check_kept(changes: Mapping[str, tuple[str, str]]) -> None:
    """Raise :class:`UserError` if of texts, before and after by name, one had numbers and has none now."""
    emptied = [name for name, (old, new) in changes.items() if NOT_MEASURED in new and old.strip()]
    if lost := [name for name in emptied if NOT_MEASURED not in changes[name][0]]:
        raise UserError(
            f"{'; '.join(lost)}: numbers stand there, and no record belongs to the settings as they are now, so that "
            "all would be lost; see `table` and what was changed since, or replace them by "
            "`python -m maskllm4v report --allow-empty`"
        )


def _encoded(texts: Mapping[Path, str]) -> dict[Path, bytes | None]:
    for path, text in texts.items():
        if (odd := re.search("[\ud800-\udfff]", text)) is not None:  # half a character, out of an escaped one
            raise UserError(f"cannot write {path}: {text[max(0, odd.start() - 40) : odd.end() + 10]!r} is not UTF-8")
    return {path: text.encode() for path, text in texts.items()}


def _write(files: Mapping[Path, bytes | None]) -> list[Path]:
    """Write those that are not there as they are, and remove those without content; returns what there is now."""
    contents = {path: content for path, content in files.items() if content is not None}
    write_files({p: new for p, new in contents.items() if not p.is_file() or p.read_bytes() != new})
    for path in files.keys() - contents.keys():
        path.unlink()
    return list(contents)


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
    found = {path: read_text(path).replace("\r\n", "\n") for path in expected if path.exists()}
    if wrong := [str(p.relative_to(root)) for p in found if found[p] != expected[p].replace("\r\n", "\n")]:
        raise UserError(
            f"{', '.join(wrong)}: not what the records give; run dvc repro, "
            "or `python -m maskllm4v report` where that finds nothing to do"
        )
