"""Replay: pages are contiguous, holes are said, whatever memory holds."""

from __future__ import annotations

import pytest

from fleetlm_common import rpc
from fleetlm_common.errors import Invalid
from fleetlm_common.limits import PAGE_BYTES_MAX
from tests.support.eventually import eventually
from tests.support.rpcclient import RpcClient, draft
from tests.support.shardrig import Rig, shard_rig
from tests.support.simdisk import SimVolume

MIB = 1024 * 1024


async def fill(client: RpcClient, session: str, count: int, *, text: str = "") -> None:
    """`count` messages with contents `text` + number."""
    await client.append_entries(session, *(rpc.Entry([draft(f"{number}{text}")]) for number in range(1, count + 1)))


def forget(rig: Rig, session: str) -> None:
    """Drop what memory holds of the session's messages, as the budget does."""
    state = rig.shard.memory.sessions.get(session)
    rig.shard.memory.sessions.bytes -= state.ring_bytes
    state.ring.clear()
    state.ring_bytes = 0


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize(
    ("ask", "seqs", "more"),
    [
        ({"after": 0, "limit": 4}, [1, 2, 3, 4], True),
        ({"after": 0, "limit": 10}, list(range(1, 11)), False),
        ({"after": 7, "limit": 10}, [8, 9, 10], False),
        ({"after": 10, "limit": 10}, [], False),
        ({"before": 11, "limit": 3}, [8, 9, 10], True),
        ({"before": 4, "limit": 10}, [1, 2, 3], False),
        ({"before": 1, "limit": 10}, [], False),
        ({"before": 10_000, "limit": 2}, [9, 10], True),
        ({"tail": 3}, [8, 9, 10], True),
        ({"tail": 50}, list(range(1, 11)), False),
        ({"tail": 0}, [], True),
    ],
)
async def test_forms_of_pages(cold: bool, ask: dict[str, int], seqs: list[int], more: bool) -> None:
    """`after`, `before` and `tail` answer ascending, contiguous pages, from memory and from the disk alike."""
    async with shard_rig() as rig, await rig.client() as client:
        await fill(client, "s", 10)
        if cold:
            forget(rig, "s")
        page = await client.read("s", **ask)
        assert [page.first_seq + index for index in range(len(page.messages))] == seqs
        assert [f'"seq":{seq},'.encode() in json for seq, json in zip(seqs, page.messages, strict=True)] == [
            True
        ] * len(seqs)
        assert (page.has_more, page.last_seq, page.earliest_seq, page.gap) == (more, 10, 1, None)


async def test_an_empty_session() -> None:
    """A session without messages has last_seq 0 and earliest_seq 1."""
    async with shard_rig() as rig, await rig.client() as client:
        for page in (await client.read("s", after=0), await client.read("s", tail=5), await client.read("s", before=1)):
            assert (page.messages, page.has_more, page.last_seq, page.earliest_seq, page.gap) == ([], False, 0, 1, None)
        info = await client.info("s")
        assert (info.exists, info.last_seq, info.earliest_seq, info.inserted_at) == (False, 0, 1, "")


async def test_a_cursor_beyond_the_end_is_refused() -> None:
    """Somebody who has seen more than this ring holds is told so, with what there is."""
    async with shard_rig() as rig, await rig.client() as client:
        await fill(client, "s", 3)
        for ask in (client.read("s", after=4), client.info("s", cursor=4), client.subscribe("s", after=4)):
            with pytest.raises(Invalid) as refused:
                await ask
            assert (refused.value.reason, refused.value.last_seq) == ("cursor_ahead", 3)
        assert (await client.read("s", after=3)).messages == []


@pytest.mark.parametrize(
    "ask",
    [
        {},
        {"after": 0, "tail": 1},
        {"after": -1},
        {"before": 0},
        {"tail": -1},
        {"after": 0, "limit": 0},
        {"after": 0, "limit": 1001},
    ],
)
async def test_malformed_reads_are_refused(ask: dict[str, int]) -> None:
    """Exactly one place to read from, within bounds."""
    async with shard_rig() as rig, await rig.client() as client:
        with pytest.raises(Invalid):
            await client.read("s", **ask)


async def test_pages_are_bounded_in_bytes_and_follow_each_other() -> None:
    """Large messages make short pages; together they are everything, forwards and backwards, warm and cold."""
    async with shard_rig() as rig, await rig.client() as client:
        text = "x" * 50_000
        for number in range(1, 61):
            await client.append("s", f"{number} {text}")
        for drop in (False, True):
            if drop:
                forget(rig, "s")
            assert [message["seq"] for message in await client.read_all("s")] == list(range(1, 61))
            seqs: list[int] = []
            before = 61
            while True:
                page = await client.read("s", before=before)
                assert page.gap is None
                assert sum(map(len, page.messages)) <= PAGE_BYTES_MAX
                assert page.first_seq + len(page.messages) == before
                seqs = [*range(page.first_seq, before), *seqs]
                before = page.first_seq
                if not page.has_more:
                    break
            assert seqs == list(range(1, 61))


