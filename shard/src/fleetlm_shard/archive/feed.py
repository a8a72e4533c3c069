"""Reading a shard's log in order, from another process than the one that writes it.

The shard says which segments there are and up to where they are durable and were looked at (`Places`); nothing beyond
is read. Promise: records come in the order of the log, each checked; bytes that are damaged are skipped as the shard
itself skips them, and counted. Must not be done here: writing to the volume, deciding what is durable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from fleetlm_shard.archive.errors import FeedBroken
from fleetlm_shard.chain import Link, read_span
from fleetlm_shard.framing import BATCH_FRAME_BYTES, Hole, SegmentHeader, scan
from fleetlm_shard.log_types import BATCH_BYTES_MAX
from fleetlm_shard.records import Void, decode

if TYPE_CHECKING:
    from fleetlm_shard.disk import Disk
    from fleetlm_shard.records import Record

READ_BYTES: Final = 2 * (BATCH_BYTES_MAX + BATCH_FRAME_BYTES)
"""Read at once: at least one whole batch is in it wherever it begins, and some thousand messages make a transaction."""


class Segment(msgspec.Struct, frozen=True):
    """A segment of the chain; `end_pos` 0: the one that is written to."""

    header: SegmentHeader
    end_pos: int


class Places(msgspec.Struct, frozen=True):
    """What the shard says: its segments, oldest first, and the end of what is durable and was looked at."""

    segments: list[Segment]
    durable_pos: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Records with their positions, and where the next piece begins; `damaged` counts unreadable ranges."""

    records: list[tuple[int, Record]]
    end_pos: int
    damaged: int


def _is_void(data: bytes, hole: Hole, pos: int) -> bool:
    return hole.pos == pos and not any(data[: hole.end_pos - pos])


def read_piece(disk: Disk, places: Places, pos: int) -> Piece:
    """The records from `pos` (a batch's start) on, as many as one transaction takes.

    Raises:
        FeedBroken: `pos` is no batch's start.
        OSError: the disk refuses.
    """
    first = places.segments[0]
    if pos < first.header.base_pos:
        # Explicit retention took it before there was an archive.
        return Piece([], first.header.base_pos, damaged=0)
    segment = next(each for each in reversed(places.segments) if each.header.base_pos <= pos)
    segment_end = segment.end_pos or places.durable_pos
    if pos >= segment_end:
        following = [each.header.base_pos for each in places.segments if each.header.base_pos > pos]
        return Piece([], min(following, default=pos), damaged=0)
    end = min(segment_end, places.durable_pos, pos + READ_BYTES)
    link = Link(segment.header, segment_end)
    span = read_span(disk, link, pos, end)
    data = span.data.ljust(end - pos, b"\0")
    whole = end == min(segment_end, places.durable_pos)
    # A batch that `end` cuts is not damaged: the next piece begins with it.
    proven_pos = end if whole else max(pos, end - READ_BYTES // 2)
    records: list[tuple[int, Record]] = []
    at, damaged = pos, 0
    for piece in scan(data, start_pos=pos, seed=segment.header.seed, proven_pos=proven_pos):
        for own, kind, slot, start, stop in piece.frames:
            record = decode(kind, slot, data[start:stop])
            if not isinstance(record, Void):
                records.append((own, record))
        at = piece.end_pos
        # An archive that was restored may ask from a batch that is the inside of a VOID by now.
        damaged += isinstance(piece, Hole) and not _is_void(data, piece, pos)
    if at == pos:
        raise FeedBroken(f"nothing can be read at position {pos} of {link.path}")
    return Piece(records, at, damaged)
