"""What each process of a fleet holds over time: memory, descriptors, sockets, threads, tasks; and whether that leaks.

Promise: numbers come from the kernel and from the process's own operations port, over connections that are closed at
once, so that looking leaves nothing behind; a process that is away (killed, frozen) has no sample, not a wrong one.
Must not be done here: load, kills.
"""

from __future__ import annotations

import asyncio
import csv
import re
import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Final

import aiohttp
import psutil

from tests.support.fleet import Fleet

SCRAPE_TIMEOUT_S: Final = 2.0
"""A frozen process does not answer; its sample is left out."""
CACHED_FILES_MAX: Final = {"shard": 136}
"""Descriptors that a kind of process may keep in a bounded cache: a shard's two reader lanes hold 64 indexes each, and
checkpoints' tables. More than these is a leak; the soak has segments enough to fill them."""
_TASKS: Final = re.compile(r"^fleetlm_process_tasks (\S+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Sample:
    """One process at one moment. `tasks` is 0 for a process without an operations port (`up` itself)."""

    at_s: float
    name: str
    pid: int
    rss_bytes: int
    files: int
    sockets: int
    threads: int
    tasks: int


async def sample(running: Fleet, *, begin_s: float = 0.0) -> list[Sample]:
    """Everything that answers now, `up` itself included."""
    at_s = time.monotonic() - begin_s
    targets = [(one.name, one.pid, one.ops_url) for one in running.up.processes]
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(SCRAPE_TIMEOUT_S), connector=connector) as http:
        found = await asyncio.gather(
            _one(http, at_s, "up", running.process.pid, None),
            *(_one(http, at_s, name, pid, url) for name, pid, url in targets),
        )
    return [one for one in found if one is not None]


async def _one(http: aiohttp.ClientSession, at_s: float, name: str, pid: int, url: str | None) -> Sample | None:
    try:
        tasks = 0
        if url is not None:
            async with http.get(f"{url}/metrics") as answer:
                shown = _TASKS.search(await answer.text())
            if shown is None:
                return None
            tasks = int(float(shown[1]))
        return await asyncio.to_thread(_of_kernel, at_s, name, pid, tasks)
    except (aiohttp.ClientError, OSError, TimeoutError, psutil.Error):
        return None


def _of_kernel(at_s: float, name: str, pid: int, tasks: int) -> Sample:
    process = psutil.Process(pid)
    with process.oneshot():
        return Sample(
            at_s=at_s,
            name=name,
            pid=pid,
            rss_bytes=process.memory_info().rss,
            files=process.num_fds(),
            sockets=len(process.net_connections(kind="tcp")),
            threads=process.num_threads(),
            tasks=tasks,
        )


class Watch:
    """Samples of a whole run, also written to a file as they come.

    Args:
        running: the fleet.
        path: CSV, one row a sample.
    """

    def __init__(self, running: Fleet, path: Path) -> None:
        self.samples: list[Sample] = []
        self._fleet = running
        self._path = path
        self._begin_s = time.monotonic()

    async def run(self, *, every_s: float) -> None:
        """Look again and again; ends by cancellation."""
        with self._path.open("w") as file:
            rows = csv.DictWriter(file, [field.name for field in fields(Sample)])
            rows.writeheader()
            while True:
                found = await sample(self._fleet, begin_s=self._begin_s)
                self.samples += found
                rows.writerows(asdict(one) for one in found)
                file.flush()
                await asyncio.sleep(every_s)

    def of(self, name: str) -> list[Sample]:
        """One process's samples, in order."""
        return [one for one in self.samples if one.name == name]


def growth_bytes(samples: Sequence[Sample]) -> int:
    """Median memory of the last quarter less that of the second: warm-up is over by then. Negative: it shrank."""
    quarter = len(samples) // 4
    if not quarter:
        return 0
    early = statistics.median(one.rss_bytes for one in samples[quarter : 2 * quarter])
    late = statistics.median(one.rss_bytes for one in samples[-quarter:])
    return int(late - early)


def leaks(before: Iterable[Sample], after: Iterable[Sample], *, slack: int) -> list[str]:
    """What the processes hold more than they did, both times without any client; a sentence each.

    Args:
        before: idle, before the load.
        after: idle, after it.
        slack: descriptors, sockets, threads or tasks that do not count: pools that fill once.
    """
    first = {one.name: one for one in before}
    found: list[str] = []
    for late in after:
        early = first[late.name]
        for what in ("files", "sockets", "threads", "tasks"):
            was, now = getattr(early, what), getattr(late, what)
            cached = CACHED_FILES_MAX.get(late.name.partition("-")[0], 0) if what == "files" else 0
            if now > was + slack + cached:
                found.append(f"{late.name}: {now} {what}, {was} before the load")
    return found


async def settled(running: Fleet, before: Sequence[Sample], *, slack: int, within_s: float) -> list[str]:
    """`leaks` once nothing leaks any more, or what still does after `within_s`: connections end a little later."""
    found = ["nobody answered"]
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            while found:
                now = await sample(running)
                missing = {one.name for one in before} - {one.name for one in now}
                found = [f"{name} does not answer" for name in sorted(missing)] or leaks(before, now, slack=slack)
                await asyncio.sleep(0.2)
    return found
