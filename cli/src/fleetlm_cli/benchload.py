"""Appends over so many connections, in a closed or an open loop; latencies of what came back.

Closed: each answered append is followed by the next at once, so the rate is what the system gives at that concurrency
(it says nothing about latency at a given rate: it slows down with the system). Open: appends are due at a constant rate
whatever the system does, and latency counts from the moment an append was due, not from when it was sent: a system that
stalls is charged for every append that should have been sent meanwhile (no coordinated omission). A refused append
(TRY_AGAIN) is sent again with its key after the time it was told, and its latency counts from the first try.

Promise: every append of the measured time is counted: acknowledged, or in `errors`; nothing is left out because it was
slow. Must not be done here: starting what is measured, printing.
"""

from __future__ import annotations

import asyncio
import re
import time
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

import msgspec

from fleetlm_cli.benchpace import Pace
from fleetlm_cli.benchwire import WireSocket, text_frame

MARK_HEX: Final = 16
"""Digits of the number that stands at the beginning of each content."""
SIZE_BYTES_MIN: Final = MARK_HEX + 2
JOIN_TIMEOUT_S: Final = 30.0
DRAIN_TIMEOUT_S: Final = 15.0
"""After the end, what is in flight may still come: longer than the gateway's own deadline."""
HEARTBEAT_S: Final = 20.0
OPEN_IN_FLIGHT_MAX: Final = 50_000
"""Unanswered appends of an open loop; past it what is due waits here, and its latency goes on counting."""
TICKS_PER_S: Final = 10
Hook = Callable[[], None]
_MARK: Final = re.compile(rb'"content":"([0-9a-f]{16})')
_OK: Final = b'"status":"ok"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is done."""

    connections: int
    sessions: int
    in_flight: int
    size_bytes: int
    duration_s: float
    warm_up_s: float
    readers: int = 0
    rate: float = 0.0
    """Appends a second that are due; 0: closed loop."""
    run_id: str = "bench"


@dataclass(slots=True)
class Outcome:
    """What came back; latencies in seconds."""

    measured_s: float = 0.0
    acks: array[float] = field(default_factory=lambda: array("d"))
    deliveries: array[float] = field(default_factory=lambda: array("d"))
    errors: Counter[str] = field(default_factory=Counter[str])
    unanswered: int = 0
    ticks: Counter[int] = field(default_factory=Counter[int])
    """Acknowledgements in each tenth of a second of the measured time."""
    offered: int = 0
    """Open loop: appends that were due in the measured time."""
    unsent: int = 0
    """Open loop: of those, never sent: `OPEN_IN_FLIGHT_MAX` others were unanswered."""
    late: array[float] = field(default_factory=lambda: array("d"))
    """Open loop: how long after its due time each was sent: the generator's own share of the latency."""


class BenchError(Exception):
    """The load could not be put on."""


@dataclass(slots=True)
class _Flight:
    mark: int
    session: int
    started_s: float
    frame_tail: bytes


class _Meter:
    """Times of appends, shared by all connections: a mark's start, whoever receives it."""

    def __init__(self) -> None:
        self.outcome = Outcome()
        self.starts: dict[int, float] = {}
        self.marks = 0
        self.measuring = False
        self.running = True
        self.begin_s = 0.0
        self.end_s = float("inf")

    def counts(self, started_s: float) -> bool:
        """Whether an append belongs to the measured time."""
        return self.begin_s <= started_s < self.end_s


