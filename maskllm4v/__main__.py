"""The command line, for single steps without the pipeline: ``python -m maskllm4v --help``."""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path

from maskllm4v.cli import export, options, prune, receipt, sample, shrink, train, update, validate, verify
from maskllm4v.config import PARAMS, Experiment, load_experiment
from maskllm4v.runs.paths import REPORTS
from maskllm4v.utils.errors import ConfigError, UserError
from maskllm4v.utils.io import write_text


def report(arguments: argparse.Namespace) -> None:
    """Render tables, figures and the README from the committed records, check them, or print a table."""
    from maskllm4v.reporting.report import check_report, find_experiment, write_report
    from maskllm4v.reporting.terminal import show

    if arguments.check:
        check_report(Path())
        print("README and tables agree with the records")
        return
    written = [] if arguments.show is not None else write_report(Path())
    show(find_experiment(Path(), arguments.show), REPORTS)
    for path in written:
        print(path)


def publish(_: argparse.Namespace) -> None:
    """Send the committed records of all tables to MLflow (MLFLOW_TRACKING_URI, or ./mlflow.db)."""
    from maskllm4v.reporting.report import experiments
    from maskllm4v.tracking.publishing import publish

    for table, experiment in experiments(Path()).items():
        print(f"{table}: {len(publish(Path(), experiment))} runs")


def use(arguments: argparse.Namespace) -> None:
    """Switch params.yaml to one of experiments/*.yaml."""
    source = Path("experiments") / f"{arguments.experiment}.yaml"
    if not source.exists():
        names = ", ".join(sorted(path.stem for path in Path("experiments").glob("*.yaml")))
        raise ConfigError(f"no experiment {arguments.experiment!r}; allowed: {names}")
    experiment = load_experiment(source)
    if missing := _read_by_dvc(experiment):
        raise ConfigError(f"{source}: dvc.yaml reads these, too, so they have to stand there: {'; '.join(missing)}")
    write_text(PARAMS, source.read_text(encoding="utf-8"))
    print(f"params.yaml is now {source}; run `dvc repro`")


def _read_by_dvc(experiment: Experiment) -> list[str]:
    """What an experiment leaves out to take its default, as lines to add: DVC knows no defaults."""
    found = []
    for key, field in Experiment.model_fields.items():
        if key not in experiment.model_fields_set and key != "runtime":
            plain = isinstance(field.default, str | int)
            found.append(f"{key}: {json.dumps(field.default) if plain else '{}'}")
    if "name" not in experiment.task.model_fields_set:
        found.append(f"name: {experiment.task.name} in task")
    return found


def main() -> None:
    parser = options.Parser(prog="python -m maskllm4v", description=__doc__)
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")
    for command in (report, publish, use):
        sub = commands.add_parser(command.__name__, help=command.__doc__)
        sub.set_defaults(command=command)
        if command is report:
            alone = sub.add_mutually_exclusive_group()
            alone.add_argument("--check", action="store_true", help="only say whether README and records agree")
            alone.add_argument(
                "--show", nargs="?", const="", metavar="TABLE", help="only print the active table, or this one"
            )
        if command is use:
            sub.add_argument("experiment", help="name of a file in experiments/, without .yaml")
    for step in (prune, train, update, validate, sample, shrink, export, verify, receipt):
        name, text = step.__name__.rpartition(".")[2], step.__doc__ or ""
        sub = commands.add_parser(name, help=text.partition("\n")[0], description=text, allow_abbrev=False)
        step.add_arguments(sub)
        sub.set_defaults(command=step.run)
    parser.set_defaults(error_status=1)  # unless the command has another
    arguments, unknown = parser.parse_known_args()
    if unknown:
        commands.choices[arguments.name].error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        status = arguments.command(arguments)
    except UserError as error:
        print(f"{arguments.name}: {error}", file=sys.stderr)
        sys.exit(arguments.error_status)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception:  # a bug; Python would end with 1, which is a finding where a command has another status
        if arguments.error_status == 1:
            raise
        traceback.print_exc()
        sys.exit(arguments.error_status)
    if status:
        sys.exit(status)


if __name__ == "__main__":
    main()
