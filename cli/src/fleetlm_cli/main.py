"""The command `fleetlm`: builds the application from one module a command, and is the only place that ends the process.

Promise: a command that fails says why in one or two sentences on standard error and ends with a documented status;
no traceback for what the world gets wrong. Must not be done here: the work of any command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Annotated

import typer
from typer.core import TyperGroup

from fleetlm_cli import environment
from fleetlm_cli.append import append
from fleetlm_cli.archive import archive
from fleetlm_cli.bench import bench
from fleetlm_cli.drill import drill
from fleetlm_cli.exits import Failure
from fleetlm_cli.inbox import inbox
from fleetlm_cli.move import move
from fleetlm_cli.restore import restore
from fleetlm_cli.ring import ring
from fleetlm_cli.sessions import sessions
from fleetlm_cli.shards import shards
from fleetlm_cli.tail import tail
from fleetlm_cli.up import up
from fleetlm_cli.verify import verify

app = typer.Typer(
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
    context: typer.Context,
    *,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and end.")
    ] = False,
) -> None:
    """FleetLM: a durable, ordered, resumable message log for conversations."""
    assert not version
    environment.check(os.environ, known=_variables(context.command))


def _variables(command: object) -> Iterator[str]:
    """Every variable that an option of `command`, or of one below it, is read from."""
    for parameter in getattr(command, "params", []):
        names = parameter.envvar or ()
        yield from [names] if isinstance(names, str) else names
    if isinstance(command, TyperGroup):
        for below in command.commands.values():
            yield from _variables(below)


app.command()(up)
app.command()(append)
app.command()(tail)
app.command()(sessions)
app.command()(inbox)
app.command()(move)
app.command()(verify)
app.add_typer(ring, name="ring")
app.add_typer(archive, name="archive")
shards.command()(restore)
app.add_typer(shards, name="shards")
app.add_typer(bench, name="bench")
app.add_typer(drill, name="drill")


def main() -> None:
    """Entry point of the command."""
    try:
        app()
    except Failure as failure:
        sys.stderr.write(f"fleetlm: {failure.message}\n")
        sys.exit(failure.status)


if __name__ == "__main__":
    main()