class _Writer:
    """One connection that appends to its sessions in turn."""

    def __init__(self, meter: _Meter, load: Load, *, number: int, sessions: list[int], delivers: bool) -> None:
        self._meter = meter
        self._load = load
        self._number = number
        self._sessions = sessions
        self._delivers = delivers
        self._turn = 0
        self._ref = 0
        self._flights: dict[bytes, _Flight] = {}
        self._joined = 0
        self._refused: list[str] = []
        self._filling = b"x" * (load.size_bytes - SIZE_BYTES_MIN)
        self._loop = asyncio.get_running_loop()
        self._socket: WireSocket | None = None
        self._progress = asyncio.Event()

    @property
    def in_flight(self) -> int:
        """Appends without an answer."""
        return len(self._flights)

    async def idle(self) -> None:
        """Return when nothing is in flight."""
        while self._flights:
            self._progress.clear()
            await self._progress.wait()

    async def open(self, url: str) -> WireSocket:
        """Connect and join."""
        socket = self._socket = await connect(url, f"bench-{self._number}", self._on_texts)
        socket.send([_join_frame(self._load, session) for session in self._sessions])
        try:
            async with asyncio.timeout(JOIN_TIMEOUT_S):
                while self._joined < len(self._sessions):
                    self._progress.clear()
                    await self._progress.wait()
                    if self._refused or socket.lost.done():
                        raise BenchError(f"join refused: {(self._refused or [socket.lost.result()])[0]}")
        except TimeoutError as error:
            raise BenchError(f"{self._joined} of {len(self._sessions)} sessions were joined in time") from error
        return socket

    def start(self) -> None:
        """Put everything in flight."""
        self._send([self._next(time.perf_counter()) for _ in range(self._load.in_flight)])

    def offer(self, due_s: float) -> None:
        """Open loop: send one that was due then."""
        self._send([self._next(due_s)])

    def _next(self, started_s: float) -> bytes:
        """One more append, whose latency counts from `started_s`."""
        meter = self._meter
        meter.marks += 1
        mark = meter.marks
        session = self._sessions[self._turn]
        self._turn = (self._turn + 1) % len(self._sessions)
        tail = b',"%s","append",{"content":"%016x%s","idempotency_key":"%s-%x"}]' % (
            _topic(self._load, session),
            mark,
            self._filling,
            self._load.run_id.encode(),
            mark,
        )
        meter.starts[mark] = started_s
        return self._frame(_Flight(mark, session, started_s, tail))

    def _frame(self, flight: _Flight) -> bytes:
        self._ref += 1
        ref = b"%d" % self._ref
        self._flights[ref] = flight
        return text_frame(b'["j%d","%s"%s' % (flight.session, ref, flight.frame_tail))

    def _send(self, frames: list[bytes]) -> None:
        if frames and self._socket is not None:
            self._socket.send(frames)

    def _on_texts(self, texts: list[bytes]) -> None:
        now_s = time.perf_counter()
        frames: list[bytes] = []
        for text in texts:
            head = text[:400]
            if b'"phx_reply"' in head:
                self._on_reply(text, head, now_s, frames)
            elif self._delivers and b'"messages"' in head:
                _on_messages(self._meter, text, now_s, once=True)
        self._send(frames)

    def _on_reply(self, text: bytes, head: bytes, now_s: float, frames: list[bytes]) -> None:
        ref = head.split(b",", 2)[1].strip(b'" ')
        flight = self._flights.pop(ref, None)
        if flight is None:
            if ref.startswith(b"j"):
                self._on_join_reply(text, head)
            return
        if not self._meter.running:
            self._progress.set()
        if _OK in head:
            self._on_ack(flight, now_s)
        elif self._on_refusal(flight, _error(text)):
            return
        if self._meter.running and not self._load.rate:
            frames.append(self._next(time.perf_counter()))

    def _on_ack(self, flight: _Flight, now_s: float) -> None:
        meter = self._meter
        if meter.counts(flight.started_s):
            meter.outcome.acks.append(now_s - flight.started_s)
        if meter.begin_s <= now_s < meter.end_s:
            meter.outcome.ticks[int((now_s - meter.begin_s) * TICKS_PER_S)] += 1
        if not self._delivers and not self._load.readers:
            meter.starts.pop(flight.mark, None)

    def _on_refusal(self, flight: _Flight, error: _Error) -> bool:
        """Whether it will be tried again."""
        if self._meter.counts(flight.started_s):
            self._meter.outcome.errors[f"{error.code} {error.reason}"] += 1
        if error.code != "TRY_AGAIN":
            return False
        self._loop.call_later((error.retry_after_ms or 100) / 1000, self._again, flight)
        return True

    def _again(self, flight: _Flight) -> None:
        if self._meter.running:
            self._send([self._frame(flight)])

    def _on_join_reply(self, text: bytes, head: bytes) -> None:
        if _OK in head:
            self._joined += 1
        else:
            self._refused.append(_error(text).message)
        self._progress.set()


class _Open:
    """The open loop: sends what is due, over the writers in turn."""

    def __init__(self, meter: _Meter, load: Load, writers: list[_Writer]) -> None:
        self._meter = meter
        self._writers = writers
        self._sent = 0
        self.pace = Pace(load.rate, tick=self.send_due)

    def send_due(self) -> None:
        """Everything that is due and has room."""
        meter, pace, writers = self._meter, self.pace, self._writers
        due = pace.due()
        room = OPEN_IN_FLIGHT_MAX - sum(writer.in_flight for writer in writers)
        for number in range(self._sent, min(due, self._sent + room)):
            due_s = pace.due_at_s(number)
            writers[number % len(writers)].offer(due_s)
            if meter.counts(due_s):
                meter.outcome.late.append(time.perf_counter() - due_s)
            self._sent = number + 1

    def stop(self) -> None:
        """Send what became due since the last tick; count what was due in the measured time, and what stayed unsent."""
        meter, pace = self._meter, self.pace
        self.send_due()
        due, begin_s = pace.due(), meter.begin_s
        pace.stop()
        meter.outcome.offered = sum(1 for number in range(due) if begin_s <= pace.due_at_s(number) < meter.end_s)
        meter.outcome.unsent = sum(1 for number in range(self._sent, due) if meter.counts(pace.due_at_s(number)))


class _Reader:
    """One connection that only receives."""

    def __init__(self, meter: _Meter, load: Load, *, number: int, sessions: list[int]) -> None:
        self._meter = meter
        self._load = load
        self._number = number
        self._sessions = sessions

    async def open(self, url: str) -> WireSocket:
        """Connect and join; what is appended before the joins are done is not measured (warm-up)."""
        socket = await connect(url, f"bench-reader-{self._number}", self._on_texts)
        socket.send([_join_frame(self._load, session) for session in self._sessions])
        return socket

    def _on_texts(self, texts: list[bytes]) -> None:
        now_s = time.perf_counter()
        for text in texts:
            if b'"messages"' in text[:400]:
                _on_messages(self._meter, text, now_s, once=self._load.readers == 1)


