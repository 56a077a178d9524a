"""Look at what people will see: the report pages and MLflow's UI in headless Chromium, checked and photographed.

    python -m scripts.screenshots [--table digits] [--folder docs/screenshots]

Pages: no error on the console, not one request, no cell of the headline table that differs from what the records
give, no sideways scrolling; wide, narrow and dark. MLflow: all committed records are published over HTTP to a server of
its own in a temporary folder; run list, comparison, curves, the report as an artifact. Needs the extra ``browser`` and
a Chromium: one that is installed, or ``playwright install chromium``. The status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, TimeoutError, sync_playwright

from maskllm4v.config import Experiment
from maskllm4v.reporting.metrics import metrics_of
from maskllm4v.reporting.report import experiments
from maskllm4v.runs.records import read_records

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDE, NARROW = {"width": 1440, "height": 900}, {"width": 390, "height": 844}
# The UI greets newcomers with a chat window; somebody who has closed it once sees no more of it.
RETURNING = "try { localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true') } catch {}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", default="digits", help="whose pictures to take; the pages of all tables are checked")
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "screenshots")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found)
        faults = check_pages(browser)
        take_pages(browser, arguments.table, arguments.folder)
        with server() as address:
            faults += take_mlflow(browser, address, arguments.table, arguments.folder)
        browser.close()
    for fault in faults:
        print(f"FAULT {fault}", file=sys.stderr)
    print(f"{len(list(arguments.folder.glob('*.png')))} pictures in {arguments.folder}, {len(faults)} faults")
    sys.exit(bool(faults))


def page_of(table: str) -> Path:
    return ROOT / "reports" / table / "index.html"


def check_pages(browser: Browser) -> list[str]:
    """What is wrong with the pages of all tables and their index, in words."""
    faults = []
    pages: dict[Path, Experiment | None] = {ROOT / "reports" / "index.html": None}
    pages |= {page_of(table): e for table, e in experiments(ROOT).items() if read_records(ROOT / "reports", table)}
    for path, experiment in pages.items():
        if not path.exists():
            faults.append(f"{path.relative_to(ROOT)}: there is no page")
            continue
        for size in (WIDE, NARROW):
            page, seen = watched(browser, path.as_uri(), size)
            faults += [f"{path.relative_to(ROOT)}, {size['width']} pixels wide: {fault}" for fault in seen]
            if experiment is not None and size is WIDE:
                faults += [f"{path.relative_to(ROOT)}: {fault}" for fault in wrong_cells(page, experiment)]
            page.context.close()
    return faults


def watched(browser: Browser, address: str, size: dict[str, int]) -> tuple[Page, list[str]]:
    """A page, opened without a network and unfolded, and what it complained of or asked for."""
    faults: list[str] = []

    def heard(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            faults.append(f"console: {message.text}")

    def asked(request: Request) -> None:
        if request.url != address and not request.url.startswith("data:"):
            faults.append(f"asks for {request.url}")

    page = browser.new_context(viewport=size, offline=True).new_page()
    page.on("console", heard)
    page.on("request", asked)
    page.on("pageerror", lambda error: faults.append(f"script: {error}"))
    page.goto(address)
    page.evaluate("document.querySelectorAll('details').forEach(element => element.open = true)")
    if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
        faults.append("scrolls sideways")
    return page, faults


def wrong_cells(page: Page, experiment: Experiment) -> list[str]:
    """Cells of the headline table that are not what the records give, worked out here from their numbers alone."""
    metrics, records = metrics_of(experiment.task.name), read_records(ROOT / "reports", experiment.table)
    faults = []
    for row, record in records.items():
        for metric in metrics.columns:
            values = [found[metric.name] for found in record["metrics"].values() if metric.name in found]
            expected = "–"
            if values:
                expected = f"{statistics.fmean(values):.{metric.digits}f}"
            if len(values) > 1:
                expected += f" ± {statistics.stdev(values):.{metric.digits}f}"
            cell = page.locator(f"table.sortable td[data-row='{row}'][data-metric='{metric.name}']")
            text = cell.inner_text() if cell.count() == 1 else f"{cell.count()} cells"
            if text.strip() != expected:
                faults.append(f"{metric.name} of {row} reads {text!r}, the record says {expected!r}")
    return faults


def take_pages(browser: Browser, table: str, folder: Path) -> None:
    for name, size, scheme in (("wide", WIDE, "light"), ("dark", WIDE, "dark"), ("narrow", NARROW, "light")):
        page = browser.new_context(viewport=size, color_scheme=scheme, offline=True).new_page()
        page.goto(page_of(table).as_uri())
        page.screenshot(path=folder / f"page_{name}.png")
        for section in ("methods", "masks") if name == "wide" else ():
            page.locator(f"#{section}").evaluate("element => element.scrollIntoView()")
            page.screenshot(path=folder / f"page_{section}.png")
        page.context.close()


@contextmanager
def server() -> Iterator[str]:
    """An MLflow server that holds all committed records and ends with its folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
        command += [
            "--backend-store-uri",
            f"sqlite:///{folder}/mlflow.db",
            "--artifacts-destination",
            f"{folder}/files",
        ]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        log = Path(folder, "log")
        with log.open("w") as stream:
            process = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, start_new_session=True)
        try:
            _wait_for(f"{address}/health", log)
            publish = [sys.executable, "-m", "maskllm4v", "publish"]
            subprocess.run(publish, env={**environment, "MLFLOW_TRACKING_URI": address}, cwd=ROOT, check=True)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # the server and its workers
            process.wait()


