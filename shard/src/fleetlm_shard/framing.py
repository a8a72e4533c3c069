"""Bytes of a segment (docs/log.md, "Frames"), pure: header, frames, batches, and the scan.

Promise: `scan` yields each batch whole or not at all; bytes below a position that is proven to be on disk are yielded
as a `Hole` if they are unreadable, never skipped in silence; after the last whole batch it ends (a torn tail).
Nothing unchecked comes out.
Must not be done here: I/O, and the meaning of bodies (`records.py`).
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec
from crc32c import crc32c

if TYPE_CHECKING:
    from collections.abc import Iterator

HEADER_BYTES: Final = 4096
"""Of a segment: one page, written before the segment has its name."""
_COPY_BYTES: Final = HEADER_BYTES // 2
"""The header stands twice, in sectors of its own: without its seed no frame of the segment could be checked."""
FORMAT: Final = 1
_MAGIC: Final = b"FLEETLG"
_CRC: Final = struct.Struct("<I")

FRAME: Final = struct.Struct("<IIBBHI")
"""body_bytes, crc, type, flags, slot, reserved."""
FRAME_BYTES: Final = FRAME.size
FRAME_START: Final = struct.Struct("<II")
"""body_bytes, crc."""
UNCHECKED_BYTES: Final = FRAME_START.size
"""Of a frame: its length and its checksum; the checksum covers the rest."""
_BATCH_BODY: Final = struct.Struct("<QQII")
_BATCH_TAIL: Final = struct.Struct("<BBHIQQII")
BATCH_FRAME_BYTES: Final = FRAME_BYTES + _BATCH_BODY.size
_BATCH: Final = 1
_LAST_TYPE: Final = 14

MESSAGE_FRAME_BYTES_MIN: Final = 160
"""No MESSAGE frame is shorter (16 + 34 + 1 + the JSON's fixed members, 115): bounds how many a hole can have held."""
SALVAGE_TRIES_MAX: Final = 200_000
"""Places in one hole at which a whole frame is looked for: bounds boot to a second or so; the rest counts as lost."""

_BATCH_LIKE: Final = re.compile(rb"\x18\x00\x00\x00[\s\S]{4}\x01\x00\x00\x00\x00\x00\x00\x00")
_FRAME_LIKE: Final = re.compile(rb"(?=[\s\S]{8}[\x02-\x0e]\x00[\s\S]{2}\x00{4})")

Frame = tuple[int, int, int, int, int]
"""A checked frame: position, type, slot, and where its body starts and ends in the scanned bytes."""


class UnknownFormat(Exception):
    """A whole header of a format that this version does not know."""


class PrevSegment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The segment before, and the position where it ends, for ever: what lies beyond in that file is read by nobody."""

    term: int
    number: int
    cut_pos: int


class SegmentHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """First page of a segment.

    `base_pos`: position of the first byte after the header. `size`: length of the file. `filled_pos`: what lies below
    it was written and synced before the file got its name. `seed`: every checksum of the segment starts with it.
    """

    ring_uid: str
    shard: str
    term: int
    number: int
    base_pos: int
    size: int
    filled_pos: int
    prev: PrevSegment | None
    seed: int

    @property
    def end_pos_max(self) -> int:
        """The position that the file's end would have."""
        return self.base_pos + self.size - HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Batch:
    """A whole batch: every frame is there and its checksum is right."""

    pos: int
    end_pos: int
    synced_pos: int
    frames: list[Frame]


@dataclass(frozen=True, slots=True)
class Hole:
    """`[pos, end_pos)` was on disk and is damaged; `frames` in it are whole, up to `lost_max` records are not."""

    pos: int
    end_pos: int
    lost_max: int
    frames: list[Frame]


def encode_header(header: SegmentHeader) -> bytes:
    """The 4,096 bytes: the same half twice."""
    text = _MAGIC + bytes([FORMAT]) + msgspec.json.encode(header)
    room = _COPY_BYTES - _CRC.size
    if len(text) > room:
        raise ValueError(f"a segment header of {len(text)} bytes does not fit {room}")
    half = text.ljust(room, b"\0")
    half += _CRC.pack(crc32c(half))
    return half + half


def decode_header(block: bytes) -> tuple[SegmentHeader | None, int]:
    """The header, from whichever copy is whole, and how many of the two are.

    Raises:
        UnknownFormat: the copy is whole but of another format.
    """
    found: list[SegmentHeader] = []
    for start in (0, _COPY_BYTES):
        half = block[start : start + _COPY_BYTES]
        body, crc = half[: -_CRC.size], half[-_CRC.size :]
        if len(half) < _COPY_BYTES or not half.startswith(_MAGIC) or _CRC.pack(crc32c(body)) != crc:
            continue
        version = half[len(_MAGIC)]
        if version != FORMAT:
            raise UnknownFormat(f"segment format {version}; this version reads format {FORMAT}")
        found.append(msgspec.json.decode(body[len(_MAGIC) + 1 :].rstrip(b"\0"), type=SegmentHeader))
    return (found[0] if found else None), len(found)


def frame_start(tail: bytes, seed: int) -> bytes:
    """The first 8 bytes of a frame whose rest is `tail` (see `records.encode`)."""
    return FRAME_START.pack(len(tail) - UNCHECKED_BYTES, crc32c(tail, seed))


def batch_frame(*, pos: int, synced_pos: int, frames: int, frames_bytes: int, seed: int) -> bytes:
    """The BATCH frame that stands before `frames` frames of together `frames_bytes`; with none it is a mark."""
    tail = _BATCH_TAIL.pack(_BATCH, 0, 0, 0, pos, synced_pos, frames, frames_bytes)
    return frame_start(tail, seed) + tail


def reseeded(data: bytes, batch: Batch, *, start_pos: int, seed: int) -> bytes:
    """The same batch with checksums for another segment.

    Args:
        data: the scanned bytes.
        batch: found in them.
        start_pos: the position of `data[0]`.
        seed: of the new segment.
    """
    parts: list[bytes] = []
    at = batch.pos - start_pos
    stops = [at + BATCH_FRAME_BYTES, *(frame[4] for frame in batch.frames)]
    for stop in stops:
        tail = data[at + UNCHECKED_BYTES : stop]
        parts += (frame_start(tail, seed), tail)
        at = stop
    return b"".join(parts)


def check_frame(data: bytes | memoryview, at: int, stop: int, seed: int) -> tuple[int, int, int] | None:
    """Type, slot and end of the frame at `at`, or None if there is no whole one that ends by `stop`."""
    if at + FRAME_BYTES > stop:
        return None
    body_bytes, crc, kind, flags, slot, reserved = FRAME.unpack_from(data, at)
    end = at + FRAME_BYTES + body_bytes
    if end > stop or flags or reserved or not kind:
        return None
    if crc32c(data[at + UNCHECKED_BYTES : end], seed) != crc:
        return None
    return kind, slot, end


def _check_mark(data: bytes, at: int, pos: int, seed: int) -> tuple[int, int, int] | None:
    """(synced_pos, frames, bytes) of the BATCH frame at `at`, if it is whole and says that it stands at `pos`."""
    found = check_frame(data, at, len(data), seed)
    if found is None or found[0] != _BATCH or found[2] - at != BATCH_FRAME_BYTES:
        return None
    own_pos, synced_pos, frames, frames_bytes = _BATCH_BODY.unpack_from(data, at + FRAME_BYTES)
    return (synced_pos, frames, frames_bytes) if own_pos == pos else None


class _Scan:
    """One pass over the bytes of a segment; the state that `scan`'s helpers share."""

    def __init__(self, data: bytes, *, start_pos: int, seed: int, proven_pos: int) -> None:
        self.data = data
        self.start_pos = start_pos
        self.seed = seed
        self.proven_pos = proven_pos
        self._marks: list[tuple[int, int]] | None = None

    def batch_at(self, pos: int) -> Batch | None:
        """The whole batch at `pos`."""
        data, seed, at = self.data, self.seed, pos - self.start_pos
        mark = _check_mark(data, at, pos, seed)
        if mark is None:
            return None
        synced_pos, count, frames_bytes = mark
        at += BATCH_FRAME_BYTES
        stop = at + frames_bytes
        if stop > len(data):
            return None
        frames: list[Frame] = []
        unpack, start_pos = FRAME.unpack_from, self.start_pos
        while at < stop:
            # `check_frame` by hand: this loop sets the speed of boot.
            if at + FRAME_BYTES > stop:
                return None
            body_bytes, crc, kind, flags, slot, reserved = unpack(data, at)
            body_at = at + FRAME_BYTES
            end = body_at + body_bytes
            if end > stop or flags or reserved or crc32c(data[at + UNCHECKED_BYTES : end], seed) != crc:
                return None
            frames.append((start_pos + at, kind, slot, body_at, end))
            at = end
        return Batch(pos, self.start_pos + stop, synced_pos, frames) if len(frames) == count else None

    def marks_after(self, pos: int) -> list[tuple[int, int]]:
        """(pos, synced_pos) of each whole BATCH frame beyond `pos`, by searching every byte."""
        if self._marks is None:
            self._marks = []
            for found in _BATCH_LIKE.finditer(self.data, max(pos + 1 - self.start_pos, 0)):
                own_pos = self.start_pos + found.start()
                mark = _check_mark(self.data, found.start(), own_pos, self.seed)
                if mark is not None:
                    self._marks.append((own_pos, mark[0]))
                    self.proven_pos = max(self.proven_pos, mark[0])
        return [each for each in self._marks if each[0] > pos]

    def hole_at(self, pos: int) -> Hole | None:
        """What is damaged from `pos` on; None if nothing proves that it was ever on disk: a torn tail."""
        later = self.marks_after(pos)
        if pos >= self.proven_pos:
            return None
        end_pos = min(later[0][0], self.proven_pos) if later else self.proven_pos
        mark = _check_mark(self.data, pos - self.start_pos, pos, self.seed)
        if mark is None:
            frames, lost_bytes = self._salvage(pos, end_pos)
            return Hole(pos, end_pos, sum(each // MESSAGE_FRAME_BYTES_MIN for each in lost_bytes), frames)
        end_pos = min(end_pos, pos + BATCH_FRAME_BYTES + mark[2])
        frames, _ = self._salvage(pos + BATCH_FRAME_BYTES, end_pos)
        return Hole(pos, end_pos, max(mark[1] - len(frames), 0), frames)

    def _salvage(self, pos: int, end_pos: int) -> tuple[list[Frame], list[int]]:
        """Whole frames in `[pos, end_pos)`, and the lengths of what lies between them."""
        frames: list[Frame] = []
        lost_bytes: list[int] = []
        at, stop = pos - self.start_pos, min(end_pos - self.start_pos, len(self.data))
        lost_from = at
        for _ in range(SALVAGE_TRIES_MAX):
            found = check_frame(self.data, at, stop, self.seed)
            if found is not None and found[0] != _BATCH and found[0] <= _LAST_TYPE:
                if at > lost_from:
                    lost_bytes.append(at - lost_from)
                frames.append((self.start_pos + at, found[0], found[1], at + FRAME_BYTES, found[2]))
                at = lost_from = found[2]
                continue
            near = _FRAME_LIKE.search(self.data, at + 1, stop)
            if near is None:
                break
            at = near.start()
        lost_bytes.append(end_pos - self.start_pos - lost_from)
        return frames, lost_bytes


def batches(data: bytes, *, start_pos: int, seed: int) -> Iterator[Batch]:
    """The whole batches from `start_pos` on, up to the first that is not: for who leaves damage to others."""
    state, pos = _Scan(data, start_pos=start_pos, seed=seed, proven_pos=start_pos), start_pos
    while (batch := state.batch_at(pos)) is not None:
        yield batch
        pos = batch.end_pos


def scan(data: bytes, *, start_pos: int, seed: int, proven_pos: int) -> Iterator[Batch | Hole]:
    """Read the batches of a segment in order.

    Args:
        data: bytes of the segment, from a batch's start on; of a sealed segment only up to its cut.
        start_pos: the position of `data[0]`.
        seed: from the segment's header.
        proven_pos: what lies below is known to have been on disk. Each whole BATCH frame proves more: its `synced_pos`
            was true when it was written, wherever it stands.

    Yields:
        Batches and holes without space between them. The end of the last is the end of the log.
    """
    state = _Scan(data, start_pos=start_pos, seed=seed, proven_pos=proven_pos)
    pos = start_pos
    while True:
        piece: Batch | Hole | None = state.batch_at(pos)
        if piece is None:
            # The end of every log comes here too: the rest of the segment is searched for a later batch.
            piece = state.hole_at(pos)
        if piece is None:
            return
        yield piece
        pos = piece.end_pos
