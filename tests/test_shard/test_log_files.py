"""The log's files over several boots: checkpoints, retention, damage, strays, elders."""

from __future__ import annotations

import asyncio
import errno
import random

import pytest

from fleetlm_shard.framing import HEADER_BYTES
from fleetlm_shard.log_types import (
    CheckpointRow,
    LogBusy,
    LogStopped,
    LogUnreadable,
    Missing,
)
from fleetlm_shard.records import Damaged, Trimmed
from fleetlm_shard.recovery import LogBoot
from tests.support.faults import Op, fail_at
from tests.support.logkit import SMALL, TestFence, boot_log, message, open_log, run_log
from tests.support.simdisk import SimVolume


async def test_a_checkpoint_shortens_boot_and_keeps_the_key_window() -> None:
    """Boot hands out only what follows the checkpoint or the window's start; rows come from the table."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    for seq in range(1, 100):
        await opened.add(message("s", seq, text="x" * 60), message(f"t{seq}", 1))
    await opened.checkpoint(keys_from_pos=opened.durable[-20][0])
    await opened.add(message("s", 100))
    volume.kill("p")
    again = await open_log(volume.process("q"), 2)
    meta = again.boot.checkpoint
    assert meta is not None
    assert len(again.replayed) < 60
    assert meta.keys_from_pos <= opened.durable[-20][0]
    assert again.last_seqs()["s"] == 100
    assert len(list(again.boot.rows())) == 100
    assert [session for session, _ in again.boot.rows("t90")] == [f"t{n}" for n in range(91, 100)]
    row = again.log.row("t5")
    assert row is not None
    assert (row.first_seq, row.last_seq, row.metadata) == (1, 1, b"{}")
    assert again.log.row("nobody") is None


async def test_checkpoints_merge_and_older_ones_go() -> None:
    """Each carries all rows; only the two newest files stay."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    for number in range(300):
        await opened.add(message(f"s{number:03d}", 1))
    await opened.checkpoint()
    for round_number in range(2, 5):
        await opened.add(message("s007", round_number), message(f"new{round_number}", 1))
        pos = opened.log.durable_pos
        rows = opened.note_rows()
        changed = {session: rows[session] for session in ("s007", f"new{round_number}")}
        await opened.log.checkpoint(changed, pos=pos, keys_from_pos=pos, opened={})
    rows = dict(opened.log.rows())
    assert len(rows) == 303
    assert rows["s007"].last_seq == 4
    assert rows["s299"].last_seq == 1
    await opened.log.look()
    await opened.close()
    assert sum(path.endswith(".ckpt") for path in volume.paths()) == 2


async def test_a_second_checkpoint_at_once_is_refused_and_a_failed_one_changes_nothing() -> None:
    """At most one at a time; an error of the disk leaves the last one in force and the log running."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    await opened.add(message("s", 1))
    running = asyncio.ensure_future(opened.checkpoint())
    await asyncio.sleep(0)
    with pytest.raises(LogBusy):
        await opened.checkpoint()
    await running
    await opened.add(message("s", 2))
    volume.hooks.append(fail_at(1, errno.ENOSPC, only={"create"}))
    with pytest.raises(OSError, match="No space"):
        await opened.checkpoint()
    assert opened.log.row("s") == CheckpointRow(
        1, 1, opened.durable[0][0], 1, opened.durable[0][0], message("s", 1).inserted_at_us, b"{}", {}
    )
    await opened.add(message("s", 3))
    await opened.checkpoint()
    assert opened.log.stats.checkpoint_failures == 1


async def test_a_damaged_newest_checkpoint_costs_time_only() -> None:
    """With one byte of it wrong, boot takes the one before and reads more."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    for seq in range(1, 60):
        await opened.add(message("s", seq, text="x" * 100))
        if seq in {20, 40}:
            await opened.checkpoint()
    await opened.log.trim(max_bytes=0, max_age_s=None, now_ms=0)
    await opened.close()
    newest = [path for path in volume.paths() if path.endswith(".ckpt")][-1]
    volume.flip(newest, 40)
    again = await open_log(volume.process("q"), 2)
    assert again.last_seqs() == {"s": 59}
    assert newest in again.boot.strays
    assert not again.boot.damage


