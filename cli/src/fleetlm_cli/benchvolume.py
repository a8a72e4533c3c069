"""What a full volume costs: boot after SIGKILL, and replay from memory and from disk.

Both start a ring of their own with one shard, fill it through the shard's RPC, and end it with SIGKILL, so that the
next boot has the most to do. Promise: a boot is over when `up.json` is written, which means that every process calls
itself ready; the same is measured for an empty ring, so that the difference is the log's. Page cache is warm and said
to be. Must not be done here: knowing what is in a volume.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from collections.abc import Callable, Coroutine, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from fleetlm_cli import benchhost
from fleetlm_cli.benchload import BenchError, connect
from fleetlm_cli.benchshard import ShardWire
from fleetlm_cli.benchtarget import own_up, run
from fleetlm_cli.benchwire import WireSocket, text_frame
from fleetlm_cli.upfile import Up

BOOT_MESSAGES_MIN: Final = 2
REPLAY_TIMEOUT_S: Final = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayPlan:
    """What is read."""

    hot_messages: int
    messages: int
    sessions: int
    size_bytes: int
    duration_s: float


@contextmanager
def _killed(folder: Path) -> Generator[tuple[Up, float]]:
    """A ring with one shard that ends by SIGKILL (its children die with it), and how long it took to be ready."""
    folder.mkdir(exist_ok=True)
    began_s = time.perf_counter()
    with own_up(folder, shards=1, end=signal.SIGKILL) as up:
        yield up, time.perf_counter() - began_s


@contextmanager
def _folder(folder: Path | None) -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="fleetlm-bench-", dir=folder) as made:
        yield Path(made)


def boot(*, mib: int, sessions: int, boots: int, folder: Path | None, run_id: str) -> dict[str, Any]:
    """Fill, kill, and time each boot."""
    with _folder(folder) as made:
        origin = benchhost.provenance(made)
        names = [f"{run_id}-{number}" for number in range(sessions)]
        size_bytes = max(18, min(32_768, (mib << 20) // (sessions * BOOT_MESSAGES_MIN) - 350))
        messages = max(1, (mib << 20) // (sessions * (size_bytes + 350)))
        empty = _timed(made / "empty", boots + 1)[1:]
        with _killed(made / "full") as (up, _):
            _filled(up, made / "full" / "ring", names, messages=messages, size_bytes=size_bytes)
        log_bytes = sum(path.stat().st_blocks * 512 for path in (made / "full" / "ring" / "shard-0").rglob("*"))
        ready = _timed(made / "full", boots)
        return {
            "bench": "boot",
            "log_mib": round(log_bytes / 2**20),
            "sessions": sessions,
            "messages": messages * sessions,
            "size_bytes": size_bytes,
            "page_cache": "warm",
            "ready_s": round(median(ready), 3),
            "empty_ready_s": round(median(empty), 3),
            "log_s": round(median(ready) - median(empty), 3),
            "samples": {"ready_s": ready, "empty_ready_s": empty},
            "processes": [],
            "provenance": origin,
        }


def _timed(folder: Path, boots: int) -> list[float]:
    took: list[float] = []
    for _ in range(boots):
        with _killed(folder) as (_, ready_s):
            took.append(round(ready_s, 3))
    return took


def _filled(up: Up, data: Path, names: list[str], *, messages: int, size_bytes: int) -> None:
    async def work() -> None:
        wire = await ShardWire.open(data)
        await wire.fill(names, messages=messages, size_bytes=size_bytes)
        wire.close()

    run(up.url, work())


def replay(plan: ReplayPlan, *, folder: Path | None, run_id: str) -> dict[str, Any]:
    """Write, kill, start again, read: cold ones first, then hot ones over and over."""
    cold = [f"{run_id}-cold-{number}" for number in range(plan.sessions)]
    hot = [f"{run_id}-hot-{number}" for number in range(plan.sessions)]
    with _folder(folder) as made, ExitStack() as stack:
        data = made / "ring"
        origin = benchhost.provenance(made)
        with _killed(made) as (up, _):
            _filled(up, data, cold, messages=plan.messages, size_bytes=plan.size_bytes)
            _filled(up, data, hot, messages=plan.hot_messages, size_bytes=plan.size_bytes)
        figures: dict[str, Any] = {}
        used: list[dict[str, Any]] = []
        for door, read in (("shard", _read_shard), ("socket", _read_sockets)):
            # A boot of its own for each: what the first one read would be warm in the shard for the second.
            up, _ = stack.enter_context(_killed(made))
            processes = [("load", os.getpid()), *((each.name, each.pid) for each in up.processes)]
            shard = up.process("shard-0").pid
            before = benchhost.usage(processes)
            figures[f"{door}_cold_per_s"] = round(_rate(up, read(up, data, cold, 0.0)))
            figures[f"{door}_cold_shard_mib"] = {
                "before": round(before["shard-0"].rss_bytes / 2**20, 1),
                "peak": round(benchhost.peak_rss_bytes(shard) / 2**20, 1),
            }
            figures[f"{door}_hot_per_s"] = round(_rate(up, read(up, data, hot, plan.duration_s)))
            spent = benchhost.spent(before, benchhost.usage(processes))
            used += [{**each, "name": f"{each['name']} ({door})"} for each in spent]
            stack.close()
        return {
            "bench": "replay",
            "sessions": plan.sessions,
            "cold_messages": plan.messages,
            "hot_messages": plan.hot_messages,
            "size_bytes": plan.size_bytes,
            "page_cache": "warm",
            **figures,
            "processes": used,
            "provenance": origin,
        }


def _rate(up: Up, work: Coroutine[Any, Any, tuple[int, float]]) -> float:
    messages, seconds = run(up.url, work)
    return messages / seconds


async def _over_and_over(
    sessions: list[str], read: Callable[[int, str], Coroutine[Any, Any, int]], duration_s: float
) -> tuple[int, float]:
    """Each session by a reader of its own, once at least, until the time is over: messages and seconds."""
    began_s = time.perf_counter()

    async def reader(number: int, session: str) -> int:
        total = await read(number, session)
        while time.perf_counter() - began_s < duration_s:
            total += await read(number, session)
        return total

    totals = await asyncio.gather(*(reader(number, session) for number, session in enumerate(sessions)))
    return sum(totals), time.perf_counter() - began_s


async def _read_shard(up: Up, data: Path, sessions: list[str], duration_s: float) -> tuple[int, float]:
    """By READ, a connection each."""
    del up
    wires = [await ShardWire.open(data) for _ in sessions]

    async def read(number: int, session: str) -> int:
        return await wires[number].read(session)

    try:
        return await _over_and_over(sessions, read, duration_s)
    finally:
        for wire in wires:
            wire.close()


class _Returning:
    """A reader on a socket who joins with cursor 0, takes everything, and leaves."""

    def __init__(self) -> None:
        self.socket: WireSocket | None = None
        self._count = 0
        self._joins = 0
        self._caught_up: asyncio.Future[None] | None = None

    async def read(self, session: str) -> int:
        """Messages until `caught_up`."""
        assert self.socket is not None
        self._count = 0
        self._joins += 1
        self._caught_up = asyncio.get_running_loop().create_future()
        topic, ref = session.encode(), self._joins
        self.socket.send([text_frame(b'["%d","%d","session:%b","phx_join",{"cursor":0}]' % (ref, ref, topic))])
        async with asyncio.timeout(REPLAY_TIMEOUT_S):
            await self._caught_up
        self.socket.send([text_frame(b'["%d","l%d","session:%b","phx_leave",{}]' % (ref, ref, topic))])
        return self._count

    def on_texts(self, texts: list[bytes]) -> None:
        """What came."""
        assert self._caught_up is not None
        for text in texts:
            head = text[:300]
            if b'"messages"' in head:
                self._count += text.count(b'"seq":')
            elif b'"caught_up"' in head and not self._caught_up.done():
                self._caught_up.set_result(None)
            elif b'"status":"error"' in head and not self._caught_up.done():
                self._caught_up.set_exception(BenchError(f"join refused: {text!r}"))


async def _read_sockets(up: Up, data: Path, sessions: list[str], duration_s: float) -> tuple[int, float]:
    """By join with cursor 0, a socket each."""
    del data
    readers = [_Returning() for _ in sessions]

    async def read(number: int, session: str) -> int:
        return await readers[number].read(session)

    try:
        for number, reader in enumerate(readers):
            reader.socket = await connect(up.websocket_url, f"reader-{number}", reader.on_texts)
        return await _over_and_over(sessions, read, duration_s)
    finally:
        for reader in readers:
            if reader.socket is not None:
                reader.socket.close()
