"""`fleetlm append SESSION TEXT`: one message, or one for each line of standard input.

Promise: what was printed is on disk; lines are appended in their order; repeating a command with the same `--key` never
makes a second copy. Must not be done here: retrying (the SDK does).
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator
from typing import Annotated, Any, Final

import msgspec
import typer

from fleetlm_cli.exits import Exit, Failure
from fleetlm_cli.show import Printer
from fleetlm_cli.target import (
    AS_DEFAULT,
    DATA_DEFAULT,
    AsKindOption,
    AsOption,
    DataOption,
    JsonOption,
    Target,
    UrlOption,
    run,
    target,
)
from fleetlm_client import Ack, NewMessage, Settings

LINES_IN_FLIGHT_MAX: Final = 1_000
"""Lines that were read and not yet acknowledged: bounds memory however long the input is."""
LINES_AHEAD_MAX: Final = 1_000
"""Lines that were read and not yet appended."""


def append(
    session: Annotated[str, typer.Argument(help="Session id.")],
    text: Annotated[str, typer.Argument(help="The message; `-`: one message for each line of standard input.")],
    *,
    key: Annotated[
        str | None, typer.Option(help="Idempotency key; with `-` each line gets KEY-1, KEY-2, … (safe to repeat).")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="Label of the message.")] = None,
    json_content: Annotated[bool, typer.Option("--json-content", help="TEXT is JSON and is the content.")] = False,
    expected_seq: Annotated[
        int | None, typer.Option(min=0, help="Append only if this is the session's last seq.")
    ] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until giving up.")] = 30.0,
    as_: AsOption = AS_DEFAULT,
    as_kind: AsKindOption = "human",
    url: UrlOption = None,
    data: DataOption = DATA_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Append a message and wait until it is on disk."""
    where = target(url=url, data=data, participant=as_, kind=as_kind)
    printer = Printer(as_json=as_json)
    settings = Settings(append_deadline_s=timeout, connect_deadline_s=min(timeout, 10.0))
    if text == "-":
        if expected_seq is not None:
            raise Failure("--expected-seq is for one message, not for `-`", status=Exit.USAGE)
        run(_append_lines(where, settings, session, printer, key=key, kind=kind, json_content=json_content))
        return
    message = NewMessage(content=_content(text, json_content=json_content), kind=kind, idempotency_key=key)
    ack = run(_append_one(where, settings, session, message, expected_seq=expected_seq))
    printer.ack(session, ack)


def _content(text: str, *, json_content: bool, line: int | None = None) -> Any:
    """The content that `text` stands for: `{"text": …}`, or itself when it is JSON."""
    if not json_content:
        return {"text": text}
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        place = "" if line is None else f"line {line}: "
        raise Failure(f"{place}not JSON: {error}", status=Exit.USAGE) from error


async def _append_one(
    where: Target, settings: Settings, session: str, message: NewMessage, *, expected_seq: int | None
) -> Ack:
    async with where.client(settings) as client, client.join(session) as joined:
        return await joined.append(
            message.content, kind=message.kind, idempotency_key=message.idempotency_key, expected_seq=expected_seq
        )


async def _append_lines(
    where: Target,
    settings: Settings,
    session: str,
    printer: Printer,
    *,
    key: str | None,
    kind: str | None,
    json_content: bool,
) -> None:
    """Many at once, printed in their order; the first that fails ends it, those before it stay."""
    async with where.client(settings) as client, client.join(session) as joined:
        waiting: deque[asyncio.Task[Ack]] = deque()
        number = 0
        try:
            async for line in _lines():
                number += 1
                content = _content(line, json_content=json_content, line=number)
                line_key = None if key is None else f"{key}-{number}"
                call = joined.append(content, kind=kind, idempotency_key=line_key)
                waiting.append(asyncio.create_task(call))
                while len(waiting) >= LINES_IN_FLIGHT_MAX or (waiting and waiting[0].done()):
                    printer.ack(session, await waiting.popleft())
            while waiting:
                printer.ack(session, await waiting.popleft())
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)


async def _lines() -> AsyncIterator[str]:
    """Lines of standard input, as they come.

    Read in a thread that does not keep the process alive: Ctrl-C must end a command that waits for a terminal.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[str | None] = asyncio.Queue(LINES_AHEAD_MAX)

    def read() -> None:
        try:
            for line in sys.stdin:
                asyncio.run_coroutine_threadsafe(queue.put(line.rstrip("\r\n")), loop).result()
            asyncio.run_coroutine_threadsafe(queue.put(None), loop).result()
        except RuntimeError:
            return  # the loop is closed: nobody wants more lines

    threading.Thread(target=read, name="stdin", daemon=True).start()
    while (line := await queue.get()) is not None:
        yield line
