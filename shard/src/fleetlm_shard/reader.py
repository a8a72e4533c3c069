"""Reading messages back from segments: pages of sessions, each record checked (docs/log.md, "Frames").

Place: runs on the log's reader lanes, beside the loop; it works on what the loop gave it and shares nothing with it but
the disk. Promise: a message is returned only if its checksum, session and seq are right; what is not there is named.
Must not be done here: deciding which segments there are (`log.py`).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, Self

from fleetlm_shard.chain import index_of, read_span
from fleetlm_shard.framing import FRAME, FRAME_BYTES, HEADER_BYTES, check_frame
from fleetlm_shard.log_types import Missing, ReadResult, StoredMessage
from fleetlm_shard.records import MESSAGES, message_place
from fleetlm_shard.segment_index import Found, MemoryIndex, find_in_value
from fleetlm_shard.table import KIND_INDEX, Table, TableDamaged

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fleetlm_shard.chain import Link
    from fleetlm_shard.disk import Disk, File

TABLES_MAX: Final = 64
"""Open indexes of a lane: descriptors, and some 100 KiB of directory each at 100,000 sessions a segment."""
_CHUNK_BYTES: Final = 64 * 1024
"""Read at once where a session's messages lie close together."""
_SINGLE_BYTES: Final = 2048
"""Read at once where they do not: one call for a usual message."""

Places = list[tuple[int, int]]
"""(seq, pos), ascending."""


class Wanted(NamedTuple):
    """Messages of a session from `first_seq` on; nothing below `from_pos` counts (`released_pos` of its slot)."""

    session: str
    first_seq: int
    from_pos: int = 0


@dataclass(slots=True)
class PageRequest:
    """What to read, as the loop knows it now.

    `links` are the sealed segments, newest first; `found` is what the active one has. Nothing below `from_pos` counts.
    `whole`: give the records' bodies instead of their JSON.
    """

    session: str
    first_seq: int
    limit: int
    bytes_max: int
    trim_pos: int
    from_pos: int
    whole: bool
    active: Link
    found: Found | None
    links: Sequence[Link]


@dataclass(slots=True)
class PageAnswer:
    """The page, and what reading it taught: positions that are damaged, indexes that were built anew."""

    result: ReadResult
    damaged: list[tuple[Link, int, int]] = field(default_factory=list["tuple[Link, int, int]"])
    rebuilt: list[tuple[Link, MemoryIndex]] = field(default_factory=list["tuple[Link, MemoryIndex]"])


class IndexCache:
    """Open indexes of one reader lane, the least recently used are closed first. Not shared between threads."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._tables: OrderedDict[str, Table] = OrderedDict()

    def table(self, path: str) -> Table:
        """The index at `path`, open.

        Raises:
            TableDamaged, FileNotFoundError: there is none that could be used.
        """
        table = self._tables.get(path)
        if table is not None:
            self._tables.move_to_end(path)
            return table
        file = self.disk.open(path)
        try:
            table = Table(file, KIND_INDEX)
        except BaseException:
            file.close()
            raise
        self._tables[path] = table
        if len(self._tables) > TABLES_MAX:
            self._tables.popitem(last=False)[1].close()
        return table

    def keep_only(self, paths: Iterable[str]) -> None:
        """Close the others: an open file takes space also after it was deleted."""
        kept = set(paths)
        for path in [path for path in self._tables if path not in kept]:
            self._tables.pop(path).close()


def find_in_link(
    cache: IndexCache,
    link: Link,
    session: str,
    *,
    first_seq: int,
    limit: int,
    rebuilt: list[tuple[Link, MemoryIndex]],
    from_pos: int = 0,
) -> Found | None:
    """Where a sealed segment has messages of a session, from `from_pos` on."""
    if link.end_pos <= from_pos:
        return None
    index, path = link.index, link.index_path
    if index is None and path is not None:
        try:
            value = cache.table(path).get(session.encode())
        except (TableDamaged, FileNotFoundError):
            # The index is only derived: the segment itself says what it holds.
            index = index_of(read_span(cache.disk, link, link.header.base_pos, link.end_pos).data, link)
            rebuilt.append((link, index))
        else:
            if value is None:
                return None
            return find_in_value(value, link.header.base_pos, first_seq=first_seq, limit=limit, from_pos=from_pos)
    return index.find(session, first_seq, limit, from_pos) if index is not None else None


def read_pages(requests: Sequence[PageRequest], cache: IndexCache) -> list[PageAnswer]:
    """Read pages that share the limits of the first request: as many as these allow, at least that of the first."""
    answers: list[PageAnswer] = []
    limit, bytes_max = requests[0].limit, requests[0].bytes_max
    with _Files(cache.disk) as files:
        for request in requests:
            request.limit, request.bytes_max = limit, bytes_max
            answer = _read_page(request, cache, files)
            answers.append(answer)
            limit -= len(answer.result.messages)
            bytes_max -= sum(len(message.json) for message in answer.result.messages)
            if answer.result.has_more or limit <= 0 or bytes_max <= 0:
                break
    return answers


def first_place(
    cache: IndexCache, links: Sequence[Link], session: str, from_pos: int, rebuilt: list[tuple[Link, MemoryIndex]]
) -> tuple[int, int] | None:
    """Seq and position of the first message of a session in sealed segments (`links`, oldest first)."""
    for link in links:
        place = find_in_link(cache, link, session, first_seq=0, limit=1, rebuilt=rebuilt, from_pos=from_pos)
        if place is not None:
            return place.places[0]
    return None


class _Files:
    """Segments, open for reading until the end of the `with`."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._open: dict[str, File] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open.values():
            file.close()

    def open(self, path: str) -> File:
        """The file.

        Raises:
            FileNotFoundError: retention took it.
        """
        file = self._open.get(path)
        if file is None:
            file = self._open[path] = self._disk.open(path)
        return file