async def test_what_retention_dropped_is_a_gap() -> None:
    """A reader below the earliest message gets one gap that names it, then the rest; nothing is skipped in silence."""
    async with shard_rig(retention_bytes=1, keys_window_s=15.0) as rig, await rig.client() as client:
        text = "x" * 50_000
        for number in range(1, 201):
            await client.append("s", f"{number} {text}")
        await client.append("other", "one")
        last_seq = (await client.info("s")).last_seq
        await trim(rig)
        forget(rig, "s")
        info = await client.info("s")
        assert 1 < info.earliest_seq <= last_seq
        page = await client.read("s", after=0, limit=5)
        assert page.gap == rpc.Gap("trimmed", 1, info.earliest_seq, info.earliest_seq, last_seq)
        assert page.first_seq == info.earliest_seq
        assert [message["seq"] for message in await client.read_all("s", after=info.earliest_seq - 1)] == list(
            range(info.earliest_seq, last_seq + 1)
        )
        page = await client.read("s", before=info.earliest_seq + 3)
        assert (page.first_seq, len(page.messages), page.has_more) == (info.earliest_seq, 3, False)
        assert page.gap is not None
        assert (page.gap.from_seq, page.gap.next_seq) == (1, info.earliest_seq)


async def test_a_damaged_message_is_a_gap_and_ends_a_page() -> None:
    """What is before it is answered first, then the gap with what follows; backwards the same; nothing is skipped."""
    volume = SimVolume()
    async with shard_rig(volume) as rig, await rig.client() as client:
        for number in range(1, 11):
            await client.append("s", f"text-{number}-")
        [path] = [path for path in volume.paths() if path.endswith(".seg") and b"text-5-" in volume.read(path)]
        volume.flip(path, volume.read(path).index(b"text-5-"))
        forget(rig, "s")
        page = await client.read("s", after=0)
        assert (page.first_seq, len(page.messages), page.has_more, page.gap) == (1, 4, True, None)
        page = await client.read("s", after=4, limit=4)
        gap = rpc.Gap("damaged", 5, 6, 1, 10)
        assert (page.first_seq, len(page.messages), page.has_more, page.gap) == (6, 3, True, gap)
        for page in (await client.read("s", tail=8), await client.read("s", before=11, limit=8)):
            assert (page.first_seq, len(page.messages), page.has_more, page.gap) == (6, 5, True, gap)
            forget(rig, "s")
        page = await client.read("s", before=6, limit=8)
        assert (page.messages, page.has_more, page.gap) == ([], True, rpc.Gap("damaged", 5, 6, 1, 10))
        page = await client.read("s", before=5, limit=8)
        assert (page.first_seq, len(page.messages), page.has_more, page.gap) == (1, 4, False, None)
        assert (rig.shard.health().ok, rig.shard.health().reason) == (True, "LogDamaged")
        assert [ack.seq for ack in await client.append("s", "next")] == [11]


async def test_a_session_of_which_nothing_is_left() -> None:
    """Its seq goes on where it was; its readers get a gap up to the next message."""
    async with shard_rig(retention_bytes=1, keys_window_s=15.0) as rig, await rig.client() as client:
        await fill(client, "s", 3)
        for number in range(1, 201):
            await client.append("bulk", f"{number} " + "x" * 50_000)
        await trim(rig)
        forget(rig, "s")
        info = await client.info("s")
        assert (info.last_seq, info.earliest_seq) == (3, 4)
        page = await client.read("s", after=1)
        assert page.gap == rpc.Gap("trimmed", 2, 4, 4, 3)
        assert (page.messages, page.has_more, page.first_seq) == ([], False, 4)
        page = await client.read("s", tail=2)
        assert (page.gap, page.has_more) == (rpc.Gap("trimmed", 2, 4, 4, 3), False)
        rig.clock.advance(60.0)
        assert [ack.seq for ack in await client.append("s", "more")] == [4]
        page = await client.read("s", after=0)
        assert page.gap == rpc.Gap("trimmed", 1, 4, 4, 4)
        assert len(page.messages) == 1


async def trim(rig: Rig) -> None:
    """Two checkpoints (both kept ones must cover it), then retention."""
    rig.clock.advance(100.0)
    for _ in range(100):
        rig.shard.memory.keys.evict(rig.clock.monotonic_s())
    await eventually(lambda: rig.shard.log.stats.rotations > 0, "the log has more than one segment")
    for _ in range(2):
        assert await rig.shard.upkeep.checkpoint()
    await rig.shard.upkeep.retain()
    assert rig.shard.log.trim_pos > 0
