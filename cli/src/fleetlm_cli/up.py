"""`fleetlm up`: a whole FleetLM on this machine, the same processes as in a cluster.

Promise: what is asked for is checked before anything is written or started; whatever goes wrong ends in words and a
status, with nothing damaged and no process left. Must not be done here: supervision (`supervisor.py`), files
(`folder.py`), what a process is told (`children.py`).
"""

from __future__ import annotations

import asyncio
import os
import random
import shlex
import shutil
import signal
import sys
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Final, TextIO

import typer

from fleetlm_cli import archivechoice, ports, upfile
from fleetlm_cli import folder as folders
from fleetlm_cli.archivechoice import ARCHIVE_HELP
from fleetlm_cli.children import FIRST_GATEWAY, Layout, child_specs, describe, port_names, shards_to_run
from fleetlm_cli.exits import Exit, Failure
from fleetlm_cli.following import Follower
from fleetlm_cli.supervisor import EXIT_CONFIG, GaveUp, Supervisor, status_text
from fleetlm_cli.target import DATA_DEFAULT
from fleetlm_common.control import ControlPlaneUnavailable, RingSpec
from fleetlm_common.filecontrol import FileControlPlane, create_ring
from fleetlm_common.ring import SHARDS_MAX
from fleetlm_common.slots import SLOTS_MAX, SLOTS_MIN

SHARDS_DEFAULT: Final = 3
SLOTS_DEFAULT: Final = 256
GATEWAYS_MAX: Final = 16
"""More processes of one kind than a machine has cores help nobody."""

DataOption = Annotated[Path, typer.Option("--data", help="Folder of the ring.", show_default=True)]


def up(
    *,
    data: DataOption = DATA_DEFAULT,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Port of gateway-0; 0: a free one; without it the one of last time, at first 4000."
        ),
    ] = None,
    shards: Annotated[
        int | None, typer.Option(min=1, max=SHARDS_MAX, help=f"Shards of a new ring (without it {SHARDS_DEFAULT}).")
    ] = None,
    gateways: Annotated[int, typer.Option(min=1, max=GATEWAYS_MAX, help="Gateways.")] = 1,
    slots: Annotated[
        int | None,
        typer.Option(min=SLOTS_MIN, max=SLOTS_MAX, help=f"Slots of a new ring, for life (without it {SLOTS_DEFAULT})."),
    ] = None,
    archive: Annotated[str | None, typer.Option(help=ARCHIVE_HELP)] = None,
) -> None:
    """Run shards, gateways and a controller on this machine until Ctrl-C."""
    os.umask(0o077)  # for every file of ours and of the children
    wanted = None if archive is None else archivechoice.parse(archive)
    folder = data.absolute()
    with folders.held(folder):
        layout = _prepare(folder, port=port, shards=shards, gateways=gateways, slots=slots)
        layout = replace(layout, archive=archivechoice.choose(folder, wanted))
        status = asyncio.run(_run(layout))
    if status is not Exit.DONE:
        raise typer.Exit(status)


def _prepare(folder: Path, *, port: int | None, shards: int | None, gateways: int, slots: int | None) -> Layout:
    """Everything that must be right before a process is started; the port first, for it needs no file."""
    entropy = random.Random()
    remembered = ports.load(folder)
    client_port = ports.client_port(wanted=port, remembered=remembered.get(FIRST_GATEWAY), entropy=entropy)
    names = _shards(folder, _ring(folder, shards=shards, slots=slots))
    chosen = ports.choose(
        port_names(shards=names, gateways=gateways),
        chosen={FIRST_GATEWAY: client_port},
        remembered=remembered,
        entropy=entropy,
    )
    layout = Layout(folder, names, gateways, chosen)
    try:
        ports.save(folder, chosen)
        folders.make_credential(layout.credential)
        layout.logs.mkdir(mode=folders.FOLDER_MODE, exist_ok=True)
    except OSError as error:
        raise folders.unusable(folder, error) from error
    return layout


def _ring(folder: Path, *, shards: int | None, slots: int | None) -> RingSpec:
    """The ring that lives in `folder`; a new one if there is none."""
    new_slots = slots or SLOTS_DEFAULT
    new_shards = shards or min(SHARDS_DEFAULT, new_slots)
    try:
        spec = create_ring(folder / "control", RingSpec(str(uuid.uuid4()), new_slots, new_shards))
    except ControlPlaneUnavailable as error:
        raise Failure(f"cannot use the ring in {folder}: {error}") from error
    if slots is not None and slots != spec.slots:
        raise Failure(
            f"the ring in {folder} has {spec.slots} slots, and a ring keeps them for life; leave --slots out, "
            "or make another ring with --data",
            status=Exit.USAGE,
        )
    if shards is not None and shards != spec.shards:
        _say(
            f"the ring in {folder} has {spec.shards} shards, and --shards is for new ones; starting its {spec.shards} "
            f"(`fleetlm shards scale {shards}` changes that)"
        )
    return spec


