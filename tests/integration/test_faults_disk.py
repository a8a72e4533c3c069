"""A shard process on a real file system that fills up, or turns read-only, while it writes (loop mounts: root)."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

from fleetlm_common.errors import FleetError, TryAgain
from fleetlm_common.ids import Epoch, ShardName
from fleetlm_shard.process import EXIT_FAILED
from tests.support.eventually import POLL_S
from tests.support.loopmount import loop_mount
from tests.support.rpcclient import RpcClient
from tests.support.shardprocess import ShardProcess, ShardRing

pytestmark = pytest.mark.root

SMALL = {"SEGMENT_BYTES": str(4 * 1024 * 1024), "DISK_RESERVE_BYTES": str(8 * 1024 * 1024)}
TEXT_BYTES = 50_000
SHARD = ShardName("shard-0")


def text_of(number: int) -> str:
    """A content that says its number and takes room."""
    return f"{number}:" + "x" * TEXT_BYTES


async def append_until_refused(client: RpcClient, first: int = 1) -> tuple[int, Exception]:
    """Append one after the other; returns the last that was acknowledged, and why the next was not."""
    for number in itertools.count(first):
        try:
            await client.append("s", text_of(number), key=f"k{number}")
        except (FleetError, ConnectionError, TimeoutError) as error:
            return number - 1, error
    raise AssertionError("unreachable")


async def assert_all(shard: ShardProcess, last: int) -> None:
    """Everything acknowledged is there, whole and in order; at most one more that was not answered."""
    async with await shard.client() as client:
        contents = [str(one["content"]) for one in await client.read_all("s")]
    assert contents[:last] == [text_of(number) for number in range(1, last + 1)]
    assert len(contents) <= last + 1


async def acted(ring: ShardRing, epoch: Epoch) -> None:
    """The shard has stored the map of this epoch, done what it asks for, and says so."""
    async with asyncio.timeout(20):
        while (await ring.control.read()).shards[SHARD].epoch != epoch:  # noqa: ASYNC110  a file says it
            await asyncio.sleep(POLL_S)


async def test_a_volume_fills_up_and_is_given_room_again(tmp_path: Path) -> None:
    """Full by its own log, then to the last byte by somebody else: `TRY_AGAIN disk_full`, reads go on, then appends."""
    with loop_mount(tmp_path, mib=64) as disk:
        ring = ShardRing(tmp_path)
        async with ring.shard(data=disk.path / "shard-0", env=SMALL) as shard:
            async with await shard.client() as client:
                last, why = await append_until_refused(client)
                assert isinstance(why, TryAgain)
                assert why.reason == "disk_full"
                assert last > 200
                await shard.wait_reason("DiskFull")
                await assert_all(shard, last)
            await shard.kill()
        # What is kept in reserve lets it boot, say so, and serve what it holds.
        async with ring.process(data=disk.path / "shard-0", env=SMALL) as again:
            await again.wait_reason("DiskFull")
            await assert_all(again, last)
            disk.fill()
            members = (await ring.bind()).members
            for _ in range(3):  # other slots move, or these come back: the ring has newer maps all the same
                await acted(ring, (await ring.publish(members, [SHARD] * ring.slots)).epoch)
                await assert_all(again, last)
            async with await again.client() as client:
                with pytest.raises(TryAgain):
                    await client.append("s", text_of(last + 1), key=f"k{last + 1}")
            await again.kill()
        # Without one byte it cannot begin the segment that its term needs: it ends, says why, and has changed nothing.
        async with ring.process(data=disk.path / "shard-0", env=SMALL) as starved:
            assert await starved.ended() == EXIT_FAILED
            assert "No space left on device" in starved.printed()
        disk.free()
        async with ring.process(data=disk.path / "shard-0", env={**SMALL, "DISK_RESERVE_BYTES": "0"}) as roomy:
            await roomy.wait_reason("Ready")
            async with await roomy.client() as client:
                await client.append("s", text_of(last + 1), key=f"k{last + 1}")
            await assert_all(roomy, last + 1)


async def test_a_volume_turns_read_only_under_load(tmp_path: Path) -> None:
    """The shard acknowledges nothing more, says why and ends with 74; repaired, it serves all that it acknowledged."""
    with loop_mount(tmp_path, mib=128) as disk:
        ring = ShardRing(tmp_path)
        async with ring.shard(data=disk.path / "shard-0", env=SMALL) as shard:
            async with await shard.client() as client:
                load = asyncio.create_task(append_until_refused(client))
                while (await client.info("s")).last_seq < 20:  # noqa: ASYNC110  bounded by the client's own deadline
                    await asyncio.sleep(0)
                disk.abort()
                last, _ = await load
            assert last >= 20
            assert await shard.ended() == EXIT_FAILED
            assert "Read-only file system" in shard.printed() or "EROFS" in shard.printed()
        async with ring.process(data=disk.path / "shard-0", env=SMALL) as refused:
            # Nothing can be locked or written there: it does not serve what it could not defend.
            status = await refused.ended()
            assert status != 0, refused.printed()
        disk.repair()
        async with ring.process(data=disk.path / "shard-0", env=SMALL) as shard:
            await shard.wait_reason("Ready")
            await assert_all(shard, last)
