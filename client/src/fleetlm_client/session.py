"""One joined session as its user sees it: append, read, mark read.

Promise: appends of one session object are sequenced in the order of the calls (`outbox.py` says how); iterating yields
contiguous messages or a `Gap`; a slow reader costs bounded memory and misses nothing. Must not be done here: decisions
about frames.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import msgspec

from fleetlm_client.channel import Call, Channel
from fleetlm_client.drafts import Fragment, NewMessage, fragment, fragments
from fleetlm_client.errors import ClientClosed, NotReachable, NotSent
from fleetlm_client.events import Ack, Event, Joined, Page
from fleetlm_client.frames import decode_last_read, decode_page, encode_json
from fleetlm_client.outbox import Append, Done
from fleetlm_client.settings import Settings
from fleetlm_common.errors import FleetError, Invalid, TryAgain

T = TypeVar("T")


class Owner(Protocol):
    """What a session needs of its client."""

    def now_s(self) -> float: ...  # noqa: D102 - see Client
    def now_ms(self) -> int: ...  # noqa: D102
    def new_channel(  # noqa: D102
        self, session_id: str, *, cursor: int | None, tail: int | None, wake: Callable[[], None]
    ) -> Channel: ...
    def pump(self, channel: Channel) -> None: ...  # noqa: D102
    def drop(self, channel: Channel) -> None: ...  # noqa: D102
    @property
    def last_failure(self) -> str: ...  # noqa: D102


class Session:
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
        self.session_id = session_id
        self._begin = (cursor, tail)
        self._owner = owner
        self._settings = settings
        self._entropy = entropy
        self._channel: Channel | None = None
        self._changed = asyncio.Event()
        self._turn = asyncio.Lock()
        self._reading = False
        self._closed = False

    # --- life

    async def __aenter__(self) -> Self:
        """Join.

        Raises:
            FleetError: refused (for example `Invalid` `cursor_ahead`), or not answered within `connect_deadline_s`.
        """
        cursor, tail = self._begin
        channel = self._channel = self._owner.new_channel(
            self.session_id, cursor=cursor, tail=tail, wake=self._changed.set
        )
        try:
            async with asyncio.timeout(self._settings.connect_deadline_s):
                while channel.joined is None:
                    _raise_if_failed(channel)
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            self._owner.drop(channel)
            raise NotReachable(f"{self.session_id!r} was not joined in time: {self._owner.last_failure}") from error
        except BaseException:
            self._owner.drop(channel)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave."""
        self.close()

    def close(self) -> None:
        """Leave; appends that are not acknowledged end in `OutcomeUnknown` or `NotSent`. May be called twice."""
        if self._channel is not None and not self._closed:
            self._owner.drop(self._channel)
        self._closed = True
        self._changed.set()

    @property
    def _open(self) -> Channel:
        if self._channel is None or self._closed:
            raise ClientClosed("the session is not open: use `async with client.join(…) as session`")
        return self._channel

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
        if self._channel is not None:
            self._channel.outbox.cancel(append)
            self._changed.set()

    async def _room_for(self, append: Append) -> None:
        outbox = self._open.outbox
        if outbox.has_room(len(append.fragments), append.size_bytes):
            return
        try:
            async with asyncio.timeout(append.deadline_s - self._owner.now_s()):
                while not outbox.has_room(len(append.fragments), append.size_bytes):
                    _raise_if_failed(self._open)
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            raise NotSent(keys=append.keys, why="the outbox was full until the deadline") from error

    def _submit(self, append: Append) -> None:
        channel = self._open
        channel.append(append)
        self._owner.pump(channel)

    # --- reading

    def __aiter__(self) -> Self:
        """Iterate events; one iteration at a time."""
        return self

    async def __anext__(self) -> Event:
        """The next event.

        Raises:
            FleetError: the session cannot go on (refused, or the client was closed by the server for good).
            RuntimeError: somebody else iterates at the same time.
        """
        if self._reading:
            raise RuntimeError(f"session {self.session_id!r} is iterated twice at the same time")
        self._reading = True
        try:
            while True:
                if self._closed:
                    raise StopAsyncIteration
                channel = self._open
                event = channel.reader.take()
                if event is not None:
                    if channel.reader.behind:
                        self._owner.pump(channel)
                    return event
                if channel.error is not None:
                    _raise_unless_closed(channel.error)
                self._changed.clear()
                await self._changed.wait()
        finally:
            self._reading = False

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


def _raise_if_failed(channel: Channel) -> None:
    if channel.error is not None:
        raise channel.error


def _raise_unless_closed(error: FleetError) -> None:
    if isinstance(error, ClientClosed):
        raise StopAsyncIteration
    raise error