def _shards(folder: Path, spec: RingSpec) -> tuple[str, ...]:
    """Those that are asked for, and members that have not left yet."""
    try:
        view = asyncio.run(FileControlPlane(folder / "control").read())
    except ControlPlaneUnavailable as error:
        raise Failure(f"cannot use the ring in {folder}: {error}") from error
    return shards_to_run(spec, view.map)


async def _run(layout: Layout) -> Exit:
    """Start, supervise, stop; a second signal ends everything at once."""
    _say(f"starting {_count(len(layout.shard_names), 'shard')}, {_count(layout.gateways, 'gateway')} and a controller")
    stop = asyncio.Event()
    board = _Board()
    supervisor = Supervisor(child_specs(layout, os.environ), log_folder=layout.logs, say=_say, on_change=board.update)
    board.follower = Follower(layout, supervisor, env=os.environ, say=_say)
    board.supervisor = supervisor
    work = asyncio.create_task(supervisor.run(stop))
    follow = asyncio.create_task(board.follower.run())
    follow.add_done_callback(_follow_ended)
    _on_signals(lambda: _interrupt(stop, work))
    try:
        in_time = await work
    except asyncio.CancelledError:
        _say("ended at once; what was acknowledged is on disk")
        return Exit.INTERRUPTED
    except GaveUp as gave_up:
        raise _failure(gave_up, layout) from gave_up
    finally:
        follow.cancel()
        with suppress(OSError):
            upfile.remove(layout.folder)
    _say("stopped")
    return Exit.DONE if in_time else Exit.FAILED


class _Board:
    """Says what runs: `up.json` at each change once everything was ready, and the banner the first time."""

    def __init__(self) -> None:
        self._welcomed = False
        self.supervisor: Supervisor | None = None
        self.follower: Follower | None = None

    def update(self) -> None:
        """A child was started, or all are ready for the first time."""
        if self.supervisor is None or self.follower is None or not self.supervisor.all_ready:
            return
        layout = self.follower.layout
        found = describe(layout, pid=os.getpid(), pids=self.supervisor.pids())
        try:
            upfile.write(layout.folder, found)
        except OSError as error:
            _say(f"cannot write {layout.folder / upfile.UP_FILE}: {error.strerror}")
        if not self._welcomed:
            self._welcomed = True
            _print(_banner(layout, found), stream=sys.stdout)


def _follow_ended(task: asyncio.Task[None]) -> None:
    """It ends by cancellation only; what runs goes on running without it."""
    if not task.cancelled() and (error := task.exception()) is not None:
        _say(f"processes no longer follow the ring ({error!r}): restart `up` before changing the number of shards")


def _on_signals(interrupt: Callable[[], None]) -> None:
    """Ctrl-C, `kill`, and the end of the terminal."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, interrupt)


def _interrupt(stop: asyncio.Event, work: asyncio.Task[bool]) -> None:
    """The first signal stops in order, the second at once."""
    if stop.is_set():
        work.cancel()
        return
    _say("stopping: gateways, then shards, then the rest (again to end at once)")
    stop.set()


def _failure(gave_up: GaveUp, layout: Layout) -> Failure:
    """Why `up` ended by itself, with the child's own last words."""
    if gave_up.status == EXIT_CONFIG:
        what = f"{gave_up.child} refuses its configuration"
    else:
        what = f"{gave_up.child} died {gave_up.deaths} times before it was ready ({status_text(gave_up.status)})"
    words = "".join(f"\n  {line}" for line in gave_up.last_lines)
    log = layout.logs / f"{gave_up.child}.log"
    status = Exit.CONFIG if gave_up.status == EXIT_CONFIG else Exit.FAILED
    return Failure(f"{what}; its last lines (all of them are in {log}):{words}", status=status)


def _banner(layout: Layout, found: upfile.Up) -> str:
    """What to do now that it runs."""
    default = layout.folder == DATA_DEFAULT.absolute()
    data = "" if default else f" --data {shlex.quote(str(layout.folder))}"
    own = Path(sys.argv[0])  # not on the PATH when `make up` started it from an environment that is not active
    command = shlex.quote(str(own)) if own.name == "fleetlm" and shutil.which("fleetlm") is None else "fleetlm"
    shards = _count(len(layout.shard_names), "shard")
    return f"""
FleetLM is ready: {shards}, {_count(layout.gateways, "gateway")}, on this machine only.

  WebSocket  {found.websocket_url}
  REST       {found.url}/v1
  Data       {layout.folder}
  Archive    {archivechoice.shown(layout.archive)}

Try in another terminal:

  {command} append demo "hello, is anybody there?" --as alice{data}

Ctrl-C stops it.
"""


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _say(line: str) -> None:
    _print(line, stream=sys.stderr)


def _print(text: str, *, stream: TextIO) -> None:
    """A terminal that is gone is no reason to end."""
    with suppress(OSError, ValueError):
        stream.write(f"{text}\n")
        stream.flush()
