"""The command `fleetlm`: builds the application from one module a command, and is the only place that ends the process.

Promise: a command that fails says why in one or two sentences on standard error and ends with a documented status;
no traceback for what the world gets wrong. Must not be done here: the work of any command.
"""

from __future__ import annotations

import sys

import typer

from fleetlm_cli.exits import Failure

app = typer.Typer(
    name="fleetlm",
    help="FleetLM: a durable, ordered, resumable message log for conversations.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the command."""
    try:
        app()
    except Failure as failure:
        sys.stderr.write(f"fleetlm: {failure.message}\n")
        sys.exit(failure.status)


if __name__ == "__main__":
    main()
