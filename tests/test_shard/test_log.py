"""The running log: appends, groups, looks, bounds, fsync policies, a full disk, threads."""

from __future__ import annotations

import asyncio
import errno
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from fleetlm_shard.disk import OsDisk
from fleetlm_shard.framing import HEADER_BYTES
from fleetlm_shard.lanes import thread_lanes
from fleetlm_shard.log import Durable, Log
from fleetlm_shard.log_types import (
    GroupTooLarge,
    LogBusy,
    LogConfig,
    LogDiskFull,
    LogStopped,
)
from fleetlm_shard.reader import Wanted
from fleetlm_shard.records import CursorMoved, Record, SessionCreated, SlotsOpened
from fleetlm_shard.recovery import LogBoot
from tests.support.faults import Op, fail_at
from tests.support.logkit import SMALL, TestFence, message, open_log, until
from tests.support.simdisk import NOTHING_KEPT, SimVolume


async def test_what_was_appended_is_read_back_in_pages() -> None:
    """Pages are ascending, contiguous, bounded by count and bytes, and end where the log ends."""
    opened = await open_log(SimVolume().process("p"), 1)
    for seq in range(1, 120):
        await opened.add(message("s", seq, text="x" * (seq % 50)), message(f"other-{seq}", 1))
    assert opened.log.stats.rotations > 3
    page = await opened.log.read("s", first_seq=50, limit=7)
    assert [each.seq for each in page.messages] == list(range(50, 57))
    assert page.has_more
    assert not page.missing
    small = await opened.log.read("s", first_seq=1, limit=100, bytes_max=500)
    assert 1 <= len(small.messages) <= 3
    assert small.has_more
    assert [each.seq for each in await opened.read_all("s", limit=9)] == list(range(1, 120))
    beyond = await opened.log.read("s", first_seq=120, limit=10)
    assert (list(beyond.messages), beyond.has_more) == ([], False)
    assert not (await opened.log.read("nobody", first_seq=1, limit=10)).messages


@pytest.mark.parametrize(
    ("limit", "bytes_max"), [(1, 10**6), (7, 10**6), (40, 10**6), (100, 10**6), (100, 1), (100, 900)]
)
async def test_pages_of_several_sessions_share_the_limits(limit: int, bytes_max: int) -> None:
    """Each page is what the session alone would give; only the last may be cut short, what is behind it is not read."""
    opened = await open_log(SimVolume().process("p"), 1)
    counts = {"few": 3, "none": 0, "many": 30, "one": 1, "last": 5}
    for name, count in counts.items():
        for seq in range(1, count + 1):
            await opened.add(message(name, seq, text="x" * 20), message(f"other-{name}-{seq}", 1, text="y" * 60))
    assert opened.log.stats.rotations > 2
    wanted = [Wanted(name, 2 if name == "few" else 1) for name in counts]
    pages = await opened.log.read_each(wanted, limit=limit, bytes_max=bytes_max)
    left, left_bytes = limit, bytes_max
    for number, (each, page) in enumerate(zip(wanted, pages, strict=False)):
        alone = await opened.log.read(each.session, first_seq=each.first_seq, limit=left, bytes_max=left_bytes)
        assert (list(page.messages), page.has_more) == (list(alone.messages), alone.has_more)
        assert not page.has_more or number == len(pages) - 1
        left -= len(page.messages)
        left_bytes -= sum(len(found.json) for found in page.messages)
        assert number == len(pages) - 1 or min(left, left_bytes) > 0
    assert pages[0].messages
    assert len(pages) == len(wanted) or pages[-1].has_more or min(left, left_bytes) <= 0


async def test_positions_lead_to_the_records_and_never_come_twice() -> None:
    """`append` returns the position that `on_durable` and boot name; they ascend."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    given = [opened.log.append(message("s", seq), f"context {seq}") for seq in range(1, 40)]
    await opened.settle()
    assert [pos for pos, _, _ in opened.durable] == given == sorted(set(given))
    assert [context for _, _, context in opened.durable] == [f"context {seq}" for seq in range(1, 40)]
    await opened.close()
    again = await open_log(volume.process("q"), 2)
    assert [pos for pos, _ in again.replayed] == given
    assert again.log.append(message("s", 40), None) > given[-1]


async def test_messages_beyond_a_position_are_counted() -> None:
    """From the beginning all, from the end none, in between as many as lie there: running, sealed and after a boot."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    places = [opened.log.append(message("s", seq), None) for seq in range(1, 200)]
    await opened.settle()
    assert opened.log.stats.rotations > 3

    def check(log: Log) -> None:
        counts = [log.messages_from(pos) for pos in (0, *places, log.durable_pos)]
        assert (counts[0], counts[-1]) == (199, 0)
        for before, count in enumerate(counts[1:-1]):
            assert abs(count - (199 - before)) <= 1

    check(opened.log)
    await opened.close()
    again = await open_log(volume.process("q"), 2)
    check(again.log)
    await again.settle()
    check(again.log)


