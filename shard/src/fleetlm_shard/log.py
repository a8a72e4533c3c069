"""The log as the upper half of the shard sees it (docs/log.md, "Between the halves").

Place: a facade in the event loop, which owns all state here; threads are lanes that get what they need and give back
what they made. Promise: `on_durable` is called in order, once a batch, after sync and look; a read returns only durable
messages; old files go only after what replaces them is on disk. Must not be done here: sessions, keys, subscribers.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from fleetlm_shard.appender import Appender, Durable
from fleetlm_shard.chain import messages_from
from fleetlm_shard.checkpoints import KeptCheckpoints, StoredMeta, write_checkpoint
from fleetlm_shard.compactor import Compactor
from fleetlm_shard.framing import BATCH_FRAME_BYTES
from fleetlm_shard.housekeeping import delete_segments, unlink_all, write_index
from fleetlm_shard.lanes import run_on
from fleetlm_shard.log_types import READ_BYTES_MAX, Damage, LogBusy, LogStats, MoveFacts, ReadResult
from fleetlm_shard.reader import IndexCache, PageAnswer, PageRequest, Wanted, first_place, read_pages
from fleetlm_shard.records import Imported, Message, SlotsReleased, Trimmed
from fleetlm_shard.recovery import BOUNDARY_BYTES, merged
from fleetlm_shard.segments import CheckpointId, IndexId, SegmentId, checkpoint_path, index_path, keep_aside

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Container, Iterator, Mapping, Sequence

    from fleetlm_common.ids import SessionId
    from fleetlm_shard.chain import Link
    from fleetlm_shard.framing import SegmentHeader
    from fleetlm_shard.lanes import Lanes
    from fleetlm_shard.log_types import CheckpointRow
    from fleetlm_shard.records import Record
    from fleetlm_shard.recovery import LogStart
    from fleetlm_shard.segment_index import MemoryIndex

__all__ = ["Durable", "Log"]

T = TypeVar("T")
_NO_FACTS: Final = MoveFacts()


class _Own:
    """Context of a record of the log itself: resolved here, not shown to the upper half."""

    __slots__ = ("future",)

    def __init__(self, future: asyncio.Future[None]) -> None:
        self.future = future


class Log:
    """The running log.

    Args:
        start: what `LogBoot.cut` made.
        lanes: threads; closed by `close`.
        loop: the owner.
        on_durable: called once a batch with its (position, record, context), in order, after sync and look.
        on_stopped: called once with the reason; the process must end.
        monotonic: seconds, for the length of syncs.
        observe_sync: called with the seconds of each sync, for a histogram.
    """

    def __init__(
        self,
        start: LogStart,
        *,
        lanes: Lanes,
        loop: asyncio.AbstractEventLoop,
        on_durable: Callable[[list[Durable]], None],
        on_stopped: Callable[[BaseException], None],
        monotonic: Callable[[], float] = time.monotonic,
        observe_sync: Callable[[float], None] = lambda _: None,
    ) -> None:
        self._disk = start.disk
        self._term = start.fence.term
        self._config = start.config
        self._temps = start.temps
        self._lanes = lanes
        self._loop = loop
        self._on_durable = on_durable
        self._on_stopped = on_stopped
        self._sealed = list(start.sealed)
        self._leftovers = start.leftovers
        self._listing = start.listing
        self._boundaries = start.boundaries
        self._damage = list(start.damage)
        self._trim = start.trim
        self._released = start.released
        self._kept = KeptCheckpoints(start.checkpoint, start.listing.checkpoints)
        self._next_checkpoint = 1
        self._checkpointing = False
        self._trimming = False
        self._sealing = False
        self._memory_only: set[SegmentId] = set()
        self._own_pending = 0
        self._next_reader = 0
        self._caches = [IndexCache(start.disk) for _ in lanes.readers]
        self._stats = LogStats(strays=start.strays)
        self._appender = Appender(
            start,
            lanes=lanes,
            loop=loop,
            owner=self,
            stats=self._stats,
            monotonic=monotonic,
            observe_sync=observe_sync,
        )
        self._compactor = Compactor(start, self._kept, lanes=lanes, loop=loop, look=self._appender.look)
        self.append = self._appender.append
        """`append(record, context) -> position`; see `Appender.append`. Bound here: one call less for each message."""

    def start(self) -> None:
        """Begin: prepare the next segment, look each second, write missing indexes, clear away what elders left."""
        self._appender.start()
        disk = self._disk
        # A temporary name of an elder is never read; if that elder still lives, its link fails and it ends.
        temps = [path for term, path in self._listing.temps if term < self._term]
        leftovers = [link.id for link in self._leftovers]

        def clear() -> None:
            unlink_all(disk, temps)
            delete_segments(disk, leftovers)

        self._lanes.background.submit(clear, self._background_done)
        self._seal_next()

    # Appending -----------------------------------------------------------------------------------------------------

    def append_group(self, records: Sequence[Record], contexts: Sequence[object]) -> list[int]:
        """Queue records that become durable together or not at all; returns their positions.

        Raises:
            GroupTooLarge, LogBusy, LogDiskFull, LogStopped: nothing was queued.
        """
        return self._appender.append_group(records, contexts)

    def append_own(self, record: Record, context: object) -> int:
        """Queue a small record that the shard needs to go on, if need be from the reserve; returns its position.

        Raises:
            LogStopped: nothing was queued.
        """
        return self._appender.append_own(record, context)

    async def sync(self) -> None:
        """Wait until all that is durable by the policy is on disk and was looked at. Cancel-safe.

        Raises:
            LogStopped: a younger term, or an error.
        """
        await self._appender.sync()

    async def look(self) -> None:
        """Wait for a look at the term that began after this call. Cancel-safe.

        Raises:
            LogStopped: a younger term, or an error.
        """
        await self._appender.look()

    def batch_durable(self, link: Link, entries: list[Durable]) -> None:
        """From the appender: index the messages, then tell the upper half."""
        index = link.index
        assert index is not None, "the active segment's index is in memory"
        add = index.add
        for pos, record, _ in entries:
            if type(record) is Message:
                add(record.session, record.seq, pos)
                index.inserted_at_us_max = record.inserted_at_us
            elif type(record) is Imported:
                add(record.session, record.seq, pos)
                index.inserted_at_us_max = max(index.inserted_at_us_max, record.inserted_at_us)
            elif type(record) is SlotsReleased:
                self._released.update((slot, pos) for slot in record.slots)
        if entries and entries[0][0] - self._boundaries[-1] >= BOUNDARY_BYTES:
            self._remember_boundary(entries[0][0])
        if self._own_pending:
            entries = self._settle_own(entries)
        if entries:
            self._on_durable(entries)

    def _remember_boundary(self, first_pos: int) -> None:
        # The batch begins one BATCH frame before its first record.
        self._boundaries.append(first_pos - BATCH_FRAME_BYTES)

    def _settle_own(self, entries: list[Durable]) -> list[Durable]:
        others: list[Durable] = []
        for entry in entries:
            context = entry[2]
            if isinstance(context, _Own):
                self._own_pending -= 1
                if not context.future.done():
                    context.future.set_result(None)
            else:
                others.append(entry)
        return others

    def segment_sealed(self, old: Link, active: Link) -> None:
        """From the appender: the log goes on in another segment."""
        old.stored_bytes = old.header.size
        self._sealed.append(old)
        self._boundaries.append(active.header.base_pos)
        self._seal_next()

    def writer_stopped(self, error: BaseException) -> None:
        """From the appender: the end."""
        self._on_stopped(error)

    # Reading -------------------------------------------------------------------------------------------------------

    async def read(
        self,
        session: str,
        *,
        first_seq: int,
        limit: int,
        bytes_max: int = READ_BYTES_MAX,
        from_pos: int = 0,
    ) -> ReadResult:
        """As `read_each` of one session. Cancel-safe."""
        return (await self.read_each([Wanted(session, first_seq, from_pos)], limit=limit, bytes_max=bytes_max))[0]

    async def read_each(
        self, wanted: Sequence[Wanted], *, limit: int, bytes_max: int, whole: bool = False
    ) -> list[ReadResult]:
        """Durable messages of sessions, ascending, each checked; of as many as the limits allow. Cancel-safe.

        Args:
            wanted: sessions, and where each page begins; the first is always answered.
            limit: most messages of all pages. The last page may be cut short (`has_more`), those before it are whole.
            bytes_max: the pages end with the message that reaches this many bytes of JSON.
            whole: give the bodies of the records instead of the JSON in them.
        """
        while True:
            trim_pos = self.trim_pos
            active = self._appender.active
            assert active.index is not None
            links = self._sealed[::-1]
            requests = [
                PageRequest(
                    session=each.session,
                    first_seq=each.first_seq,
                    limit=limit,
                    bytes_max=min(bytes_max, READ_BYTES_MAX),
                    trim_pos=trim_pos,
                    from_pos=each.from_pos,
                    whole=whole,
                    active=active,
                    found=active.index.find(each.session, each.first_seq, limit, each.from_pos),
                    links=links,
                )
                for each in wanted
            ]
            answers = await self._on_reader(partial(read_pages, requests))
            if self.trim_pos != trim_pos and any(answer.damaged for answer in answers):
                continue  # retention took the files away under the reader
            self._stats.reads += len(answers)
            for answer in answers:
                self._learn(answer)
            return [answer.result for answer in answers]

    async def earliest(self, session: str, *, from_pos: int = 0) -> tuple[int, int] | None:
        """Seq and position of the first message of a session that is held from `from_pos` on. Cancel-safe."""
        links = list(self._sealed)
        active = self._appender.active
        assert active.index is not None
        found = active.index.find(session, 0, 1, from_pos)
        rebuilt: list[tuple[Link, MemoryIndex]] = []
        first = await self._on_reader(lambda cache: first_place(cache, links, session, from_pos, rebuilt))
        self._learn(PageAnswer(ReadResult((), (), has_more=False), rebuilt=rebuilt))
        return first or (found.places[0] if found is not None else None)

    def _on_reader(self, work: Callable[[IndexCache], T]) -> asyncio.Future[T]:
        self._next_reader = (self._next_reader + 1) % len(self._lanes.readers)
        cache = self._caches[self._next_reader]
        return run_on(self._lanes.readers[self._next_reader], partial(work, cache), self._loop)

    def _learn(self, answer: PageAnswer) -> None:
        """Keep what a read found out: indexes that it had to build, places that are damaged."""
        for link, index in answer.rebuilt:
            if link.index is None and link in self._sealed:
                link.index, link.index_path = index, None
        hurt = {link.id for link, _, _ in answer.damaged}
        known = {each.from_pos for each in self._damage}
        fresh = [Damage(pos, pos + 1, 0) for _, _, pos in answer.damaged if pos not in known]
        if fresh:
            self._damage = merged(sorted([*self._damage, *fresh], key=lambda each: each.from_pos))
            disk = self._disk

            def keep() -> None:
                for each in sorted(hurt):
                    keep_aside(disk, each)

            self._lanes.background.submit(keep, self._background_done)
        if answer.rebuilt:
            self._seal_next()

    # Checkpoints ---------------------------------------------------------------------------------------------------

    def row(self, session: str) -> CheckpointRow | None:
        """A session's row in the newest checkpoint; reads one block, usually from the page cache.

        Raises:
            TableDamaged: the block has rotted since boot.
        """
        newest = self._kept.newest
        return newest.row(session) if newest else None

    def rows(self, after: str = "") -> Iterator[tuple[str, CheckpointRow]]:
        """Rows of the newest checkpoint after a session id, in the order of UTF-8 bytes.

        Not to be kept over an `await`: the file is closed when it has been replaced twice.
        """
        newest = self._kept.newest
        return newest.rows(after) if newest else iter(())

    def names(self, after: str = "") -> Iterator[str]:
        """As `rows`, only the ids, and also of rows whose slots were released since."""
        newest = self._kept.newest
        return newest.names(after) if newest else iter(())

    def released_pos(self, slot: int) -> int:
        """Nothing of the slot below this position counts; 0: all does."""
        return self._released.get(slot, 0)

    async def checkpoint(
        self,
        changed: Mapping[str, CheckpointRow],
        *,
        pos: int,
        keys_from_pos: int,
        opened: Mapping[int, int],
        facts: MoveFacts = _NO_FACTS,
    ) -> None:
        """Write a checkpoint: the rows of the last one with `changed` put over them. Durable when it returns.

        Args:
            changed: every session that has changed since the last checkpoint; must not be altered meanwhile.
            pos: all records below it are in the rows (at most `durable_pos`).
            keys_from_pos: where the idempotency window begins.
            opened: slot → epoch.
            facts: what moves left.

        Raises:
            LogBusy: one is being written.
            LogStopped: the log ended before it was written.
            OSError: the disk refuses; the last checkpoint stays and this may be tried again.
        """
        assert pos <= self.durable_pos, "a checkpoint holds durable records only"
        if self._checkpointing:
            raise LogBusy("a checkpoint is being written")
        self._compactor.give_way()
        self._checkpointing = True
        try:
            stored = StoredMeta(
                pos=self._boundary(pos),
                keys_from_pos=self._boundary(min(keys_from_pos, pos)),
                opened=dict(opened),
                damage=[(each.from_pos, each.to_pos, each.lost_max) for each in self._damage],
                trim=self._trim,
                released=dict(self._released),
                facts=facts,
            )
            # Releases, openings and facts may be of records beyond `pos`, which must not be lost either.
            if self._appender.synced_pos < self.durable_pos:
                await self._appender.sync()
            own_id = CheckpointId(self._term, self._next_checkpoint)
            self._next_checkpoint += 1
            old, disk, temps, pause = self._kept.newest, self._disk, self._temps, self._lanes.pause
            gone = old.gone() if old else None
            made = await self._in_background(
                lambda: write_checkpoint(
                    disk, temps, own_id, old=old, changed=changed, stored=stored, gone=gone, pause=pause
                )
            )
            # A session that was changed below `pos` may leave memory now: its row counts, whatever was released before.
            made.rows_pos, made.released = pos, self._released
        except Exception:
            self._stats.checkpoint_failures += 1
            raise
        finally:
            self._checkpointing = False
        self._stats.checkpoints += 1
        if doomed := [checkpoint_path(each) for each in self._kept.add(made)]:
            self._lanes.background.submit(lambda: unlink_all(disk, doomed), self._background_done)

    def _boundary(self, pos: int) -> int:
        """The start of the batch at or before `pos` from which a boot can read."""
        if pos == self.durable_pos:
            return pos
        return self._boundaries[max(bisect_right(self._boundaries, pos) - 1, 0)]

    # Sealing and retention -----------------------------------------------------------------------------------------

    def _seal_next(self) -> None:
        """Write the index of the oldest segment that has none; one at a time."""
        if self._sealing or self._appender.stopped is not None:
            return
        link = next((each for each in self._sealed if each.index and each.id not in self._memory_only), None)
        if link is None or link.index is None:
            return
        self._sealing = True
        disk, temps, index, pause = self._disk, self._temps, link.index, self._lanes.pause
        own_path = index_path(IndexId(link.id, self._term))

        def done(path: str | None, error: BaseException | None) -> None:
            self._sealing = False
            if path is not None:
                link.index_path, link.index = path, None
            else:
                # It stays in memory, and the next boot reads the segment. The name may be taken by a damaged index.
                self._stats.seal_failures += 1
                self._memory_only.add(link.id)
                self._background_done(None, error)
            link.inserted_at_us_max, link.messages = index.inserted_at_us_max, index.messages
            self._seal_next()

        self._lanes.background.submit(lambda: write_index(disk, temps, link, index, path=own_path, pause=pause), done)

    async def trim(
        self, *, max_bytes: int | None, max_age_s: float | None, now_ms: int, below_pos: int | None = None
    ) -> bool:
        """Drop the oldest sealed segments: while the log is larger than `max_bytes`, or all in them older.

        Only what lies below `below_pos` (what is archived) and the replay positions of both kept checkpoints can go.
        Returns whether `trim_pos` moved.

        Raises:
            LogStopped: the log ended meanwhile.
        """
        if self._trimming:
            return False
        count = self._trimmable(max_bytes, max_age_s, now_ms, below_pos)
        if not count:
            return False
        self._trimming = True
        try:
            first = self._sealed[count] if count < len(self._sealed) else self._appender.active
            record = Trimmed(first.header.term, first.header.number, first.header.base_pos)
            future: asyncio.Future[None] = self._loop.create_future()
            self._appender.append_own(record, _Own(future))
            self._own_pending += 1
            # A look after it resolves later than the record, or fails with it.
            await self._appender.look()
            await future
            gone = self._sealed[:count]
            self._sealed = self._sealed[count:]
            self._trim = record
            self._damage = [each for each in self._damage if each.lost_max or each.to_pos > record.below_pos]
            self._boundaries = [pos for pos in self._boundaries if pos >= record.below_pos]
            self._stats.trimmed_segments += count
            ids = [link.id for link in gone]
            await self._in_background(lambda: delete_segments(self._disk, ids))
            self._close_indexes()
        finally:
            self._trimming = False
        return True

    def _close_indexes(self, doomed: Container[str | None] = frozenset()) -> None:
        """Readers let go of files that have no name any more: they would take space."""
        paths = [link.index_path for link in self._sealed if link.index_path and link.index_path not in doomed]
        for lane, cache in zip(self._lanes.readers, self._caches, strict=True):
            lane.submit(partial(cache.keep_only, paths), self._background_done)

    def _trimmable(self, max_bytes: int | None, max_age_s: float | None, now_ms: int, below_pos: int | None) -> int:
        """How many of the oldest segments may go."""
        limit_pos = self._limit_pos(below_pos)
        total = self._stored_bytes()
        count = 0
        for link in self._sealed:
            inserted_at_us_max = link.index.inserted_at_us_max if link.index else link.inserted_at_us_max
            too_large = max_bytes is not None and total > max_bytes
            too_old = max_age_s is not None and inserted_at_us_max < (now_ms - max_age_s * 1000) * 1000
            if link.end_pos > limit_pos or not (too_large or too_old):
                break
            total -= link.stored_bytes
            count += 1
        return count

    def _limit_pos(self, below_pos: int | None) -> int:
        """What may go, or be written anew: no boot reads it, and it is archived."""
        limit_pos = self._kept.limit_pos()
        return limit_pos if below_pos is None else min(limit_pos, below_pos)

    def _stored_bytes(self) -> int:
        return sum(link.stored_bytes for link in self._sealed) + self._appender.active.header.size

    async def compact(self, slot_of: Callable[[SessionId], int], *, below_pos: int | None = None) -> int:
        """Write a sealed segment anew without what RELEASED made void (`compaction.py`); one a call.

        Of the same segments as `trim`. Returns how many bytes the volume got back.

        Raises:
            LogStopped: the log ended meanwhile.
            OSError: the disk refuses; what is there says the same as before.
        """
        limit_pos = self._limit_pos(below_pos)
        made = await self._compactor.run(
            self._sealed, limit_pos=limit_pos, slot_of=slot_of, begins=self._forget_boundaries
        )
        if made is None:
            return 0
        link, compacted = made
        back_bytes = compacted.apply(link)
        self._stats.compacted_segments += 1
        self._stats.compacted_bytes += back_bytes
        self._close_indexes({link.index_path})
        return back_bytes

    def _forget_boundaries(self, link: Link) -> None:
        """Batches become one: no checkpoint may say any more that a boot begins in the middle of them."""
        self._boundaries = [pos for pos in self._boundaries if not link.header.base_pos < pos < link.end_pos]

    def compaction_waits(self, keys_from_pos: int) -> bool:
        """Whether there may be more to compact once there are newer checkpoints, whose keys begin at this position."""
        return self._compactor.waits(self._sealed, self._released, keys_from_pos=keys_from_pos)

    # The rest ------------------------------------------------------------------------------------------------------

    def _in_background(self, work: Callable[[], T]) -> asyncio.Future[T]:
        return run_on(self._lanes.background, work, self._loop)

    def _background_done(self, _: object, error: BaseException | None) -> None:
        """Housekeeping that failed is done again by the next boot; it never ends the log."""
        if error is not None:
            self._stats.background_failures += 1

    @property
    def durable_pos(self) -> int:
        """The end of what is durable and was looked at."""
        return self._appender.durable_pos

    @property
    def trim_pos(self) -> int:
        """Nothing below is held."""
        return self._trim.below_pos if self._trim else 0

    def places(self) -> list[tuple[SegmentHeader, int]]:
        """Header and end of each segment, oldest first, for readers in other processes; the active one's end is 0."""
        return [*((link.header, link.end_pos) for link in self._sealed), (self._appender.active.header, 0)]

    def messages_from(self, pos: int) -> int:
        """Messages at `pos` or beyond; of the segment that it lies in, in proportion to the bytes."""
        return sum(messages_from(link, pos) for link in (*self._sealed, self._appender.active))

    @property
    def damage(self) -> Sequence[Damage]:
        """What is known to be unreadable, ascending."""
        return self._damage

    @property
    def full(self) -> bool:
        """Whether appends are, or with the next one may be, refused because the volume has no space for them."""
        return self._appender.full

    @property
    def spacious(self) -> bool:
        """Whether space is left for what can wait, beyond the reserve and what clients will write next."""
        return self._appender.spacious

    @property
    def stats(self) -> LogStats:
        """Counters and sizes, as of now."""
        stats, appender = self._stats, self._appender
        stats.segments = len(self._sealed) + 1
        stats.segment_bytes = self._stored_bytes()
        stats.queued_records, stats.queued_bytes = appender.queued
        stats.durable_pos = appender.durable_pos
        stats.checkpoint_pos = self._kept.newest.stored.pos if self._kept.newest else 0
        stats.trim_pos = self.trim_pos
        stats.free_bytes = appender.free_bytes
        stats.rounds = appender.rounds
        stats.damage = list(self._damage)
        return stats

    async def close(self) -> None:
        """Graceful end: what is queued becomes durable, a mark says so, threads end. Must not be cancelled."""
        self._compactor.give_way()
        await self._appender.close()
        # Each lane answers once more when it has done what was queued; then ending its thread takes no time.
        for lane in {id(lane): lane for lane in self._lanes.all()}.values():
            await run_on(lane, _nothing, self._loop)
        self._lanes.close()
        for cache in self._caches:
            cache.keep_only(())
        self._kept.close()


def _nothing() -> None:
    """The last thing that a lane does."""
