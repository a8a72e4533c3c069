"""Slots are to move to a shard that has no room for them, under load, with real processes (loop mounts: root)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import pytest

from fleetlm_cli.asking import has_members, is_steady, owns_nothing
from fleetlm_common.control import View
from fleetlm_common.filecontrol import Status
from fleetlm_common.ids import ShardName
from tests.integration.kills import Plan
from tests.integration.moves import Mover
from tests.support.eventually import eventually
from tests.support.faultload import FaultRun, under_load
from tests.support.load import clean
from tests.support.loopmount import LoopMount, loop_mount

pytestmark = pytest.mark.root

MIB: Final = 1024 * 1024
SEGMENT_BYTES: Final = 4 * MIB
RESERVE_BYTES: Final = 4 * MIB
IMPORTS_STOP_BYTES: Final = RESERVE_BYTES + 2 * SEGMENT_BYTES
"""With less free space a target gives a move up: what is left is for its clients."""
ENV: Final = {
    "FLEETLM_SHARD_SEGMENT_BYTES": str(SEGMENT_BYTES),
    "FLEETLM_SHARD_DISK_RESERVE_BYTES": str(RESERVE_BYTES),
}
SOURCES: Final = (ShardName("shard-0"), ShardName("shard-1"))
TARGET: Final = ShardName("shard-2")


def cordon(mover: Mover, *names: ShardName) -> None:
    """Ask for three shards of which these own nothing."""
    mover.ask(lambda spec: msgspec.structs.replace(spec, shards=3, cordoned=names))


def says(status: Status | None, *words: str) -> bool:
    """Whether the controller says all of this."""
    return status is not None and all(each in status.sentence for each in words)


def written_bytes(run: FaultRun) -> int:
    """Contents that were acknowledged."""
    acked = (one for one in run.history.invocations if one.outcome == "acked")
    return sum(len(content) for one in acked for content in one.contents)


async def without_room(run: FaultRun, disk: LoopMount) -> None:
    """All slots are to move to a third shard on `disk`: first it has too little room, then it has room."""
    mover = Mover(run, kills=False)
    (disk.path / TARGET).mkdir(mode=0o700)
    (run.fleet.data / TARGET).symlink_to(disk.path / TARGET)
    cordon(mover, TARGET)
    await mover.until(lambda view, status: has_members(view, 3) and is_steady(view, status), f"{TARGET} joined")
    await eventually(lambda: written_bytes(run) > 2 * SEGMENT_BYTES, "there is much to copy", timeout_s=60)

    disk.fill(leave_bytes=IMPORTS_STOP_BYTES + MIB)
    cordon(mover, *SOURCES)
    why = (f" to {TARGET} does not get on: it failed ", f" times: {TARGET} gave it up: disk_full: ")
    await mover.until(lambda _, status: says(status, *why), "moves are given up, again and again, and it is said why")
    await run.progress()
    disk.fill()
    away = f"waiting for {TARGET} to become ready"
    await mover.until(lambda _, status: says(status, *why, away), "nothing can be tried any more, and it is said why")
    await run.progress()
    assert owns_nothing(await mover.view(), TARGET)

    disk.free()

    def moved(view: View, status: Status | None) -> bool:
        return is_steady(view, status) and all(owns_nothing(view, source) for source in SOURCES)

    await mover.until(moved, "with room the moves succeed by themselves")
    await run.progress()


@pytest.mark.timeout(300)
async def test_a_target_fills_up_in_mid_move_and_is_given_room(tmp_path: Path) -> None:
    """Moves are given up and tried again, sources serve, the sentence says why; with room all slots move. Clean."""
    plan = Plan(kills=0, seed=1, shards=2, sessions=8, writers=6, readers=4, write_pause_s=0.02, text_chars_max=8_000)
    with loop_mount(tmp_path, mib=512) as disk:
        report = await under_load(tmp_path, lambda run: without_room(run, disk), plan=plan, env=ENV)
    clean(report)
    assert report.figures["unknown"] == 0, report.as_json()