async def test_every_kind_of_record_comes_back() -> None:
    """Records of all types survive a boot unchanged."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    records: list[Record] = [
        SlotsOpened(3, [1, 2, 255]),
        SessionCreated(5, "sé", 1_700_000_000_000_000, b'{"a":1}'),
        message("sé", 1),
        CursorMoved(5, "sé", "bob", 1),
    ]
    for record in records:
        opened.log.append(record, None)
    await opened.settle()
    volume.power_loss(NOTHING_KEPT)
    again = await open_log(volume.process("q"), 2)
    assert [record for _, record in again.replayed] == records


async def test_appends_during_a_round_share_the_next_batch() -> None:
    """The batch size tunes itself: ten appends in one tick are one batch, one sync."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    syncs = sum(op.name == "sync" for op in volume.log)
    for seq in range(1, 6):
        opened.log.append(message("s", seq), None)
    await opened.settle()
    assert opened.log.stats.batches == 1
    # One for the batch, one for the segment that is prepared meanwhile.
    assert sum(op.name == "sync" for op in volume.log) - syncs == 2


async def test_a_group_is_never_split() -> None:
    """A group lies in one batch, opened anew if the current one has no room; one that fits no batch is refused."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    for seq in range(1, 8):
        opened.log.append(message("s", seq, text="x" * 90), None)
    group = [message("g", seq, text="y" * 90) for seq in range(1, 6)]
    positions = opened.log.append_group(group, [None] * 5)
    sizes = [after - before for before, after in pairwise(positions)]
    assert len(set(sizes)) == 1, "no BATCH frame stands between the members of a group"
    with pytest.raises(GroupTooLarge):
        opened.log.append_group([message("g", seq, text="y" * 900) for seq in range(6, 10)], [None] * 4)
    with pytest.raises(GroupTooLarge):
        opened.log.append(message("g", 6, text="z" * SMALL.batch_bytes_max), None)
    await opened.settle()
    assert len(opened.acked) == 12


async def test_a_full_queue_refuses_and_recovers() -> None:
    """Past the bounds `LogBusy`, nothing is queued by a refusal; after the disk caught up it goes on."""
    config = replace(SMALL, queue_records_max=10, queue_bytes_max=8000)
    opened = await open_log(SimVolume().process("p"), 1, config)
    for seq in range(1, 11):
        opened.log.append(message("s", seq), None)
    with pytest.raises(LogBusy):
        opened.log.append(message("s", 11), None)
    with pytest.raises(LogBusy):
        opened.log.append_group([message("s", 11)], [None])
    await opened.settle()
    for seq in range(11, 14):
        opened.log.append(message("s", seq, text="x" * 2000), None)
    with pytest.raises(LogBusy):
        opened.log.append(message("s", 14, text="x" * 2000), None)
    await opened.settle()
    assert len(opened.acked) == 13


async def test_not_durable_is_not_visible() -> None:
    """A reader sees nothing of a batch before its round is over."""
    opened = await open_log(SimVolume().process("p"), 1)
    opened.log.append(message("s", 1), None)
    assert not (await opened.log.read("s", first_seq=1, limit=1)).messages or opened.acked
    await opened.settle()
    assert (await opened.log.read("s", first_seq=1, limit=1)).messages


@pytest.mark.parametrize("step", ["pwrite", "sync", "exists", "free_bytes"])
async def test_the_first_error_of_a_round_stops_the_log_for_good(step: str) -> None:
    """A failed write, sync or look acknowledges nothing, then or later; everybody who waits is told, once."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    await opened.add(message("s", 1))
    volume.hooks.append(fail_at(1, errno.EIO, only={step}))
    opened.log.append(message("s", 2), None)
    looks = [asyncio.ensure_future(opened.log.look()) for _ in range(3)]
    results = await asyncio.gather(*looks, return_exceptions=True)
    assert all(isinstance(result, LogStopped) for result in results)
    assert [each.seq for each in opened.acked] == [1]
    assert len(opened.stopped) == 1
    with pytest.raises(LogStopped):
        opened.log.append(message("s", 3), None)
    with pytest.raises(LogStopped):
        await opened.log.look()
    assert [each.seq for each in (await opened.log.read("s", first_seq=1, limit=9)).messages] == [1]


