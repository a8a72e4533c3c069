"""What a running shard does now and then: checkpoints, retention, compaction, forgetting old keys.

Promise: a checkpoint's rows hold every record below its position (rows gathered later may hold more: replaying a record
twice changes nothing); the loop is never held up for more than a slice. A checkpoint that fails is tried again later;
nothing is lost by that but time at the next boot. Must not be done here: deciding what is durable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fleetlm_shard.log_types import LogBusy, LogDiskFull

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fleetlm_common.clock import Clock
    from fleetlm_common.ids import SessionId
    from fleetlm_common.logs import Logger
    from fleetlm_shard.config import ShardConfig
    from fleetlm_shard.holdings import Holdings
    from fleetlm_shard.keys import KeyWindow
    from fleetlm_shard.log import Log
    from fleetlm_shard.log_types import CheckpointRow
    from fleetlm_shard.sessions import Sessions

UPKEEP_S: Final = 1.0
"""How often it is looked whether something is due."""
RETENTION_S: Final = 10.0
"""How often segments are looked at: retention is a matter of hours and gigabytes."""
COMPACTION_RETRY_S: Final = 60.0
"""After a failure: each try reads a whole segment."""
SLICE_ROWS: Final = 256
"""Rows gathered in one go: half a millisecond."""


class Upkeep:
    """The shard's housekeeping; one task runs it."""

    def __init__(
        self,
        *,
        log: Log,
        sessions: Sessions,
        keys: KeyWindow,
        holdings: Holdings,
        clean: Callable[[], None],
        archived_below: Callable[[], int | None],
        slot_of: Callable[[SessionId], int],
        config: ShardConfig,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]],
        events: Logger,
    ) -> None:
        self._log = log
        self._sessions = sessions
        self._keys = keys
        self._holdings = holdings
        self._clean = clean
        self._archived_below = archived_below
        self._slot_of = slot_of
        self._config = config
        self._clock = clock
        self._sleep = sleep
        self._events = events
        self._retention_due_s = 0.0
        self._compaction_due_s = 0.0

    async def run(self) -> None:
        """Look each second; runs until cancelled.

        Raises:
            LogStopped: the process is ending.
        """
        while True:
            await self._sleep(UPKEEP_S)
            now_s = self._clock.monotonic_s()
            self._keys.evict(now_s)
            self._clean()
            if self.checkpoint_due():
                await self.checkpoint()
            if now_s >= self._retention_due_s:
                self._retention_due_s = now_s + RETENTION_S
                await self.retain()
                if self._log.compaction_waits(self._keys.from_pos(self._log.durable_pos)):
                    await self.checkpoint()
            if now_s >= self._compaction_due_s:
                await self.compact()

    def checkpoint_due(self) -> bool:
        """The log has grown, or too many sessions have changed, since the last checkpoint."""
        grown_bytes = self._log.durable_pos - self._log.stats.checkpoint_pos
        return (
            grown_bytes >= self._config.checkpoint_bytes
            or self._sessions.changed_count >= self._config.checkpoint_sessions
        )

    async def checkpoint(self) -> bool:
        """Write a checkpoint of what is durable now; returns whether it was written.

        Raises:
            LogStopped: the log ended meanwhile.
        """
        pos = self._log.durable_pos
        keys_from_pos = self._keys.from_pos(pos)
        changed = self._sessions.changed_now()
        rows: dict[str, CheckpointRow] = {}
        for start in range(0, len(changed), SLICE_ROWS):
            rows.update((session.id, session.row()) for session in changed[start : start + SLICE_ROWS])
            await self._sleep(0)
        try:
            await self._log.checkpoint(
                rows,
                pos=pos,
                keys_from_pos=keys_from_pos,
                opened={int(slot): int(epoch) for slot, epoch in self._holdings.opened.items()},
                facts=self._holdings.facts(),
            )
        except (LogBusy, LogDiskFull, OSError) as error:
            self._events.event("checkpoint.failed", level="warning", error=str(error))
            return False
        for start in range(0, len(changed), SLICE_ROWS):
            self._sessions.checkpointed(changed[start : start + SLICE_ROWS], pos)
            await self._sleep(0)
        self._events.event("checkpoint.written", level="debug", pos=pos, rows=len(rows))
        return True

    async def retain(self) -> None:
        """Drop the oldest segments that retention says may go; with an archive only what it has.

        Raises:
            LogStopped: the log ended meanwhile.
        """
        config = self._config
        if not (config.retention_bytes or config.retention_age_s):
            return
        try:
            moved = await self._log.trim(
                max_bytes=config.retention_bytes or None,
                max_age_s=config.retention_age_s or None,
                now_ms=self._clock.now_ms(),
                below_pos=self._archived_below(),
            )
        except (LogBusy, LogDiskFull, OSError) as error:
            self._events.event("retention.failed", level="warning", error=str(error))
            return
        if moved:
            self._events.event("retention.trimmed", pos=self._log.trim_pos)

    async def compact(self) -> None:
        """Give back what slots that moved away left in one segment, if there is one where that is worth it."""
        try:
            bytes_back = await self._log.compact(self._slot_of, below_pos=self._archived_below())
        except OSError as error:
            self._compaction_due_s = self._clock.monotonic_s() + COMPACTION_RETRY_S
            self._events.event("compaction.failed", level="warning", error=str(error))
            return
        if bytes_back:
            self._events.event("compaction.done", bytes=bytes_back)
