"""The sessions of the whole ring in the order of their ids, merged from every shard's pages.

Promise: no id is skipped: a shard's page ends where it ends (it is bounded in bytes), and is followed by the next one
before anything behind it is taken from other shards; only an empty page is a shard's end. One deadline for all of it.
Memory: a page of each shard and the answer.
Must not be done here: filters (they need an index that does not exist yet).
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Iterable

from fleetlm_common import rpc
from fleetlm_common.limits import REPLAY_LIMIT_MAX, REQUEST_DEADLINE_S
from fleetlm_gateway.exchanges import LIST
from fleetlm_gateway.router import Router


class _Merge:
    """Pages of all shards on the way into one list."""

    def __init__(self, router: Router, *, limit: int, deadline_s: float) -> None:
        self._router = router
        self._limit = limit
        self._deadline_s = deadline_s
        self._pages: dict[str, deque[tuple[str, rpc.InfoOk]]] = {}
        self._heads: list[tuple[bytes, str]] = []

    async def run(self, after: str) -> list[tuple[str, rpc.InfoOk]]:
        """Up to `limit` sessions after `after`."""
        found: dict[str, rpc.InfoOk] = {}
        await self._fill(self._router.members, after)
        while self._heads and len(found) < self._limit:
            _, shard = heapq.heappop(self._heads)
            session, info = self._pages[shard].popleft()
            known = found.get(session)
            # Two shards name it while its slot moves: the one that knows more is the owner, or becomes it.
            if known is None or (info.epoch, info.last_seq) > (known.epoch, known.last_seq):
                found[session] = info
            if self._pages[shard]:
                self._push_head(shard)
            elif len(found) < self._limit:
                await self._fill([shard], session)
        return list(found.items())

    async def _fill(self, shards: Iterable[str], after: str) -> None:
        names = list(shards)
        request = rpc.encode(rpc.List(after, min(self._limit, REPLAY_LIMIT_MAX)))
        tasks = [asyncio.ensure_future(self._page(shard, request)) for shard in names]
        try:
            pages = await asyncio.gather(*tasks)
        finally:
            # The first refusal is the answer: nobody waits for the others.
            for task in tasks:
                task.cancel()
        for shard, page in zip(names, pages, strict=True):
            self._pages[shard] = deque(page)
            if self._pages[shard]:
                self._push_head(shard)

    async def _page(self, shard: str, request: bytes) -> list[tuple[str, rpc.InfoOk]]:
        listed = await self._router.request_shard(LIST, shard, request, deadline_s=self._deadline_s)
        return listed.sessions

    def _push_head(self, shard: str) -> None:
        heapq.heappush(self._heads, (self._pages[shard][0][0].encode(), shard))


async def merged(router: Router, *, after: str, limit: int) -> list[tuple[str, rpc.InfoOk]]:
    """Sessions of every shard, ascending by the bytes of their ids.

    Args:
        router: asks the shards.
        after: the id before the first ("" for the first of all).
        limit: at most so many.

    Raises:
        FleetError: a shard did not answer in time, or refused.
    """
    deadline_s = asyncio.get_running_loop().time() + REQUEST_DEADLINE_S
    return await _Merge(router, limit=limit, deadline_s=deadline_s).run(after)
