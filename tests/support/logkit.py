"""The log in tests: boot it on a simulated (or real) disk, append, read everything back.

Place: beside `simdisk.py`. Must not be done here: faults (hooks of the volume do that).
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fleetlm_common.ids import ShardName
from fleetlm_shard.lanes import inline_lanes
from fleetlm_shard.log import Durable, Log
from fleetlm_shard.log_types import CheckpointRow, LogConfig, LogStopped, StoredMessage, lost_seqs
from fleetlm_shard.records import (
    Damaged,
    InsertedAt,
    LostMessage,
    Message,
    Replayed,
    SlotsReleased,
    content_hash,
    message_json,
)
from fleetlm_shard.recovery import LogBoot, LogStart
from fleetlm_shard.volume_types import Identity, encode_paper

if TYPE_CHECKING:
    from collections.abc import Callable

    from fleetlm_shard.disk import Disk
    from tests.support.simdisk import SimVolume

SMALL = LogConfig(
    segment_bytes=16 * 1024,
    boot_segment_bytes=8 * 1024,
    batch_bytes_max=3 * 1024,
    reserve_bytes=0,
    queue_bytes_max=64 * 1024,
    idle_s=3600.0,
)
"""Segments of a few batches, so that a short history has everything in it."""

AT_US = 1_795_475_336_123_456


class TestFence:
    """A fence whose term files are like the real ones: `term-N` of a younger process ends this one."""

    __test__ = False

    def __init__(self, disk: Disk, term: int, *, ring_uid: str = "ring-1", shard: str = "shard-0") -> None:
        self.disk = disk
        self.term = term
        self.ring_uid = ring_uid
        self.shard = shard

    def look(self) -> None:
        """One stat."""
        if self.disk.exists(f"term-{self.term + 1:010d}"):
            raise RuntimeError(f"term {self.term} has ended")


def message(
    session: str, seq: int, *, text: str = "", key: str | None = None, at_us: int = AT_US, sender: str = "a"
) -> Message:
    """A whole message; the same arguments give the same bytes."""
    names = (sender.encode(), text.encode())
    fragment = b'"sender_id":"%b","sender_kind":"human","kind":"text","content":"%b","metadata":{}' % names
    source = random.Random(f"{session}/{seq}/{text}")
    return Message(
        slot=len(session) % 7,
        session=session,
        seq=seq,
        inserted_at_us=at_us,
        key=key or f"key-{seq}",
        content_hash=content_hash(fragment),
        json=message_json(
            id_text=f"0190c1c2-0000-7000-8000-{source.getrandbits(48):012x}",
            session_json=b'"%b"' % session.encode(),
            seq=seq,
            inserted_at=InsertedAt().text(at_us),
            fragment=fragment,
        ),
    )


@dataclass
class Opened:
    """A running log with what it told."""

    log: Log
    boot: LogBoot
    replayed: list[tuple[int, Replayed]]
    fence: TestFence
    durable: list[Durable] = field(default_factory=list[Durable])
    stopped: list[BaseException] = field(default_factory=list[BaseException])

    @property
    def acked(self) -> list[Message]:
        """Messages that `on_durable` named, in order."""
        return [record for _, record, _ in self.durable if isinstance(record, Message)]

    def messages(self) -> list[Message]:
        """Messages that boot handed out, in order."""
        return [record for _, record in self.replayed if isinstance(record, Message)]

    def last_seqs(self) -> dict[str, int]:
        """Each session's last seq as a good upper half would know it after boot (without `lost_max`)."""
        seqs = {session: row.last_seq for session, row in self.boot.rows()}
        for _, record in self.replayed:
            if isinstance(record, Message | LostMessage):
                seqs[record.session] = max(seqs.get(record.session, 0), record.seq)
        return seqs

    def next_seq(self, session: str) -> int:
        """The seq that a good upper half gives next, as docs/log.md says."""
        last_seq, last_pos = 0, 0
        row = self.boot.row(session)
        if row is not None:
            last_seq, last_pos = row.last_seq, row.last_pos
        for pos, record in self.replayed:
            if isinstance(record, Message | LostMessage) and record.session == session and record.seq > last_seq:
                last_seq, last_pos = record.seq, pos
        return last_seq + 1 + lost_seqs(self.boot.damage, last_pos)

    async def settle(self) -> None:
        """Wait until everything that was appended is durable, or the log has stopped."""
        while self.log.stats.queued_records and not self.stopped:
            try:
                await self.log.look()
            except LogStopped:
                return

    async def add(self, *messages: Message) -> None:
        """Append and wait."""
        for each in messages:
            self.log.append(each, None)
        await self.settle()

    def note_rows(self) -> dict[str, CheckpointRow]:
        """Rows of all sessions, from what boot and `on_durable` told."""
        rows = dict(self.boot.rows())
        rows.update(self.log.rows())
        entries = [*self.replayed, *((pos, record) for pos, record, _ in self.durable)]
        for pos, record in entries:
            if isinstance(record, SlotsReleased):
                rows = {name: row for name, row in rows.items() if row.slot not in record.slots or row.last_pos > pos}
            if isinstance(record, LostMessage | Damaged) or not isinstance(record, Message):
                continue
            row = rows.get(record.session)
            if row is None:
                rows[record.session] = CheckpointRow(
                    record.slot, record.seq, pos, record.seq, pos, record.inserted_at_us, b"{}", {}
                )
            elif record.seq > row.last_seq:
                rows[record.session] = CheckpointRow(
                    row.slot,
                    row.first_seq,
                    row.first_pos,
                    record.seq,
                    pos,
                    row.inserted_at_us,
                    row.metadata,
                    row.cursors,
                )
        return rows

    async def checkpoint(self, *, keys_from_pos: int | None = None) -> None:
        """A checkpoint of everything durable."""
        pos = self.log.durable_pos
        await self.log.checkpoint(
            self.note_rows(), pos=pos, keys_from_pos=pos if keys_from_pos is None else keys_from_pos, opened={1: 1}
        )

    async def read_all(self, session: str, first_seq: int = 1, limit: int = 1000) -> list[StoredMessage]:
        """Every message that can be read, page by page."""
        found: list[StoredMessage] = []
        while True:
            page = await self.log.read(session, first_seq=first_seq, limit=limit)
            found += page.messages
            ends = [each.seq for each in page.messages] + [each.to_seq for each in page.missing]
            if not page.has_more:
                return found
            assert ends, "a page that says there is more must move on"
            first_seq = max(ends) + 1

    async def close(self) -> None:
        """Graceful end."""
        await self.log.close()


