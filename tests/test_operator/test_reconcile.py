"""Liveness of the loop: what counts as stuck, and what does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

from kubernetes.aio.client.configuration import Configuration
from prometheus_client import CollectorRegistry

from fleetlm_common.kubeapi import ApiUnavailable, KubeApi
from fleetlm_common.logs import NullLogger
from fleetlm_operator.kubemetrics import KubeMetrics
from fleetlm_operator.kubeworld import KubeWorld
from fleetlm_operator.observed import Observed
from fleetlm_operator.reconcile import STUCK_S, Reconciler
from fleetlm_operator.shardwords import ShardWords
from tests.support.eventually import eventually
from tests.test_operator.modelcluster import DEFAULTS, START


class HandClock:
    """A clock that a test turns on."""

    def __init__(self) -> None:
        self.s = 0.0

    def now_ms(self) -> int:
        return int(self.s * 1e3)

    def now_us(self) -> int:
        return int(self.s * 1e6)

    def monotonic_s(self) -> float:
        return self.s


class World(KubeWorld):
    """Rings whose API server is away, but for one, where what is called never comes back and lets nobody cancel it."""

    def __init__(self, api: KubeApi, words: ShardWords) -> None:
        super().__init__(api, now=lambda: START, new_credential=lambda: "", words=words, log=NullLogger())
        self.looks: list[str] = []
        self.released = asyncio.Event()

    def looked(self, times: int) -> bool:
        """Whether there were as many looks, at whatever ring."""
        return len(self.looks) >= times

    async def observe_orphan(self, namespace: str, name: str) -> Observed | None:
        """No ring that is gone has left anything."""
        del namespace, name
        return None

    async def observe(self, namespace: str, name: str) -> Observed | None:
        """Never an observation."""
        self.looks.append(name)
        if name == "gone":
            return None
        if name == "hanging":
            await self.released.wait()
        raise ApiUnavailable(f"{namespace}/{name}: away")


@asynccontextmanager
async def reconciling(clock: HandClock) -> AsyncGenerator[tuple[Reconciler, World]]:
    """The loop of a leader, over that world."""
    api = KubeApi(Configuration(), agent="test")
    async with ShardWords() as words:
        world = World(api, words)
        metrics = KubeMetrics(CollectorRegistry())
        reconciler = Reconciler(
            api, world, defaults=DEFAULTS, clock=clock, now=lambda: START, log=NullLogger(), metrics=metrics
        )
        running = asyncio.create_task(reconciler.run())
        try:
            yield reconciler, world
        finally:
            world.released.set()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await api.close()


async def test_a_step_that_does_not_end_is_said() -> None:
    """Also while the steps of other rings end."""
    clock = HandClock()
    async with reconciling(clock) as (reconciler, world):
        reconciler.hint("chat", "hanging")
        await eventually(lambda: "hanging" in world.looks, "a look at the ring")
        clock.s += STUCK_S - 1
        assert reconciler.live().ok
        clock.s += 2
        reconciler.hint("chat", "other")
        await eventually(lambda: "other" in world.looks, "a look at the other ring")
        health = reconciler.live()
        assert (health.ok, health.reason) == (False, "Stuck")
        assert "chat/hanging" in health.message


async def test_an_api_server_that_is_away_is_no_reason_to_begin_anew() -> None:
    """Steps fail and end; a process that began anew would do no better."""
    clock = HandClock()
    async with reconciling(clock) as (reconciler, world):
        for looks in range(1, 4):
            clock.s += STUCK_S - 1
            reconciler.hint("chat", "demo")
            await eventually(partial(world.looked, looks), "another look")
            assert reconciler.live().ok


async def test_a_ring_that_is_the_first_after_long_is_no_alarm() -> None:
    """Without rings there are no steps, and nobody misses them."""
    clock = HandClock()
    async with reconciling(clock) as (reconciler, world):
        reconciler.hint("chat", "gone")
        await eventually(lambda: "gone" in world.looks, "a look")
        clock.s += 100 * STUCK_S
        assert reconciler.live().ok
        reconciler.hint("chat", "demo")
        assert reconciler.live().ok
