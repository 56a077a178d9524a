"""Send the committed records of all tables to MLflow (MLFLOW_TRACKING_URI, or ./mlflow.db)."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(_: argparse.ArgumentParser) -> None:
    pass


def run(_: argparse.Namespace) -> None:
    from maskllm4v.reporting.report import experiments
    from maskllm4v.tracking.publishing import publish

    for table, experiment in experiments(Path()).items():
        print(f"{table}: {len(publish(Path(), experiment))} runs")
