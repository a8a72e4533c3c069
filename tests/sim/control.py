"""The control plane as one simulated process sees it: slow, sometimes away, sometimes with yesterday's map.

Promise: what `ControlPlane` promises and no more: an answer may be late, a compare-and-swap whose answer is lost may
have been done. Must not be done here: the truth (`support/memorycontrol.py`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

from fleetlm_common.control import ControlPlaneUnavailable, ShardEndpoint, View
from fleetlm_common.ids import Epoch
from fleetlm_common.ring import RingMap
from tests.support.memorycontrol import MemoryControlPlane


class Weather:
    """How the control plane is to whom; changed by the nemesis."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.away: dict[str, bool] = {}
        self.stale_s: dict[str, float] = {}
        self.lost_answers = 0.0

    def clear(self) -> None:
        """All is well again."""
        self.away.clear()
        self.stale_s.clear()
        self.lost_answers = 0.0


class SimControl:
    """`ControlPlane` of one machine."""

    def __init__(self, truth: MemoryControlPlane, machine: str, weather: Weather) -> None:
        self._truth = truth
        self._machine = machine
        self._weather = weather

    @property
    def trouble(self) -> str | None:
        """See `ControlPlane.trouble`."""
        return "the control plane does not answer" if self._weather.away.get(self._machine) else None

    async def close(self) -> None:
        """See `ControlPlane.close`."""

    async def _way(self) -> None:
        await asyncio.sleep(0.001 + self._weather.rng.random() * 0.004)
        if self._weather.away.get(self._machine):
            await asyncio.sleep(self._weather.rng.choice((0.0, 1.0, 3.0)))
            raise ControlPlaneUnavailable("the control plane does not answer")

    async def read(self) -> View:
        """See `ControlPlane.read`."""
        await self._way()
        view = await self._truth.read()
        await asyncio.sleep(0.001)
        return view

    async def watch(self) -> AsyncIterator[View]:
        """See `ControlPlane.watch`."""
        async for view in self._truth.watch():
            await asyncio.sleep(0.001 + self._weather.rng.random() * 0.02 + self._weather.stale_s.get(self._machine, 0))
            while self._weather.away.get(self._machine):  # noqa: ASYNC110  the weather has no events
                await asyncio.sleep(0.25)
            yield view

    async def announce(self, endpoint: ShardEndpoint) -> None:
        """See `ControlPlane.announce`."""
        await self._way()
        await self._truth.announce(endpoint)

    async def compare_and_swap(self, *, expected: Epoch | None, new: RingMap) -> None:
        """See `ControlPlane.compare_and_swap`."""
        await self._way()
        await self._truth.compare_and_swap(expected=expected, new=new)
        if self._weather.rng.random() < self._weather.lost_answers:
            raise ControlPlaneUnavailable("the answer was lost")

    async def report(self, sentence: str, *, reason: str = "", epoch: int = 0) -> None:
        """See `ControlPlane.report`."""
        await self._way()
        await self._truth.report(sentence, reason=reason, epoch=epoch)