def _read_page(request: PageRequest, cache: IndexCache, files: _Files) -> PageAnswer:
    answer = PageAnswer(ReadResult((), (), has_more=False))
    parts: list[tuple[Link, Places]] = []
    more = False
    link, found = request.active, request.found
    links = iter(request.links)
    while True:
        if found is not None:
            if found.places:
                parts.append((link, found.places))
            more = more or found.more
            if found.lowest_seq <= request.first_seq:
                break
        following = next(links, None)
        if following is None:
            break
        link = following
        found = find_in_link(
            cache,
            link,
            request.session,
            first_seq=request.first_seq,
            limit=request.limit,
            rebuilt=answer.rebuilt,
            from_pos=request.from_pos,
        )
    parts.reverse()
    answer.result = _fetch(files, request, parts, more=more, answer=answer)
    return answer


def _fetch(
    files: _Files, request: PageRequest, parts: list[tuple[Link, Places]], *, more: bool, answer: PageAnswer
) -> ReadResult:
    messages: list[StoredMessage] = []
    missing: list[Missing] = []
    budget = request.bytes_max
    expected = request.first_seq
    taken = 0
    total = sum(len(places) for _, places in parts)
    for link, places in parts:
        if budget <= 0 or taken >= request.limit:
            break
        want = places[: request.limit - taken]
        for seq, pos, json in _SegmentReader(files, link, request.session, whole=request.whole).read(want):
            if budget <= 0:
                break
            if seq < expected:
                # The record that released an earlier copy of this session is lost to damage; both say the same.
                taken += 1
                continue
            if seq > expected:
                # Retention takes from the beginning only.
                trimmed = request.trim_pos > 0 and taken == 0
                missing.append(Missing(expected, seq - 1, "trimmed" if trimmed else "damaged"))
            taken += 1
            if json is None:
                missing.append(Missing(seq, seq, "damaged"))
                answer.damaged.append((link, seq, pos))
            else:
                messages.append(StoredMessage(seq, pos, json))
                budget -= len(json)
            expected = seq + 1
    return ReadResult(messages, _joined(missing), has_more=more or taken < total)


def _joined(missing: list[Missing]) -> list[Missing]:
    """Neighbours of one reason become one range."""
    joined: list[Missing] = []
    for each in missing:
        if joined and joined[-1].reason == each.reason and joined[-1].to_seq + 1 == each.from_seq:
            joined[-1] = Missing(joined[-1].from_seq, each.to_seq, each.reason)
        else:
            joined.append(each)
    return joined


class _SegmentReader:
    """Reads places of one segment, near ones together."""

    def __init__(self, files: _Files, link: Link, session: str, *, whole: bool) -> None:
        self._files = files
        self._link = link
        self._session = session.encode()
        self._whole = whole
        self._start = 0
        self._chunk = b""

    def read(self, places: Places) -> list[tuple[int, int, bytes | None]]:
        """(seq, pos, JSON, or the body, or None where it is damaged)."""
        try:
            file = self._files.open(self._link.path)
        except FileNotFoundError:
            return [(seq, pos, None) for seq, pos in places]
        last = len(places) - 1
        return [
            (seq, pos, self._one(file, seq, pos, places[number + 1][1] if number < last else pos))
            for number, (seq, pos) in enumerate(places)
        ]

    def _one(self, file: File, seq: int, pos: int, next_pos: int) -> bytes | None:
        base_pos = self._link.header.base_pos
        offset = HEADER_BYTES + pos - base_pos
        end_offset = HEADER_BYTES + self._link.end_pos - base_pos
        near = 0 < next_pos - pos < _CHUNK_BYTES // 2
        try:
            at = offset - self._start
            if at < 0 or at + FRAME_BYTES > len(self._chunk):
                self._load(file, offset, min(_CHUNK_BYTES if near else _SINGLE_BYTES, end_offset - offset))
                at = 0
            if at + FRAME_BYTES > len(self._chunk):
                return None
            size = FRAME_BYTES + FRAME.unpack_from(self._chunk, at)[0]
            if at + size > len(self._chunk):
                if offset + size > end_offset:
                    return None
                self._load(file, offset, max(size, min(_CHUNK_BYTES if near else 0, end_offset - offset)))
                at = 0
        except OSError:
            return None
        checked = check_frame(self._chunk, at, min(at + size, len(self._chunk)), self._link.header.seed)
        if checked is None or checked[0] not in MESSAGES:
            return None
        body = self._chunk[at + FRAME_BYTES : at + size]
        session, own_seq, json_at = message_place(body)
        if (session, own_seq) != (self._session, seq):
            return None
        return body if self._whole else body[json_at:]

    def _load(self, file: File, offset: int, size: int) -> None:
        self._start, self._chunk = offset, b""
        self._chunk = file.pread(size, offset)
