"""Single steps without the pipeline, and what looks after its results."""

from __future__ import annotations

import argparse
import sys
import traceback
from pathlib import Path

from maskllm4v import __version__
from maskllm4v.cli import (
    export,
    options,
    prune,
    publish,
    receipt,
    report,
    sample,
    shrink,
    train,
    update,
    use,
    validate,
    verify,
)
from maskllm4v.cli.wording import in_options
from maskllm4v.utils.errors import UserError

COMMANDS = (report, publish, use, prune, train, update, validate, sample, shrink, export, verify, receipt)


def main() -> None:
    """Run one command; ends the process if its status is not 0."""
    called = "maskllm4v" if Path(sys.argv[0]).name == "maskllm4v" else "python -m maskllm4v"
    parser = options.Parser(prog=called, description=__doc__)
    parser.add_argument("--version", action="version", version=f"maskllm4v {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="command")
    for command in COMMANDS:
        name, text = command.__name__.rpartition(".")[2], command.__doc__ or ""
        sub = commands.add_parser(name, help=text.partition("\n")[0], description=text, allow_abbrev=False)
        command.add_arguments(sub)
        sub.set_defaults(command=command.run)
    parser.set_defaults(error_status=1)  # unless the command has another
    arguments, unknown = parser.parse_known_args()
    if unknown:
        commands.choices[arguments.name].error(f"unrecognized arguments: {' '.join(unknown)}")
    if status := _status(arguments, commands.choices[arguments.name]):
        sys.exit(status)


def _status(arguments: argparse.Namespace, parser: options.Parser) -> int | None:
    """What the process ends with; errors that a user can mend are a line on standard error."""
    try:
        status: int | None = arguments.command(arguments)
        return status
    except UserError as error:
        print(f"{arguments.name}: {in_options(str(error), parser.has)}", file=sys.stderr)
        return int(arguments.error_status)
    except KeyboardInterrupt:
        return 130
    except Exception:  # a bug; Python would end with 1, which is a finding where a command has another status
        if arguments.error_status == 1:
            raise
        traceback.print_exc()
        return int(arguments.error_status)
