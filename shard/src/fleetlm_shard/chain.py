"""The chain of segments: following it back from the newest, and reading a segment's bytes (docs/log.md, "Boot").

Promise: only files that the newest segment's headers name are read; a broken link is bridged where that is certain,
and otherwise said. Must not be done here: deciding what was lost (`recovery.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from fleetlm_shard import framing
from fleetlm_shard.framing import HEADER_BYTES, SegmentHeader, UnknownFormat
from fleetlm_shard.log_types import LogUnreadable
from fleetlm_shard.records import MESSAGES, message_inserted_at_us, message_place
from fleetlm_shard.segment_index import IndexMeta, MemoryIndex
from fleetlm_shard.segments import Listing, SegmentId, index_path, segment_path
from fleetlm_shard.table import KIND_INDEX, Table, TableDamaged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fleetlm_shard.disk import Disk
    from fleetlm_shard.log_types import Fence

_SECTOR_BYTES: Final = 4096
"""Where a large read fails, this much is tried at a time: what a bad sector costs."""


@dataclass(slots=True)
class Link:
    """A segment of the chain: `[header.base_pos, end_pos)`.

    Exactly one of `index` (in memory) and `index_path` (a table) is there once the segment was read or sealed.
    """

    header: SegmentHeader
    end_pos: int
    index: MemoryIndex | None = None
    index_path: str | None = None
    inserted_at_us_max: int = 0
    messages: int = 0
    """This and the field before: what the index says, once it is in a table."""
    stored_bytes: int = 0
    """What its file takes, once it is sealed: less than its length when it was compacted."""

    @property
    def id(self) -> SegmentId:
        """Its name."""
        return SegmentId(self.header.term, self.header.number)

    @property
    def path(self) -> str:
        """Its file."""
        return segment_path(self.id)


def messages_from(link: Link, pos: int) -> int:
    """Messages of a segment at `pos` or beyond, if they lie evenly; never 0 if bytes of it lie there and it has any."""
    messages = link.messages if link.index is None else link.index.messages
    size = link.end_pos - link.header.base_pos
    beyond = min(max(link.end_pos - pos, 0), size)
    return -(-messages * beyond // size) if size else 0


@dataclass(slots=True)
class Chain:
    """Links, oldest first; `broken` are newer than all of them and unreadable; `bridged` stand between them."""

    links: list[Link] = field(default_factory=list[Link])
    broken: list[SegmentId] = field(default_factory=list[SegmentId])


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a segment; `whole` is False if the file is too short or the disk refused some bytes.

    `refused`: where in `data` zeros stand for what the disk refused, as (start, stop).
    """

    data: bytes
    whole: bool
    refused: tuple[tuple[int, int], ...] = ()

    def is_refused(self, start: int, stop: int) -> bool:
        """Did the disk refuse any byte of this range of `data`?"""
        return any(own_start < stop and start < own_stop for own_start, own_stop in self.refused)


def read_span(disk: Disk, link: Link, start_pos: int, end_pos: int) -> Span:
    """Read `[start_pos, end_pos)` of a segment, as far as the disk gives it."""
    offset = HEADER_BYTES + start_pos - link.header.base_pos
    size = end_pos - start_pos
    try:
        file = disk.open(link.path)
    except FileNotFoundError:
        # Its header came from its index: the file itself has gone.
        return Span(b"", whole=False)
    try:
        data = file.pread(size, offset)
        return Span(data, len(data) == size)
    except OSError:
        parts: list[bytes] = []
        refused: list[tuple[int, int]] = []
        for at in range(offset, offset + size, _SECTOR_BYTES):
            want = min(_SECTOR_BYTES, offset + size - at)
            try:
                parts.append(file.pread(want, at))
            except OSError:
                parts.append(bytes(want))
                refused.append((at - offset, at - offset + want))
        return Span(b"".join(parts), False, tuple(refused))
    finally:
        file.close()


def stored_bytes(disk: Disk, link: Link) -> int:
    """What a segment's file takes; 0 if it has gone."""
    try:
        file = disk.open(link.path)
    except FileNotFoundError:
        return 0
    try:
        return file.stored_bytes()
    finally:
        file.close()


def _indexes_of(listing: Listing, each: SegmentId) -> list[str]:
    return [index_path(own) for own in reversed(listing.indexes) if own.segment == each]


def _index_meta(disk: Disk, path: str) -> IndexMeta | None:
    """Metadata of an index whose frame is whole; its blocks are checked when they are read."""
    try:
        file = disk.open(path)
    except FileNotFoundError:
        return None
    try:
        return msgspec.json.decode(Table(file, KIND_INDEX).meta, type=IndexMeta)
    except (TableDamaged, msgspec.MsgspecError):
        return None
    finally:
        file.close()


