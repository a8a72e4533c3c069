"""The log's moving end: group commit, rotation, looks, marks, the fsync policy (docs/log.md; design §4, "Append path").

    append ──► open batch ─┐                       one round at a time:
    append ──► open batch ─┴─► queue of batches ──► writer lane: rotate? write, sync, look ──► durable, in order

Place: lives in the event loop, which owns all of its state; the disk is touched by lanes only. Promise: positions are
given in order and never twice; a batch is reported once, after its round; after the first error nothing is reported.
The batch size tunes itself: what was appended during a round is the next batch; there is no timer on this path.
Must not be done here: reading, sealing, checkpoints (`log.py`).
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from crc32c import crc32c

from fleetlm_shard.chain import Link
from fleetlm_shard.framing import (
    BATCH_FRAME_BYTES,
    FRAME_START,
    HEADER_BYTES,
    UNCHECKED_BYTES,
    PrevSegment,
    SegmentHeader,
    batch_frame,
    encode_header,
    frame_start,
)
from fleetlm_shard.lanes import run_on
from fleetlm_shard.log_types import GroupTooLarge, LogBusy, LogDiskFull, LogStopped
from fleetlm_shard.records import encode
from fleetlm_shard.segment_index import MemoryIndex
from fleetlm_shard.segments import Prepared, discard, prepare
from fleetlm_shard.writer import Finished, Job, Rotation

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fleetlm_shard.disk import File
    from fleetlm_shard.lanes import Lanes
    from fleetlm_shard.log_types import LogStats
    from fleetlm_shard.records import Record
    from fleetlm_shard.recovery import LogStart

Durable = tuple[int, "Record", object]
"""A record that is on disk: position, record, and what the caller gave with it."""

_pack_start: Final = FRAME_START.pack
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
SPARE_SEGMENTS: Final = 2
"""What an import leaves to clients beside the reserve: it gives up while their next segments can still be prepared."""


class AppenderOwner(Protocol):
    """Whoever keeps what the appender made (`log.Log`)."""

    def batch_durable(self, link: Link, entries: list[Durable]) -> None:
        """These records of the active segment are durable and were looked at."""
        ...

    def segment_sealed(self, old: Link, active: Link) -> None:
        """The old segment has got its last batch; called before the first batch of the new one is reported."""
        ...

    def writer_stopped(self, error: BaseException) -> None:
        """Nothing will be durable any more."""
        ...


class _Batch:
    """Records on their way into one group commit."""

    __slots__ = ("entries", "link", "parts", "pos", "seed", "size")

    def __init__(self, link: Link, pos: int) -> None:
        self.link = link
        self.seed = link.header.seed
        self.pos = pos
        self.size = BATCH_FRAME_BYTES
        self.parts: list[bytes] = []
        self.entries: list[Durable] = []


class Appender:
    """Appends to the newest segment.

    Args:
        start: what boot made.
        lanes: threads.
        loop: the owner of this object.
        owner: told of durable batches, sealed segments and the end.
        stats: counters to keep.
        monotonic: seconds, for the length of syncs.
        observe_sync: called with the seconds of each sync.
    """

    def __init__(
        self,
        start: LogStart,
        *,
        lanes: Lanes,
        loop: asyncio.AbstractEventLoop,
        owner: AppenderOwner,
        stats: LogStats,
        monotonic: Callable[[], float],
        observe_sync: Callable[[float], None],
    ) -> None:
        self._disk = start.disk
        self._fence = start.fence
        self._config = start.config
        self._entropy = start.entropy
        self._temps = start.temps
        self._lanes = lanes
        self._loop = loop
        self._owner = owner
        self._stats = stats
        self._monotonic = monotonic
        self._observe_sync = observe_sync

        self.active = start.active
        self._file: File = start.active_file
        self._planned = start.active
        self._end_pos = start.active.end_pos
        self.durable_pos = self._end_pos
        self.synced_pos = self._end_pos
        # The first segment's header proves what it was filled with.
        self._marked_pos = self._end_pos

        self._queue: deque[_Batch] = deque()
        self._queued_records = 0
        self._queued_bytes = 0
        self._prepared: Prepared | None = None
        self._preparing = False
        self._prepare_refused = False
        self._free_bytes = start.disk.free_bytes()
        self._waiters: list[asyncio.Future[None]] = []
        self._sync_waiters: list[asyncio.Future[None]] = []
        self._want_round = False
        self._want_sync = False
        self._in_round = False
        self._scheduled = False
        self._sync_timer: asyncio.TimerHandle | None = None
        self._tick_timer: asyncio.TimerHandle | None = None
        self._rounds = 0
        self._batches_at_tick = 0
        self._rounds_at_tick = 0
        self._drained: asyncio.Future[None] | None = None
        self._closing = False
        self._stopped: BaseException | None = None

    def start(self) -> None:
        """Prepare the next segment, begin to look each second."""
        self._prepare()
        self._tick_timer = self._loop.call_later(self._config.idle_s, self._tick)

    # Appending -----------------------------------------------------------------------------------------------------

    def append(self, record: Record, context: object) -> int:
        """Queue one record; returns its position.

        Raises:
            GroupTooLarge, LogBusy, LogDiskFull, LogStopped: it was not queued.
        """
        tail = encode(record)
        size = UNCHECKED_BYTES + len(tail)
        batch = self._batch_for(size, 1)
        pos = self._end_pos
        # `_put` in line: this runs once a message.
        batch.parts += (_pack_start(size - 2 * UNCHECKED_BYTES, crc32c(tail, batch.seed)), tail)
        batch.entries.append((pos, record, context))
        batch.size += size
        self._end_pos = pos + size
        self._queued_records += 1
        self._queued_bytes += size
        if not (self._in_round or self._scheduled):
            self._kick()
        return pos

    def append_group(self, records: Sequence[Record], contexts: Sequence[object]) -> list[int]:
        """Queue records that share a batch; returns their positions."""
        assert len(records) == len(contexts), "a context for each record"
        tails = [encode(record) for record in records]
        size = sum(map(len, tails)) + UNCHECKED_BYTES * len(tails)
        batch = self._batch_for(size, len(tails))
        positions = [
            self._put(batch, record, context, tail)
            for record, context, tail in zip(records, contexts, tails, strict=True)
        ]
        self._kick()
        return positions

    def append_own(self, record: Record, context: object) -> int:
        """Queue a small record of the log itself; the reserve is there for it."""
        tail = encode(record)
        size = UNCHECKED_BYTES + len(tail)
        if self._stopped is not None or self._closing:
            raise LogStopped("the log has stopped") from self._stopped
        batch = self._queue[-1] if self._queue else None
        if batch is None or batch.size + size > self._config.batch_bytes_max:
            fits = self._planned.header.end_pos_max - self._end_pos >= size + 2 * BATCH_FRAME_BYTES
            batch = self._open_batch() if fits else self._plan_batch()
        pos = self._put(batch, record, context, tail)
        self._kick()
        return pos

    def _put(self, batch: _Batch, record: Record, context: object, tail: bytes) -> int:
        """What `append` does in line."""
        size = UNCHECKED_BYTES + len(tail)
        pos = self._end_pos
        batch.parts += (frame_start(tail, batch.seed), tail)
        batch.entries.append((pos, record, context))
        batch.size += size
        self._end_pos = pos + size
        self._queued_records += 1
        self._queued_bytes += size
        return pos

    def _batch_for(self, size: int, records: int) -> _Batch:
        """The batch that takes `size` more bytes; refuses before anything is changed."""
        config = self._config
        if self._stopped is not None or self._closing:
            raise LogStopped("the log has stopped") from self._stopped
        if self._queued_records + records > config.queue_records_max:
            raise LogBusy(f"{self._queued_records} records wait for the disk")
        if self._queued_bytes + size > config.queue_bytes_max:
            raise LogBusy(f"{self._queued_bytes} bytes wait for the disk")
        if self._free_bytes < config.reserve_bytes:
            raise LogDiskFull(f"{self._free_bytes} bytes are free, {config.reserve_bytes} of them are kept in reserve")
        if self._queue:
            batch = self._queue[-1]
            if batch.size + size <= config.batch_bytes_max:
                return batch
        if BATCH_FRAME_BYTES + size > config.batch_bytes_max:
            raise GroupTooLarge(f"{size} bytes do not fit a batch of {config.batch_bytes_max}")
        # A batch of full size and the mark after it must fit, whatever will be appended to this one.
        if self._planned.header.end_pos_max - self._end_pos >= config.batch_bytes_max + BATCH_FRAME_BYTES:
            return self._open_batch()
        if self._prepared is None and self._prepare_refused:
            raise LogDiskFull("there is no space for the next segment")
        return self._plan_batch()

    def _open_batch(self) -> _Batch:
        batch = _Batch(self._planned, self._end_pos)
        self._end_pos += BATCH_FRAME_BYTES
        self._queue.append(batch)
        return batch

    def _plan_batch(self) -> _Batch:
        """Open a batch that begins the next segment."""
        old, base_pos = self._planned, self._end_pos
        header = SegmentHeader(
            ring_uid=old.header.ring_uid,
            shard=old.header.shard,
            term=old.header.term,
            number=old.header.number + 1,
            base_pos=base_pos,
            size=self._config.segment_bytes,
            filled_pos=base_pos,
            prev=PrevSegment(old.header.term, old.header.number, base_pos),
            seed=self._entropy.getrandbits(32),
        )
        self._planned = Link(header, base_pos, index=MemoryIndex())
        return self._open_batch()

    # Rounds --------------------------------------------------------------------------------------------------------

    async def look(self) -> None:
        """Wait for a look that begins after this call. Cancel-safe."""
        await self._wait(self._waiters)

    async def sync(self) -> None:
        """Wait until all that is durable by the policy is on disk. Cancel-safe."""
        self._want_sync = True
        await self._wait(self._sync_waiters)

    async def _wait(self, waiters: list[asyncio.Future[None]]) -> None:
        if self._stopped is not None:
            raise LogStopped("the log has stopped") from self._stopped
        future: asyncio.Future[None] = self._loop.create_future()
        waiters.append(future)
        self._kick()
        await future

    def _kick(self) -> None:
        """Begin a round after the callbacks that are ready now: their appends share it."""
        if not (self._in_round or self._scheduled):
            self._scheduled = True
            self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        self._scheduled = False
        if self._in_round or self._stopped is not None:
            return
        batch, rotation = self._next_batch()
        waiters, sync_waiters = self._waiters, self._sync_waiters
        if batch is None and not (waiters or sync_waiters or self._want_round or self._want_sync):
            return
        self._waiters, self._sync_waiters = [], []
        file, data, offset = self._file, b"", 0
        # A mark is only worth something if it is on disk.
        sync = self._want_sync
        if batch is not None:
            sync = sync or self._config.fsync == "always" or not batch.entries
            header = batch.link.header
            offset = HEADER_BYTES + batch.pos - header.base_pos
            frames_bytes = batch.size - BATCH_FRAME_BYTES
            # Before the first write to a new segment its predecessor is synced.
            synced_pos = batch.pos if rotation is not None else self.synced_pos
            head = batch_frame(
                pos=batch.pos,
                synced_pos=synced_pos,
                frames=len(batch.entries),
                frames_bytes=frames_bytes,
                seed=header.seed,
            )
            data = b"".join((head, *batch.parts))
            assert len(data) == batch.size, "a batch is as long as its positions say"
            if rotation is not None:
                file = rotation.prepared.file
        self._want_sync = self._want_round = False
        self._in_round = True
        job = Job(self._disk, self._fence, file, data, offset, sync, rotation, self._monotonic)

        def done(finished: Finished | None, error: BaseException | None) -> None:
            self._in_round = False
            if finished is None:
                self.stop(error or RuntimeError("a round without a result"), [*waiters, *sync_waiters])
            else:
                self._finish(finished, batch, rotation, synced=sync)
                _release(waiters)
                _release(sync_waiters)

        job.submit(self._lanes, self._loop, done)

    def _next_batch(self) -> tuple[_Batch | None, Rotation | None]:
        """The batch for this round; none if it begins a segment that is not prepared yet."""
        if not self._queue:
            return None, None
        batch = self._queue[0]
        rotation = None
        if batch.link is not self.active:
            if self._prepared is None:
                self._prepare()
                return None, None
            rotation = Rotation(
                self._prepared,
                batch.link.path,
                encode_header(batch.link.header),
                self._file,
                self.synced_pos < self.durable_pos,
            )
            self._prepared = None
        self._queue.popleft()
        return batch, rotation

    def _finish(self, finished: Finished, batch: _Batch | None, rotation: Rotation | None, *, synced: bool) -> None:
        if self._stopped is not None:
            return
        self._rounds += 1
        self._free_bytes = finished.free_bytes
        if rotation is not None and batch is not None:
            old, self.active = self.active, batch.link
            self._file = rotation.prepared.file
            self.synced_pos = batch.pos
            self._stats.rotations += 1
            self._owner.segment_sealed(old, self.active)
            self._prepare()
        if batch is not None:
            self._advance(batch)
        if synced:
            self.synced_pos = self.durable_pos
            self._observe_sync(finished.sync_s)
        elif self.synced_pos < self.durable_pos:
            self._sync_soon()
        # First the next round, then this one's reports: the disk need not wait for them.
        self._begin()
        if batch is not None:
            self._owner.batch_durable(batch.link, batch.entries)
        self._wake_close()

    def _wake_close(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def _advance(self, batch: _Batch) -> None:
        end_pos = batch.pos + batch.size
        self.durable_pos = batch.link.end_pos = end_pos
        count = len(batch.entries)
        self._queued_records -= count
        self._queued_bytes -= batch.size - BATCH_FRAME_BYTES
        stats = self._stats
        if count:
            stats.batches += 1
            stats.appended_records += count
            stats.appended_bytes += batch.size
        else:
            stats.marks += 1
            self._marked_pos = end_pos

    def _sync_soon(self) -> None:
        if self._config.fsync == "interval" and self._sync_timer is None:
            self._sync_timer = self._loop.call_later(self._config.fsync_interval_ms / 1000, self._sync_now)

    def _sync_now(self) -> None:
        self._sync_timer = None
        self._want_sync = True
        self._kick()

    # Beside the rounds ---------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Have the next segment zero-filled."""
        # What was taken in must get its segment, if need be from the reserve.
        accepted = bool(self._queue) and self._queue[0].link is not self.active
        if self._preparing or self._prepared is not None or self._stopped is not None:
            return
        if self._closing and not accepted:
            return
        size = self._config.segment_bytes
        if self._free_bytes < size + (0 if accepted else self._config.reserve_bytes):
            self._prepare_refused = True
            self._wake_close()
            return
        self._preparing = True
        temp, pause = self._temps.next(), self._lanes.pause
        self._lanes.preparer.submit(lambda: prepare(self._disk, temp, size=size, pause=pause), self._prepare_done)

    def _prepare_done(self, prepared: Prepared | None, error: BaseException | None) -> None:
        self._preparing = False
        self._prepared = prepared
        self._prepare_refused = prepared is None
        if prepared is None and not (isinstance(error, OSError) and error.errno in _FULL):
            # A disk that fails here will fail the batches too.
            self.stop(error or RuntimeError("a preparation without a result"), [])
        elif prepared is not None:
            self._kick()
        self._wake_close()

    def _tick(self) -> None:
        """Each second: an idle log looks at its term; one that has been idle for a while writes its mark."""
        if self._stopped is not None or self._closing:
            return
        if self._rounds == self._rounds_at_tick:
            self._want_round = True
        if self._stats.batches == self._batches_at_tick and not self._queue:
            self._mark()
        self._rounds_at_tick, self._batches_at_tick = self._rounds, self._stats.batches
        self._prepare()
        self._kick()
        self._tick_timer = self._loop.call_later(self._config.idle_s, self._tick)

    def _mark(self) -> None:
        """Say in the log that all of it is on disk, if it does not say so yet."""
        if self.synced_pos < self.durable_pos:
            self._want_sync = True
        elif self._marked_pos < self.durable_pos and not self._in_round:
            room = self._planned.header.end_pos_max - self._end_pos
            if room >= BATCH_FRAME_BYTES:
                self._open_batch()

    async def close(self) -> None:
        """Make what is queued durable, mark the end. Nothing may be appended any more. Must not be cancelled."""
        if self._closing:
            return
        self._closing = True
        for timer in (self._tick_timer, self._sync_timer):
            if timer is not None:
                timer.cancel()
        while self._stopped is None and (self._queue or self._in_round):
            blocked = self._prepare_refused and self._prepared is None and not self._preparing
            if blocked and not self._in_round and self._queue[0].link is not self.active:
                self.stop(LogDiskFull("there is no space for the segment of what is queued"), [])
                break
            self._drained = self._loop.create_future()
            self._kick()
            await self._drained
        if self._stopped is None:
            await self.sync()
            self._mark()
            # The round of the mark is a look, too: this waits for it.
            await self.look()
        # After the preparer's last piece of work and its answer: nobody will use what it made.
        await run_on(self._lanes.preparer, lambda: None, self._loop)
        await run_on(self._lanes.preparer, self._discard_prepared, self._loop)
        self._file.close()

    def _discard_prepared(self) -> None:
        if self._prepared is not None and self._stopped is None:
            discard(self._disk, self._prepared.file, self._prepared.temp)

    def stop(self, error: BaseException, waiters: list[asyncio.Future[None]]) -> None:
        """End for good: everybody who waits is told."""
        if self._stopped is not None:
            return
        self._stopped = error
        for future in (*waiters, *self._waiters, *self._sync_waiters):
            if not future.done():
                stopped = LogStopped(f"the log has stopped: {error}")
                stopped.__cause__ = error
                future.set_exception(stopped)
        self._wake_close()
        for timer in (self._tick_timer, self._sync_timer):
            if timer is not None:
                timer.cancel()
        self._owner.writer_stopped(error)

    @property
    def queued(self) -> tuple[int, int]:
        """Records and bytes that wait for the disk."""
        return self._queued_records, self._queued_bytes

    @property
    def rounds(self) -> int:
        """Rounds of the writer so far; each looked at the term."""
        return self._rounds

    @property
    def free_bytes(self) -> int:
        """Space on the file system, as of the last round."""
        return self._free_bytes

    @property
    def full(self) -> bool:
        """Whether the next append of any size could be refused for want of space."""
        config, rest = self._config, self._planned.header.end_pos_max - self._end_pos
        no_segment = self._prepared is None and self._prepare_refused
        return self._free_bytes < config.reserve_bytes or (
            no_segment and rest < config.batch_bytes_max + BATCH_FRAME_BYTES
        )

    @property
    def spacious(self) -> bool:
        """Whether space is left for what can wait: more than the reserve and what clients will write next."""
        config = self._config
        return self._free_bytes >= config.reserve_bytes + SPARE_SEGMENTS * config.segment_bytes

    @property
    def stopped(self) -> BaseException | None:
        """Why nothing is durable any more."""
        return self._stopped


def _release(waiters: list[asyncio.Future[None]]) -> None:
    for future in waiters:
        if not future.done():
            future.set_result(None)
