"""The closed loop that all peers get: so many connections, each with so many appends unanswered.

Promise: what is counted was acknowledged within the measured time; latency runs from the write of the request to the
read of its answer. Warm-up is not counted. Must not be done here: protocols (`peerwire.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, cast

from tests.bench.peerwire import PeerError, Wire

OPEN_TIMEOUT_S: Final = 20.0
DRAIN_TIMEOUT_S: Final = 30.0


@dataclass(slots=True)
class Tally:
    """What came back."""

    begin_s: float = float("inf")
    end_s: float = float("inf")
    acked: int = 0
    acked_ever: int = 0
    latencies: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])
    """Seconds, and how many appends took that long."""

    def percentile_ms(self, percent: float) -> float:
        """Nearest rank."""
        ranked = sorted(self.latencies)
        left = percent / 100 * sum(count for _, count in ranked)
        for latency_s, count in ranked:
            left -= count
            if left <= 0:
                return round(latency_s * 1000, 3)
        raise PeerError("nothing was acknowledged in the measured time")


class Lane(asyncio.Protocol):
    """One connection that keeps `window` appends unanswered."""

    def __init__(self, wire: Wire, tally: Tally, *, window: int) -> None:
        self._wire = wire
        self._tally = tally
        self._window = window
        self._unanswered: deque[list[float]] = deque()
        """Batches as they were written: when, and how many are still unanswered."""
        self._transport: asyncio.Transport | None = None
        self._open = False
        self._running = False
        loop = asyncio.get_running_loop()
        self.opened: asyncio.Future[None] = loop.create_future()
        self.drained: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio's call."""
        self._transport = cast("asyncio.Transport", transport)
        hello = self._wire.hello()
        if hello:
            self._transport.write(hello)
        else:
            self._open = True
            self.opened.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio's call."""
        self._fail(PeerError(f"the connection ended: {exc}"))

    def data_received(self, data: bytes) -> None:
        """Asyncio's call."""
        try:
            if not self._open:
                if self._wire.greeted(data):
                    self._open = True
                    self.opened.set_result(None)
                return
            count = self._wire.answers(data)
        except PeerError as error:
            self._fail(error)
            return
        if count:
            self._on_answers(count)

    def start(self) -> None:
        """Put the window in flight."""
        self._running = True
        self._send(self._window, time.perf_counter())

    def stop(self) -> None:
        """Send no more; `drained` resolves with the last answer."""
        self._running = False
        if not self._unanswered and not self.drained.done():
            self.drained.set_result(None)

    def close(self) -> None:
        """Close."""
        if self._transport is not None:
            self._transport.abort()

    def _send(self, count: int, now_s: float) -> None:
        assert self._transport is not None
        self._unanswered.append([now_s, count])
        self._transport.write(self._wire.requests(count))

    def _on_answers(self, count: int) -> None:
        tally, now_s, left = self._tally, time.perf_counter(), count
        tally.acked_ever += count
        counts = tally.begin_s <= now_s < tally.end_s
        if counts:
            tally.acked += count
        while left:
            batch = self._unanswered[0]
            part = min(left, int(batch[1]))
            batch[1] -= part
            left -= part
            if counts:
                tally.latencies.append((now_s - batch[0], part))
            if not batch[1]:
                self._unanswered.popleft()
        if self._running:
            self._send(count, now_s)
        elif not self._unanswered and not self.drained.done():
            self.drained.set_result(None)

    def _fail(self, error: PeerError) -> None:
        for future in (self.opened, self.drained):
            if not future.done():
                future.set_exception(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How the load is put on."""

    name: str
    connections: int
    window: int


async def closed_loop(
    host: str,
    port: int,
    shape: Shape,
    *,
    wire: Callable[[int], Wire],
    warm_up_s: float,
    seconds: float,
    on_begin: Callable[[], None],
    on_end: Callable[[], None],
) -> Tally:
    """One measurement.

    Raises:
        PeerError: a server refused, or a connection was lost.
    """
    tally, loop = Tally(), asyncio.get_running_loop()
    lanes: list[Lane] = []
    try:
        for number in range(shape.connections):
            _, lane = await loop.create_connection(partial(Lane, wire(number), tally, window=shape.window), host, port)
            lanes.append(lane)
            await asyncio.wait_for(lane.opened, OPEN_TIMEOUT_S)
        for lane in lanes:
            lane.start()
        await asyncio.sleep(warm_up_s)
        on_begin()
        tally.begin_s = time.perf_counter()
        tally.end_s = tally.begin_s + seconds
        await asyncio.sleep(seconds)
        on_end()
        for lane in lanes:
            lane.stop()
        async with asyncio.timeout(DRAIN_TIMEOUT_S):
            await asyncio.gather(*(lane.drained for lane in lanes))
    finally:
        for lane in lanes:
            lane.close()
            for future in (lane.opened, lane.drained):
                # One that failed was told already, or another one was first.
                if future.done() and not future.cancelled():
                    future.exception()
    return tally