async def test_a_failed_sync_is_not_trusted_after_a_restart() -> None:
    """After a failed sync the kernel calls the lost pages clean: what boot shows is copied and synced anew."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    await opened.add(message("s", 1))
    volume.hooks.append(fail_at(1, errno.EIO, only={"sync"}))
    await opened.add(message("s", 2))
    volume.hooks.clear()
    volume.kill("p")
    again = await open_log(volume.process("q"), 2)
    seen = again.last_seqs()
    volume.power_loss(NOTHING_KEPT)
    third = await open_log(volume.process("r"), 3)
    assert third.last_seqs() == seen


async def test_a_look_is_answered_by_one_that_began_after_it() -> None:
    """A look asked for during a round is not answered by that round's own look."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    loop = asyncio.get_running_loop()
    late: list[asyncio.Future[None]] = []
    asked_at: list[int] = []

    def during(op: Op) -> None:
        if op.name == "exists" and not late:
            late.append(loop.create_task(opened.log.look()))
            asked_at.append(len(volume.log))

    volume.hooks.append(during)
    await opened.log.look()
    await late[0]
    assert any(op.name == "exists" for op in volume.log[asked_at[0] :])


async def test_full_disk_refuses_appends_and_resumes() -> None:
    """Below the reserve appends are refused with nothing broken; with space again they go on."""
    volume = SimVolume(capacity_bytes=120_000)
    config = replace(SMALL, reserve_bytes=40_000, idle_s=0.01)
    opened = await open_log(volume.process("p"), 1, config)
    seq = 0

    async def fill() -> None:
        nonlocal seq
        while True:
            opened.log.append(message("s", seq + 1, text="x" * 1000), None)
            seq += 1
            await opened.settle()

    with pytest.raises(LogDiskFull):
        await fill()
    assert not opened.stopped
    assert len(opened.acked) == seq
    # The reserve is for these.
    await opened.checkpoint()
    await opened.checkpoint()
    await opened.log.look()
    assert await opened.log.trim(max_bytes=0, max_age_s=None, now_ms=0)
    rounds = opened.log.stats.rounds
    await until(lambda: opened.log.stats.rounds >= rounds + 3)
    opened.log.append(message("s", seq + 1), None)
    await opened.settle()
    assert opened.acked[-1].seq == seq + 1
    await opened.close()


async def test_space_that_others_take_refuses_appends_although_the_segment_has_room() -> None:
    """The reserve counts as soon as a look has seen it; a closed log takes nothing either."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1, replace(SMALL, reserve_bytes=40_000))
    await opened.add(message("s", 1))
    volume.capacity_bytes = volume.used_bytes() + 39_999
    await opened.log.look()
    with pytest.raises(LogDiskFull):
        opened.log.append(message("s", 2), None)
    volume.capacity_bytes += 1
    await opened.log.look()
    await opened.add(message("s", 2))
    assert len(opened.acked) == 2
    await opened.close()
    with pytest.raises(LogStopped):
        opened.log.append(message("s", 3), None)


async def test_a_close_without_space_ends_and_says_so() -> None:
    """What was taken in but has no segment to go to is not acknowledged, and `close` does not wait for ever."""
    volume = SimVolume(capacity_bytes=10 * 1024 + SMALL.segment_bytes + 2000)
    opened = await open_log(volume.process("p"), 1)
    await opened.log.look()
    for seq in range(1, 41):
        opened.log.append(message("s", seq, text="x" * 500), None)
    await opened.close()
    assert 10 < len(opened.acked) < 40
    assert isinstance(opened.stopped[0], LogDiskFull)
    volume.capacity_bytes *= 10
    again = await open_log(volume.process("q"), 2)
    assert [each.seq for each in again.messages()] == [each.seq for each in opened.acked]


async def test_a_close_whose_prepared_file_was_cleared_away_ends() -> None:
    """A younger process clears an elder's temporary files away, also while the elder ends in order."""
    volume = SimVolume()
    opened = await open_log(volume.process("elder"), 1)
    await opened.log.look()
    [prepared] = [path for path in volume.paths() if path.startswith("log/tmp-")]
    volume.process("younger").unlink(prepared)
    await opened.close()
    assert opened.stopped == []


