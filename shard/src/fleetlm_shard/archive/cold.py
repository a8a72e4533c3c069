"""The log with the archive behind it: what the log does not hold (any more) is looked for there.

Promise: the same answers as `Log.read`, with holes filled as far as the archive fills them; a hole that stays is one
that neither has. A database that does not answer is said (`TRY_AGAIN`), not taken for an empty one. Must not be done
here: sessions, pages, gaps (`replay.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from fleetlm_common.errors import TryAgain
from fleetlm_shard.log_types import READ_BYTES_MAX, Missing, ReadResult, StoredMessage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fleetlm_shard.log import Log


class Shelves(Protocol):
    """What is asked of the archive (`library.Library`)."""

    async def read(
        self, session: str, *, first_seq: int, last_seq: int, limit: int, bytes_max: int
    ) -> list[StoredMessage]:
        """Messages of a range, ascending."""
        ...

    async def earliest(self, session: str) -> int | None:
        """The first seq that is held."""
        ...


class Cold:
    """What replay reads when memory does not have it.

    Args:
        log: the shard's log.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self.shelves: Shelves | None = None
        """The archive, if there is one; set before anything is served."""
        self.archive_reads = 0
        self.archive_failures = 0

    @property
    def trim_pos(self) -> int:
        """Nothing below is held by the log."""
        return self._log.trim_pos

    async def read(
        self, session: str, *, first_seq: int, last_seq: int, limit: int, slot: int, bytes_max: int = READ_BYTES_MAX
    ) -> ReadResult:
        """As `Log.read`, for a session of `slot` whose last durable seq is `last_seq`. Cancel-safe.

        Raises:
            TryAgain: part of it is in the archive, which does not answer.
        """
        from_pos = self._log.released_pos(slot)
        found = await self._log.read(session, first_seq=first_seq, limit=limit, bytes_max=bytes_max, from_pos=from_pos)
        shelves = self.shelves
        if shelves is None or first_seq > last_seq:
            return found
        held = list(found.messages)
        cut = found.has_more or len(held) >= limit
        end_seq = held[-1].seq if held and cut else last_seq
        holes = _holes(held, first_seq=first_seq, end_seq=end_seq)
        if not holes:
            return ReadResult(held, found.missing, has_more=found.has_more or end_seq < last_seq)
        merged: list[StoredMessage] = []
        asked_from = first_seq
        archive_cut = False
        for hole_from, hole_to in holes:
            merged += [message for message in held if asked_from <= message.seq < hole_from]
            wanted = limit - len(merged)
            room_bytes = bytes_max - sum(len(message.json) for message in merged)
            if wanted <= 0 or room_bytes <= 0:
                archive_cut, asked_from = True, end_seq + 1
                break
            filled = await self._archived(
                shelves, session, first_seq=hole_from, last_seq=hole_to, limit=wanted, bytes_max=room_bytes
            )
            merged += filled
            asked_from = hole_to + 1
            if filled and filled[-1].seq < hole_to and (len(filled) >= wanted or _bytes(filled) >= room_bytes):
                # By the page, not by what the archive holds.
                archive_cut, asked_from = True, end_seq + 1
                break
        merged += [message for message in held if message.seq >= asked_from]
        page = _that_fit(merged, limit=limit, bytes_max=bytes_max)
        full = len(page) >= limit and page[-1].seq < last_seq
        return ReadResult(
            page,
            _missing(page, found.missing, first_seq=first_seq),
            has_more=found.has_more or archive_cut or full or len(page) < len(merged),
        )

    async def _archived(
        self, shelves: Shelves, session: str, *, first_seq: int, last_seq: int, limit: int, bytes_max: int
    ) -> list[StoredMessage]:
        self.archive_reads += 1
        try:
            return await shelves.read(session, first_seq=first_seq, last_seq=last_seq, limit=limit, bytes_max=bytes_max)
        except TryAgain:
            self.archive_failures += 1
            raise

    async def earliest(self, session: str, *, slot: int) -> int | None:
        """The first seq that log or archive hold; the log's alone if the archive does not answer. Cancel-safe."""
        if self.shelves is not None:
            try:
                archived = await self.shelves.earliest(session)
            except TryAgain:
                archived = None
            if archived is not None:
                return archived
        first = await self._log.earliest(session, from_pos=self._log.released_pos(slot))
        return None if first is None else first[0]


def _bytes(messages: list[StoredMessage]) -> int:
    return sum(len(message.json) for message in messages)


def _holes(messages: list[StoredMessage], *, first_seq: int, end_seq: int) -> list[tuple[int, int]]:
    """Ranges (inclusive) of `[first_seq, end_seq]` that are not among ascending messages."""
    holes: list[tuple[int, int]] = []
    expected = first_seq
    for message in messages:
        if message.seq > expected:
            holes.append((expected, message.seq - 1))
        expected = message.seq + 1
    if expected <= end_seq:
        holes.append((expected, end_seq))
    return holes


def _that_fit(messages: list[StoredMessage], *, limit: int, bytes_max: int) -> list[StoredMessage]:
    total_bytes = 0
    for count, message in enumerate(messages[:limit]):
        if count and total_bytes >= bytes_max:
            return messages[:count]
        total_bytes += len(message.json)
    return messages[:limit]


def _missing(messages: list[StoredMessage], known: Sequence[Missing], *, first_seq: int) -> list[Missing]:
    """What stayed missing before and between the messages of a page, with the log's reason where it gave one."""
    end_seq = messages[-1].seq if messages else first_seq - 1
    missing: list[Missing] = []
    for hole_from, hole_to in _holes(messages, first_seq=first_seq, end_seq=end_seq):
        named = next((each for each in known if each.from_seq <= hole_from <= each.to_seq), None)
        missing.append(Missing(hole_from, hole_to, "trimmed" if named is None else named.reason))
    return missing
