"""`fleetlm shards`: change the number of shards of a running `up`, or restart them.

Promise: `scale` writes the wish and waits; the controller moves slots, `up` starts and ends processes. A restart
touches the next shard only when the one before is ready again; what is on disk stays. Others own its slots first, if
there are others; with `--in-place` they answer `TRY_AGAIN` meanwhile.
Must not be done here: starting processes, deciding about slots.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final

import aiohttp
import msgspec
import typer

from fleetlm_cli import upfile
from fleetlm_cli.asking import ask, has_members, is_steady, owns_nothing, wait_until
from fleetlm_cli.exits import Exit, Failure
from fleetlm_cli.forget import forget
from fleetlm_cli.restore import restore
from fleetlm_cli.show import Printer
from fleetlm_cli.target import DATA_DEFAULT, DataOption, JsonOption
from fleetlm_cli.upfile import UpProcess
from fleetlm_common.control import RingSpec, View
from fleetlm_common.filecontrol import Status
from fleetlm_common.ids import ShardName
from fleetlm_common.ring import SHARDS_MAX

READY_WAIT_S_MAX: Final = 120.0
"""Stop (30 s at the most), a boot of a large log, and some."""
POLL_S: Final = 0.05
SCALE_TIMEOUT_S: Final = 3600.0
"""Copies of large volumes take their time; whoever waits may stop waiting."""

shards = typer.Typer(no_args_is_help=True, help="The shards of a running `fleetlm up`.")


@shards.command()
def scale(
    count: Annotated[int, typer.Argument(min=1, max=SHARDS_MAX, help="How many shards there shall be.")],
    *,
    delete_volumes: Annotated[
        bool, typer.Option("--delete-volumes", help="Delete the folders of shards that left; without it they stay.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is so.")] = True,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds to wait at the most.")
    ] = SCALE_TIMEOUT_S,
    data: DataOption = DATA_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Add shards, or empty the last ones and take them away; slots move, nothing is lost."""
    folder = data.absolute()
    if delete_volumes and not wait:
        raise Failure("--delete-volumes needs to wait until the shards have left", status=Exit.USAGE)
    upfile.find(folder)
    began_s = time.monotonic()
    ask(folder, lambda spec: msgspec.structs.replace(spec, shards=count))
    printer = Printer(as_json=as_json)

    def done(view: View, status: Status | None) -> bool:
        if view.spec.shards != count:
            raise Failure(f"somebody else asked for {view.spec.shards} shards meanwhile")
        running = {process.name for process in upfile.find(folder).processes if process.kind == "shard"}
        named = running == {f"shard-{ordinal}" for ordinal in range(count)}
        return named and has_members(view, count) and is_steady(view, status)

    if wait:
        asyncio.run(wait_until(folder, done, timeout_s=timeout_s, printer=printer, as_json=as_json))
    deleted = _delete_volumes(folder, count) if delete_volumes else []
    if as_json:
        took_ms = round((time.monotonic() - began_s) * 1000)
        printer.record({"shards": count, "waited": wait, "took_ms": took_ms, "deleted": deleted})
    else:
        number = "1 shard" if count == 1 else f"{count} shards"
        what = f"the ring has {number}" if wait else f"the ring shall have {number}"
        printer.line("; ".join([what, *(f"deleted {path}" for path in deleted)]))


def _delete_volumes(folder: Path, count: int) -> list[str]:
    """Volumes of shards that left: no process has them, and no map names them."""
    deleted: list[str] = []
    for path in sorted(folder.glob("shard-*")):
        ordinal = path.name.removeprefix("shard-")
        if path.is_dir() and ordinal.isdigit() and int(ordinal) >= count:
            gone = path.with_name(f"deleted-{path.name}")
            path.rename(gone)  # in one step: a shard that comes back meanwhile begins with an empty volume
            shutil.rmtree(gone)
            deleted.append(str(path))
    return deleted


@shards.command()
def restart(
    *,
    name: Annotated[str | None, typer.Argument(help="One shard; all of them without it.")] = None,
    rolling: Annotated[bool, typer.Option("--rolling", help="One after the other; it is never done otherwise.")] = True,
    handover: Annotated[
        bool | None,
        typer.Option(
            "--handover/--in-place",
            help="Let others own its slots first (what happens unless there is one shard only), or let them wait.",
        ),
    ] = None,
    data: DataOption = DATA_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Restart shards, one after the other; each must be ready before the next."""
    assert rolling
    folder = data.absolute()
    up = upfile.find(folder)
    chosen = _chosen(up, name)
    if handover is None:
        handover = sum(process.kind == "shard" for process in up.processes) > 1
    printer = Printer(as_json=as_json)
    try:
        for shard in chosen:
            began_s = time.monotonic()
            if handover:
                _empty(folder, ShardName(shard.name), printer, as_json=as_json)
            pid = asyncio.run(_restart(folder, shard))
            took_s = time.monotonic() - began_s
            if as_json:
                printer.record({"name": shard.name, "old_pid": shard.pid, "pid": pid, "took_ms": round(took_s * 1000)})
            else:
                printer.line(f"{shard.name} is ready again after {took_s:.1f} s (pid {pid})")
    finally:
        if handover:  # also when it was interrupted: nobody shall stay empty because of a restart
            ask(folder, lambda spec: msgspec.structs.replace(spec, cordoned=()))
    if handover:
        asyncio.run(wait_until(folder, is_steady, timeout_s=SCALE_TIMEOUT_S, printer=printer, as_json=as_json))


def _empty(folder: Path, shard: ShardName, printer: Printer, *, as_json: bool) -> None:
    """Have others own its slots; those of the shard before come here from this one, so few move twice."""

    def cordon(spec: RingSpec) -> RingSpec:
        if spec.shards < 2:
            raise Failure("a ring of one shard has nobody to hand over to; use --in-place", status=Exit.USAGE)
        return msgspec.structs.replace(spec, cordoned=(shard,))

    def done(view: View, _: Status | None) -> bool:
        return owns_nothing(view, shard)

    ask(folder, cordon)
    asyncio.run(wait_until(folder, done, timeout_s=SCALE_TIMEOUT_S, printer=printer, as_json=as_json))


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
                if current.pid != shard.pid and await is_ready(http, current):
                    return current.pid
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        raise Failure(
            f"{shard.name} was not ready again within {READY_WAIT_S_MAX:g} s; `fleetlm ring` says how it is"
        ) from error


async def is_ready(http: aiohttp.ClientSession, shard: UpProcess) -> bool:
    """A process says so itself."""
    try:
        async with http.get(f"{shard.ops_url}/health/ready") as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


shards.command()(restore)
shards.command()(forget)
