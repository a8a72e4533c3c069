"""Many sockets on one gateway: what an idle one costs, and how long one append takes to reach them all.

Promise: memory is the gateway's resident set, read from `/proc` before, after opening and after joining; a fan-out is
over when the last socket has the message, not when most have. Must not be done here: starting what is measured.
"""

from __future__ import annotations

import asyncio
import os
import time
from array import array
from collections.abc import Callable, Iterable
from typing import Any, Final

from fleetlm_cli import benchhost, benchreport
from fleetlm_cli.benchload import BenchError, connect
from fleetlm_cli.benchtarget import System, run
from fleetlm_cli.benchwire import WireSocket, text_frame
from fleetlm_cli.exits import Failure

OPEN_AT_ONCE: Final = 100
"""Handshakes under way: a gateway's listen backlog is finite."""
STEP_TIMEOUT_S: Final = 120.0
FAN_TIMEOUT_S: Final = 30.0
SETTLE_S: Final = 1.0
"""Memory is read that long after the last answer: what a handshake needed has been given back."""
_OK: Final = b'"status":"ok"'


class _Crowd:
    """Sockets that were opened, and what has come to them."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.sockets: list[WireSocket] = []
        self.joined = 0
        self.refused = 0
        self.got = 0
        self.mark = b"\0"
        self.first_s = 0.0
        self.last_s = 0.0
        self._wanted: Callable[[], bool] = lambda: False
        self._reached = asyncio.Event()

    async def open(self, count: int) -> None:
        """Open so many sockets, some at once."""
        for begin in range(0, count, OPEN_AT_ONCE):
            numbers = range(begin, min(count, begin + OPEN_AT_ONCE))
            opened = await asyncio.gather(*(connect(self._url, f"crowd-{at}", self._on_texts) for at in numbers))
            self.sockets += opened

    async def join(self, topics: Iterable[bytes]) -> None:
        """Socket k joins topic k, live only.

        Raises:
            BenchError: a join was refused or not answered.
        """
        for socket, topic in zip(self.sockets, topics, strict=True):
            socket.send([text_frame(b'["1","1","%b","phx_join",{}]' % topic)])
        await self.until(lambda: self.joined + self.refused >= len(self.sockets), timeout_s=STEP_TIMEOUT_S)
        if self.refused:
            raise BenchError(f"{self.refused} joins were refused")

    async def until(self, wanted: Callable[[], bool], *, timeout_s: float) -> None:
        """Wait for something that arrives.

        Raises:
            BenchError: it did not in time.
        """
        self._wanted = wanted
        try:
            async with asyncio.timeout(timeout_s):
                while not wanted():
                    self._reached.clear()
                    await self._reached.wait()
        except TimeoutError as error:
            raise BenchError(f"not within {timeout_s:g} s: {self.joined} joined, {self.got} delivered") from error

    def close(self) -> None:
        """Close all."""
        for socket in self.sockets:
            socket.close()

    def _on_texts(self, texts: list[bytes]) -> None:
        for text in texts:
            if self.mark in text and b'"messages"' in text:
                self.last_s = time.perf_counter()
                if not self.got:
                    self.first_s = self.last_s
                self.got += 1
            elif b'"phx_reply"' in text and b'"phoenix"' not in text:
                if _OK in text:
                    self.joined += 1
                else:
                    self.refused += 1
        if self._wanted():
            self._reached.set()


def fanout(found: System, *, sockets: int, appends: int, size_bytes: int, run_id: str) -> dict[str, Any]:
    """Append one by one; each when the one before has reached everybody."""
    processes = [("load", os.getpid()), *found.processes()]
    origin = benchhost.provenance(found.folder)
    topic = b"session:%b-fan" % run_id.encode()
    first, last, moments = array("d"), array("d"), list[dict[str, benchhost.Usage]]()

    async def work() -> None:
        crowd = _Crowd(found.websocket_url)
        writer: WireSocket | None = None
        try:
            await crowd.open(sockets)
            await crowd.join([topic] * sockets)
            writer = await connect(found.websocket_url, "writer", lambda _: None)
            writer.send([text_frame(b'["w","w","%b","phx_join",{}]' % topic)])
            moments.append(benchhost.usage(processes))
            for number in range(appends + 1):
                crowd.got, crowd.mark = 0, b"%016x" % number
                body = crowd.mark + b"x" * (size_bytes - len(crowd.mark) - 2)
                began_s = time.perf_counter()
                writer.send([text_frame(b'["w","%d","%b","append",{"content":"%b"}]' % (number, topic, body))])
                await crowd.until(lambda: crowd.got >= sockets, timeout_s=FAN_TIMEOUT_S)
                if number:  # the first one warms up
                    first.append(crowd.first_s - began_s)
                    last.append(crowd.last_s - began_s)
            moments.append(benchhost.usage(processes))
        finally:
            crowd.close()
            if writer is not None:
                writer.close()

    run(found.websocket_url, work())
    return {
        "bench": "fanout",
        "sockets": sockets,
        "appends": appends,
        "size_bytes": size_bytes,
        "first_ms": benchreport.percentiles(first),
        "last_ms": benchreport.percentiles(last),
        "samples": [round(each * 1000, 3) for each in last],
        "processes": benchhost.spent(*moments),
        "provenance": origin,
    }


def idle(found: System, *, sockets: int, sessions: int, run_id: str) -> dict[str, Any]:
    """Open, then join, and look at the gateway's memory after each.

    Raises:
        Failure: only an address is known: there is no process to look at.
    """
    gateways = found.processes("gateway")
    if not gateways:
        raise Failure("bench idle reads the gateway's memory: name the `up` that runs here with --data")
    processes = [("load", os.getpid()), *found.processes()]
    origin = benchhost.provenance(found.folder)
    sizes: list[int] = []
    moments: list[dict[str, benchhost.Usage]] = []

    async def look() -> None:
        await asyncio.sleep(SETTLE_S)
        sizes.append(sum(usage.rss_bytes for usage in benchhost.usage(gateways).values()))

    async def work() -> None:
        crowd = _Crowd(found.websocket_url)
        try:
            # Code that runs for the first time is loaded before anything is counted.
            await crowd.open(1)
            await crowd.join([b"session:%b-warm" % run_id.encode()])
            crowd.sockets.pop().close()
            crowd.joined = 0
            await look()
            moments.append(benchhost.usage(processes))
            began_s = time.perf_counter()
            await crowd.open(sockets)
            took.append(time.perf_counter() - began_s)
            await look()
            await crowd.join(b"session:%b-%d" % (run_id.encode(), number % sessions) for number in range(sockets))
            await look()
            moments.append(benchhost.usage(processes))
            lost = sum(socket.lost.done() for socket in crowd.sockets)
            if lost:
                raise BenchError(f"{lost} sockets were closed by the gateway")
        finally:
            crowd.close()

    took: list[float] = []
    run(found.websocket_url, work())
    before, opened, joined = sizes
    return {
        "bench": "idle",
        "sockets": sockets,
        "sessions": sessions,
        "gateway_mib_before": round(before / 2**20, 1),
        "gateway_mib_opened": round(opened / 2**20, 1),
        "gateway_mib_joined": round(joined / 2**20, 1),
        "kib_a_socket_opened": round((opened - before) / sockets / 1024, 2),
        "kib_a_socket_joined": round((joined - before) / sockets / 1024, 2),
        "opened_per_s": round(sockets / took[0]),
        "processes": benchhost.spent(*moments),
        "provenance": origin,
    }