async def test_retention_drops_old_segments_and_says_where_the_log_begins() -> None:
    """By size and by age; only below both checkpoints; readers get the trimmed range; a reboot agrees."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    for seq in range(1, 100):
        await opened.add(message("s", seq, text="x" * 100, at_us=seq * 1_000_000), *([message("old", 1)] * (seq == 1)))
    assert not await opened.log.trim(max_bytes=0, max_age_s=None, now_ms=0), "no checkpoint covers anything"
    await opened.checkpoint()
    assert not await opened.log.trim(max_bytes=0, max_age_s=None, now_ms=0), "one checkpoint is no spare"
    await opened.checkpoint()
    assert not await opened.log.trim(max_bytes=1 << 30, max_age_s=1000, now_ms=100_000)
    assert not await opened.log.trim(max_bytes=0, max_age_s=None, now_ms=0, below_pos=0), "nothing is archived"
    assert await opened.log.trim(max_bytes=None, max_age_s=70, now_ms=100_000)
    by_age = opened.log.trim_pos
    assert by_age > 0
    assert await opened.log.trim(max_bytes=2 * SMALL.segment_bytes, max_age_s=None, now_ms=0)
    assert opened.log.trim_pos > by_age
    assert opened.log.stats.segment_bytes <= 2 * SMALL.segment_bytes
    first = await opened.log.earliest("s")
    assert first is not None
    assert first[1] >= opened.log.trim_pos
    page = await opened.log.read("s", first_seq=1, limit=3)
    assert list(page.missing) == [Missing(1, first[0] - 1, "trimmed")]
    assert page.messages[0].seq == first[0]
    assert await opened.log.earliest("old") is None
    await opened.close()
    again = await open_log(volume.process("q"), 2)
    assert again.log.trim_pos == opened.log.trim_pos
    assert await again.log.earliest("s") == first
    assert again.last_seqs() == {"s": 99, "old": 1}
    assert not again.boot.damage


async def test_a_read_beside_retention_is_not_called_damage() -> None:
    """A segment that is deleted while it is read leads to a second try, not to damage."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    for seq in range(1, 100):
        await opened.add(message("s", seq, text="x" * 100))
    await opened.checkpoint()
    await opened.checkpoint()
    path = opened.log._sealed[0].path
    trims: list[asyncio.Task[bool]] = []

    def trim_now(op: Op) -> None:
        # The reader has got its list of segments and is about to open the first one.
        if op.name == "open" and op.path == path and not trims:
            volume.drop_name(path)
            gone, *opened.log._sealed = opened.log._sealed
            header = opened.log._sealed[0].header
            opened.log._trim = Trimmed(header.term, header.number, gone.end_pos)
            trims.append(asyncio.ensure_future(opened.log.trim(max_bytes=0, max_age_s=None, now_ms=0)))

    volume.hooks.append(trim_now)
    page = await opened.log.read("s", first_seq=1, limit=5)
    assert await trims[0]
    assert not opened.log.damage
    assert [each.reason for each in page.missing] == ["trimmed"]
    assert page.messages[0].seq == page.missing[0].to_seq + 1


async def test_damage_found_by_a_reader_is_said_and_kept_aside() -> None:
    """Rot in a sealed segment: that message is missing as damaged, the rest is there, the bytes are kept."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    for seq in range(1, 60):
        await opened.add(message("s", seq, text="x" * 100))
    volume.flip("log/0000000001-0000000001.seg", HEADER_BYTES + opened.durable[4][0] + 100)
    page = await opened.log.read("s", first_seq=1, limit=10)
    assert [each.seq for each in page.messages] == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert list(page.missing) == [Missing(5, 5, "damaged")]
    assert opened.log.damage
    await opened.log.read("s", first_seq=1, limit=10)
    assert len(opened.log.damage) == 1
    await opened.close()
    assert "aside/0000000001-0000000001.seg" in volume.paths()


async def test_a_damaged_index_is_built_again() -> None:
    """An index is derived: with a wrong byte, or gone, reads find everything all the same."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    for seq in range(1, 60):
        await opened.add(message("s", seq, text="x" * 100))
    indexes = [path for path in volume.paths() if path.endswith(".idx")]
    volume.flip(indexes[0], 30)
    volume.drop_name(indexes[1])
    assert [each.seq for each in await opened.read_all("s")] == list(range(1, 60))
    assert not opened.log.damage