async def test_an_idle_log_looks_and_writes_one_mark() -> None:
    """Idle, it looks each interval; one mark proves what was acknowledged, and no second one follows."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1, replace(SMALL, idle_s=0.005))
    await opened.add(message("s", 1))
    rounds = opened.log.stats.rounds
    await until(lambda: opened.log.stats.rounds >= rounds + 10)
    assert opened.log.stats.marks == 1
    # A flipped byte in the last record is now known to be damage, not a torn tail.
    volume.kill("p")
    pos = opened.durable[0][0]
    volume.flip("log/0000000001-0000000001.seg", HEADER_BYTES + pos + 60)
    again = await open_log(volume.process("q"), 2)
    assert again.next_seq("s") == 2
    assert [each.lost_max for each in again.boot.damage] == [1]


async def test_interval_policy_acknowledges_first_and_syncs_soon() -> None:
    """`interval`: durable means written; a sync follows on its own, and a kill loses nothing."""
    volume = SimVolume()
    config = replace(SMALL, fsync="interval", fsync_interval_ms=5)
    opened = await open_log(volume.process("p"), 1, config)

    def own_syncs() -> int:
        return sum(op.name == "sync" and op.path == "log/tmp-0000000001-0000000001" for op in volume.log)

    syncs = own_syncs()
    await opened.add(message("s", 1))
    assert [each.seq for each in opened.acked] == [1]
    await until(lambda: own_syncs() > syncs)
    volume.power_loss(NOTHING_KEPT)
    again = await open_log(volume.process("q"), 2, config)
    assert again.last_seqs() == {"s": 1}


@pytest.mark.parametrize("fsync", ["interval", "never"])
async def test_lazy_policies_lose_a_suffix_only(fsync: str) -> None:
    """Without a sync a power loss takes the end of the log, never the middle, and is not called damage."""
    volume = SimVolume()
    config = replace(SMALL, fsync=fsync, fsync_interval_ms=3_600_000)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    opened = await open_log(volume.process("p"), 1, config)
    for seq in range(1, 60):
        await opened.add(message("s", seq, text="x" * 100))
    for loss in volume.losses():
        twin = volume.copy()
        twin.power_loss(loss)
        again = await open_log(twin.process("q"), 2, config)
        assert not again.boot.damage, loss.name
        got = [each.seq for each in again.messages()]
        assert got == list(range(1, len(got) + 1)), loss.name


async def test_with_threads_on_a_real_disk_all_is_the_same(tmp_path: Path) -> None:
    """The same log with real threads and files: concurrent appends, reads, close, boot."""
    disk = OsDisk(tmp_path)
    config = LogConfig(
        segment_bytes=256 * 1024, boot_segment_bytes=128 * 1024, batch_bytes_max=32 * 1024, reserve_bytes=0
    )
    loop = asyncio.get_running_loop()
    boot = LogBoot.open(disk, TestFence(disk, 1), config, entropy=random.Random(1))
    assert boot.empty
    assert not list(boot.replay())
    durable: list[Durable] = []
    stopped: list[BaseException] = []
    syncs: list[float] = []
    log = Log(
        boot.cut(),
        lanes=thread_lanes(loop, readers=2),
        loop=loop,
        on_durable=durable.extend,
        on_stopped=stopped.append,
        observe_sync=syncs.append,
    )
    log.start()

    async def writer(session: str) -> None:
        for seq in range(1, 101):
            log.append(message(session, seq, text="x" * 100), None)
            await log.look()
            page = await log.read(session, first_seq=seq, limit=5)
            assert [each.seq for each in page.messages] == [seq]

    await asyncio.gather(*(writer(f"s{number}") for number in range(20)))
    assert log.stats.rotations >= 2
    assert len(durable) == 2000
    assert syncs
    await log.close()
    assert not stopped
    again = LogBoot.open(disk, TestFence(disk, 2), config, entropy=random.Random(2))
    assert sum(1 for _ in again.replay()) == 2000
    assert not again.damage


def test_settings_that_do_not_go_together_are_refused() -> None:
    """A segment must hold two full batches."""
    with pytest.raises(ValueError, match="two batches"):
        LogConfig(segment_bytes=8192, batch_bytes_max=8192)
