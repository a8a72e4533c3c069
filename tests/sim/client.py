"""The SDK on a simulated connection: `Link`, `Channel`, outbox and `Session` are the product's; the socket is not.

Place: what `fleetlm_client.client.Client` is in production (aiohttp). Promise: does for its `Link` what that module's
docstring says an owner does, and nothing else. Must not be done here: decisions about frames, load.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from fleetlm_client.backoff import Backoff
from fleetlm_client.errors import ClientClosed
from fleetlm_client.link import Link
from fleetlm_client.session import Session
from fleetlm_client.settings import Settings
from fleetlm_client.topic import Topic
from fleetlm_common.clock import Clock
from tests.sim.wire import FrameReader, Watch, masked_close, masked_text

if TYPE_CHECKING:
    from tests.support.history import History


class _Stream(asyncio.Protocol):
    """The client's end of a connection."""

    def __init__(self, owner: SimClient, watch: Watch) -> None:
        self.owner = owner
        self.watch = watch
        self.transport: asyncio.Transport | None = None
        self.accepted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.close_code: int | None = None
        self.reason = ""
        self._line = b""
        self._frames = FrameReader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self.owner.participant.encode() + b"\n")

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if not self.accepted.done():
            self._line += data
            line, found, data = self._line.partition(b"\n")
            if not found:
                return
            self.accepted.set_result(line == b"101")
        for opcode, payload in self._frames.feed(data):
            if opcode == 0x1:
                self.owner.on_text(self, payload.decode())
            elif opcode == 0x8 and self.close_code is None:
                self.close_code = int.from_bytes(payload[:2], "big")
                self.reason = payload[2:].decode()
                self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self.watch.lost()
        if not self.accepted.done():
            self.accepted.set_result(False)
        if not self.ended.done():
            self.ended.set_result(None)

    def send(self, text: str) -> None:
        """Send a frame."""
        assert self.transport is not None
        if not self.transport.is_closing():
            self.watch.sent(text)
            self.transport.write(masked_text(text, self.owner.entropy.randbytes(4)))

    def close(self) -> None:
        """Close, without waiting for the other side longer than a moment."""
        self.watch.lost()
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(masked_close(b"abcd"))
            self.transport.close()
            asyncio.get_running_loop().call_later(1.0, self.abort)

    def abort(self) -> None:
        """End at once."""
        if self.transport is not None:
            self.transport.abort()


class SimClient:
    """One participant (`subscription.Owner`).

    Args:
        participant: who speaks; also the name of its machine.
        ports: where gateways listen.
        settings: of the SDK.
        entropy: keys, jitter, masks, which gateway.
        clock: time.
        history: what is judged.
        life: number of this life, for names.
    """

    def __init__(
        self,
        participant: str,
        *,
        ports: list[int],
        settings: Settings,
        entropy: random.Random,
        clock: Clock,
        history: History,
        life: int,
    ) -> None:
        self.participant = participant
        self.entropy = entropy
        self.settings = settings
        self.last_failure = "nothing was tried yet"
        self.watches: list[Watch] = []
        self._ports = ports
        self._clock = clock
        self._history = history
        self._life = life
        self._link = Link(settings=settings, entropy=entropy)
        self._stream: _Stream | None = None
        self._woken = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at_s = 0.0

    def join(self, session_id: str, *, cursor: int | None = None) -> Session:
        """See `Client.join`."""
        return Session(session_id, cursor=cursor, tail=None, owner=self, settings=self.settings, entropy=self.entropy)

    def close(self) -> None:
        """End for good."""
        self._link.fail(ClientClosed())
        if self._stream is not None:
            self._stream.close()
        self._woken.set()

    @property
    def connections(self) -> int:
        """How many were made."""
        return self._link.connections

    # --- `subscription.Owner`

    def now_s(self) -> float:
        """See `Owner`."""
        return self._clock.monotonic_s()

    def now_ms(self) -> int:
        """See `Owner`."""
        return self._clock.now_ms()

    def backoff(self) -> Backoff:
        """See `Owner`."""
        return self._link.backoff()

    def add(self, topic: Topic) -> None:
        """See `Owner`."""
        self._link.add(topic, self.now_s())
        self._after_input()

    def pump(self, topic: Topic) -> None:
        """See `Owner`."""
        self._link.pump(topic, self.now_s())
        self._after_input()

    def drop(self, topic: Topic) -> None:
        """See `Owner`."""
        self._link.remove(topic, self.now_s())
        self._after_input()

    # --- the connection

    async def run(self) -> None:
        """Connect, serve, wait, until closed."""
        link = self._link
        while link.state != "failed":
            if link.should_connect(self.now_s()):
                stream = await self._dial()
                if stream is None:
                    link.connect_failed(self.now_s())
                else:
                    await self._serve(stream)
                continue
            self._woken.clear()
            self._after_input()
            await self._woken.wait()

    async def _dial(self) -> _Stream | None:
        port = self.entropy.choice(self._ports)
        watch = Watch(f"{self.participant}/{self._life}#{len(self.watches)}", self._history, self._clock.monotonic_s)
        stream = _Stream(self, watch)
        try:
            async with asyncio.timeout(self.settings.connect_deadline_s):
                await asyncio.get_running_loop().create_connection(lambda: stream, "127.0.0.1", port)
                if await stream.accepted:
                    self.watches.append(watch)
                    return stream
                self.last_failure = "refused"
        except (OSError, TimeoutError) as error:
            self.last_failure = str(error) or "timeout"
        stream.abort()
        return None

    async def _serve(self, stream: _Stream) -> None:
        self._stream = stream
        self._link.connected(self.now_s())
        self._after_input()
        await stream.ended
        self._stream = None
        self._link.disconnected(self.now_s(), close_code=stream.close_code, reason=stream.reason)

    def on_text(self, stream: _Stream, text: str) -> None:
        """A frame arrived."""
        if stream is self._stream and not stream.watch.over:
            stream.watch.received(text)
            self._link.received(text, self.now_s())
            self._after_input()

    def _after_input(self) -> None:
        link = self._link
        if self._stream is not None:
            if link.has_outgoing:
                for text in link.take_outgoing():
                    self._stream.send(text)
            if link.wants_close:
                self._stream.close()
        at_s = link.next_at_s()
        if at_s is not None and (self._timer is None or at_s < self._timer_at_s):
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at_s = at_s
            delay_s = max(0.0, at_s - self.now_s())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._link.tick(self.now_s())
        self._woken.set()
        self._after_input()
