"""What slots leave behind on a shard is given back under load, with real processes that are killed meanwhile."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

import msgspec
import pytest

from fleetlm_cli.asking import is_steady, owns_nothing
from fleetlm_common.ids import ShardName
from fleetlm_shard.verify import verify
from tests.integration.kills import Plan
from tests.integration.moves import Mover
from tests.integration.test_moves_full_disk import written_bytes
from tests.support.eventually import eventually
from tests.support.faultload import FaultRun, under_load
from tests.support.load import clean

SEGMENT_BYTES: Final = 4 * 1024 * 1024
ENV: Final = {
    "FLEETLM_SHARD_SEGMENT_BYTES": str(SEGMENT_BYTES),
    "FLEETLM_SHARD_KEYS_WINDOW_S": "15",
    "FLEETLM_SHARD_CLEAN_AFTER_S": "1",
}
"""Copies are compacted half a minute after a move instead of a quarter of an hour."""
COMPACTED_S_MAX: Final = 120.0
SHARDS: Final = (ShardName("shard-0"), ShardName("shard-1"))


def has_holes(volume: Path) -> bool:
    """Whether a segment was written anew: most of its file takes no space."""
    found = [each.stat() for each in (volume / "log").glob("*.seg")]
    return any(each.st_blocks * 512 < each.st_size // 2 for each in found)


def written(run: FaultRun, enough_bytes: int) -> bool:
    """Whether so much was acknowledged."""
    return written_bytes(run) >= enough_bytes


async def handed_over(mover: Mover, name: ShardName) -> None:
    """All slots are on the other shard, then evenly spread again."""
    mover.ask(lambda spec: msgspec.structs.replace(spec, cordoned=(name,)))
    await mover.until(lambda view, status: owns_nothing(view, name) and is_steady(view, status), f"{name} is empty")
    mover.ask(lambda spec: msgspec.structs.replace(spec, cordoned=()))
    await mover.until(lambda view, status: is_steady(view, status) and not owns_nothing(view, name), "evenly spread")


async def there_and_back(run: FaultRun) -> None:
    """Each shard hands over to the other one; each is killed when it has begun to give back, and goes on with that."""
    mover = Mover(run, kills=False)
    for name in SHARDS:
        enough = written_bytes(run) + 3 * SEGMENT_BYTES
        await eventually(partial(written, run, enough), "there is something to copy", timeout_s=90)
        await handed_over(mover, name)
    for name in SHARDS:
        holes = partial(has_holes, run.fleet.data / name)
        await eventually(holes, f"{name} gives something back", timeout_s=COMPACTED_S_MAX)
        run.fleet.kill(name)
        await run.fleet.wait_ready(name)
        await run.progress()


@pytest.mark.long
@pytest.mark.timeout(420)
async def test_copies_are_given_back_and_nothing_else_is(tmp_path: Path) -> None:
    """No promise is broken by compaction amid kills, and both volumes are whole afterwards."""
    plan = Plan(kills=0, seed=1, shards=2, sessions=8, writers=6, readers=4, write_pause_s=0.02, text_chars_max=8_000)
    report = await under_load(tmp_path, there_and_back, plan=plan, env=ENV)
    clean(report)
    for name in SHARDS:
        checked = verify(tmp_path / "ring" / name)
        assert checked.ok, checked.problems