async def until(ready: Callable[[], bool], *, turns: int = 1_000_000) -> None:
    """Let the loop turn until it is so; a bound instead of a clock, for everything runs in this loop."""
    for _ in range(turns):
        if ready():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never became so")


def formatted(volume: SimVolume) -> None:
    """What `fleetlm verify` asks for beside the log: the paper that says whose volume it is."""
    disk = volume.process("format")
    file = disk.create("identity")
    file.pwrite(encode_paper(Identity(ring_uid="ring-1", shard=ShardName("shard-0"), volume_id="v-1")), 0)
    file.sync()
    file.close()
    disk.sync_folder("")


def boot_log(
    disk: Disk, term: int, config: LogConfig = SMALL, *, seed: int = 1
) -> tuple[LogBoot, list[tuple[int, Replayed]], LogStart]:
    """Boot, up to the new segment; nothing runs yet."""
    boot = LogBoot.open(disk, TestFence(disk, term), config, entropy=random.Random(seed * 1000 + term))
    replayed = list(boot.replay())
    return boot, replayed, boot.cut()


def run_log(boot: LogBoot, replayed: list[tuple[int, Replayed]], start: LogStart) -> Opened:
    """Run what `boot_log` made, all of it in this thread."""
    loop = asyncio.get_running_loop()
    opened: Opened

    def on_durable(entries: list[Durable]) -> None:
        opened.durable += entries

    def on_stopped(error: BaseException) -> None:
        opened.stopped.append(error)

    log = Log(start, lanes=inline_lanes(loop), loop=loop, on_durable=on_durable, on_stopped=on_stopped)
    assert isinstance(start.fence, TestFence)
    opened = Opened(log, boot, replayed, start.fence)
    log.start()
    return opened


async def open_log(disk: Disk, term: int, config: LogConfig = SMALL, *, seed: int = 1) -> Opened:
    """Boot and run."""
    return run_log(*boot_log(disk, term, config, seed=seed))
