"""Logged writes on their way to the disk: what becomes visible when, and who waits for it.

    queue record ──► log (batch: write, sync, look) ──► visible ──► answers ──► publish

Promise: nothing of a record is visible before the log says that its batch is synced and that the term was looked at;
answers go out after everything that they rest on is visible, publishes after the answers. When the log stops, everybody
who waits is told once. Must not be done here: deciding what to write, forming answers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from fleetlm_shard.log_types import LogStopped
from fleetlm_shard.records import Message
from fleetlm_shard.sessions import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fleetlm_common.clock import Clock
    from fleetlm_shard.log import Durable, Log
    from fleetlm_shard.records import Record
    from fleetlm_shard.sessions import Sessions

OnDurable = Callable[[int], None]
"""Called with the record's position once it may be shown; makes it visible."""


Measured = Callable[[int, float], None]


class Waiting(Protocol):
    """Somebody who waits for everything that was queued before."""

    def settled(self) -> None:
        """It is on disk, looked at and visible."""
        ...

    def stopped(self) -> None:
        """It may or may not be on disk: the log has stopped."""
        ...


class _Future:
    """`Waiting` for a coroutine."""

    __slots__ = ("future",)

    def __init__(self, future: asyncio.Future[None]) -> None:
        self.future = future

    def settled(self) -> None:
        if not self.future.done():
            self.future.set_result(None)

    def stopped(self) -> None:
        if not self.future.done():
            self.future.set_exception(LogStopped("the log has stopped"))


class Publisher(Protocol):
    """Who wants new messages of sessions with subscribers."""

    def publish(self, session: Session, messages: list[bytes]) -> None:
        """These messages, the last one is the session's `seq_durable`, became durable."""
        ...


class Writes:
    """The way of this shard's records into its log.

    Args:
        log: the log.
        sessions: hot state, advanced when records are durable.
        publisher: told of new messages of sessions that somebody listens to.
        clock: for how long answers took.
        measured: called once a batch with the records in it and the seconds that its oldest answer took.
    """

    def __init__(self, log: Log, sessions: Sessions, publisher: Publisher, *, clock: Clock, measured: Measured) -> None:
        self._log = log
        self._append = log.append
        self._sessions = sessions
        self._publisher = publisher
        self._clock = clock
        self._measured = measured
        self._waiting: deque[tuple[int, float, Waiting]] = deque()
        self.queued_pos = -1
        """Position of the record that was queued last."""
        self.durable_pos = -1
        """Position of the record that became visible last."""
        self._stopped = False

    @property
    def settled(self) -> bool:
        """Nothing is on its way."""
        return self.durable_pos >= self.queued_pos

    @property
    def waiting_count(self) -> int:
        """Answers that wait for the disk."""
        return len(self._waiting)

    def message(self, session: Session, message: Message) -> int:
        """Queue a message; returns its position.

        Raises:
            LogError: it was not queued.
        """
        self.queued_pos = pos = self._append(message, session)
        session.pending += 1
        return pos

    def messages(self, session: Session, messages: Sequence[Message]) -> int:
        """Queue messages that are durable together or not at all; returns the first's position.

        Raises:
            LogError: nothing was queued.
        """
        positions = self._log.append_group(messages, [session] * len(messages))
        first_pos, last_pos = positions[0], positions[-1]
        self.queued_pos = last_pos
        session.pending += len(messages)
        return first_pos

    def other(self, record: Record, session: Session | None, on_durable: OnDurable) -> int:
        """Queue a record that is no message.

        Raises:
            LogError: nothing was queued.
        """

        def visible(pos: int) -> None:
            if session is not None:
                session.pending -= 1
            on_durable(pos)

        self.queued_pos = self._log.append(record, visible)
        if session is not None:
            session.pending += 1
        return self.queued_pos

    def own(self, record: Record, on_durable: OnDurable) -> int:
        """Queue a record of the shard about itself, if need be from the disk's reserve.

        Raises:
            LogStopped: nothing was queued.
        """
        self.queued_pos = self._log.append_own(record, on_durable)
        return self.queued_pos

    def wait(self, who: Waiting, since_s: float) -> None:
        """Tell `who`, who waits since then, when all that is queued now is visible, or that it never will be.

        Something must be on its way (see `settled`).
        """
        assert self.durable_pos < self.queued_pos
        if self._stopped:
            # Whoever waited was told; nobody would tell those who come afterwards.
            who.stopped()
        else:
            self._waiting.append((self.queued_pos, since_s, who))

    async def all_settled(self) -> None:
        """Return when all that is queued now is visible. Cancel-safe.

        Raises:
            LogStopped: the log failed first.
        """
        if self.settled:
            return
        who = _Future(asyncio.get_running_loop().create_future())
        self.wait(who, self._clock.monotonic_s())
        await who.future

    def on_durable(self, records: Sequence[Durable]) -> None:
        """The log's call: these records, in the order of the log, are synced and the term was looked at."""
        listened: dict[Session, list[bytes]] = {}
        sessions = self._sessions
        message_durable = sessions.message_durable
        pos = self.durable_pos
        for pos, record, context in records:
            if type(record) is Message:
                assert type(context) is Session
                context.pending -= 1
                message_durable(context, record.seq, pos, record.inserted_at_us, record.json)
                if context.subscribers:
                    listened.setdefault(context, []).append(record.json)
            else:
                assert callable(context)
                context(pos)
        self.durable_pos = pos
        waiting = self._waiting
        if waiting and waiting[0][0] <= pos:
            self._measured(len(records), self._clock.monotonic_s() - waiting[0][1])
        while waiting and waiting[0][0] <= pos:
            waiting.popleft()[2].settled()
        for session, messages in listened.items():
            self._publisher.publish(session, messages)
        sessions.evict()

    def on_stopped(self) -> None:
        """The log's call: nothing more will become durable."""
        self._stopped = True
        while self._waiting:
            self._waiting.popleft()[2].stopped()
