"""SIGKILL at random moments while something is done to a ring: source and target of its moves, operator, gateways.

    kills: list[Kill] = []
    async with under_fire(ring, chance, kills):
        await scaled(ring, 5)

Promise: real signals to containers' processes, behind Kubernetes' back, as drawn from `chance`; at the end of the block
whoever was killed is back, in its pod or in another one, or has left the ring. `kills` says who died when.
Must not be done here: what is done to the ring; judging.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, Literal

from tests.e2e.install import OPERATOR_NAMESPACE
from tests.e2e.kubectl import CommandError, Json, get, listed, until
from tests.e2e.rings import Ring, going, pod_ready, restarts, signal_container

Role = Literal["source", "target", "shard", "operator", "gateway"]

KILLS_MAX: Final = 6
"""In one block: one that is killed without end makes no way, and every restart takes some seconds."""
GAP_S_MAX: Final = 4.0
"""Between a kill that is healed and the next one."""
MOVE_SEEN_S: Final = 4.0
"""So long a move is waited for; then any shard will do."""
LOOK_S: Final = 0.1
BACK_S_MAX: Final = 120.0
LEASE: Final = "fleetlm-operator"
AIMS: Final[tuple[Role, ...]] = ("source", "target", "source", "target", "operator", "gateway")
"""Half as often as a party of a move: the one who leads, a gateway."""


@dataclass(frozen=True, slots=True)
class Kill:
    """One, by `time.monotonic()`."""

    role: Role
    pod: str
    at_s: float


@asynccontextmanager
async def under_fire(ring: Ring, chance: random.Random, kills: list[Kill]) -> AsyncGenerator[None]:
    """See the module."""
    over = asyncio.Event()
    # Never cancelled: a kill that was not counted would look like a container that ended by itself.
    firing = asyncio.create_task(_Fire(ring, chance, kills, over).go_on())
    try:
        yield
    finally:
        over.set()
        await firing


class _Fire:
    """The one who shoots."""

    def __init__(self, ring: Ring, chance: random.Random, kills: list[Kill], over: asyncio.Event) -> None:
        self._ring = ring
        self._chance = chance
        self._kills = kills
        self._over = over

    async def go_on(self) -> None:
        """Until the block is over or the kills are spent."""
        for _ in range(KILLS_MAX):
            if await self._is_over_within(self._chance.uniform(0, GAP_S_MAX)):
                return
            role, pod = await self._victim(self._chance.choice(AIMS))
            if pod is None:
                continue
            with suppress(CommandError, KeyError, IndexError):  # it has just ended, or was never there
                await signal_container(pod)
                self._kills.append(Kill(role, pod["metadata"]["name"], time.monotonic()))
                await _back(pod)

    async def _is_over_within(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._over.wait()
        return self._over.is_set()

    async def _victim(self, aim: Role) -> tuple[Role, Json | None]:
        """A pod for the aim; where no move is seen, any shard."""
        if aim == "operator":
            return aim, await _leader()
        if aim in {"source", "target"}:
            shard = await self._party(aim)
            if shard is not None:
                return aim, await _pod(self._ring.namespace, f"{self._ring.name}-{shard}")
            aim = "shard"
        pods = await self._ring.pods("gateway" if aim == "gateway" else "shard")
        return aim, self._chance.choice(pods) if pods else None

    async def _party(self, side: Role) -> str | None:
        """The source or target of a move that the RingMap shows in flight."""
        end_s = time.monotonic() + MOVE_SEEN_S
        while time.monotonic() < end_s:
            with suppress(CommandError):
                moves = (await self._ring.map()).get("moves", [])
                if moves:
                    return str(self._chance.choice(moves)[side])
            if await self._is_over_within(LOOK_S):
                return None
        return None


async def _pod(namespace: str, name: str) -> Json | None:
    with suppress(CommandError):
        return await get(namespace, "pod", name)
    return None


async def _leader() -> Json | None:
    """The operator's pod that holds the Lease."""
    with suppress(CommandError):
        lease = await get(OPERATOR_NAMESPACE, "lease", LEASE)
        return await _pod(OPERATOR_NAMESPACE, str(lease["spec"].get("holderIdentity")))
    return None


async def _back(pod: Json) -> None:
    """Its container runs again and is ready; or its pod is gone, and whatever followed it is ready."""
    namespace, name = pod["metadata"]["namespace"], pod["metadata"]["name"]

    async def holds() -> bool:
        for now in await listed(namespace, "pods"):
            if now["metadata"]["name"] != name:
                continue
            same = now["metadata"]["uid"] == pod["metadata"]["uid"]
            return going(now) or (pod_ready(now) and (not same or restarts(now) > restarts(pod)))
        return True

    await until(f"{name} is back", holds, timeout_s=BACK_S_MAX)
