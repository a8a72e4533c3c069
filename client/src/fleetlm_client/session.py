"""One joined session as its user sees it: append, read, mark read.

Promise: appends of one session object are sequenced in the order of the calls (`outbox.py` says how); iterating yields
contiguous messages or a `Gap`; a slow reader costs bounded memory and misses nothing. Must not be done here: decisions
about frames.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from fleetlm_client.channel import Call, Channel
from fleetlm_client.drafts import Fragment, NewMessage, fragment, fragments
from fleetlm_client.errors import NotSent
from fleetlm_client.events import Ack, Event, Joined, Page
from fleetlm_client.frames import decode_last_read, decode_page, encode_json
from fleetlm_client.outbox import Append, Done
from fleetlm_client.settings import Settings
from fleetlm_client.subscription import Owner, Subscription, raise_if_failed
from fleetlm_common.errors import FleetError, Invalid, TryAgain

T = TypeVar("T")


class Session(Subscription[Channel, Event]):
    """Made by `Client.join`; enter it with `async with`, iterate it with `async for`."""

    def __init__(
        self,
        session_id: str,
        *,
        cursor: int | None,
        tail: int | None,
        owner: Owner,
        settings: Settings,
        entropy: random.Random,
    ) -> None:
        super().__init__(owner=owner, settings=settings)
        self.session_id = session_id
        self._begin = (cursor, tail)
        self._entropy = entropy
        self._turn = asyncio.Lock()

    def _make(self, on_change: Callable[[], None]) -> Channel:
        cursor, tail = self._begin
        return Channel(
            self.session_id,
            cursor=cursor,
            tail=tail,
            settings=self._settings,
            backoff=self._owner.backoff,
            on_change=on_change,
        )

    # --- state

    @property
    def cursor(self) -> int:
        """Seq of the last message that iterating handed out (or where it began): keep it, and `join` with it later.

        Store it after the event was processed; what was handed out and not processed is delivered again only to a
        `join` with a lower cursor.
        """
        return self._open.reader.cursor or 0

    @property
    def joined(self) -> Joined:
        """What the server said at the newest join: `last_seq`, `earliest_seq`, `epoch`."""
        joined = self._open.joined
        assert joined is not None
        return joined

    @property
    def unacknowledged(self) -> int:
        """Messages submitted and not yet answered."""
        return self._open.outbox.messages

    # --- writing

    async def append(
        self,
        content: Any,
        *,
        kind: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
        expected_seq: int | None = None,
        timeout_s: float | None = None,
    ) -> Ack:
        """Append one message and wait until it is on disk.

        Cancel-safe: cancelled before it was sent it is not appended, afterwards its outcome is unknown.

        Args:
            content: any JSON value.
            kind: label, for example `tool_call`.
            metadata: a JSON object.
            idempotency_key: makes repeating this call harmless, also from another process; made when not given.
            expected_seq: append only if this is the session's `last_seq`.
            timeout_s: instead of `Settings.append_deadline_s`.

        Raises:
            Rejected: was not and will not be appended (`Conflict` carries `last_seq`, …).
            OutcomeUnknown: not answered in time; append the same with `error.key` to be sure.
            NotSent: not even sent in time.
        """
        message = NewMessage(content=content, kind=kind, metadata=metadata, idempotency_key=idempotency_key)
        (ack,) = await self._append([message], batch=False, expected_seq=expected_seq, timeout_s=timeout_s)
        return ack

    async def append_batch(
        self,
        messages: Sequence[NewMessage],
        *,
        expected_seq: int | None = None,
        timeout_s: float | None = None,
    ) -> list[Ack]:
        """Append several messages with consecutive seqs: all of them or none. Otherwise like `append`.

        Args:
            messages: 1–100; a message's own key makes repeating the batch harmless.
            expected_seq: `last_seq` before the first of them.
            timeout_s: instead of `Settings.append_deadline_s`.
        """
        return await self._append(messages, batch=True, expected_seq=expected_seq, timeout_s=timeout_s)

    async def _append(
        self, messages: Sequence[NewMessage], *, batch: bool, expected_seq: int | None, timeout_s: float | None
    ) -> list[Ack]:
        deadline_s = self._owner.now_s() + (self._settings.append_deadline_s if timeout_s is None else timeout_s)
        async with self._turn:
            # One caller at a time waits for room, in the order of the calls: the lock is fair.
            append, future = self._prepare(messages, batch=batch, expected_seq=expected_seq, deadline_s=deadline_s)
            await self._room_for(append)
            self._submit(append)
        return await future

    def submit(
        self,
        content: Any,
        *,
        kind: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> asyncio.Future[Ack]:
        """Queue an append without waiting; the future gets its `Ack`, or raises like `append`.

        Raises:
            TryAgain: `overloaded`: the outbox is full, or callers of `append` are waiting for room before this one.
            Rejected: the message is not acceptable.
        """
        if self._turn.locked():
            raise TryAgain("outbox is full and others wait for room", reason="overloaded")
        message = NewMessage(content=content, kind=kind, metadata=metadata, idempotency_key=idempotency_key)
        deadline_s = self._owner.now_s() + self._settings.append_deadline_s
        append, acks = self._prepare([message], batch=False, expected_seq=None, deadline_s=deadline_s)
        first: asyncio.Future[Ack] = asyncio.get_running_loop().create_future()
        first.add_done_callback(_retrieve)
        first.add_done_callback(lambda future: acks.cancel() if future.cancelled() else None)
        append.done = _answer_first(first, append.done)
        self._submit(append)
        return first

    def _prepare(
        self, messages: Sequence[NewMessage], *, batch: bool, expected_seq: int | None, deadline_s: float
    ) -> tuple[Append, asyncio.Future[list[Ack]]]:
        if expected_seq is not None and expected_seq < 0:
            raise Invalid("expected_seq must be 0 or more", field="expected_seq")
        now_ms = self._owner.now_ms()
        make = fragments if batch else _one_fragment
        future: asyncio.Future[list[Ack]] = asyncio.get_running_loop().create_future()
        append = Append(
            fragments=make(messages, now_ms=now_ms, entropy=self._entropy),
            deadline_s=deadline_s,
            done=_answer(future),
            expected_seq=expected_seq,
            batch=batch,
        )
        future.add_done_callback(lambda future: self._cancelled(append) if future.cancelled() else None)
        return append, future

    def _cancelled(self, append: Append) -> None:
        if self._topic is not None:
            self._topic.outbox.cancel(append)
            self._changed.set()

    async def _room_for(self, append: Append) -> None:
        outbox = self._open.outbox
        if outbox.has_room(len(append.fragments), append.size_bytes):
            return
        try:
            async with asyncio.timeout(append.deadline_s - self._owner.now_s()):
                while not outbox.has_room(len(append.fragments), append.size_bytes):
                    raise_if_failed(self._open)
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            raise NotSent(keys=append.keys, why="the outbox was full until the deadline") from error

    def _submit(self, append: Append) -> None:
        channel = self._open
        channel.append(append)
        self._owner.pump(channel)

    # --- reading

    def _take(self, topic: Channel) -> Event | None:
        event = topic.reader.take()
        if event is not None and topic.reader.behind:
            self._owner.pump(topic)
        return event

    async def replay(
        self,
        *,
        after: int | None = None,
        before: int | None = None,
        limit: int | None = None,
        timeout_s: float | None = None,
    ) -> Page:
        """A page of messages, apart from the iteration; ascending. Exactly one of `after` and `before` is given.

        Raises:
            Rejected: not a page that can be asked for.
            TryAgain: not answered in time.
        """
        if (after is None) == (before is None):
            raise Invalid("give either after or before", field="after")
        asked = {"after": after, "before": before, "limit": limit}
        payload = encode_json({name: value for name, value in asked.items() if value is not None})
        return decode_page(await self._call("replay", payload, timeout_s))

    async def mark_read(self, seq: int, *, timeout_s: float | None = None) -> int:
        """Say that this participant has read up to `seq`; it never goes back.

        Returns:
            The read cursor as it is now.

        Raises:
            Rejected: `Invalid` `cursor_ahead` for a seq that does not exist yet.
            TryAgain: not answered in time; safe to repeat.
        """
        payload = encode_json({"seq": seq})
        return decode_last_read(await self._call("mark_read", payload, timeout_s)).last_read_seq

    async def _call(self, event: str, payload: bytes, timeout_s: float | None) -> msgspec.Raw:
        channel = self._open
        future: asyncio.Future[msgspec.Raw] = asyncio.get_running_loop().create_future()
        wait_s = self._settings.call_deadline_s if timeout_s is None else timeout_s
        call = Call(event=event, payload=payload, deadline_s=self._owner.now_s() + wait_s, done=_answer(future))
        channel.call(call)
        self._owner.pump(channel)
        try:
            return await future
        except asyncio.CancelledError:
            channel.cancel_call(call)
            raise


def _one_fragment(messages: Sequence[NewMessage], *, now_ms: int, entropy: random.Random) -> tuple[Fragment, ...]:
    return (fragment(messages[0], now_ms=now_ms, entropy=entropy),)


def _answer(future: asyncio.Future[T]) -> Callable[[T | FleetError], None]:
    def done(result: T | FleetError) -> None:
        if future.done():
            return
        if isinstance(result, FleetError):
            future.set_exception(result)
        else:
            future.set_result(result)

    return done


def _answer_first(future: asyncio.Future[Ack], also: Done) -> Done:
    def done(result: list[Ack] | FleetError) -> None:
        if isinstance(result, FleetError):
            if not future.done():
                future.set_exception(result)
            return
        also(result)
        if not future.done():
            future.set_result(result[0])

    return done


def _retrieve(future: asyncio.Future[Any]) -> None:
    """A future of `submit` that nobody awaits is the caller's choice, not a warning at shutdown."""
    if not future.cancelled():
        future.exception()
