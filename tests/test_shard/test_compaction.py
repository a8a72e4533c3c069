"""Compaction: what still counts stays where it is, byte for byte, whatever happens meanwhile."""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from fleetlm_common.ids import SessionId
from fleetlm_shard.disk import OsDisk
from fleetlm_shard.log_types import LogConfig
from fleetlm_shard.records import CursorMoved, Imported, Message, SessionImported, SlotsReleased
from fleetlm_shard.verify import verify_disk
from tests.support.faults import Op, fail_at
from tests.support.logkit import Opened, formatted, message, open_log
from tests.support.simdisk import WRITES, SimVolume

CONFIG = LogConfig(
    segment_bytes=48 * 1024,
    boot_segment_bytes=48 * 1024,
    batch_bytes_max=16 * 1024,
    reserve_bytes=0,
    queue_bytes_max=64 * 1024,
    idle_s=3600.0,
)
STAYS, GOES, BACK = "stay", "going", "back42"
"""Slots 4, 5 and 6: one that is owned all the time, one that moved away, one that moved away and came back."""


def slot_of(session: SessionId) -> int:
    """As `message` has it."""
    return len(session) % 7


def as_imported(made: Message) -> Imported:
    """The same message, brought by a move."""
    return Imported(made.slot, made.session, made.seq, made.inserted_at_us, made.key, made.content_hash, made.json)


@dataclass
class Story:
    """A log with much that does not count any more, and what does."""

    opened: Opened
    live: dict[str, list[Message]] = field(default_factory=dict[str, list[Message]])

    async def fill(self, rounds: int, *sessions: str, seed: int = 1) -> None:
        """Batches of messages of these sessions, mixed, of all sizes."""
        chance = random.Random(seed)
        for _ in range(rounds):
            for _ in range(chance.randint(1, 6)):
                name = chance.choice(sessions)
                made = message(name, len(self.live.setdefault(name, [])) + 1, text="x" * chance.randint(0, 1800))
                if name != STAYS:
                    made = as_imported(made)
                self.live[name].append(made)
                self.opened.log.append(made, None)
                if name != STAYS and chance.random() < 0.3:
                    self.opened.log.append(CursorMoved(made.slot, name, "bob", made.seq), None)
                if name != STAYS and chance.random() < 0.2:
                    self.opened.log.append(SessionImported(made.slot, name, made.seq, 0, 1, b"{}", {}), None)
            await self.opened.settle()

    async def release(self, *sessions: str) -> None:
        """What stood of their slots does not count any more."""
        self.opened.log.append(SlotsReleased([slot_of(SessionId(name)) for name in sessions]), None)
        await self.opened.settle()
        for name in sessions:
            self.live[name] = []

    async def checkpoints(self) -> None:
        """The two that know all of it."""
        for _ in range(2):
            await self.fill(1, STAYS)
            await self.opened.checkpoint()

    async def compact(self) -> int:
        """All there is to compact; bytes given back."""
        total = 0
        # A call looks at one segment, and says 0 also of one that is left as it is.
        for _ in range(self.opened.log.stats.segments):
            total += await self.opened.log.compact(slot_of)
        return total

    async def is_whole(self, opened: Opened) -> None:
        """Everything that counts is read, and nothing else."""
        for name, wanted in self.live.items():
            slot = slot_of(SessionId(name))
            from_pos = opened.log.released_pos(slot)
            found, seq = list[tuple[int, bytes]](), 1
            while True:
                page = await opened.log.read(name, first_seq=seq, limit=50, from_pos=from_pos)
                assert not page.missing
                found += [(each.seq, each.json) for each in page.messages]
                if not page.has_more:
                    break
                seq = found[-1][0] + 1
            assert found == [(each.seq, each.json) for each in wanted], name
        assert not opened.log.damage


async def begun() -> tuple[SimVolume, Story]:
    """A log in which half is dead: some 20 segments."""
    volume = SimVolume(split_writes=True)
    formatted(volume)
    story = Story(await open_log(volume.process("p"), 1, CONFIG))
    await story.fill(60, STAYS, GOES, BACK)
    await story.fill(60, GOES, BACK, seed=2)
    await story.fill(30, STAYS, seed=3)
    await story.release(GOES, BACK)
    await story.fill(60, STAYS, BACK, seed=4)
    return volume, story


def whole(volume: SimVolume) -> None:
    """`fleetlm verify` has nothing to say."""
    report = verify_disk(volume.copy().process("verify"), "", progress=lambda _done, _all: None)
    assert report.ok, report.problems


def erase(volume: SimVolume, suffix: str) -> None:
    """Every file of a kind is lost."""
    disk = volume.process("eraser")
    for path in volume.paths():
        if path.endswith(suffix):
            disk.unlink(path)


