"""Asks shards how they are: `/health/ready` at each pod's operations port, which knows more than a pod's condition.

Promise: an observation waits at most WORDS_S for all of them together; a shard that does not answer says nothing, and
nothing is decided by that: words explain (conditions), they move no pod. Must not be done here: judging (`verdict.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType
from typing import Final

import aiohttp
import msgspec

from fleetlm_common.kubenames import SHARD_OPS_PORT
from fleetlm_operator.observed import Pod, ShardWord

WORDS_S: Final = 1.0
"""Longest wait for all words of a ring: one that answers does so in milliseconds, one that is gone never does."""
ASKED_MAX: Final = 16
"""Shards asked at once; a ring has at most a hundred."""
WORD_BYTES_MAX: Final = 4096
"""A reason and a sentence; what is longer is no word of a shard."""


class ShardWords:
    """The connections to shards; a context manager that closes them."""

    def __init__(self) -> None:
        limits = aiohttp.ClientTimeout(total=WORDS_S)
        self._session = aiohttp.ClientSession(timeout=limits, connector=aiohttp.TCPConnector(limit=ASKED_MAX))

    async def __aenter__(self) -> ShardWords:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def ask(self, pods: Mapping[int, Pod]) -> dict[int, ShardWord]:
        """What shards say, by ordinal, as far as they do. Cancel-safe."""
        said: dict[int, ShardWord] = {}

        async def hear(number: int, address: str) -> None:
            word = await self._word(address)
            if word is not None:
                said[number] = word

        reachable = {number: pod.status.pod_ip for number, pod in pods.items() if pod.status.pod_ip}
        try:
            async with asyncio.timeout(WORDS_S), asyncio.TaskGroup() as tasks:
                for number, address in reachable.items():
                    tasks.create_task(hear(number, address))
        except TimeoutError:
            pass  # those that answered in time are in `said`
        return dict(sorted(said.items()))

    async def _word(self, address: str) -> ShardWord | None:
        host = f"[{address}]" if ":" in address else address
        try:
            url = f"http://{host}:{SHARD_OPS_PORT}/health/ready"
            # No redirects: a pod that was taken over must not lead the operator elsewhere.
            async with self._session.get(url, allow_redirects=False) as answer:
                return msgspec.json.decode(await answer.content.read(WORD_BYTES_MAX), type=ShardWord)
        except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError):
            return None
