"""`fleetlm inbox`: a participant's sessions, newest activity first, with what is unread.

Promise: pages until all are shown, or as many as asked for. Must not be done here: following an inbox.
"""

from __future__ import annotations

import sys
from typing import Annotated

import msgspec
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
from fleetlm_client import InboxEntry


def inbox(
    *,
    limit: Annotated[int | None, typer.Option(min=1, help="At most N.", show_default=False)] = None,
    as_: AsOption = AS_DEFAULT,
    url: UrlOption = None,
    data: DataOption = DATA_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """List the sessions of a participant (`--as`), newest activity first, with unread messages."""
    found = run(_collect(target(url=url, data=data, participant=as_), limit=limit))
    printer = Printer(as_json=as_json)
    if sys.stdout.isatty() and not as_json:
        _table(found)
        return
    for entry in found:
        if as_json:
            printer.record(msgspec.to_builtins(entry))
        else:
            columns = (printable(entry.session_id), _unread(entry), entry.last_seq, entry.active_at)
            printer.line("\t".join(map(str, columns)))


async def _collect(where: Target, *, limit: int | None) -> list[InboxEntry]:
    found: list[InboxEntry] = []
    async with where.rest() as rest:
        async for entry in rest.inbox():
            found.append(entry)
            if len(found) == limit:
                break
    return found


def _unread(entry: InboxEntry) -> str:
    return f"{entry.unread}+" if entry.unread_more else str(entry.unread)


def _table(found: list[InboxEntry]) -> None:
    table = Table("session", "unread", "last seq", "active", box=None)
    for entry in found:
        table.add_row(printable(entry.session_id), _unread(entry), str(entry.last_seq), entry.active_at)
    Console().print(table if found else "no sessions yet")
