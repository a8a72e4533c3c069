"""`fleetlm sessions`: what sessions there are.

Promise: all of them, in the order of their ids, page by page. Must not be done here: reading messages.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fleetlm_cli.show import Printer, printable
from fleetlm_cli.target import (
    AS_DEFAULT,
    DATA_DEFAULT,
    AsOption,
    DataOption,
    JsonOption,
    Target,
    UrlOption,
    run,
    target,
)
from fleetlm_client import SessionInfo


def sessions(
    *,
    limit: Annotated[int | None, typer.Option(min=1, help="At most N.", show_default=False)] = None,
    as_: AsOption = AS_DEFAULT,
    url: UrlOption = None,
    data: DataOption = DATA_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """List sessions with their last seq."""
    where = target(url=url, data=data, participant=as_)
    printer = Printer(as_json=as_json)
    found = run(_collect(where, limit=limit, printer=printer if as_json or not sys.stdout.isatty() else None))
    if as_json:
        return
    if sys.stdout.isatty():
        _table(found)


async def _collect(where: Target, *, limit: int | None, printer: Printer | None) -> list[SessionInfo]:
    """Every session; for programs and pipes each is printed as it comes."""
    found: list[SessionInfo] = []
    count = 0
    async with where.rest() as rest:
        async for session in rest.all_sessions():
            count += 1
            if printer is None:
                found.append(session)
            else:
                printer.session(session)
            if count == limit:
                break
    return found


def _table(found: list[SessionInfo]) -> None:
    table = Table("session", "last seq", "earliest", "first written", box=None)
    for session in found:
        table.add_row(
            printable(session.session_id), str(session.last_seq), str(session.earliest_seq), session.inserted_at
        )
    console = Console()
    console.print(table if found else "no sessions yet")