def _wait_for(address: str, log: Path, seconds: int = 120) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    sys.exit(f"MLflow's server does not answer:\n{log.read_text()}")


def take_mlflow(browser: Browser, address: str, table: str, folder: Path) -> list[str]:
    """Pictures of the UI, and what is wrong with it, in words."""
    from mlflow.tracking import MlflowClient

    client, metrics = MlflowClient(address), metrics_of(experiments(ROOT)[table].task.name)
    experiment = client.get_experiment_by_name(table).experiment_id
    ranking = f"metrics.{metrics.headline.name} {'DESC' if metrics.better == 'higher' else 'ASC'}"
    runs = client.search_runs([experiment], "tags.current = 'true'", order_by=[ranking])
    best = next(run for run in runs if run.data.tags["pattern"] != "dense")
    context = browser.new_context(viewport=WIDE)
    context.add_init_script(RETURNING)
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(f"MLflow, script: {error}"))

    def shoot(name: str, path: str, expected: str, height: int = WIDE["height"], press: str = "") -> None:
        page.set_viewport_size({**WIDE, "height": height})
        page.goto("about:blank")  # or only the fragment changes, and the UI keeps what it showed
        page.goto(f"{address}/#/{path}")
        try:
            page.get_by_text(expected, exact=True).first.wait_for(timeout=30_000)
        except TimeoutError:
            faults.append(f"MLflow, {name}: no {expected!r} on the page")
        for switch in page.get_by_role("switch", name=press).all() if press else ():
            switch.click()
        page.wait_for_timeout(4_000)  # charts come one by one, and the UI polls on and on: no quiet to wait for
        page.screenshot(path=folder / f"mlflow_{name}.png")

    training = "workflowType=machine_learning"
    view = f"experiments/{experiment}/runs?viewStateShareKey=table&{training}"
    shoot("runs", view, best.info.run_name)
    shoot("charts", f"{view}&compareRunsMode=CHART", "Training", 1500)
    few = [run for run in runs if run.data.tags["method"] == best.data.tags["method"]][:5]
    chosen, of = json.dumps([run.info.run_id for run in few]), json.dumps([experiment])
    compared = f"Comparing {len(few)} Runs from 1 Experiment"
    shoot("compare", f"compare-runs?runs={chosen}&experiments={of}&{training}", compared, 2000, press="Show diff only")
    artifacts = f"experiments/{experiment}/runs/{best.info.run_id}/artifacts"
    shoot("artifact", f"{artifacts}/report/index.html?{training}", "index.html")
    context.close()
    return faults


if __name__ == "__main__":
    main()