async def test_a_bad_sector_at_the_end_is_damage_and_no_torn_tail() -> None:
    """The disk refuses the sector that may hold the last batch: it is said, and no seq is given twice."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    await opened.add(message("s", 1), message("s", 2))
    volume.kill("p")
    preads = 0

    def bad_sector(op: Op) -> None:
        nonlocal preads
        if op.name == "pread" and op.path.endswith(".seg"):
            preads += 1
            # The header is read, then all of the rest at once, then sector by sector.
            if preads in {2, 3}:
                raise OSError(errno.EIO, "bad sector")

    volume.hooks.append(bad_sector)
    again = await open_log(volume.process("q"), 2)
    assert again.boot.damage
    assert again.next_seq("s") > 2
    assert again.next_seq("t") > 1


async def test_an_index_names_what_was_lost() -> None:
    """Damage in a sealed segment that boot reads: the index says which messages it held, nothing is skipped."""
    volume = SimVolume()
    opened = await open_log(volume.process("p"), 1)
    for seq in range(1, 40):
        await opened.add(message("s", seq, text="x" * 100))
    await opened.close()
    volume.flip("log/0000000001-0000000001.seg", HEADER_BYTES + opened.durable[4][0] + 100)
    again = await open_log(volume.process("q"), 2)
    assert [each.lost_max for each in again.boot.damage] == [0]
    assert again.next_seq("s") == 40
    assert again.next_seq("unknown") == 1
    third = await open_log(volume.process("r"), 3)
    assert third.boot.damage == again.boot.damage
    fourth = await open_log(volume.process("s"), 4)
    damaged = [record for _, record in fourth.replayed if isinstance(record, Damaged)]
    assert len(damaged) == 1, "damage is written down once"


async def test_files_of_others_are_refused_or_left_alone() -> None:
    """A segment of another shard refuses the boot; unknown names are strays; temporary files of elders go."""
    volume = SimVolume()
    disk = volume.process("p")
    opened = await open_log(disk, 1)
    await opened.add(message("s", 1))
    disk.create("log/notes.txt").close()
    disk.create("log/tmp-0000000001-0000000099").close()
    volume.kill("p")
    other = TestFence(volume.process("x"), 2, shard="shard-9")
    with pytest.raises(LogUnreadable, match="shard-0"):
        LogBoot.open(other.disk, other, SMALL, entropy=random.Random(1))
    again = await open_log(volume.process("q"), 2)
    assert again.boot.strays == ["log/notes.txt"]
    await again.close()
    assert not any("tmp-" in path for path in volume.paths())
    assert "log/notes.txt" in volume.paths()


async def test_housekeeping_that_fails_is_counted_and_done_by_the_next_boot() -> None:
    """A disk that does not let a leftover go ends nothing."""
    volume = SimVolume()
    disk = volume.process("p")
    await open_log(disk, 1)
    disk.create("log/tmp-0000000001-0000000099").close()
    volume.kill("p")
    volume.hooks.append(fail_at(1, errno.EIO, only={"unlink"}, path="-0000000099"))
    again = await open_log(volume.process("q"), 2)
    await again.add(message("s", 1))
    assert len(again.acked) == 1
    assert again.log.stats.background_failures == 1
    await again.close()
    await (await open_log(volume.process("r"), 3)).close()
    assert not any("tmp-" in path for path in volume.paths())


async def test_an_elders_late_writes_are_never_read() -> None:
    """A frozen elder, continued after the younger's cut: its batches, rotation, index, nothing of it is read."""
    volume = SimVolume()
    elder_disk = volume.process("elder")
    elder = await open_log(elder_disk, 1)
    for seq in range(1, 5):
        await elder.add(message("s", seq, text="x" * 100))
    younger_disk = volume.process("younger")
    younger_disk.create("term-0000000002").close()
    booted = boot_log(younger_disk, 2)
    assert len(booted[1]) == 4
    # The elder does not know: it goes on as if it had not been frozen, also past the end of its segment.
    elder.fence.look = lambda: None  # type: ignore[method-assign]
    for seq in range(5, 80):
        await elder.add(message("s", seq, text="late" * 30))
    assert elder.log.stats.rotations
    await elder.log.look()
    assert any(path.endswith("0000000001.idx") for path in volume.paths()), "it sealed its segment"
    younger = run_log(*booted)
    await younger.add(message("s", 5, text="young"))
    await younger.close()
    # Even if nothing but the elder's index of the segment that was cut is left: it ends elsewhere, so it is not used.
    for path in [path for path in volume.paths() if path.endswith("-0000000002.idx")]:
        volume.drop_name(path)
    third = await open_log(volume.process("third"), 3)
    assert third.last_seqs() == {"s": 5}
    found = await third.read_all("s")
    assert [each.seq for each in found] == [1, 2, 3, 4, 5]
    assert b"young" in found[-1].json
    assert not third.log.damage
    assert "log/0000000001-0000000001.seg" in volume.paths(), "nobody deletes what was not trimmed"
    assert any(path.startswith("log/0000000001-") for path in third.boot.strays)


async def test_a_frozen_elder_answers_nothing_when_it_is_continued() -> None:
    """SIGSTOP before any operation of an append, a younger boots, SIGCONT: nothing more is acknowledged, one stop."""
    for number in range(1, 6):
        volume = SimVolume()
        disk = volume.process("elder")
        opened = await open_log(disk, 1)
        await opened.add(message("s", 1))
        ran: list[int] = []

        def younger_boots(op: Op, number: int = number, ran: list[int] = ran, volume: SimVolume = volume) -> None:
            if op.process != "elder":
                return
            ran.append(1)
            if len(ran) == number:
                door = volume.process("younger")
                door.create("term-0000000002").close()
                fence = TestFence(door, 2)
                boot = LogBoot.open(door, fence, SMALL, entropy=random.Random(2))
                assert list(boot.replay())
                boot.cut()

        volume.hooks.append(younger_boots)
        opened.log.append(message("s", 2), None)
        await opened.settle()
        # It may have been frozen after its last look of that round: then the next look ends it.
        results = await asyncio.gather(opened.log.look(), opened.log.look(), return_exceptions=True)
        assert all(isinstance(result, LogStopped) for result in results)
        if number <= 3:  # pwrite, sync, look
            assert [each.seq for each in opened.acked] == [1], number