def _on_messages(meter: _Meter, text: bytes, now_s: float, *, once: bool) -> None:
    """Messages were delivered; `once`: nobody else will get them, so their start can be forgotten."""
    deliveries, starts = meter.outcome.deliveries, meter.starts
    for found in _MARK.finditer(text):
        mark = int(found.group(1), 16)
        started_s = starts.pop(mark, None) if once else starts.get(mark)
        if started_s is not None and meter.counts(started_s):
            deliveries.append(now_s - started_s)


class _Error(msgspec.Struct, frozen=True):
    code: str = "UNKNOWN"
    reason: str = ""
    message: str = ""
    retry_after_ms: int | None = None


class _Answer(msgspec.Struct, frozen=True):
    status: str
    response: _Error


def _error(text: bytes) -> _Error:
    frame = msgspec.json.decode(text, type=list[msgspec.Raw])
    return msgspec.json.decode(frame[4], type=_Answer).response


def _topic(load: Load, session: int) -> bytes:
    return b"session:%s-%d" % (load.run_id.encode(), session)


def _join_frame(load: Load, session: int) -> bytes:
    return text_frame(b'["j%d","j%d","%s","phx_join",{}]' % (session, session, _topic(load, session)))


async def connect(url: str, participant: str, on_texts: Callable[[list[bytes]], None]) -> WireSocket:
    """Open a socket as that participant."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    path = f"{parts.path}?vsn=2.0.0&participant_id={participant}&participant_kind=agent"
    _, socket = await asyncio.get_running_loop().create_connection(
        lambda: WireSocket(f"{host}:{port}", path, on_texts=on_texts), host, port
    )
    await socket.opened
    return socket


async def put_on(websocket_url: str, load: Load, *, on_begin: Hook, on_end: Hook) -> Outcome:
    """Put the load on and take it off again.

    Args:
        websocket_url: `ws://host:port/socket/websocket`.
        load: how much.
        on_begin: called when the measured time begins.
        on_end: called when it ends.

    Raises:
        BenchError: a session could not be joined, or a connection was lost on the way.
    """
    meter = _Meter()
    writers = [
        _Writer(meter, load, number=at, sessions=_sessions_of(load, at), delivers=load.readers == 0)
        for at in range(load.connections)
    ]
    readers = [_Reader(meter, load, number=at, sessions=list(range(load.sessions))) for at in range(load.readers)]
    sockets: list[WireSocket] = []
    heartbeat = None
    try:
        for reader in readers:
            sockets.append(await reader.open(websocket_url))  # noqa: PERF401 - those so far are closed if one fails
        for writer in writers:
            sockets.append(await writer.open(websocket_url))  # noqa: PERF401
        heartbeat = asyncio.create_task(_heartbeats(sockets))
        await _measure(meter, load, writers, sockets, on_begin=on_begin, on_end=on_end)
    finally:
        if heartbeat is not None:
            heartbeat.cancel()
        for socket in sockets:
            socket.close()
    return meter.outcome


async def _measure(
    meter: _Meter, load: Load, writers: list[_Writer], sockets: list[WireSocket], *, on_begin: Hook, on_end: Hook
) -> None:
    lost = asyncio.ensure_future(asyncio.wait([socket.lost for socket in sockets], return_when="FIRST_COMPLETED"))
    meter.begin_s = float("inf")
    opened = _Open(meter, load, writers) if load.rate else None
    if opened is not None:
        opened.pace.start()
    else:
        for writer in writers:
            writer.start()
    await asyncio.wait([lost], timeout=load.warm_up_s)
    on_begin()
    meter.begin_s = time.perf_counter()
    await asyncio.wait([lost], timeout=load.duration_s)
    meter.end_s = time.perf_counter()
    on_end()
    meter.running = False
    if opened is not None:
        opened.stop()
    meter.outcome.measured_s = meter.end_s - meter.begin_s
    if not lost.done():
        await _drain(writers)
    gone = [socket.lost.result() for socket in sockets if socket.lost.done()]
    lost.cancel()
    meter.outcome.unanswered = sum(writer.in_flight for writer in writers)
    if gone:
        raise BenchError(f"{len(gone)} connections were lost, first: {gone[0]}")


async def _drain(writers: list[_Writer]) -> None:
    """Wait for the answers that are still to come."""
    await asyncio.wait([asyncio.ensure_future(writer.idle()) for writer in writers], timeout=DRAIN_TIMEOUT_S)


async def _heartbeats(sockets: list[WireSocket]) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_S)
        for socket in sockets:
            socket.send([text_frame(b'[null,"hb","phoenix","heartbeat",{}]')])


def _sessions_of(load: Load, connection: int) -> list[int]:
    """Sessions are spread over connections; when there are fewer, several connections write to one."""
    if load.sessions <= load.connections:
        return [connection % load.sessions]
    return list(range(connection, load.sessions, load.connections))
