"""The log at every crash point: before each file operation of a scripted history, with every kind of loss.

One run of the history is enough: before each operation the volume is copied as it is (page cache, disk, names), and
each copy then suffers its own fate.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import pytest

from fleetlm_shard.log_types import LogConfig
from fleetlm_shard.records import Message
from tests.support.faults import Op
from tests.support.logkit import Opened, TestFence, message, open_log
from tests.support.simdisk import NOTHING_KEPT, WRITES, Loss, SimVolume

CONFIG = LogConfig(
    segment_bytes=8 * 1024,
    boot_segment_bytes=8 * 1024,
    batch_bytes_max=1800,
    reserve_bytes=0,
    idle_s=3600.0,
)


@dataclass
class Moment:
    """A state of the volume just before an operation, and what had been promised by then."""

    name: str
    volume: SimVolume
    submitted: list[Message]
    acked: int
    trim_pos: int


class History:
    """Runs the script once and keeps the moments."""

    def __init__(self) -> None:
        self.volume = SimVolume(split_writes=True)
        self.submitted: list[Message] = []
        self.acked = 0
        self.moments: list[Moment] = []
        self.opened: Opened | None = None
        self.trims = 0
        self.volume.hooks.append(self._before)
        self._seqs: dict[str, int] = {}

    def _before(self, op: Op) -> None:
        if op.name not in WRITES:
            return
        # Operations of the volume's own making (copies) do not come here: hooks are not copied.
        acked = self.acked + (len(self.opened.acked) if self.opened else 0)
        trim_pos = self.opened.log.trim_pos if self.opened else 0
        name = f"before {op.number} {op.name} {op.path}"
        self.moments.append(Moment(name, self.volume.copy(), list(self.submitted), acked, trim_pos))

    def _message(self, session: str, text: str = "") -> Message:
        self._seqs[session] = self._seqs.get(session, 0) + 1
        made = message(session, self._seqs[session], text=text)
        self.submitted.append(made)
        return made

    async def append(self, *sessions: str, text: str = "") -> None:
        """Single messages, in one batch or several."""
        assert self.opened is not None
        for session in sessions:
            self.opened.log.append(self._message(session, text), None)
        await self.opened.settle()

    async def group(self, session: str, count: int) -> None:
        """A group that is never split."""
        assert self.opened is not None
        made = [self._message(session) for _ in range(count)]
        self.opened.log.append_group(made, [None] * count)
        await self.opened.settle()

    async def boot(self, term: int) -> None:
        """The next process."""
        if self.opened is not None:
            self.acked += len(self.opened.acked)
            self.opened = None
        self.opened = await open_log(self.volume.process(f"term-{term}"), term, CONFIG)

    async def run(self) -> None:
        """Appends, groups, rotations, checkpoints, retention, a graceful end, a kill, boots."""
        await self.boot(1)
        await self.append("a")
        await self.append("a", "b", "a", text="x" * 90)
        await self.group("b", 3)
        for _ in range(3):
            await self.append("a", "b", "c", "a", text="y" * 150)
        assert self.opened is not None
        await self.opened.checkpoint()
        for _ in range(4):
            await self.append("a", "b", "c", text="z" * 200)
        await self.opened.checkpoint()
        assert await self.opened.log.trim(max_bytes=CONFIG.segment_bytes, max_age_s=None, now_ms=0)
        await self.append("d")
        await self.opened.close()
        await self.boot(2)
        await self.append("a", "d")
        assert self.opened is not None
        await self.opened.checkpoint()
        await self.append("b")
        self.volume.kill("term-2")
        await self.boot(3)
        await self.append("b", "e")
        self.moments.append(Moment("at the end", self.volume.copy(), list(self.submitted), len(self.submitted), 0))


async def check(opened: Opened, moment: Moment) -> None:
    """What was recovered is a prefix that has everything acknowledged, and all of it can be read."""
    last_seqs = opened.last_seqs()
    total = sum(last_seqs.values())
    expected: dict[str, int] = {}
    for each in moment.submitted[:total]:
        expected[each.session] = each.seq
    assert last_seqs == expected, f"{moment.name}: not a prefix"
    assert total >= moment.acked, f"{moment.name}: {moment.acked} were acknowledged, {total} are there"
    assert not opened.boot.damage, moment.name
    by_place = {(each.session, each.seq): each for each in moment.submitted}
    for session, last_seq in last_seqs.items():
        found = await opened.read_all(session)
        if opened.log.trim_pos == 0:
            assert len(found) == last_seq, f"{moment.name}: {session}"
        seqs = [each.seq for each in found]
        assert seqs == list(range(last_seq - len(seqs) + 1, last_seq + 1)), f"{moment.name}: {session}"
        assert all(each.pos >= opened.log.trim_pos for each in found)
        assert all(each.json == by_place[session, each.seq].json for each in found), moment.name


async def go_on(opened: Opened, volume: SimVolume, moment: Moment, *, term: int) -> None:
    """The log takes appends again, and survives a second, total loss."""
    submitted = moment.submitted[: sum(opened.last_seqs().values())]
    for session in ("a", "z"):
        made = message(session, opened.last_seqs().get(session, 0) + 1, text="after")
        await opened.add(made)
        submitted.append(made)
    assert len(opened.acked) == 2, moment.name
    volume.power_loss(NOTHING_KEPT)
    again = await open_log(volume.process("again"), term + 1, CONFIG)
    await check(again, replace(moment, submitted=submitted, acked=len(submitted), name=moment.name + ", again"))


async def suffer(moment: Moment, loss: Loss | None, *, term: int) -> None:
    """One fate of one moment: SIGKILL (None) or a power loss."""
    volume = moment.volume.copy()
    fate = replace(moment, name=f"{moment.name}; {loss.name if loss else 'killed'}")
    if loss is None:
        for process in volume.processes():
            volume.kill(process)
    else:
        volume.power_loss(loss)
    opened = await open_log(volume.process("younger"), term, CONFIG)
    await check(opened, fate)
    if loss is None:
        # What was visible after a mere restart is still there if the machine dies now: it was synced before.
        twin = volume.copy()
        twin.power_loss(NOTHING_KEPT)
        seen = opened.last_seqs()
        later = await open_log(twin.process("later"), term + 1, CONFIG)
        assert later.last_seqs() == seen, fate.name
    await go_on(opened, volume, fate, term=term)


@pytest.fixture(scope="module")
def history() -> History:
    """The script, run once."""
    made = History()
    asyncio.run(made.run())
    return made


def test_the_history_has_everything_in_it(history: History) -> None:
    """The script rotates, seals, checkpoints and trims: else its crash points prove little."""
    names = " ".join(moment.name for moment in history.moments)
    for part in ("link log/0000000001-0000000003.seg", ".idx", ".ckpt", "unlink log/0000000001-0000000001.seg"):
        assert part in names, part
    assert "0000000003-0000000001.seg" in names


@pytest.mark.timeout(600)
def test_every_crash_point_loses_nothing_acknowledged(history: History) -> None:
    """Stopped before any operation, with unsynced data kept, lost or torn: a prefix with all that was acknowledged.

    Then it accepts appends again, and survives a second power loss.
    """

    async def run() -> int:
        count = 0
        for moment in history.moments:
            await suffer(moment, None, term=4)
            for loss in moment.volume.losses(singles=False):
                await suffer(moment, loss, term=4)
                count += 1
        return count

    assert asyncio.run(run()) > 500


@pytest.mark.timeout(600)
def test_single_units_kept_or_lost_are_no_worse(history: History) -> None:
    """Each unsynced page or name kept alone or lost alone, at every fifth moment: still a prefix."""

    async def run() -> None:
        for moment in history.moments[::5]:
            for loss in moment.volume.losses():
                await suffer(moment, loss, term=4)

    asyncio.run(run())


async def test_a_boot_that_dies_anywhere_loses_nothing(history: History) -> None:
    """The younger's boot is stopped before each of its operations, then the machine dies: the next boot has all."""
    end = history.moments[-1]
    total = len(end.submitted)
    fates: list[SimVolume] = []
    volume = end.volume.copy()
    for process in volume.processes():
        volume.kill(process)

    def before(op: Op) -> None:
        if op.name in WRITES:
            fates.append(volume.copy())

    volume.hooks.append(before)
    await open_log(volume.process("younger"), 4, CONFIG)
    assert len(fates) > 5
    for fate in fates:
        for loss in fate.losses():
            twin = fate.copy()
            twin.power_loss(loss)
            # An incomplete boot left nothing or a whole segment of its term: the next term finds either.
            opened = await open_log(twin.process("third"), 5, CONFIG)
            assert sum(opened.last_seqs().values()) == total, loss.name


async def test_a_fenced_elder_acknowledges_nothing_more() -> None:
    """After a younger term is there, an append is never reported durable, and the log stops once."""
    volume = SimVolume()
    disk = volume.process("elder")
    opened = await open_log(disk, 1, CONFIG)
    await opened.add(message("a", 1))
    file = disk.create("term-0000000002")
    file.close()
    await opened.add(message("a", 2))
    assert [each.seq for each in opened.acked] == [1]
    assert len(opened.stopped) == 1
    with pytest.raises(RuntimeError, match="has ended"):
        TestFence(disk, 1).look()
