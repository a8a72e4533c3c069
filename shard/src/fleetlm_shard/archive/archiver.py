"""The shard's side of its archiver: starts the process, tells it how far the log is durable, knows how it stands.

Place: a task of the shard's process; nothing of the append path knows of it. Promise: the archiver hears of what is
durable and was looked at, and of nothing else; when it dies it is started again, seldom if it dies at once. Retention
asks `floor_pos`: what the database has not said yet is not archived. Must not be done here: PostgreSQL.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from fleetlm_common.ops import Health
from fleetlm_shard.archive.link import Durable, Placed, Said, Start
from fleetlm_shard.archive.worker import Report

if TYPE_CHECKING:
    from asyncio.subprocess import Process
    from collections.abc import Awaitable, Callable

    from fleetlm_common.clock import Clock
    from fleetlm_common.logs import Logger
    from fleetlm_shard.archive.feed import Segment

TELL_S: Final = 0.05
"""How often the archiver is told that more is durable."""
RESTART_S: Final = 1.0
"""Between two starts of a process that ends by itself."""
SAID_MAX: Final = 10
"""Slots named in one sentence."""
END_S: Final = 2.0
"""For the archiver's transaction under way, when the shard ends; then it is killed (the server rolls back)."""

_decode_report = msgspec.json.Decoder(Report).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What the archiver may know of the log."""

    segments: Callable[[], list[Segment]]
    durable_pos: Callable[[], int]
    messages_from: Callable[[int], int]


class Archiver:
    """Keeps an archiver running. `run` is its one task.

    Args:
        start: what a process of it is told first.
        source: the log.
        clock: for the lag.
        events: its starts and ends.
        sleep: the loop's.
    """

    def __init__(
        self,
        *,
        start: Start,
        source: Source,
        clock: Clock,
        events: Logger,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._start = start
        self._source = source
        self._clock = clock
        self._events = events
        self._sleep = sleep
        self.report = Report()
        self.starts = 0

    @property
    def floor_pos(self) -> int:
        """Every record below it is in the archive, as the database said last; 0 before it said anything."""
        return max(self.report.floor_pos, 0)

    @property
    def lag_bytes(self) -> int:
        """Of the log that is durable and not archived."""
        return max(self._source.durable_pos() - max(self.report.pos, 0), 0)

    @property
    def lag_messages(self) -> int:
        """Messages that are durable and not archived; of the segment under way in proportion to its bytes."""
        return self._source.messages_from(max(self.report.pos, 0))

    @property
    def lag_s(self) -> float:
        """How long the oldest message that is known to wait has waited."""
        oldest_us = self.report.oldest_us
        return max((self._clock.now_us() - oldest_us) / 1e6, 0.0) if oldest_us else 0.0

    def health(self) -> Health | None:
        """What people should know of it; the shard serves all the same. None if all is well."""
        report = self.report
        if report.halted:
            slots = f"slots {', '.join(map(str, report.halted))}" if len(report.halted) < SAID_MAX else "many slots"
            return Health(
                ok=True, reason="ArchiveDiverged", message=f"{slots}: another message stands in the archive; see docs"
            )
        if report.state in ("Refused", "FeedBroken", "Away"):
            return Health(ok=True, reason=f"Archive{report.state}", message=report.why)
        if report.quarantined:
            words = f"{report.quarantined} records were refused by PostgreSQL; they are in the table quarantine"
            return Health(ok=True, reason="ArchiveQuarantined", message=words)
        return None

    async def run(self) -> None:
        """Until cancelled; then the process ends too."""
        while True:
            self.starts += 1
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "fleetlm_shard.archive", stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            self._events.event("archiver.started", pid=process.pid)
            hear = asyncio.create_task(self._hear(process), name="archiver reports")
            tell = asyncio.create_task(self._tell(process), name="archiver places")
            try:
                await asyncio.wait({hear, tell}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                tell.cancel()
                await self._ended(process)
                hear.cancel()
            self._events.event("archiver.ended", level="warning", status=process.returncode)
            self.report.state, self.report.why = "Connecting", "the archiver is being started again"
            await self._sleep(RESTART_S)

    async def _tell(self, process: Process) -> None:
        assert process.stdin is not None, "a pipe was asked for"
        source = self._source
        told_segments: list[Segment] = []
        told_pos = -1
        with suppress(ConnectionError):
            process.stdin.write(_line(self._start))
            while True:
                segments, durable_pos = source.segments(), source.durable_pos()
                if segments != told_segments:
                    process.stdin.write(_line(Placed(segments, durable_pos)))
                elif durable_pos != told_pos:
                    process.stdin.write(_line(Durable(durable_pos)))
                told_segments, told_pos = segments, durable_pos
                await process.stdin.drain()
                await self._sleep(TELL_S)

    async def _hear(self, process: Process) -> None:
        assert process.stdout is not None, "a pipe was asked for"
        while line := await process.stdout.readline():
            self.report = _decode_report(line)

    async def _ended(self, process: Process) -> None:
        """End it with its input; must finish also when this task is cancelled."""
        assert process.stdin is not None, "a pipe was asked for"
        process.stdin.close()
        waited = asyncio.ensure_future(process.wait())
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(waited), END_S)
        if not waited.done():
            process.kill()
            await waited


def _line(said: Said) -> bytes:
    return msgspec.json.encode(said) + b"\n"
