"""Compaction beside everything else: who comes next, what is looked at, full disks, `verify`, the archive's reader."""

from __future__ import annotations

import contextlib
import errno
import random
from dataclasses import replace

import pytest

from fleetlm_common.ids import SessionId
from fleetlm_shard.archive.feed import Places, Segment, read_piece
from fleetlm_shard.chain import Link, read_span
from fleetlm_shard.compactor import Candidates
from fleetlm_shard.framing import SegmentHeader, scan
from fleetlm_shard.log_types import LogStopped
from fleetlm_shard.records import OF_A_SLOT, Message, RecordType, SessionImported, SlotsReleased
from fleetlm_shard.recovery import LogBoot
from fleetlm_shard.verify import verify_disk
from tests.support.faults import Op, fail_at
from tests.support.logkit import TestFence, formatted, message, open_log
from tests.support.simdisk import SimVolume
from tests.test_shard.test_compaction import BACK, CONFIG, GOES, STAYS, Story, begun, erase, slot_of


def _idle() -> None: ...


BIG = replace(CONFIG, segment_bytes=3 << 20, boot_segment_bytes=64 * 1024)


def swap(volume: SimVolume, path: str, data: bytes, number: int) -> None:
    """A compaction's last step, by the volume's owner."""
    disk = volume.process("owner")
    temp = f"log/tmp-0000000001-{number:010d}"
    file = disk.create(temp)
    file.pwrite(data, 0)
    file.sync()
    file.close()
    disk.replace(temp, path)
    disk.sync_folder("log")


async def test_a_full_disk_one_segment_without_room_does_not_stop_the_others() -> None:
    """The oldest needs more room than there is; a younger one is dead as a whole, and is given back."""
    volume = SimVolume()
    story = Story(await open_log(volume.process("p"), 1, replace(CONFIG, reserve_bytes=160 * 1024)))
    await story.fill(40, STAYS, STAYS, STAYS, GOES)  # oldest: three quarters alive
    await story.fill(90, GOES, seed=2)  # then: dead as a whole
    await story.fill(30, STAYS, seed=3)
    await story.release(GOES)
    await story.checkpoints()
    volume.capacity_bytes = volume.used_bytes() + 106 * 1024
    back = refused = 0
    for _ in range(40):
        try:
            back += await story.opened.log.compact(slot_of)
        except OSError:
            refused += 1
    assert back > 0, f"{refused} tries of the same segment, nothing was given back"


