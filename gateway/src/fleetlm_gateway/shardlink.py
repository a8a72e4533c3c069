"""One multiplexed connection to one shard: handshake, replies by id, keep-alive, reconnecting.

Promise: each request that `call` took is answered exactly once: by the shard's frame, or by `LOST` when the connection
ended first (the outcome is unknown then, so the caller retries with the same keys) — or by nobody after `forget`.
A peer that went silent is noticed within `PING_EVERY_S * SILENT_TICKS_MAX`. What waits on a connection is bounded in
count and bytes.
Must not be done here: choosing a shard, retrying, deadlines of requests (`router.py`), the meaning of replies.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from fleetlm_common import rpc
from fleetlm_common.decoding import UNREADABLE
from fleetlm_common.errors import ErrorBody, FleetError, TryAgain, TryAgainReason, from_body
from fleetlm_common.logs import Logger
from fleetlm_common.rpc import Kind
from fleetlm_common.wire import FrameConnection

LOST: Final = 0
"""Instead of a reply's kind: the connection ended first. No `Kind` has this number."""
IN_FLIGHT_MAX: Final = 16_384
"""Requests without an answer on one connection: at 20,000 a second that is most of a second of a shard's silence."""
BUFFERED_BYTES_MAX: Final = 32 * 1024 * 1024
"""Bytes that the kernel has not taken: a shard that does not read must not fill this process."""
CONNECT_TIMEOUT_S: Final = 3.0
"""For the connection and its handshake together; well under a request's deadline, so that a retry still helps."""
PING_EVERY_S: Final = 1.0
SILENT_TICKS_MAX: Final = 4
"""Ticks without one byte from the shard before it counts as gone: longer than a slow disk's worst sync, shorter than a
request's deadline. Counted in ticks of this process: one that was itself frozen first reads, then judges."""
GOAWAY_TICKS_MAX: Final = 5
"""Ticks that a leaving shard gets for what is in flight before this side closes."""
BACKOFF_MIN_S: Final = 0.02
BACKOFF_MAX_S: Final = 1.0
"""A shard that restarts is found again within a second; 256 links that knock once a second are no load."""

OnReply = Callable[[int, bytes], None]
"""Takes a kind (or `LOST`) and a payload, in the loop; may raise msgspec errors (the connection is then given up)."""
Connect = Callable[[Callable[[], FrameConnection], str, int], Awaitable[FrameConnection]]
"""Makes a connection with the protocol that the factory makes; raises OSError. The simulator passes its own."""

_decode_welcome = msgspec.msgpack.Decoder(rpc.Welcome).decode
_decode_error = msgspec.msgpack.Decoder(ErrorBody).decode


async def connect_tcp(factory: Callable[[], FrameConnection], host: str, port: int) -> FrameConnection:
    """`Connect` over TCP."""
    _, connection = await asyncio.get_running_loop().create_connection(factory, host, port)
    return connection


class NoPath(TryAgain):
    """No connection to the owner now: worth another try as soon as a link or the map changes."""

    def __init__(self, message: str, *, reason: TryAgainReason = "unavailable") -> None:
        super().__init__(message, reason=reason)


class _Refused(Exception):
    """The handshake failed; the text says why."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Who this gateway is. `credential` is a secret: it goes into HELLO and nowhere else."""

    gateway: str
    credential: bytes

    def __repr__(self) -> str:
        """Without the secret: reprs end up in logs."""
        return f"Identity({self.gateway!r})"


@dataclass(frozen=True, slots=True)
class Target:
    """Where a shard is, and which of its lives and volumes is meant."""

    host: str
    port: int
    ring_uid: str
    volume_id: str
    term: int


