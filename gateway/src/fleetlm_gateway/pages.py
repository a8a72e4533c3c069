"""Pages for readers that catch up: so many at once per shard, in the order in which they were asked for.

Promise: each wanted page is answered once: `arrived`, or `failed`. A shard that does not answer holds up only readers
of its own sessions. Memory for pages is bounded: `PAGES_PER_SHARD_MAX` times `PAGE_BYTES_MAX` for each shard.
Must not be done here: what readers make of a page (`streams.py`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Final, Protocol

from fleetlm_common import rpc
from fleetlm_common.errors import FleetError, TryAgain
from fleetlm_common.ids import SessionId
from fleetlm_common.limits import REPLAY_LIMIT_MAX
from fleetlm_gateway.exchanges import READ
from fleetlm_gateway.router import Router

PAGES_PER_SHARD_MAX: Final = 8
"""Pages read at once from one shard: enough to keep it busy, few enough that appends beside them stay quick."""


class Wanting(Protocol):
    """Who wants a page."""

    session: SessionId

    def wanted(self, after: int) -> bool:
        """Whether anybody still waits for the page after `after`."""
        ...

    def arrived(self, after: int, page: rpc.Page) -> None:
        """The page is here."""
        ...

    def failed(self, after: int, error: FleetError) -> None:
        """It is not; a `TryAgain` may be asked for again."""
        ...


class Pages:
    """The queue of wanted pages.

    Args:
        router: asks for them.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self._loop = asyncio.get_running_loop()
        self._queues: dict[str, deque[tuple[Wanting, int]]] = {}
        self._active: dict[str, int] = {}
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._count_ok = router.metrics.catch_up_pages.labels("ok").inc

    @property
    def active(self) -> int:
        """Pages being read now."""
        return len(self._tasks)

    def want(self, stream: Wanting, after: int) -> None:
        """Read the page after `after` when it is its turn."""
        try:
            shard = self._router.owner(stream.session)
        except TryAgain:
            shard = ""
        self._queues.setdefault(shard, deque()).append((stream, after))
        self._start(shard)

    def stop(self) -> None:
        """Give up everything."""
        self._queues.clear()
        for task in self._tasks:
            task.cancel()

    def _start(self, shard: str) -> None:
        queue = self._queues.get(shard)
        while queue and self._active.get(shard, 0) < PAGES_PER_SHARD_MAX:
            stream, after = queue.popleft()
            if not stream.wanted(after):
                continue
            self._active[shard] = self._active.get(shard, 0) + 1
            task = self._loop.create_task(self._read(shard, stream, after))
            self._tasks[task] = None
            task.add_done_callback(self._tasks.pop)
        if not queue:
            self._queues.pop(shard, None)

    async def _read(self, shard: str, stream: Wanting, after: int) -> None:
        session = stream.session

        def ask(epoch: int) -> rpc.Read:
            return rpc.Read(epoch, session, REPLAY_LIMIT_MAX, after=after)

        try:
            page = await self._router.request(READ, session, ask)
        except FleetError as error:
            self._router.metrics.catch_up_pages.labels(error.code).inc()
            stream.failed(after, error)
        else:
            self._count_ok()
            stream.arrived(after, page)
        finally:
            self._active[shard] -= 1
            if not self._active[shard]:
                del self._active[shard]
            self._start(shard)