def test_releases_that_go_on_do_not_starve_newer_segments() -> None:
    """A pass over all segments takes a second for each; a release in the middle of it does not begin it anew."""
    links = [
        Link(SegmentHeader("r", "s", 1, n + 1, n * 100, 4096 + 100, n * 100, None, 1), (n + 1) * 100, index_path="x")
        for n in range(20)
    ]
    candidates, seen = Candidates(), set[int]()
    for second in range(400):
        released = {1: 2_000, 2: 2_000 + second // 10}  # a release each ten seconds
        link = candidates.next(links, released, limit_pos=10**9)
        if link is not None:
            seen.add(link.header.number)
    assert len(seen) == 20, sorted(seen)


async def moved_away() -> tuple[SimVolume, Story]:
    """The source's side: plain messages, released; ten segments of them, then some of what stays."""
    volume = SimVolume()
    formatted(volume)
    story = Story(await open_log(volume.process("p"), 1, CONFIG))
    for seq in range(1, 301):
        await story.opened.add(message(GOES, seq, text="x" * 1500))
    await story.fill(60, STAYS)
    return volume, story


@pytest.mark.parametrize("moment", ["between segments", "between a segment and its index", "no checkpoint left"])
async def test_verify_says_nothing_false_of_a_compaction(moment: str) -> None:
    """Of a living owner, who compacts by checkpoints that came after verify began; or without checkpoints."""
    volume, story = await moved_away()
    await story.checkpoints()  # what verify knows
    stale = volume.copy()
    await story.release(GOES)
    await story.checkpoints()
    before = volume.copy()
    done = 0
    while done < 3:
        done += await story.opened.log.compact(slot_of) > 0
    both = [path for path in volume.paths() if path in before.paths() and "-" in path]
    compacted = {path: volume.read(path) for path in both if volume.read(path) != before.read(path)}
    compacted = {path: data for path, data in compacted.items() if path.endswith((".seg", ".idx"))}
    assert len(compacted) == 6, compacted.keys()

    def compact() -> None:
        for count, path in enumerate(sorted(compacted, reverse=True)):
            swap(stale, path, compacted[path], 900 + count)
        compacted.clear()

    if moment == "between segments":
        between = {1: compact}
        report = verify_disk(stale.process("verify"), "", progress=lambda number, _all: between.get(number, _idle)())
    elif moment == "between a segment and its index":

        def on(op: Op) -> None:
            if op.process == "verify" and op.path.endswith(".idx") and reading[-1] == 1:
                compact()

        reading = [-1]
        stale.hooks.append(on)
        report = verify_disk(stale.process("verify"), "", progress=lambda number, _all: reading.append(number))
        assert not compacted, "it came in between"
    else:
        erase(volume, ".ckpt")
        report = verify_disk(volume.copy().process("verify"), "", progress=lambda _a, _b: None)
    assert report.ok, report.problems[:3]


async def test_a_rename_that_fails_leaves_no_file_behind() -> None:
    """Each try (one a minute) leaves another copy of the live part."""
    volume, story = await begun()
    await story.checkpoints()
    before = len([path for path in volume.paths() if "tmp-" in path])
    for _ in range(5):
        volume.hooks.append(fail_at(1, errno.EIO, only={"replace"}))
        with pytest.raises(OSError, match="Input/output"):
            await story.compact()
        volume.hooks.clear()
    assert len([path for path in volume.paths() if "tmp-" in path]) == before


async def test_a_rotten_index_does_not_end_the_shard() -> None:
    """Its segment is left alone, the others are written anew."""
    volume, story = await begun()
    await story.checkpoints()
    index = next(path for path in volume.paths() if path.endswith(".idx"))
    segment = f"{index[:-15]}.seg"
    held = volume.read(segment)
    for at in range(40, 400):
        volume.flip(index, at)
    assert await story.compact() > 0
    assert volume.read(segment) == held
    await story.is_whole(story.opened)


async def test_dead_records_that_are_no_messages_are_given_back() -> None:
    """An import of sessions without messages that was given up: segments in which no message is."""
    volume = SimVolume()
    story = Story(await open_log(volume.process("p"), 1, CONFIG))
    for number in range(60):
        for part in range(4):
            name = f"{number:03d}{part:02d}{'x'}"
            assert slot_of(SessionId(name)) == 6
            metadata = b'{"a":"' + b"m" * 1500 + b'"}'
            story.opened.log.append(SessionImported(6, name, 100, 100, 1, metadata, {}), None)
        await story.opened.settle()
    await story.fill(20, STAYS)
    story.opened.log.append(SlotsReleased([6]), None)
    await story.opened.settle()
    await story.checkpoints()
    assert await story.compact() > 200 * 1024


async def test_a_compaction_looks_at_the_term_after_its_checkpoints() -> None:
    """A younger one has listed the folder; the elder makes two checkpoints, and does not compact by them."""
    volume = SimVolume()
    story = Story(await open_log(volume.process("p"), 1, BIG))
    for seq in range(1, 401):
        await story.opened.add(message(GOES, seq, text="x" * 14_000))
    await story.fill(1, STAYS)
    await story.release(GOES)
    log = story.opened.log
    third = log.durable_pos // 3
    for _ in range(2):
        await story.opened.checkpoint(keys_from_pos=third)
    disk = volume.process("young")
    file = disk.create("term-0000000002")
    file.sync()
    disk.sync_folder("")
    boot = LogBoot.open(disk, TestFence(disk, 2), BIG, entropy=random.Random(1))
    for _ in range(2):
        await story.opened.checkpoint()
    with pytest.raises(LogStopped):
        await story.compact()
    list(boot.replay())
    assert not boot.damage, boot.damage


async def test_an_archive_restored_to_an_older_position_counts_no_damage() -> None:
    """Its position was a batch's start, which lies in a VOID now."""
    volume = SimVolume()
    story = Story(await open_log(volume.process("p"), 1, BIG))
    positions: list[int] = []
    for seq in range(1, 401):
        positions.append(story.opened.log.durable_pos)
        await story.opened.add(message(GOES, seq, text="x" * 14_000))
    await story.fill(1, STAYS)
    await story.release(GOES)
    await story.checkpoints()
    assert await story.compact() > 0
    log = story.opened.log
    places = Places([Segment(header, end_pos) for header, end_pos in log.places()], log.durable_pos)
    disk = volume.process("archiver")
    bad = [pos for pos in positions if read_piece(disk, places, pos).damaged]
    assert not bad, f"{len(bad)} of {len(positions)} positions"


async def test_dead_messages_that_lie_between_live_ones_cost_nothing() -> None:
    """Half of the slots moved, small messages lie mixed: no page is free of live ones, which the indexes alone tell."""
    volume = SimVolume()
    story = Story(await open_log(volume.process("p"), 1, BIG))
    for seq in range(1, 9001):
        name = (STAYS, GOES)[seq % 2]
        story.opened.log.append(message(name, seq // 2 + 1, text="x" * 120), None)
        if seq % 30 == 0:
            await story.opened.settle()
    await story.opened.settle()
    await story.release(GOES)
    await story.checkpoints()
    assert story.opened.log.stats.segments > 1
    read: list[str] = []
    volume.hooks.append(lambda op: read.append(op.path) if op.name == "pread" and op.path.endswith(".seg") else None)
    back = await story.compact()
    first = len(read)
    await story.release(BACK)  # nothing of it is there
    await story.checkpoints()
    read.clear()
    back += await story.compact()
    assert back > 0 or not read, f"{first} reads of segments, and {len(read)} more after the next release"


async def test_few_large_dead_messages_among_many_small_ones_are_given_back() -> None:
    """One of 40 messages is dead, and has nine tenths of the bytes."""
    story = Story(await open_log(SimVolume().process("p"), 1, BIG))
    seqs = {STAYS: 0, GOES: 0}
    for number in range(1, 12001):
        name = GOES if number % 40 == 0 else STAYS
        seqs[name] += 1
        story.opened.log.append(message(name, seqs[name], text="x" * (14_000 if name == GOES else 1)), None)
        if number % 40 == 0:
            await story.opened.settle()
    await story.opened.settle()
    await story.release(GOES)
    await story.checkpoints()
    assert story.opened.log.stats.segments > 1
    assert await story.compact() > 1 << 20


async def test_an_index_that_is_gone_does_not_stop_the_others() -> None:
    """A segment of which something keeps failing does not hold the others up."""
    volume, story = await begun()
    await story.checkpoints()
    log = story.opened.log
    link = Candidates().next(log._sealed, log._kept.released(), limit_pos=log._limit_pos(None))
    assert link is not None
    assert link.index_path is not None
    volume.process("eraser").unlink(link.index_path)
    back = 0
    for _ in range(60):
        with contextlib.suppress(OSError):
            back += await log.compact(slot_of)
    assert back > 0


async def test_a_missing_segment_behind_a_compacted_one_is_bridged_as_before() -> None:
    """The end that is found by reading a compacted segment is its end."""
    volume, story = await begun()
    await story.checkpoints()
    log = story.opened.log
    before = volume.copy()
    while not await log.compact(slot_of):
        pass
    both = [path for path in before.paths() if path.endswith(".seg") and path in volume.paths()]
    done = next(path for path in both if volume.read(path) != before.read(path))
    number = int(done[-14:-4]) + 1
    damages = list[object]()
    for each in (before, volume.copy()):
        each.process("eraser").unlink(f"log/0000000001-{number:010d}.seg")
        for path in each.paths():
            if path.startswith(f"log/0000000001-{number:010d}-"):
                each.process("eraser2").unlink(path)
        again = await open_log(each.process("q"), 2, CONFIG)
        damages.append(again.boot.damage)
    assert damages[0] == damages[1]
    assert damages[0]


@pytest.mark.parametrize("seed", range(10))
async def test_any_log_keeps_what_is_alive(seed: int) -> None:
    """Live frames stay byte for byte, batches that hold them begin where they did, the end is the end."""
    volume, chance = SimVolume(), random.Random(seed)
    opened = await open_log(volume.process("p"), 1, replace(CONFIG, segment_bytes=200 * 1024, idle_s=3600.0))
    names = ["a" * n for n in range(1, 7)]
    seqs = dict.fromkeys(names, 0)
    for _ in range(chance.choice((80, 200))):
        weights = [chance.random() ** 3 for _ in names]
        for _ in range(chance.randint(1, 8)):
            (name,) = chance.choices(names, weights)
            seqs[name] += 1
            opened.log.append(message(name, seqs[name], text="x" * chance.choice((0, 10, 300, 5000, 9000))), None)
        if chance.random() < 0.05:
            opened.log.append(SlotsReleased([chance.randint(1, 6)]), None)
        await opened.settle()
    opened.log.append(SlotsReleased([2, 3, 4]), None)
    await opened.settle()
    for _ in range(2):
        pos = opened.log.durable_pos
        await opened.log.checkpoint({}, pos=pos, keys_from_pos=pos, opened={})
    released = opened.log._kept.released()

    def live(link: Link) -> tuple[list[tuple[int, bytes]], set[int], int]:
        base_pos, end_pos = link.header.base_pos, 0
        data = read_span(volume.process(f"reader {chance.random()}"), link, base_pos, link.end_pos).data
        found, starts = list[tuple[int, bytes]](), set[int]()
        for piece in scan(data, start_pos=base_pos, seed=link.header.seed, proven_pos=link.end_pos):
            alive = [
                (pos, data[start:stop])
                for pos, kind, slot, start, stop in piece.frames
                if kind != RecordType.VOID and not (kind in OF_A_SLOT and pos < released.get(slot, 0))
            ]
            found += alive
            starts |= {piece.pos} if alive else set()
            end_pos = piece.end_pos
        return found, starts, end_pos

    before = [live(link) for link in opened.log._sealed]
    links = list(opened.log._sealed)
    back = sum([await opened.log.compact(slot_of) for _ in range(len(links) * 2)])
    assert before == [live(link) for link in links]
    assert back > 0


async def test_a_disk_below_half_of_its_reserve_still_gets_dead_segments_back() -> None:
    """What is dead as a whole needs a page or two and gives back all of it; checkpoints may have taken the rest."""
    config, volume = replace(CONFIG, reserve_bytes=256 * 1024), SimVolume()
    story = Story(await open_log(volume.process("p"), 1, config))
    await story.fill(90, GOES)
    await story.fill(20, STAYS)
    await story.release(GOES)
    await story.checkpoints()
    volume.capacity_bytes = volume.used_bytes() + 120 * 1024
    back = 0
    for _ in range(60):
        with contextlib.suppress(OSError):
            back += await story.opened.log.compact(slot_of)
    assert back > 0


async def test_a_checkpoint_names_no_release_that_a_power_loss_can_undo() -> None:
    """With fsync `interval` a RELEASED beyond a checkpoint's `pos` may not be on disk; positions are given again."""
    config, volume = replace(CONFIG, fsync="interval", fsync_interval_ms=10_000), SimVolume()
    story = Story(await open_log(volume.process("p"), 1, config))
    await story.fill(10, GOES)
    await story.opened.log.sync()
    pos = story.opened.log.durable_pos  # `Upkeep.checkpoint`: pos is taken, rows are gathered in slices meanwhile
    rows = story.opened.note_rows()
    await story.fill(3, STAYS)
    await story.release(GOES)  # what `clean` had queued just before becomes visible
    await story.opened.log.checkpoint(rows, pos=pos, keys_from_pos=pos, opened={})
    volume.power_loss()
    again = await open_log(volume.process("q"), 2, config)
    slot = slot_of(SessionId(GOES))
    # the slot comes back: all of it is imported anew, acknowledged, synced
    await again.add(message(GOES, 1, text="imported"), message(GOES, 2, text="imported"))
    await again.log.sync()
    found = await again.log.read(GOES, first_seq=1, limit=10, from_pos=again.log.released_pos(slot))
    assert [each.seq for each in found.messages] == [1, 2], (again.log.released_pos(slot), again.log.durable_pos)


async def test_the_archive_reads_a_compacted_log_whole() -> None:
    """A piece at a time, from the beginning: every record that counts, once, in order, and no damage."""
    story = Story(await open_log((volume := SimVolume()).process("p"), 1, BIG))
    await story.fill(700, STAYS, STAYS, GOES, seed=7)
    await story.fill(500, GOES, seed=8)
    await story.fill(100, STAYS, seed=9)
    await story.release(GOES)
    await story.checkpoints()
    assert await story.compact() > 0
    log = story.opened.log
    places = Places([Segment(header, end_pos) for header, end_pos in log.places()], log.durable_pos)
    disk, pos, seqs = volume.process("archiver"), 0, list[int]()
    while pos < log.durable_pos:
        piece = read_piece(disk, places, pos)
        assert not piece.damaged
        assert piece.end_pos > pos
        seqs += [record.seq for _, record in piece.records if isinstance(record, Message) and record.session == STAYS]
        pos = piece.end_pos
    assert seqs == [each.seq for each in story.live[STAYS]]


async def test_a_checkpoint_at_the_end_does_not_wait_for_a_compaction() -> None:
    """What is under way ends at its next pause, and the segment is as it was."""
    volume, story = await begun()
    await story.checkpoints()
    before = {path: volume.read(path) for path in volume.paths() if path.endswith(".seg")}
    log, made = story.opened.log, list[int]()
    volume.hooks.append(lambda op: log._compactor.give_way() if op.name == "create" and not made else None)
    assert await log.compact(slot_of) == 0
    volume.hooks.clear()
    assert {path: volume.read(path) for path in before} == before
    await story.opened.checkpoint()
    assert await story.compact() > 0
    assert volume.read(min(before)) != before[min(before)], "the oldest, which had begun, has another turn"
