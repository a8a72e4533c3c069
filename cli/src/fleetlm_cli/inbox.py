"""`fleetlm inbox`: a participant's sessions, newest activity first, with what is unread; and each one that changes.

Promise: listing pages until all are shown, or as many as asked for; following prints each change, through restarts, and
none of what the newest page holds twice. Must not be done here: reconnecting (the SDK does).
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fleetlm_cli.show import Printer, printable, unread_text
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
from fleetlm_client import InboxEntry, InboxPage


def inbox(
    participant: Annotated[str | None, typer.Argument(help="Whose inbox; instead of --as.", show_default=False)] = None,
    *,
    follow: Annotated[bool, typer.Option(help="Stay and print each session that changes; Ctrl-C ends.")] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most N (with --follow: begin with N, up to 100).", show_default=False)
    ] = None,
    as_: AsOption = AS_DEFAULT,
    url: UrlOption = None,
    data: DataOption = DATA_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """List a participant's sessions, newest activity first, with unread messages; and follow them."""
    where = target(url=url, data=data, participant=as_ if participant is None else participant)
    printer = Printer(as_json=as_json)
    if follow:
        run(_follow(where, printer, limit=limit))
        return
    found = run(_collect(where, limit=limit))
    if sys.stdout.isatty() and not as_json:
        _table(found)
        return
    for entry in found:
        printer.entry(entry)


async def _collect(where: Target, *, limit: int | None) -> list[InboxEntry]:
    found: list[InboxEntry] = []
    async with where.rest() as rest:
        async for entry in rest.inbox():
            found.append(entry)
            if len(found) == limit:
                break
    return found


async def _follow(where: Target, printer: Printer, *, limit: int | None) -> None:
    shown: dict[str, InboxEntry] = {}
    async with where.client() as client, client.inbox(limit=limit) as joined:
        async for update in joined:
            entries = update.sessions if isinstance(update, InboxPage) else [update]
            for entry in entries:
                if shown.get(entry.session_id) != entry:
                    printer.entry(entry)
            if isinstance(update, InboxPage):
                shown.clear()  # so it never holds more than a page and what changed since
            shown |= {entry.session_id: entry for entry in entries}


def _table(found: list[InboxEntry]) -> None:
    table = Table("session", "unread", "last seq", "active", box=None)
    for entry in found:
        table.add_row(printable(entry.session_id), unread_text(entry), str(entry.last_seq), entry.active_at)
    Console().print(table if found else "no sessions yet")
