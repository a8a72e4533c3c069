"""Boot of the log: from files to a chain, a checkpoint, the records after it, and a new segment (docs/log.md, "Boot").

Promise: what is handed out is what was acknowledged, in order, each record checked; what cannot be read is named as
damage; elder files are never written; when `cut` has returned, all that was handed out is on disk under this term.
Must not be done here: appends (`log.py`), the meaning of sessions and keys (the upper half).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from fleetlm_shard import framing, records
from fleetlm_shard.chain import Link, Span, add_frames, open_index, read_chain, read_span, stored_bytes
from fleetlm_shard.checkpoints import Checkpoint, newest_checkpoint
from fleetlm_shard.framing import (
    BATCH_FRAME_BYTES,
    HEADER_BYTES,
    MESSAGE_FRAME_BYTES_MIN,
    Batch,
    Hole,
    PrevSegment,
    SegmentHeader,
)
from fleetlm_shard.log_types import CheckpointMeta, CheckpointRow, Damage, LogUnreadable
from fleetlm_shard.records import Damaged, LostMessage, Replayed, SlotsReleased, Trimmed
from fleetlm_shard.segment_index import MemoryIndex, decode_runs
from fleetlm_shard.segments import (
    ASIDE_FOLDER,
    LOG_FOLDER,
    Listing,
    SegmentId,
    TempNames,
    checkpoint_path,
    discard,
    keep_aside,
    parse_names,
    publish,
    segment_path,
)
from fleetlm_shard.table import KIND_INDEX, Table, TableDamaged

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from fleetlm_shard.disk import Disk, File
    from fleetlm_shard.log_types import Fence, LogConfig

LISTINGS_MAX: Final = 5
"""An elder that is ending may still delete what it trimmed while we read: list again, a few times."""
BOUNDARY_BYTES: Final = 1024 * 1024
"""Starts of batches are remembered this far apart: where a later boot may begin to read."""
DAMAGES_MAX: Final = 1000
"""Ranges kept apart; with more, neighbours become one: records and checkpoints carry them all."""
_ZEROS: Final = bytes(256 * 1024)


@dataclass(slots=True, kw_only=True)
class LogStart:
    """All that the running log begins with; made by `LogBoot.cut`."""

    disk: Disk
    fence: Fence
    config: LogConfig
    entropy: random.Random
    temps: TempNames
    sealed: list[Link]
    leftovers: list[Link]
    active: Link
    active_file: File
    checkpoint: Checkpoint | None
    listing: Listing
    damage: list[Damage]
    trim: Trimmed | None
    released: dict[int, int]
    strays: list[str]
    boundaries: list[int]


@dataclass(slots=True)
class _End:
    """Where the new segment begins, and what is copied into it."""

    base_pos: int = 0
    data: bytes = b""
    tail_from: int = 0
    tail: tuple[Batch, ...] = ()
    boundaries: tuple[int, ...] = ()


class LogBoot:
    """One boot of the log, steps 4 to 8. Blocking throughout; used once, in the order open, replay, cut.

    Attributes:
        damage: everything known to be damaged (complete after `replay`).
        strays: files that are not part of the log; never read, never touched.
    """

    def __init__(self, disk: Disk, fence: Fence, config: LogConfig, *, entropy: random.Random) -> None:
        self._disk = disk
        self._fence = fence
        self._config = config
        self._entropy = entropy
        self._checkpoint: Checkpoint | None = None
        self._listing = Listing([], [], [], [], [])
        self._links: list[Link] = []
        self._leftovers: list[Link] = []
        self._broken: list[SegmentId] = []
        self._trim: Trimmed | None = None
        self._known: list[Damage] = []
        self._new: list[Damage] = []
        self._hurt: list[SegmentId] = []
        self._end = _End()
        self._replay_from = 0
        self._boundaries: list[int] = []
        self.damage: list[Damage] = []
        self.strays: list[str] = []
        self.released: dict[int, int] = {}
        """Slot → position of its newest RELEASED, as far as was read."""

    @classmethod
    def open(cls, disk: Disk, fence: Fence, config: LogConfig, *, entropy: random.Random) -> LogBoot:
        """Sync the folder, find the chain and the newest whole checkpoint.

        Args:
            disk: the volume, already taken: the fence's term is durable.
            fence: the term of this boot, ring uid and shard name.
            config: settings.
            entropy: for the seeds of segments.

        Raises:
            LogUnreadable: with words for a person.
            OSError: the disk refuses.
        """
        boot = cls(disk, fence, config, entropy=entropy)
        disk.mkdir(LOG_FOLDER)
        disk.mkdir(ASIDE_FOLDER)
        disk.sync_folder("")
        # Names that are listed may be in the cache only: what is built on them must not outlive them.
        disk.sync_folder(LOG_FOLDER)
        for _ in range(LISTINGS_MAX):
            boot._listing = parse_names(disk.listdir(LOG_FOLDER))
            try:
                boot._find()
            except FileNotFoundError:
                continue
            return boot
        raise LogUnreadable("files of the log keep disappearing while it is read; another process deletes them")

    def _find(self) -> None:
        listing = self._listing
        self._checkpoint, damaged = newest_checkpoint(self._disk, listing.checkpoints)
        chain = read_chain(self._disk, self._fence, listing)
        self._links, self._broken = chain.links, chain.broken
        in_chain = {link.id for link in chain.links}
        self.strays = [segment_path(each) for each in listing.segments if each not in in_chain]
        self.strays += [checkpoint_path(each) for each in damaged]
        self.strays += listing.unknown
        if self._checkpoint is not None:
            stored = self._checkpoint.stored
            self._replay_from = stored.replay_from_pos
            self._known = stored.damages()
            self._trim = stored.trim
            self.released = dict(stored.released)
            self._checkpoint.released = self.released
        elif damaged and (not self._links or self._links[0].header.base_pos > 0):
            raise LogUnreadable(
                f"no checkpoint is whole ({', '.join(map(checkpoint_path, damaged))}) and the log's beginning was "
                "trimmed: sessions without messages in the rest of the log would begin again at 1"
            )

    @property
    def empty(self) -> bool:
        """Nothing was ever written here."""
        return not self._listing.segments and not self._listing.checkpoints

    @property
    def checkpoint(self) -> CheckpointMeta | None:
        """What the newest whole checkpoint covers."""
        return self._checkpoint.meta if self._checkpoint else None

    @property
    def trim_pos(self) -> int:
        """Nothing below is held."""
        return self._trim.below_pos if self._trim else 0

    def released_pos(self, slot: int) -> int:
        """Nothing of the slot below this position counts; 0: all does."""
        return self.released.get(slot, 0)

    def row(self, session: str) -> CheckpointRow | None:
        """A session's row in the checkpoint."""
        return self._checkpoint.row(session) if self._checkpoint else None

    def rows(self, after: str = "") -> Iterator[tuple[str, CheckpointRow]]:
        """The checkpoint's rows after a session id, in the order of UTF-8 bytes."""
        return self._checkpoint.rows(after) if self._checkpoint else iter(())

    # Reading -------------------------------------------------------------------------------------------------------

    def replay(self) -> Iterator[tuple[int, Replayed]]:
        """Yield (position, record) in order, from where the checkpoint or the key window begins to the log's end.

        Must be exhausted before `cut`.

        Raises:
            LogUnreadable: a whole record of an unknown type: a newer version wrote here.
        """
        covered_pos = self._checkpoint.stored.pos if self._checkpoint else 0
        end_pos = self._links[0].header.base_pos if self._links else covered_pos
        self._end = _End(base_pos=end_pos)
        for link in self._links:
            if link.header.base_pos > end_pos:
                self._lose(end_pos, link.header.base_pos)
            self._boundaries.append(link.header.base_pos)
            if link is self._links[-1]:
                yield from self._read_last(link)
            else:
                yield from self._read_sealed(link)
            end_pos = link.end_pos
        self._settle()

    def _read_sealed(self, link: Link) -> Iterator[tuple[int, Replayed]]:
        start_pos = link.header.base_pos
        open_index(self._disk, link, self._listing)
        if link.index_path is not None:
            # With an index, only what boot needs is read. Where a checkpoint says to begin, a batch begins.
            start_pos = max(start_pos, self._replay_from)
            if start_pos >= link.end_pos:
                return
        else:
            link.index = MemoryIndex()
        data = read_span(self._disk, link, start_pos, link.end_pos).data
        for piece in framing.scan(data, start_pos=start_pos, seed=link.header.seed, proven_pos=link.end_pos):
            yield from self._take(link, data, piece)

    def _read_last(self, link: Link) -> Iterator[tuple[int, Replayed]]:
        """The newest segment: find its end; what lies beyond the last proof that it is on disk is to be copied."""
        header = link.header
        base_pos = header.base_pos
        link.index = MemoryIndex()
        # A checkpoint covers durable records only: it may prove more than the last mark.
        proven_pos = max(header.filled_pos, self._checkpoint.stored.pos if self._checkpoint else 0)
        span = read_span(self._disk, link, base_pos, header.end_pos_max)
        end_pos = base_pos
        batches: list[Batch] = []
        for piece in framing.scan(span.data, start_pos=base_pos, seed=header.seed, proven_pos=proven_pos):
            yield from self._take(link, span.data, piece)
            end_pos = piece.end_pos
            if isinstance(piece, Batch):
                batches.append(piece)
                proven_pos = max(proven_pos, piece.synced_pos)
            else:
                proven_pos = max(proven_pos, piece.end_pos)
        rest = span.data[end_pos - base_pos :]
        if not span.whole and end_pos < header.end_pos_max and _hides_a_batch(span, end_pos - base_pos):
            # A file that is too short or unreadable at the place where the next batch would be: that is no torn tail.
            # Whatever was there counts as written; its whole frames are used.
            proven_pos = header.end_pos_max
            for piece in framing.scan(rest, start_pos=end_pos, seed=header.seed, proven_pos=proven_pos):
                yield from self._take(link, rest, piece)
            self._sync_elder(link)
        elif self._broken:
            # The process went on to a further segment, so it had synced all of this one.
            proven_pos = end_pos
            self._sync_elder(link)
        tail = [batch for batch in batches if batch.pos >= proven_pos]
        while tail and not tail[-1].frames:
            # Marks at the end say nothing to the new segment: all of it is synced before it is visible.
            tail.pop()
        link.end_pos = proven_pos
        self._end = _End(proven_pos, span.data, base_pos, tuple(tail))
        if self._broken:
            self._lose_broken(proven_pos)

    def _sync_elder(self, link: Link) -> None:
        """Sync a file that is trusted to its end for want of anything better (its end is destroyed)."""
        try:
            file = self._disk.open(link.path)
        except FileNotFoundError:
            return
        try:
            file.sync()
        finally:
            file.close()

    def _lose_broken(self, end_pos: int) -> None:
        """The newest segments are destroyed as a whole: as much was lost as fits."""
        size = 0
        for each in self._broken:
            file = self._disk.open(segment_path(each))
            size += max(file.size(), self._config.segment_bytes)
            file.close()
            self._hurt.append(each)
        self._lose(end_pos, end_pos + size)
        self._end.base_pos = end_pos + size

    def _take(self, link: Link, data: bytes, piece: Batch | Hole) -> Iterator[tuple[int, Replayed]]:
        """Index a piece's messages if the segment has no index, hand out its records from where boot begins."""
        if isinstance(piece, Hole):
            yield from self._take_hole(link, piece)
        elif piece.pos - self._boundaries[-1] >= BOUNDARY_BYTES:
            self._boundaries.append(piece.pos)
        if link.index is not None:
            add_frames(link.index, data, piece.frames)
        if piece.end_pos <= self._replay_from:
            return
        for pos, kind, slot, start, stop in piece.frames:
            if pos < self._replay_from:
                continue
            try:
                record = records.decode(kind, slot, data[start:stop])
            except (records.UnknownRecord, msgspec.MsgspecError) as error:
                raise LogUnreadable(f"{link.path}: record at position {pos}: {error}") from error
            self._note(record, pos)
            yield pos, record

    def _note(self, record: Replayed, pos: int) -> None:
        """Records of the log about itself."""
        if isinstance(record, SlotsReleased):
            self.released.update((slot, pos) for slot in record.slots)
        elif isinstance(record, Trimmed):
            if record.below_pos > self.trim_pos:
                self._trim = record
        elif isinstance(record, Damaged):
            self._known.append(Damage(record.from_pos, record.to_pos, record.lost_max))

    def _take_hole(self, link: Link, hole: Hole) -> Iterator[tuple[int, Replayed]]:
        self._hurt.append(link.id)
        named = self._named(link, hole)
        self._lose(hole.pos, hole.end_pos, lost_max=hole.lost_max if named is None else 0)
        yield from named or ()

    def _named(self, link: Link, hole: Hole) -> list[tuple[int, LostMessage]] | None:
        """What the index says that the hole held; None if there is no index, or it is damaged too."""
        if link.index_path is None:
            return None
        whole = {frame[0] for frame in hole.frames}
        lost: list[tuple[int, LostMessage]] = []
        file = self._disk.open(link.index_path)
        try:
            for key, value in Table(file, KIND_INDEX).items():
                for run in decode_runs(value, link.header.base_pos):
                    lost += (
                        (pos, LostMessage(key.decode(), seq))
                        for seq, pos in enumerate(run[1:], run[0])
                        if hole.pos <= pos < hole.end_pos and pos not in whole
                    )
        except TableDamaged:
            return None
        finally:
            file.close()
        return sorted(lost, key=lambda each: each[0])

    def _lose(self, from_pos: int, to_pos: int, *, lost_max: int | None = None) -> None:
        """Note damage; what a checkpoint covers is named by its rows."""
        covered = self._checkpoint is not None and to_pos <= self._checkpoint.stored.pos
        if lost_max is None:
            lost_max = (to_pos - from_pos) // MESSAGE_FRAME_BYTES_MIN
        self._new.append(Damage(from_pos, to_pos, 0 if covered else lost_max))

    def _settle(self) -> None:
        """Everything was read: leave out what was trimmed, and what was known to be damaged before."""
        trim_pos = self.trim_pos
        if self._trim is not None:
            self._leftovers = [link for link in self._links[:-1] if link.end_pos <= trim_pos]
        gone = {link.id for link in self._leftovers}
        self._links = [link for link in self._links if link.id not in gone]
        begins_pos = self._links[0].header.base_pos if self._links else self._end.base_pos
        if begins_pos > trim_pos:
            self._lose(trim_pos, begins_pos)
        known = self._known
        self._new = [
            each
            for each in self._new
            if each.to_pos > trim_pos
            and not any(one.from_pos <= each.from_pos and each.to_pos <= one.to_pos for one in known)
        ]
        kept = [each for each in known if each.lost_max or each.to_pos > trim_pos]
        self.damage = merged(sorted({*kept, *self._new}, key=lambda each: each.from_pos))

    # Cutting -------------------------------------------------------------------------------------------------------

    def cut(self) -> LogStart:
        """Make this term's first segment with all that is not proven to be on disk, and look at the term.

        Raises:
            OSError: the disk refuses (full: even the reserve is used up).
            Exception: whatever the fence raises; a younger term exists.
        """
        for each in dict.fromkeys(self._hurt):
            keep_aside(self._disk, each)
        temps = TempNames(self._fence.term)
        seed = self._entropy.getrandbits(32)
        data = self._first_data(seed)
        header = self._first_header(len(data), seed)
        temp = temps.next()
        file = self._disk.create(temp)
        try:
            _write_filled(file, framing.encode_header(header) + data, header.size)
            file.sync()
        except OSError:
            discard(self._disk, file, temp)
            raise
        publish(self._disk, temp, segment_path(SegmentId(header.term, header.number)))
        active = Link(header, header.filled_pos, index=MemoryIndex())
        sealed = self._links
        if sealed:
            last = sealed[-1]
            assert last.index is not None, "the newest segment was read as a whole"
            last.index, active.index = last.index.split(last.end_pos)
            last.inserted_at_us_max = last.index.inserted_at_us_max
        for link in sealed:
            if link.index is not None:
                link.inserted_at_us_max = link.index.inserted_at_us_max
            link.stored_bytes = stored_bytes(self._disk, link)
        self._fence.look()
        return LogStart(
            disk=self._disk,
            fence=self._fence,
            config=self._config,
            entropy=self._entropy,
            temps=temps,
            sealed=sealed,
            leftovers=self._leftovers,
            active=active,
            active_file=file,
            checkpoint=self._checkpoint,
            listing=self._listing,
            damage=self.damage,
            trim=self._trim,
            released=self.released,
            strays=self.strays,
            boundaries=[pos for pos in self._boundaries if pos < header.base_pos] + [header.base_pos],
        )

    def _first_data(self, seed: int) -> bytes:
        end = self._end
        parts = [framing.reseeded(end.data, batch, start_pos=end.tail_from, seed=seed) for batch in end.tail]
        pos = end.tail[-1].end_pos if end.tail else end.base_pos
        fresh = merged(self._new)
        if fresh:
            tails = [records.encode(Damaged(each.from_pos, each.to_pos, each.lost_max)) for each in fresh]
            frames = b"".join(framing.frame_start(tail, seed) + tail for tail in tails)
            # True when the segment becomes visible, for all of it is synced before.
            parts.append(
                framing.batch_frame(pos=pos, synced_pos=pos, frames=len(tails), frames_bytes=len(frames), seed=seed)
            )
            parts.append(frames)
        return b"".join(parts)

    def _first_header(self, data_bytes: int, seed: int) -> SegmentHeader:
        end = self._end
        prev = None
        if self._links:
            last = self._links[-1]
            prev = PrevSegment(last.header.term, last.header.number, last.end_pos)
        config = self._config
        return SegmentHeader(
            ring_uid=self._fence.ring_uid,
            shard=self._fence.shard,
            term=self._fence.term,
            number=1,
            base_pos=end.base_pos,
            size=max(config.boot_segment_bytes, HEADER_BYTES + data_bytes + 2 * config.batch_bytes_max),
            filled_pos=end.base_pos + data_bytes,
            prev=prev,
            seed=seed,
        )


def _hides_a_batch(span: Span, end: int) -> bool:
    """May a batch have begun at `end`, where the bytes that the disk gave stop making sense?"""
    head = span.data[end : end + BATCH_FRAME_BYTES]
    return len(head) < BATCH_FRAME_BYTES or any(span.data[end:]) or span.is_refused(end, end + BATCH_FRAME_BYTES)


def merged(damage: list[Damage]) -> list[Damage]:
    """At most `DAMAGES_MAX` ranges; the last ones become one if there are more."""
    if len(damage) <= DAMAGES_MAX:
        return damage
    rest = damage[DAMAGES_MAX - 1 :]
    return [
        *damage[: DAMAGES_MAX - 1],
        Damage(rest[0].from_pos, rest[-1].to_pos, sum(each.lost_max for each in rest)),
    ]


def _write_filled(file: File, data: bytes, size: int) -> None:
    file.pwrite(data, 0)
    at = len(data)
    while at < size:
        part = min(len(_ZEROS), size - at)
        file.pwrite(_ZEROS[:part], at)
        at += part