async def test_what_counts_stays_and_what_does_not_is_given_back() -> None:
    """Half of the log was released: that much is given back, all else is read as before, by the next process too."""
    volume, story = await begun()
    before_bytes = story.opened.log.stats.segment_bytes
    await story.checkpoints()
    back = await story.compact()
    stats = story.opened.log.stats
    assert back == stats.compacted_bytes > before_bytes // 4
    assert stats.segment_bytes < before_bytes * 3 // 4 + 3 * CONFIG.segment_bytes
    assert not stats.background_failures
    await story.is_whole(story.opened)
    assert await story.compact() == 0, "nothing is left to do"
    whole(volume)
    await story.opened.close()
    again = await open_log(volume.process("q"), 2, CONFIG)
    await story.is_whole(again)
    assert again.log.stats.segment_bytes < stats.segment_bytes + 2 * CONFIG.segment_bytes
    story.opened = again
    assert await story.compact() == 0, "nor for the next process"
    whole(volume)


async def test_a_real_file_system_gets_the_space(tmp_path: Path) -> None:
    """The holes of a segment that was written anew take no blocks."""

    def taken() -> int:
        return sum(each.stat().st_blocks * 512 for each in tmp_path.rglob("*.seg"))

    disk = OsDisk(tmp_path)
    story = Story(await open_log(disk, 1, replace(CONFIG, segment_bytes=512 * 1024)))
    await story.fill(300, GOES)
    await story.fill(30, STAYS)
    await story.release(GOES)
    await story.checkpoints()
    before_bytes = taken()
    back = await story.compact()
    assert 0 < back < before_bytes
    # What is sealed now was prepared to its full length; what is written meanwhile is a page or two.
    assert abs(before_bytes - back - taken()) <= 64 * 1024
    await story.is_whole(story.opened)
    await story.opened.close()


async def test_only_what_no_boot_reads_is_touched() -> None:
    """Not before two checkpoints know of the release, not in the idempotency window, not before it is archived."""
    _, story = await begun()
    assert await story.compact() == 0, "no checkpoint"
    window_pos = story.opened.log.durable_pos
    assert story.opened.log.compaction_waits(window_pos)
    await story.fill(1, STAYS)
    await story.opened.checkpoint(keys_from_pos=0)
    assert await story.compact() == 0, "one is no spare"
    await story.fill(1, STAYS)
    await story.opened.checkpoint(keys_from_pos=0)
    assert await story.compact() == 0, "a boot would read all of it for its keys"
    assert not story.opened.log.compaction_waits(0), "newer checkpoints would change nothing"
    assert story.opened.log.compaction_waits(window_pos)
    await story.checkpoints()
    assert not story.opened.log.compaction_waits(window_pos)
    assert await story.opened.log.compact(slot_of, below_pos=0) == 0, "not archived"
    assert await story.compact() > 0


async def test_a_release_that_a_checkpoint_does_not_know_is_none_yet() -> None:
    """A boot that begins with it must find what its rows speak of."""
    story = Story(await open_log(SimVolume().process("p"), 1, CONFIG))
    await story.fill(90, STAYS, GOES)
    await story.checkpoints()
    await story.release(GOES)
    assert await story.compact() == 0
    assert story.opened.log.compaction_waits(story.opened.log.durable_pos)
    await story.checkpoints()
    assert await story.compact() > 0


async def test_what_came_back_into_the_same_segment_stays() -> None:
    """Of one slot, what stands before the release goes, and what stands behind it stays."""
    story = Story(await open_log(SimVolume().process("p"), 1, replace(CONFIG, segment_bytes=256 * 1024)))
    await story.fill(50, BACK)
    await story.release(BACK)
    await story.fill(15, BACK, seed=2)
    await story.fill(150, STAYS, seed=3)
    await story.checkpoints()
    assert await story.compact() > 0
    await story.is_whole(story.opened)


async def test_an_index_that_is_lost_is_built_again_from_a_compacted_segment() -> None:
    """Every byte of it is under a checksum: a boot that must read all of it finds no damage."""
    volume, story = await begun()
    await story.checkpoints()
    assert await story.compact() > 0
    await story.opened.close()
    erase(volume, ".idx")
    again = await open_log(volume.process("q"), 2, CONFIG)
    assert not again.boot.damage
    await story.is_whole(again)


async def test_a_boot_without_checkpoints_reads_a_compacted_log() -> None:
    """It replays all there is, and what was released is gone by its RELEASED."""
    volume, story = await begun()
    await story.checkpoints()
    assert await story.compact() > 0
    wanted = {name: messages[-1].seq for name, messages in story.live.items() if messages}
    await story.opened.close()
    erase(volume, ".ckpt")
    again = await open_log(volume.process("q"), 2, CONFIG)
    assert not again.boot.damage
    assert {name: again.last_seqs()[name] for name in wanted} == wanted
    await story.is_whole(again)


async def test_what_is_released_later_is_compacted_too() -> None:
    """A segment that was written anew is so again when more of it is dead."""
    volume, story = await begun()
    await story.checkpoints()
    first = await story.compact()
    await story.release(BACK)
    await story.checkpoints()
    second = await story.compact()
    assert first > 0
    assert second > 0
    await story.is_whole(story.opened)
    whole(volume)


