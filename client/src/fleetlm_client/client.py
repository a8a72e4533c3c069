"""The asyncio shell: one WebSocket for a participant, sessions and its inbox over it.

    async with fleetlm_client.connect(url, participant_id="alice") as client:
        async with client.join("s1", cursor=0) as session:
            ack = await session.append({"text": "hi"})
            async for event in session:
                ...

Promise: everything that decides stands in `Link` and below, this module only connects, writes, reads and wakes; tasks
that it starts end when the client is closed. Must not be done here: decisions about frames.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

import aiohttp

from fleetlm_client.address import parse
from fleetlm_client.backoff import Backoff
from fleetlm_client.errors import ClientClosed, NotReachable
from fleetlm_client.events import SenderKind
from fleetlm_client.inbox import Inbox
from fleetlm_client.link import Link
from fleetlm_client.rest import Rest
from fleetlm_client.session import Session
from fleetlm_client.settings import Settings
from fleetlm_client.topic import Topic
from fleetlm_common.clock import Clock, SystemClock
from fleetlm_common.errors import Forbidden, Invalid, NotFound, Unauthenticated
from fleetlm_common.ids import checked_id

FRAME_RECEIVED_BYTES_MAX = 16 * 1024 * 1024
"""A page has at most 1 MiB of messages; a frame beyond this is not a FleetLM's."""
CLOSE_TIMEOUT_S = 1.0
"""How long a closing handshake may take: the other side may be frozen."""

# aiohttp makes this class with attrs in a way that pyright cannot see through.
_WS_TIMEOUT = aiohttp.ClientWSTimeout(ws_close=CLOSE_TIMEOUT_S)  # pyright: ignore[reportCallIssue]
_REFUSED_AT_FIRST = {400: Invalid, 401: Unauthenticated, 403: Forbidden, 404: NotFound}
_REFUSED_LATER = {401: Unauthenticated, 403: Forbidden}