def open_index(disk: Disk, link: Link, listing: Listing) -> None:
    """Find the segment's index: the newest that is whole and ends where the chain says that the segment ends."""
    for path in _indexes_of(listing, link.id):
        meta = _index_meta(disk, path)
        if meta is not None and meta.header == link.header and meta.end_pos == link.end_pos:
            link.index_path = path
            link.inserted_at_us_max, link.messages = meta.inserted_at_us_max, meta.messages
            return


def load_header(disk: Disk, each: SegmentId, listing: Listing, fence: Fence) -> SegmentHeader | None:
    """A segment's header, from its file or else from its index; None if neither has it.

    Raises:
        LogUnreadable: it belongs to another ring or shard, or to a newer version.
        FileNotFoundError: the file has gone since it was listed.
    """
    file = disk.open(segment_path(each))
    try:
        header, _ = framing.decode_header(file.pread(HEADER_BYTES, 0))
    except OSError:
        header = None
    except UnknownFormat as error:
        raise LogUnreadable(f"{segment_path(each)}: {error}") from error
    finally:
        file.close()
    if header is None:
        metas = (_index_meta(disk, path) for path in _indexes_of(listing, each))
        header = next((meta.header for meta in metas if meta is not None), None)
    if header is None or (header.term, header.number) != each:
        return None
    if (header.ring_uid, header.shard) != (fence.ring_uid, fence.shard):
        raise LogUnreadable(
            f"{segment_path(each)} belongs to shard {header.shard} of ring {header.ring_uid}, "
            f"this is {fence.shard} of {fence.ring_uid}"
        )
    return header


def read_chain(disk: Disk, fence: Fence, listing: Listing) -> Chain:
    """Follow `prev` back from the newest segment of the highest term.

    Raises:
        LogUnreadable: the newest segment is destroyed and what came before it is not certain.
        FileNotFoundError: a file has gone since it was listed.
    """
    chain = Chain()
    header = _head(disk, fence, listing, chain)
    if header is None:
        return chain
    there = set(listing.segments)
    newest = Link(header, header.end_pos_max)
    chain.links.append(newest)
    while header.prev is not None:
        want = SegmentId(header.prev.term, header.prev.number)
        found = load_header(disk, want, listing, fence) if want in there else None
        if found is not None:
            chain.links.append(Link(found, header.prev.cut_pos))
        else:
            found = _bridge(disk, fence, listing, want)
            if found is None:
                break
            chain.links.append(Link(found, _scanned_end(disk, found)))
        header = found
    chain.links.reverse()
    return chain


def _head(disk: Disk, fence: Fence, listing: Listing, chain: Chain) -> SegmentHeader | None:
    for each in reversed(listing.segments):
        header = load_header(disk, each, listing, fence)
        if header is None:
            chain.broken.insert(0, each)
            continue
        if chain.broken and chain.broken[0] != (each.term, each.number + 1):
            # Its header would have said where the elder term was cut. Without it, an elder's late writes, which
            # nobody may ever read, cannot be told from the log.
            break
        return header
    if chain.broken:
        raise LogUnreadable(
            f"{segment_path(chain.broken[0])} is destroyed (both copies of its header) and it was the first of its "
            "term: where the log before it ends is not known; restore the file, or give the volume up"
        )
    return None


def _bridge(disk: Disk, fence: Fence, listing: Listing, missing: SegmentId) -> SegmentHeader | None:
    """The segment before a missing one: certain only within one term, where one process numbered them."""
    for each in reversed(listing.segments):
        if each.term == missing.term and each.number < missing.number:
            header = load_header(disk, each, listing, fence)
            if header is not None:
                return header
    return None


def _scanned_end(disk: Disk, header: SegmentHeader) -> int:
    link = Link(header, header.end_pos_max)
    span = read_span(disk, link, header.base_pos, header.end_pos_max)
    end_pos = header.base_pos
    for piece in framing.scan(span.data, start_pos=header.base_pos, seed=header.seed, proven_pos=header.filled_pos):
        end_pos = piece.end_pos
    return end_pos


def index_of(data: bytes, link: Link) -> MemoryIndex:
    """Build a segment's index from its bytes `[base_pos, end_pos)`."""
    index = MemoryIndex()
    base_pos = link.header.base_pos
    for piece in framing.scan(data, start_pos=base_pos, seed=link.header.seed, proven_pos=link.end_pos):
        add_frames(index, data, piece.frames)
    return index


def add_frames(index: MemoryIndex, data: bytes | memoryview, frames: Sequence[framing.Frame]) -> None:
    """Take the messages among checked frames into an index."""
    for pos, kind, _slot, start, stop in frames:
        if kind in MESSAGES:
            body = data[start:stop]
            session, seq, _ = message_place(body)
            index.add(session.decode(), seq, pos)
            index.inserted_at_us_max = max(index.inserted_at_us_max, message_inserted_at_us(body))
