"""The command `fleetlm`: builds the application from one module a command, and is the only place that ends the process.

Promise: a command that fails says why in one or two sentences on standard error and ends with a documented status;
no traceback for what the world gets wrong; a command does not wait for the imports of the others (`--help` does).
Must not be done here: the work of any command.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module, metadata
from typing import Annotated, Final

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_group

from fleetlm_cli import environment
from fleetlm_cli.exits import Failure

COMMANDS: Final = (
    "up",
    "append",
    "tail",
    "sessions",
    "inbox",
    "ring",
    "move",
    "shards",
    "verify",
    "archive",
    "bench",
    "drill",
)
"""In the order of the help; each is what the module of its name calls by its name, a function or a group."""


class _Commands(TyperGroup):
    """Imports a command's module when somebody asks for the command."""

    def list_commands(self, ctx: object) -> list[str]:
        """Their names."""
        return list(COMMANDS)

    def get_command(self, ctx: object, cmd_name: str) -> TyperCommand | TyperGroup | None:
        """The command, None for an unknown one."""
        if cmd_name not in COMMANDS:
            return None
        app = typer.Typer()
        found = getattr(import_module(f"fleetlm_cli.{cmd_name}"), cmd_name)
        if isinstance(found, typer.Typer):
            app.add_typer(found, name=cmd_name)
        else:
            app.command(cmd_name)(found)
        command = get_group(app).commands[cmd_name]
        assert isinstance(command, TyperCommand | TyperGroup)
        return command


app = typer.Typer(
    cls=_Commands,
    name="fleetlm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fleetlm {metadata.version('fleetlm')}")
        raise typer.Exit


@app.callback()
def options(
    *,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and end.")
    ] = False,
) -> None:
    """FleetLM: a durable, ordered, resumable message log for conversations."""
    assert not version
    environment.check(os.environ)


def main() -> None:
    """Entry point of the command."""
    try:
        app()
    except Failure as failure:
        sys.stderr.write(f"fleetlm: {failure.message}\n")
        sys.exit(failure.status)


if __name__ == "__main__":
    main()