class ShardLink:
    """The connection to one shard, made again whenever it is lost, for as long as the link lives.

    Args:
        shard: its name.
        identity: for HELLO.
        epoch: the newest epoch known, for HELLO.
        connect: makes connections.
        entropy: for the jitter of reconnecting.
        log: for events of the connection.
        on_state: called when the link became ready (True) or stopped being it (False).
        on_epoch: called with the epoch of the shard's map at each handshake.
    """

    def __init__(
        self,
        shard: str,
        *,
        identity: Identity,
        epoch: Callable[[], int],
        connect: Connect,
        entropy: random.Random,
        log: Logger,
        on_state: Callable[[bool], None],
        on_epoch: Callable[[int], None],
    ) -> None:
        self.shard = shard
        self.why = "it has not said yet where it is"
        self._identity = identity
        self._epoch = epoch
        self._connect = connect
        self._entropy = entropy
        self._log = log
        self._on_state = on_state
        self._on_epoch = on_epoch
        self._loop = asyncio.get_running_loop()
        self._target: Target | None = None
        self._aimed = asyncio.Event()
        self._wire: FrameConnection | None = None
        self._connecting: asyncio.Timeout | None = None
        self._handshake: asyncio.Future[rpc.Welcome] | None = None
        self._ready = False
        self._leaving = False
        self._heard = False
        self._ident = 0
        self._up_at_s = 0.0
        self._term_seen = ("", 0)
        """Volume, and the youngest term that answered on it: on another one terms begin anew."""
        self._calls: dict[int, OnReply] = {}
        self._subscriptions: dict[int, OnReply] = {}
        self._task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether `call` would send now."""
        return self._ready and not self._leaving

    @property
    def in_flight(self) -> int:
        """Requests without an answer."""
        return len(self._calls)

    def aim(self, target: Target) -> None:
        """Connect to `target` from now on; a connection to an earlier life of the shard is given up."""
        if target == self._target:
            return
        self._target = target
        if self._task is None:
            self._task = self._loop.create_task(self._run(), name=f"link {self.shard}")
        elif self._connecting is not None:
            self._connecting.reschedule(self._loop.time())
        elif self._wire is not None:
            self._wire.abort()
        self._aimed.set()

    def hurry(self) -> None:
        """The shard says that it serves: knock now, whatever the backoff says."""
        if not self._ready:
            self._aimed.set()

    async def close(self) -> None:
        """End the connection and the link; what waits gets `LOST`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def call(self, kind: Kind, payload: bytes, on_reply: OnReply) -> int:
        """Send a request.

        Returns:
            Its id, for `forget`.

        Raises:
            TryAgain: not sent: `NoPath`, or `overloaded` when a bound is reached.
        """
        ident = self._send(kind, payload)
        self._calls[ident] = on_reply
        return ident

    def forget(self, ident: int) -> None:
        """Drop the reply of a request, if it still comes."""
        self._calls.pop(ident, None)

    def subscribe(self, payload: bytes, on_frame: OnReply) -> int:
        """Send a SUBSCRIBE; every frame on its id goes to `on_frame` until it ends, or `unsubscribe`.

        Raises:
            TryAgain: as `call`.
        """
        ident = self._send(Kind.SUBSCRIBE, payload)
        self._subscriptions[ident] = on_frame
        return ident

    def unsubscribe(self, ident: int) -> None:
        """End a subscription; frames that are on their way are dropped. Harmless for one that has ended."""
        if self._subscriptions.pop(ident, None) is not None and self._wire is not None:
            self._wire.send(Kind.UNSUBSCRIBE, ident, b"")

    def _send(self, kind: Kind, payload: bytes) -> int:
        wire = self._wire
        if wire is None or not self._ready:
            raise NoPath(f"no connection to {self.shard}: {self.why}")
        if self._leaving:
            raise NoPath(f"{self.shard} is leaving", reason="draining")
        if len(self._calls) >= IN_FLIGHT_MAX or wire.buffered_bytes + len(payload) > BUFFERED_BYTES_MAX:
            raise TryAgain(f"too much is waiting for {self.shard}", reason="overloaded")
        self._ident += 1
        wire.send(kind, self._ident, payload)
        return self._ident

    async def _run(self) -> None:
        """Connect, serve, wait a little, again; ends by cancellation."""
        failures = 0
        while True:
            target = self._target
            assert target is not None
            self._aimed.clear()
            try:
                await self._serve(target)
            except TimeoutError:
                self.why = f"{target.host}:{target.port} did not answer in time"
            except (OSError, _Refused, *UNREADABLE) as error:
                self.why = str(error) or type(error).__name__
            finally:
                # Also when the link is closed: nobody may wait for ever.
                lived_s = self._loop.time() - self._up_at_s if self._ready else 0.0
                self._down()
            # A shard that accepts and hangs up at once is no success: the backoff goes on growing.
            failures = 1 if lived_s >= PING_EVERY_S else failures + 1
            self._log.event("link.lost", level="warning" if failures == 1 else "debug", shard=self.shard, why=self.why)
            ceiling = min(BACKOFF_MAX_S, BACKOFF_MIN_S * 2**failures)
            await self._aimed_within(self._entropy.uniform(ceiling / 2, ceiling))

    async def _aimed_within(self, timeout_s: float) -> None:
        """A new target ends the wait: a shard that came back should not wait for our backoff."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._aimed.wait()
        except TimeoutError:
            return

    async def _serve(self, target: Target) -> None:
        """One connection from its beginning to its end; always raises, with the reason."""
        lost: asyncio.Future[Exception | None] = self._loop.create_future()

        def on_lost(error: Exception | None) -> None:
            if not lost.done():
                lost.set_result(error)

        wires: list[FrameConnection] = []

        def factory() -> FrameConnection:
            wires.append(FrameConnection(on_frame=self._on_frame, on_lost=on_lost))
            return wires[-1]

        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S) as self._connecting:
                self._wire = wire = await self._connect(factory, target.host, target.port)
                welcome = await self._greet(wire, target, lost)
            self._connecting = None
            self._up(welcome, target)
            await self._keep_alive(wire, lost)
        finally:
            self._connecting = None
            # Also when this task is cancelled between the connection's making and its being handed to us.
            for wire in wires:
                wire.abort()

    async def _greet(
        self, wire: FrameConnection, target: Target, lost: asyncio.Future[Exception | None]
    ) -> rpc.Welcome:
        handshake: asyncio.Future[rpc.Welcome] = self._loop.create_future()
        self._handshake = handshake
        hello = rpc.Hello(
            protocol=rpc.PROTOCOL,
            ring_uid=target.ring_uid,
            shard=self.shard,
            volume_id=target.volume_id,
            gateway=self._identity.gateway,
            credential=self._identity.credential,
            epoch=self._epoch(),
        )
        wire.send(Kind.HELLO, 0, rpc.encode(hello))
        both: set[asyncio.Future[Any]] = {handshake, lost}
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if not handshake.done():
            raise _Refused("the connection ended during the handshake")
        welcome = handshake.result()
        if welcome.protocol != rpc.PROTOCOL or welcome.shard != self.shard:
            raise _Refused(f"{welcome.shard} answered with protocol {welcome.protocol}")
        volume_id, term = self._term_seen
        if welcome.term < max(target.term, term if volume_id == target.volume_id else 0):
            # An elder container of this shard: it is fenced, whatever it believes.
            raise _Refused(f"term {welcome.term} answered, a younger one is known")
        return welcome

    async def _keep_alive(self, wire: FrameConnection, lost: asyncio.Future[Exception | None]) -> None:
        silent_ticks = leaving_ticks = 0
        while True:
            await asyncio.wait({lost}, timeout=PING_EVERY_S)
            if lost.done():
                raise _Refused(f"the connection was lost ({lost.result() or 'closed'})")
            silent_ticks = 0 if self._heard else silent_ticks + 1
            self._heard = False
            if silent_ticks >= SILENT_TICKS_MAX:
                raise _Refused(f"silent for {silent_ticks * PING_EVERY_S:g} s")
            wire.send(Kind.PING, 0, b"")
            if self._leaving:
                leaving_ticks += 1
                if leaving_ticks > GOAWAY_TICKS_MAX or not (self._calls or self._subscriptions):
                    raise _Refused("it is leaving")

    def _up(self, welcome: rpc.Welcome, target: Target) -> None:
        self._ready, self._leaving, self._heard = True, False, True
        self._up_at_s = self._loop.time()
        self._term_seen = target.volume_id, welcome.term
        self.why = ""
        self._log.event("link.ready", shard=self.shard, host=target.host, port=target.port, term=welcome.term)
        self._on_state(True)
        self._on_epoch(welcome.epoch)

    def _down(self) -> None:
        """Nobody can be answered over this connection any more: say so to everybody, once."""
        was_ready = self._ready
        self._ready = self._leaving = False
        self._wire = self._handshake = None
        waiting = [*self._calls.values(), *self._subscriptions.values()]
        # Emptied first: a callback may use this link again (and is told that there is no path).
        self._calls.clear()
        self._subscriptions.clear()
        if was_ready:
            self._on_state(False)
        for on_reply in waiting:
            try:
                on_reply(LOST, b"")
            except Exception as error:  # noqa: BLE001  one broken callback must not cost the others their answer
                self._loop.call_exception_handler({"message": f"answering LOST on {self.shard}", "exception": error})

    def _on_frame(self, kind: int, ident: int, payload: bytes) -> None:
        self._heard = True
        on_reply = self._calls.pop(ident, None)
        if on_reply is None:
            on_reply = self._subscriptions.get(ident)
            if on_reply is None:
                self._on_control(kind, payload)
                return
            if kind in _ENDS_SUBSCRIPTION:
                del self._subscriptions[ident]
        try:
            on_reply(kind, payload)
        except UNREADABLE as error:
            self._log.event("link.bad_frame", level="error", shard=self.shard, kind=kind, error=str(error))
            on_reply(LOST, b"")
            if self._wire is not None:
                self._wire.abort()

    def _on_control(self, kind: int, payload: bytes) -> None:
        """Frames about the connection itself; replies that nobody waits for any more are dropped."""
        if kind == Kind.GOAWAY:
            if not self._leaving:
                self._leaving = True
                self.why = "it is leaving"
                self._log.event("link.goaway", shard=self.shard)
                self._on_state(False)
        elif self._handshake is not None and not self._handshake.done():
            try:
                self._handshake.set_result(_welcome(kind, payload))
            except (_Refused, *UNREADABLE) as error:
                self._handshake.set_exception(error)


_ENDS_SUBSCRIPTION: Final = frozenset({Kind.ENDED, Kind.ERROR, Kind.MOVED})


def _welcome(kind: int, payload: bytes) -> rpc.Welcome:
    if kind == Kind.WELCOME:
        return _decode_welcome(payload)
    if kind == Kind.ERROR:
        raise _Refused(f"it refused the handshake: {error_of(payload).message}")
    raise _Refused(f"it answered the handshake with a frame of kind {kind}")


def error_of(payload: bytes) -> FleetError:
    """The refusal in an ERROR frame."""
    return from_body(_decode_error(payload))
