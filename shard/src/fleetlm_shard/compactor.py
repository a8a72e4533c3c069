"""Which segments are written anew, and when: the part of compaction that belongs to the log's loop.

Promise: only segments are touched that no boot reads, by releases that both kept checkpoints know, under a term that
was looked at after both were written; what cannot be written keeps no other waiting. Must not be done here: bytes and
files (`compaction.py`).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fleetlm_shard.compaction import Compacted, CompactionEnded, Task, compact_segment
from fleetlm_shard.lanes import run_on

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from fleetlm_common.ids import SessionId
    from fleetlm_shard.chain import Link
    from fleetlm_shard.checkpoints import KeptCheckpoints
    from fleetlm_shard.lanes import Lanes
    from fleetlm_shard.recovery import LogStart
    from fleetlm_shard.segments import SegmentId


class Candidates:
    """Which segment to look at next: of those that may hold something released, the one whose turn is longest ago."""

    def __init__(self) -> None:
        self._looked: dict[SegmentId, int] = {}
        self._turns: dict[SegmentId, int] = {}
        self._turn = 0

    def next(self, links: Sequence[Link], released: Mapping[int, int], *, limit_pos: int) -> Link | None:
        """A sealed segment below `limit_pos` that may hold something released since it was looked at.

        Neither releases that go on nor a segment that cannot be written keep the others waiting.

        Args:
            links: sealed, ascending.
            released: slot → position below which nothing of it counts.
            limit_pos: no boot reads anything below.
        """
        newest_pos, chosen = max(released.values(), default=0), None
        for link in links:
            if link.end_pos > limit_pos:
                break
            since_pos = max(link.header.base_pos, self._looked.get(link.id, 0))
            waits_longer = chosen is None or self._turns.get(link.id, 0) < self._turns.get(chosen.id, 0)
            if link.index_path is not None and newest_pos > since_pos and waits_longer:
                chosen = link
        if chosen is not None:
            self._turn += 1
            there = {link.id for link in links}
            self._looked = {own: pos for own, pos in self._looked.items() if own in there} | {chosen.id: newest_pos}
            self._turns = {own: turn for own, turn in self._turns.items() if own in there} | {chosen.id: self._turn}
        return chosen

    def again(self, link: Link) -> None:
        """It was not looked at to the end: it has another turn, after the others."""
        self._looked.pop(link.id, None)


class Compactor:
    """Writes segments anew, one a call.

    Args:
        start: what the log begins with.
        kept: its checkpoints.
        lanes, loop: of the log.
        look: waits for a look at the term that begins after the call.
    """

    def __init__(
        self,
        start: LogStart,
        kept: KeptCheckpoints,
        *,
        lanes: Lanes,
        loop: asyncio.AbstractEventLoop,
        look: Callable[[], Awaitable[None]],
    ) -> None:
        self._start = start
        self._kept = kept
        self._lanes = lanes
        self._loop = loop
        self._looked = look
        self._candidates = Candidates()
        self._gives_way = False

    async def run(
        self,
        links: Sequence[Link],
        *,
        limit_pos: int,
        slot_of: Callable[[SessionId], int],
        begins: Callable[[Link], None],
    ) -> tuple[Link, Compacted] | None:
        """Look at one segment, and write it anew if that gives enough back.

        Args:
            links: sealed, ascending.
            limit_pos: no boot reads anything below.
            slot_of: the slot of a session id.
            begins: told of the segment before anything is written.

        Raises:
            LogStopped: the log ended meanwhile.
            OSError: the disk refuses; what is there says the same as before.
        """
        released = self._kept.released()
        link = self._candidates.next(links, released, limit_pos=limit_pos)
        if link is None:
            return None
        # After the checkpoints that it rests on: who is younger than this look begins with them.
        self._gives_way = False
        await self._looked()
        if link.index_path is None:
            return None
        begins(link)
        start = self._start
        task = Task(
            disk=start.disk,
            temps=start.temps,
            link=link,
            index_path=link.index_path,
            released=released,
            slot_of=slot_of,
            reserve_bytes=start.config.reserve_bytes,
            look=start.fence.look,
            pause=self._pause,
        )
        try:
            made = await run_on(self._lanes.background, partial(compact_segment, task), self._loop)
        except CompactionEnded:
            self._candidates.again(link)
            return None
        except OSError:
            self._candidates.again(link)
            raise
        return None if made is None else (link, made)

    def waits(self, links: Sequence[Link], released: Mapping[int, int], *, keys_from_pos: int) -> bool:
        """Whether newer checkpoints would let more segments be looked at.

        Args:
            links: sealed, ascending.
            released: slot → position of its newest RELEASED.
            keys_from_pos: no new checkpoint would let anything beyond be looked at.
        """
        kept = self._kept
        newest_pos, known_pos = max(released.values(), default=0), max(kept.released().values(), default=0)
        limit_pos = kept.limit_pos()
        return any(
            link.header.base_pos < newest_pos and link.end_pos <= keys_from_pos
            for link in links
            if link.end_pos > limit_pos or known_pos < newest_pos
        )

    def give_way(self) -> None:
        """Something else needs the background lane: what is under way ends at its next pause."""
        self._gives_way = True

    def _pause(self) -> None:
        """In the background lane."""
        if self._gives_way:
            raise CompactionEnded
        self._lanes.pause()
