"""All moves of one shard: which the map shows, what is announced of them, and what is left to clean up (docs/moves.md).

    each map ─┬─► exporter   (source: trackers, seals)
              ├─► imports    (target: one task a move, ended when its move is gone)
              └─► idle slots (neither ours nor coming: RELEASED after a grace time)

Promise: nothing is released of a slot that the newest map gives to us or moves to or from us. Must not be done here:
what a source or a target does (`exporter.py`, `importer.py`), who may write (`ownership.py`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from fleetlm_shard.importer import Import
from fleetlm_shard.log_types import LogStopped
from fleetlm_shard.records import SlotsReleased

if TYPE_CHECKING:
    from collections.abc import Callable

    from fleetlm_common.clock import Clock
    from fleetlm_common.control import MoveProgress
    from fleetlm_common.ids import Slot
    from fleetlm_common.logs import Logger
    from fleetlm_common.ring import Move, RingMap
    from fleetlm_shard.exporter import Exporter
    from fleetlm_shard.holdings import Holdings
    from fleetlm_shard.importer import ImportParts
    from fleetlm_shard.ownership import Ownership
    from fleetlm_shard.server import Credentials
    from fleetlm_shard.sessions import Sessions
    from fleetlm_shard.writes import Writes

RELEASE_SESSIONS: Final = 2000
"""In memory, of slots released at once: some five milliseconds."""


class Moves:
    """The moves of one shard. Belongs to the loop.

    Args:
        credentials: who we are, and the ring's secret.
        exporter: the source's side.
        parts: for imports.
        ownership: the map.
        holdings: what the log says about slots.
        sessions: hot state.
        writes: the way into the log.
        clock: for the grace time.
        clean_after_s: how long a copy stays that nobody needs here.
        events: for events.
        news: called when there is something to announce at once.
    """

    def __init__(
        self,
        *,
        credentials: Credentials,
        exporter: Exporter,
        parts: ImportParts,
        ownership: Ownership,
        holdings: Holdings,
        sessions: Sessions,
        writes: Writes,
        clock: Clock,
        clean_after_s: float,
        events: Logger,
        news: Callable[[], None],
    ) -> None:
        self.exporter = exporter
        self._credentials = credentials
        self._ownership = ownership
        self._holdings = holdings
        self._sessions = sessions
        self._writes = writes
        self._clock = clock
        self._clean_after_s = clean_after_s
        self._events = events
        self._parts = parts
        self._news = news
        self._imports: dict[str, Import] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._idle_since_s: dict[Slot, float] = {}
        self._ended_messages = 0
        self._ended_bytes = 0
        self._ended_mismatches = 0
        self.confirmed = 0
        self.failed = 0
        self.released_slots = 0

    def on_map(self, ring: RingMap) -> None:
        """Act on a newer map, before anything else is done because of it."""
        self.exporter.on_map(ring, self._ownership.sealed)
        shard = self._credentials.shard
        wanted = {move.id: move for move in ring.moves if move.target == shard}
        for gone in [move for move in self._imports if move not in wanted]:
            ended = self._imports.pop(gone)
            self._ended_messages += ended.imported_messages
            self._ended_mismatches += ended.mismatches
            self._ended_bytes += ended.imported_bytes
            self._tasks.pop(gone).cancel()
        for move in wanted.values():
            if move.id in self._imports:
                self._imports[move.id].on_map(move)
            else:
                self._begin(move)
        self._note_idle(ring)
        self._news()

    def _begin(self, move: Move) -> None:
        made = self._imports[move.id] = Import(move, self._parts)
        task = asyncio.get_running_loop().create_task(self._run(made), name=f"import {move.id}")
        self._tasks[move.id] = task

    async def _run(self, made: Import) -> None:
        try:
            await made.run()
        except LogStopped:
            return  # the process is ending
        except Exception as error:  # noqa: BLE001  a mistake of ours: the move is given up, the shard goes on
            self._events.event("move.failed", level="error", move=made.move.id, error=repr(error))
            made.give_up("internal", repr(error))
        self.confirmed += made.progress.state == "Confirmed"
        self.failed += made.progress.state == "Failed"

    def cancel(self) -> None:
        """The process is ending: no import goes on."""
        for task in self._tasks.values():
            task.cancel()

    # What is said ----------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> tuple[MoveProgress, ...]:
        """Of each move to here."""
        return tuple(self._imports[ident].progress for ident in sorted(self._imports))

    @property
    def imported_messages(self) -> int:
        """Messages brought over since this process began."""
        return self._ended_messages + sum(each.imported_messages for each in self._imports.values())

    @property
    def imported_bytes(self) -> int:
        """The same in bytes of JSON."""
        return self._ended_bytes + sum(each.imported_bytes for each in self._imports.values())

    @property
    def mismatches(self) -> int:
        """Times that count or sum at the end of a move did not agree with its source's."""
        return self._ended_mismatches + sum(each.mismatches for each in self._imports.values())

    @property
    def words(self) -> str:
        """What is under way, for people; empty if nothing is."""
        away = [
            f"move {each.id} away: {'sealed' if each.sealing else 'being copied'}"
            for each in self.exporter.trackers.values()
        ]
        here = [
            f"move {each.id} to here: {each.state}, {each.done} of {each.total} sessions"
            + (f" ({each.reason}: {each.message})" if each.reason else "")
            for each in self.progress
        ]
        return "; ".join([*away, *here])

    # Cleaning up -----------------------------------------------------------------------------------------------------

    def _note_idle(self, ring: RingMap) -> None:
        shard = self._credentials.shard
        busy = set(ring.slots_of(self._ownership.shard))
        for move in ring.moves:
            if shard in {move.source, move.target}:
                busy.update(move.slots)
        now_s = self._clock.monotonic_s()
        since_s = self._idle_since_s
        self._idle_since_s = {slot: since_s.get(slot, now_s) for slot in self._holdings.held if slot not in busy}

    def clean(self) -> None:
        """Release what has been idle for the grace time; what an import writes later stands behind that record.

        Slots with many sessions in memory are left to the next calls, but for the first: these leave in one go.

        Raises:
            LogStopped: the process is ending.
        """
        if self._ownership.standing == "VolumeLost":
            return
        until_s = self._clock.monotonic_s() - self._clean_after_s
        due: list[Slot] = []
        sessions = 0
        for slot in sorted(slot for slot, since_s in self._idle_since_s.items() if since_s <= until_s):
            sessions += len(self._sessions.hot_of((slot,)))
            if due and sessions > RELEASE_SESSIONS:
                break
            due.append(slot)
        if not due:
            return
        record = SlotsReleased([int(slot) for slot in due])
        for slot in due:
            del self._idle_since_s[slot]

        def visible(_: int) -> None:
            self._sessions.release(set(due))
            self._holdings.apply(record)
            self.released_slots += len(due)

        self._writes.own(record, visible)
        self._events.event("slots.released", slots=len(due))
