"""`fleetlm tail SESSION`: read a session, and follow it through restarts.

Promise: prints each message once and in order, whatever is restarted meanwhile; what is missing is said. Must not be
done here: reconnecting (the SDK does).
"""

from __future__ import annotations

from typing import Annotated

import typer

from fleetlm_cli.exits import Exit
from fleetlm_cli.show import Printer
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
from fleetlm_client import CaughtUp, Gap, Message

LAST_DEFAULT = 10
"""As `tail` does."""


def tail(
    session: Annotated[str, typer.Argument(help="Session id.")],
    *,
    after: Annotated[
        int | None, typer.Option(min=0, help="Begin after this seq (0: at the beginning).", show_default=False)
    ] = None,
    last: Annotated[int, typer.Option("--last", "-n", min=0, help="Begin with the last N.")] = LAST_DEFAULT,
    follow: Annotated[bool, typer.Option(help="Stay and print what comes; Ctrl-C ends.")] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="End after N messages.", show_default=False)] = None,
    fail_on_gap: Annotated[bool, typer.Option("--fail-on-gap", help="End with status 6 at a gap.")] = False,
    as_: AsOption = AS_DEFAULT,
    url: UrlOption = None,
    data: DataOption = DATA_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Print a session's messages, and follow it."""
    where = target(url=url, data=data, participant=as_)
    printer = Printer(as_json=as_json)
    status = run(
        _tail(where, session, printer, after=after, last=last, follow=follow, limit=limit, fail_on_gap=fail_on_gap)
    )
    if status is not Exit.DONE:
        raise typer.Exit(status)


async def _tail(
    where: Target,
    session: str,
    printer: Printer,
    *,
    after: int | None,
    last: int,
    follow: bool,
    limit: int | None,
    fail_on_gap: bool,
) -> Exit:
    async with (
        where.client() as client,
        client.join(session, cursor=after, tail=last if after is None else None) as joined,
    ):
        printed = 0
        async for event in joined:
            printer.event(event)
            printed += isinstance(event, Message)
            if isinstance(event, Gap) and fail_on_gap:
                return Exit.DAMAGED
            if limit is not None and printed >= limit:
                return Exit.DONE
            if not follow and isinstance(event, CaughtUp):
                return Exit.DONE
    return Exit.DONE