async def test_no_later_checkpoint_names_a_batch_that_is_gone() -> None:
    """Boots begin where a batch begins, also if the key window were to reach back into a compacted segment."""
    volume = SimVolume()
    story = Story(await open_log(volume.process("p"), 1, replace(CONFIG, segment_bytes=3 << 20)))
    for seq in range(1, 401):
        await story.opened.add(message(GOES, seq, text="x" * 14_000))
    await story.fill(1, STAYS)
    await story.release(GOES)
    await story.checkpoints()
    assert await story.compact() > 0
    for share in range(1, 20):
        await story.opened.checkpoint(keys_from_pos=story.opened.log.durable_pos * share // 20)
        again = await open_log(volume.copy().process("q"), 2, CONFIG)
        assert not again.boot.damage
        await story.is_whole(again)


async def test_damage_is_left_for_those_who_look_into_it() -> None:
    """A segment with a flipped bit is not written anew."""
    volume, story = await begun()
    await story.checkpoints()
    path = next(path for path in volume.paths() if path.endswith(".seg"))
    volume.flip(path, 8_000)
    held = volume.read(path)
    await story.compact()
    assert volume.read(path) == held


async def test_a_crash_anywhere_leaves_one_or_the_other() -> None:
    """Before each operation of a compaction, with every kind of loss: what counts is read, and it can begin anew."""
    volume, story = await begun()
    await story.checkpoints()
    moments: list[tuple[str, SimVolume]] = []

    def before(op: Op) -> None:
        if op.name in WRITES:
            moments.append((f"{op.name} {op.path}", volume.copy()))

    volume.hooks.append(before)
    await story.opened.log.compact(slot_of)
    await story.opened.log.compact(slot_of)
    volume.hooks.clear()
    assert {name.split()[0] for name, _ in moments} >= {"create", "pwrite", "sync", "replace", "sync_folder"}
    for name, moment in moments[:: max(1, len(moments) // 20)] + [each for each in moments if "replace" in each[0]]:
        for loss in moment.losses(singles=False):
            after = moment.copy()
            after.power_loss(loss)
            again = await open_log(after.process("q"), 2, CONFIG)
            await story.is_whole(again)
            assert not again.boot.strays, (name, loss)
            whole(after)
            resumed = Story(again, {name: list(messages) for name, messages in story.live.items()})
            await resumed.checkpoints()
            assert await resumed.compact() > 0, (name, loss)
            await resumed.is_whole(again)
            whole(after)


async def test_a_full_or_failing_disk_changes_nothing() -> None:
    """A compaction that cannot be written is told, and the segment is as it was."""
    volume, story = await begun()
    await story.checkpoints()
    volume.hooks.append(fail_at(2, errno.ENOSPC, only={"pwrite"}))
    with pytest.raises(OSError, match="No space"):
        await story.compact()
    assert not [path for path in volume.paths() if "tmp-" in path and volume.read(path)[:4] == b"FLEE"]
    volume.hooks.clear()
    await story.is_whole(story.opened)
    whole(volume)
    assert await story.compact() > 0, "the next time it can"


async def test_a_full_disk_keeps_half_of_its_reserve() -> None:
    """A compaction may take of the reserve, for it gives more back, but leaves what checkpoints need."""
    config, volume = replace(CONFIG, reserve_bytes=64 * 1024), SimVolume()
    story = Story(await open_log(volume.process("p"), 1, config))
    await story.fill(60, STAYS, GOES)
    await story.release(GOES)
    await story.checkpoints()
    made: list[str] = []
    volume.hooks.append(lambda op: made.append(op.path) if op.name == "create" else None)
    volume.capacity_bytes = volume.used_bytes() + 32 * 1024
    with pytest.raises(OSError, match="to write a segment anew"):
        await story.compact()
    assert not made
    volume.capacity_bytes = volume.used_bytes() + 63 * 1024
    assert await story.compact() > 0
    await story.is_whole(story.opened)


async def test_an_elder_that_wakes_up_puts_no_harm_in_place() -> None:
    """It stood before its last step while a younger one compacted more: what it puts there holds more, not less."""
    volume, story = await begun()
    await story.checkpoints()
    late: list[tuple[str, bytes]] = []

    def before(op: Op) -> None:
        if op.name == "replace":
            temp = max(path for path in volume.paths() if "tmp-" in path)
            late.append((op.path, volume.read(temp)))

    volume.hooks.append(before)
    await story.compact()
    volume.hooks.clear()
    await story.opened.close()
    story.opened = await open_log(volume.process("young"), 2, CONFIG)
    await story.release(BACK)
    await story.checkpoints()
    assert await story.compact() > 0
    elder = volume.process("elder")
    for number, (path, data) in enumerate(late):
        file = elder.create(f"log/tmp-0000000001-{900 + number:010d}")
        file.pwrite(data, 0)
        file.sync()
        elder.replace(f"log/tmp-0000000001-{900 + number:010d}", path)
    await story.is_whole(story.opened)
    await story.opened.close()
    again = await open_log(volume.process("q"), 3, CONFIG)
    await story.is_whole(again)
    whole(volume)
