"""Ask a ring for something else, and watch until it is so.

Promise: a wish stands in the ring's spec before anybody waits for it, so whoever is interrupted has asked all the same;
while one waits the controller's sentence is shown whenever it changes. Must not be done here: deciding how a wish
becomes true (the controller), or starting processes (`up`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fleetlm_cli.exits import Exit, Failure
from fleetlm_cli.show import Printer, printable
from fleetlm_common.control import ControlPlaneUnavailable, RingSpec, View
from fleetlm_common.filecontrol import FileControlPlane, Status, change_ring, read_status
from fleetlm_common.ids import ShardName

POLL_S: Final = 0.1

Holds = Callable[[View, Status | None], bool]


def ask(folder: Path, change: Callable[[RingSpec], RingSpec]) -> RingSpec:
    """Write a wish.

    Raises:
        Failure: there is no ring in `folder`.
    """
    try:
        return change_ring(folder / "control", change)
    except ControlPlaneUnavailable as error:
        raise Failure(f"cannot ask the ring in {folder}: {error}", status=Exit.NOT_RUNNING) from error


async def wait_until(folder: Path, holds: Holds, *, timeout_s: float, printer: Printer, as_json: bool) -> None:
    """Look again and again.

    Raises:
        Failure: not within `timeout_s`; the wish stands.
    """
    control = FileControlPlane(folder / "control")
    deadline_s = time.monotonic() + timeout_s
    said = ""
    while True:
        try:
            view = await control.read()
        except ControlPlaneUnavailable:
            view = None
        status = await asyncio.to_thread(read_status, folder / "control")
        if view is not None and holds(view, status):
            return
        if status is not None and status.sentence != said and not as_json:
            said = status.sentence
            printer.line(printable(said))
        if time.monotonic() > deadline_s:
            words = "nothing" if status is None else printable(status.sentence)
            raise Failure(
                f"not done within {timeout_s:g} s; it goes on without this command (the controller says: {words})"
            )
        await asyncio.sleep(POLL_S)


def is_steady(view: View, status: Status | None) -> bool:
    """The controller has nothing left to do about the newest map, and said so."""
    return (
        view.map is not None
        and status is not None
        and (status.reason, status.epoch) == ("Steady", view.map.epoch)
        and not view.map.moves
    )


def has_members(view: View, shards: int) -> bool:
    """The ring has exactly so many."""
    names = {ShardName(f"shard-{ordinal}") for ordinal in range(shards)}
    return view.map is not None and {member.name for member in view.map.members} == names


def owns_nothing(view: View, shard: ShardName) -> bool:
    """It gave everything away."""
    return view.map is not None and not view.map.slots_of(shard)
