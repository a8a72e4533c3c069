"""`fleetlm shards restore`: give a lost volume up; its shard goes on with what the archive has.

Promise: nothing happens before somebody who was told what it costs has agreed; the wish stands in the ring's spec, for
this volume only. Must not be done here: restoring (the shard does, from the archive).
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Final

import msgspec
import typer

from fleetlm_cli.asking import ask, wait_until
from fleetlm_cli.exits import Exit, Failure
from fleetlm_cli.show import Printer
from fleetlm_cli.target import DATA_DEFAULT, DataOption, JsonOption
from fleetlm_common.control import ControlPlaneUnavailable, RingSpec, View
from fleetlm_common.filecontrol import FileControlPlane, Status
from fleetlm_common.ids import ShardName

TIMEOUT_S: Final = 3600.0


def restore(
    name: Annotated[str, typer.Argument(help="The shard that says VolumeLost.")],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it serves.")] = True,
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds to wait at the most.")] = TIMEOUT_S,
    data: DataOption = DATA_DEFAULT,
    as_json: JsonOption = False,
) -> None:
    """Give up the volume that a shard has lost, and go on with what the archive has."""
    folder, shard = data.absolute(), ShardName(name)
    try:
        view = asyncio.run(FileControlPlane(folder / "control").read())
    except ControlPlaneUnavailable as error:
        raise Failure(f"cannot use the ring in {folder}: {error}", status=Exit.NOT_RUNNING) from error
    volume_id = _lost(view, shard)
    if not yes:
        typer.confirm(
            f"Volume {volume_id} of {shard} is given up for good. What was acknowledged and did not reach the "
            "archive is lost; readers are told of a gap in each of its sessions. Bring the volume back instead if you "
            "can. Go on?",
            abort=True,
        )

    def change(spec: RingSpec) -> RingSpec:
        return msgspec.structs.replace(spec, given_up=tuple(dict.fromkeys((*spec.given_up, volume_id))))

    ask(folder, change)
    printer = Printer(as_json=as_json)

    def done(view: View, _: Status | None) -> bool:
        member = None if view.map is None else view.map.member(shard)
        endpoint = view.shards.get(shard)
        if member is None or endpoint is None:
            return False
        return endpoint.ready and volume_id != member.volume_id == endpoint.volume_id

    if wait:
        asyncio.run(wait_until(folder, done, timeout_s=timeout_s, printer=printer, as_json=as_json))
    if as_json:
        printer.record({"shard": name, "given_up": volume_id, "waited": wait})
    else:
        printer.line(f"{name} {'serves what the archive has' if wait else 'shall be restored from the archive'}")


def _lost(view: View, shard: ShardName) -> str:
    """The volume that is to be given up.

    Raises:
        Failure: there is no such shard, or it has not lost its volume.
    """
    member = None if view.map is None else view.map.member(shard)
    if member is None:
        raise Failure(f"there is no shard {shard!r}", status=Exit.USAGE)
    endpoint = view.shards.get(shard)
    if endpoint is None or endpoint.volume_id == member.volume_id:
        raise Failure(f"{shard} has not lost its volume: it announces the one that the ring map binds it to")
    return member.volume_id