class Client:
    """A participant's connection; make it with `connect`, use it with `async with`.

    Args:
        url: any address of the gateway.
        participant_id: who speaks.
        participant_kind: what speaks.
        headers: sent with each request, for a proxy in front (credentials).
        settings: bounds and times.
        entropy: keys and jitter.
        clock: deadlines.
    """

    def __init__(
        self,
        url: str,
        *,
        participant_id: str,
        participant_kind: SenderKind,
        headers: dict[str, str],
        settings: Settings,
        entropy: random.Random,
        clock: Clock,
    ) -> None:
        self._address = parse(url)
        self._url = self._address.socket_url(
            participant_id=checked_id(participant_id, "participant_id"), participant_kind=participant_kind
        )
        self._headers = headers
        self._participant = (participant_id, participant_kind)
        self._settings = settings
        self._entropy = entropy
        self._clock = clock
        self._link = Link(settings=settings, entropy=entropy)
        self._http: aiohttp.ClientSession | None = None
        self._socket: aiohttp.ClientWebSocketResponse | None = None
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = 0.0
        self._to_write = asyncio.Event()
        self._woken = asyncio.Event()
        self._connected = asyncio.Event()
        self._closers: set[asyncio.Task[None]] = set()
        self._last_failure = "nothing was tried yet"

    # --- life

    async def __aenter__(self) -> Self:
        """Connect.

        Raises:
            NotReachable: not within `connect_deadline_s`.
            FleetError: the server refuses this participant.
        """
        assert self._task is None, "a client is entered once"
        self._http = aiohttp.ClientSession(headers=self._headers)
        self._task = asyncio.create_task(self._run(), name="fleetlm-client")
        self._task.add_done_callback(self._on_ended)
        try:
            async with asyncio.timeout(self._settings.connect_deadline_s):
                await self._connected.wait()
            self._raise_if_failed()
        except TimeoutError as error:
            await self.aclose()
            raise NotReachable(f"{self._address.base} cannot be reached: {self._last_failure}") from error
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close; appends that are not acknowledged end in `OutcomeUnknown` or `NotSent`."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connection and end every session and inbox; may be called twice."""
        self._link.fail(ClientClosed())
        if self._timer is not None:
            self._timer.cancel()
        tasks = [task for task in (self._task, *self._closers) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._http is not None:
            await self._http.close()

    def _raise_if_failed(self) -> None:
        if self._link.error is not None:
            raise self._link.error.with_traceback(None)

    # --- what users do

    def join(self, session_id: str, *, cursor: int | None = None, tail: int | None = None) -> Session:
        """A session, joined when it is entered (`async with`).

        Args:
            session_id: 1–128 bytes.
            cursor: the last seq that was processed: everything after it is delivered, then what comes.
            tail: begin with the last n messages instead; with neither, only what comes is delivered.

        Raises:
            Invalid: names the argument.
        """
        checked_id(session_id, "session_id")
        if cursor is not None and (cursor < 0 or tail is not None):
            raise Invalid("cursor must be 0 or more, and excludes tail", field="cursor")
        if tail is not None and tail < 0:
            raise Invalid("tail must be 0 or more", field="tail")
        return Session(session_id, cursor=cursor, tail=tail, owner=self, settings=self._settings, entropy=self._entropy)

    def inbox(self, participant_id: str | None = None, *, limit: int | None = None) -> Inbox:
        """A participant's inbox, joined when it is entered (`async with`); needs a ring with an archive.

        Args:
            participant_id: whose; this client's own when not given. Servers refuse that of somebody else.
            limit: sessions of a page; the server's most when not given.

        Raises:
            Invalid: names the argument.
        """
        whose = self._participant[0] if participant_id is None else checked_id(participant_id, "participant_id")
        if limit is not None and limit < 1:
            raise Invalid("limit must be 1 or more", field="limit")
        return Inbox(whose, limit=limit, owner=self, settings=self._settings)

    @property
    def rest(self) -> Rest:
        """The REST API with this client's participant: sessions without a socket.

        Raises:
            ClientClosed: the client was not entered.
        """
        if self._http is None or self._http.closed:
            raise ClientClosed("the client is not open: use `async with`")
        return Rest(
            self._http,
            self._address,
            participant=self._participant,
            settings=self._settings,
            entropy=self._entropy,
            clock=self._clock,
        )

    @property
    def connections(self) -> int:
        """How many connections were made so far; more than one means that it reconnected."""
        return self._link.connections

    # --- what subscriptions need (`subscription.Owner`)

    def now_s(self) -> float:
        """Monotonic seconds."""
        return self._clock.monotonic_s()

    def now_ms(self) -> int:
        """Milliseconds since 1970."""
        return self._clock.now_ms()

    def backoff(self) -> Backoff:
        """A counter of failures."""
        return self._link.backoff()

    def add(self, topic: Topic) -> None:
        """Join the topic."""
        self._link.add(topic, self.now_s())
        self._after_input()

    def pump(self, topic: Topic) -> None:
        """The topic was given something to do."""
        self._link.pump(topic, self.now_s())
        self._after_input()

    def drop(self, topic: Topic) -> None:
        """Leave the topic."""
        self._link.remove(topic, self.now_s())
        self._after_input()

    @property
    def last_failure(self) -> str:
        """Why the last try to connect failed."""
        return self._last_failure

    # --- the connection

    async def _run(self) -> None:
        """Connect, serve, wait, for ever; cancelled by `aclose`."""
        link = self._link
        while link.state != "failed":
            now_s = self.now_s()
            if link.should_connect(now_s):
                socket = await self._dial()
                if socket is not None:
                    await self._serve(socket)
                continue
            self._woken.clear()
            self._after_input()
            await self._woken.wait()

    async def _dial(self) -> aiohttp.ClientWebSocketResponse | None:
        assert self._http is not None
        link = self._link
        try:
            async with asyncio.timeout(self._settings.connect_deadline_s):
                return await self._http.ws_connect(
                    self._url,
                    timeout=_WS_TIMEOUT,
                    max_msg_size=FRAME_RECEIVED_BYTES_MAX,
                )
        except aiohttp.WSServerHandshakeError as error:
            self._last_failure = f"the server answered {error.status} {error.message}"
            table = _REFUSED_LATER if link.connections else _REFUSED_AT_FIRST
            refusal = table.get(error.status)
            if refusal is not None:
                link.fail(refusal(f"connection refused: {self._last_failure}", field="url"))
                self._connected.set()
                return None
            headers = error.headers
            link.connect_failed(self.now_s(), retry_after_s=_seconds(headers.get("Retry-After") if headers else None))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._last_failure = str(error) or type(error).__name__
            link.connect_failed(self.now_s())
        return None

    async def _serve(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        link = self._link
        self._socket = socket
        writer = asyncio.create_task(self._write(socket), name="fleetlm-client-writer")
        try:
            link.connected(self.now_s())
            self._connected.set()
            self._after_input()
            while True:
                message = await socket.receive()
                if message.type is aiohttp.WSMsgType.TEXT:
                    link.received(message.data, self.now_s())
                    self._after_input()
                elif message.type in {
                    aiohttp.WSMsgType.CLOSE,
                    aiohttp.WSMsgType.CLOSING,
                    aiohttp.WSMsgType.CLOSED,
                    aiohttp.WSMsgType.ERROR,
                }:
                    reason = str(message.extra or "")
                    break
        finally:
            self._socket = None
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            with contextlib.suppress(aiohttp.ClientError, OSError):
                await socket.close()
        self._last_failure = f"connection closed ({socket.close_code}) {reason}".rstrip()
        link.disconnected(self.now_s(), close_code=socket.close_code, reason=reason)

    async def _write(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Send what the link queues; a connection that is gone is the reader's to notice."""
        with contextlib.suppress(aiohttp.ClientError, OSError):
            while True:
                await self._to_write.wait()
                self._to_write.clear()
                for text in self._link.take_outgoing():
                    await socket.send_str(text)

    def _after_input(self) -> None:
        """Something was given to the link: write, close, and set the alarm as it says."""
        link = self._link
        if link.has_outgoing:
            self._to_write.set()
        if link.wants_close and self._socket is not None:
            self._close_socket(self._socket)
        at_s = link.next_at_s()
        if at_s is not None and (self._timer is None or at_s < self._timer_at_s):
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at_s = at_s
            self._timer = asyncio.get_running_loop().call_later(max(0.0, at_s - self.now_s()), self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._link.tick(self.now_s())
        self._woken.set()
        self._after_input()

    def _close_socket(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Close beside the reader, which then sees the end; the handshake is bounded by `CLOSE_TIMEOUT_S`."""
        self._socket = None

        async def close() -> None:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                await socket.close()

        closer = asyncio.create_task(close(), name="fleetlm-client-closer")
        self._closers.add(closer)
        closer.add_done_callback(self._closers.discard)

    def _on_ended(self, task: asyncio.Task[None]) -> None:
        """The connection's task is over: nobody may wait for it any more."""
        if not task.cancelled() and task.exception() is not None:
            self._link.fail(ClientClosed(f"the client failed: {task.exception()!r}"))
        self._connected.set()


def connect(
    url: str,
    *,
    participant_id: str,
    participant_kind: SenderKind = "human",
    headers: dict[str, str] | None = None,
    settings: Settings | None = None,
    entropy: random.Random | None = None,
    clock: Clock | None = None,
) -> Client:
    """A client for `url`; enter it with `async with`. See `Client` for the arguments.

    Raises:
        Invalid: names the argument.
    """
    return Client(
        url,
        participant_id=participant_id,
        participant_kind=participant_kind,
        headers=headers or {},
        settings=settings or Settings(),
        entropy=entropy or random.SystemRandom(),
        clock=clock or SystemClock(),
    )


@asynccontextmanager
async def connect_rest(
    url: str,
    *,
    participant_id: str,
    participant_kind: SenderKind = "human",
    headers: dict[str, str] | None = None,
    settings: Settings | None = None,
    entropy: random.Random | None = None,
    clock: Clock | None = None,
) -> AsyncGenerator[Rest]:
    """The REST API alone, without a socket. See `Client` for the arguments.

    Raises:
        Invalid: names the argument.
    """
    address = parse(url)
    async with aiohttp.ClientSession(headers=headers) as http:
        yield Rest(
            http,
            address,
            participant=(checked_id(participant_id, "participant_id"), participant_kind),
            settings=settings or Settings(),
            entropy=entropy or random.SystemRandom(),
            clock=clock or SystemClock(),
        )


def _seconds(value: str | None) -> float:
    return float(value) if value is not None and value.isdigit() else 0.0
