"""`fleetlm shards restart`: end shards of a running `up` one after the other; `up` starts each again.

Promise: the next shard is touched only when the one before is ready again; what is on disk stays. Until slots can move
a restart is in place: its slots answer `TRY_AGAIN` meanwhile. Must not be done here: starting processes (`up` does).
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final

import aiohttp
import typer

from fleetlm_cli import upfile
from fleetlm_cli.exits import Exit, Failure
from fleetlm_cli.show import Printer
from fleetlm_cli.target import DATA_DEFAULT, DataOption, JsonOption
from fleetlm_cli.upfile import UpProcess

READY_WAIT_S_MAX: Final = 120.0
"""Stop (30 s at the most), a boot of a large log, and some."""
POLL_S: Final = 0.05

shards = typer.Typer(no_args_is_help=True, help="The shards of a running `fleetlm up`.")


@shards.command()
def restart(
    *,
    name: Annotated[str | None, typer.Argument(help="One shard; all of them without it.")] = None,
    data: DataOption = DATA_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Restart shards in place, one after the other; each must be ready before the next."""
    folder = data.absolute()
    chosen = _chosen(upfile.find(folder), name)
    printer = Printer(as_json=as_json)
    for shard in chosen:
        began_s = time.monotonic()
        pid = asyncio.run(_restart(folder, shard))
        took_s = time.monotonic() - began_s
        if as_json:
            printer.record({"name": shard.name, "old_pid": shard.pid, "pid": pid, "took_ms": round(took_s * 1000)})
        else:
            printer.line(f"{shard.name} is ready again after {took_s:.1f} s (pid {pid})")


def _chosen(up: upfile.Up, name: str | None) -> list[UpProcess]:
    found = [process for process in up.processes if process.kind == "shard" and name in {None, process.name}]
    if not found:
        names = ", ".join(process.name for process in up.processes if process.kind == "shard")
        raise Failure(f"there is no shard {name!r}; there are {names}", status=Exit.USAGE)
    return found


async def _restart(folder: Path, shard: UpProcess) -> int:
    """SIGTERM, then wait for its successor to be ready.

    Returns:
        The successor's pid.
    """
    with suppress(ProcessLookupError):  # it has just died by itself: `up` is doing what was asked for
        os.kill(shard.pid, signal.SIGTERM)
    try:
        async with (
            asyncio.timeout(READY_WAIT_S_MAX),
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as http,
        ):
            while True:
                current = upfile.find(folder).process(shard.name)
                if current.pid != shard.pid and await _is_ready(http, current):
                    return current.pid
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        raise Failure(
            f"{shard.name} was not ready again within {READY_WAIT_S_MAX:g} s; `fleetlm ring` says how it is"
        ) from error


async def _is_ready(http: aiohttp.ClientSession, shard: UpProcess) -> bool:
    try:
        async with http.get(f"{shard.ops_url}/health/ready") as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False
