"""The control plane: the truth of a run, and how one simulated process sees it: slow, away, with yesterday's map.

Promise: what `ControlPlane` promises and no more: an answer may be late, a compare-and-swap whose answer is lost may
have been done. The truth writes down each step of each move, and notices an owner that changed without a sealed move.
Must not be done here: how a control plane works (`support/memorycontrol.py`).
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Literal

from fleetlm_common.control import ControlPlaneUnavailable, RingSpec, ShardEndpoint, View
from fleetlm_common.ids import Epoch, ShardName
from fleetlm_common.ring import Move, RingMap
from tests.sim.loop import SimLoop
from tests.sim.trace import Trace
from tests.support.memorycontrol import MemoryControlPlane

Step = Literal["begun", "sealed", "committed", "aborted"]
STEPS: tuple[Step, ...] = ("begun", "sealed", "committed", "aborted")


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


class Truth(MemoryControlPlane):
    """What is there, whoever sees it.

    Args:
        spec: the ring.
        loop: of the run.
        trace: of the run.

    Attributes:
        steps: how many of each there were.
    """

    def __init__(self, spec: RingSpec, loop: SimLoop, trace: Trace) -> None:
        super().__init__(spec)
        self._loop = loop
        self._trace = trace
        self._waiting: list[tuple[Step, asyncio.Future[Move]]] = []
        self.steps = Counter[Step]()

    async def compare_and_swap(self, *, expected: Epoch | None, new: RingMap) -> None:
        """See `ControlPlane.compare_and_swap`."""
        before = self.view.map
        await super().compare_and_swap(expected=expected, new=new)
        if before is not None:
            self._judge(before, new)
            self._note(before, new)

    def forget(self, shard: ShardName) -> None:
        """What `up` does when a shard has left: nobody goes by its last words any more."""
        shards = {name: said for name, said in self.view.shards.items() if name != shard}
        self._show(View(self.view.spec, self.view.map, shards))

    async def seen(self, step: Step) -> Move:
        """Wait for the next step of that kind; returns its move as it was before it ended."""
        future: asyncio.Future[Move] = self._loop.create_future()
        self._waiting.append((step, future))
        return await future

    def _judge(self, before: RingMap, new: RingMap) -> None:
        """An owner changes by a move that was sealed in the map before, to its target, and in no other way."""
        sealed = {slot: move for move in before.moves if move.state == "Sealing" for slot in move.slots}
        for slot, (old, now) in enumerate(zip(before.owners(), new.owners(), strict=True)):
            if old.owner != now.owner:
                move = next((move for at, move in sealed.items() if at == slot), None)
                if move is None or (move.target, move.id) != (now.owner, now.via):
                    self._loop.faults.append(f"epoch {new.epoch} gives slot {slot} to {now.owner}: nobody sealed it")

    def _note(self, before: RingMap, new: RingMap) -> None:
        old, now, owners = {move.id: move for move in before.moves}, {move.id: move for move in new.moves}, new.owners()
        for ident, move in now.items():
            if ident not in old:
                self._step("begun", move, new.epoch)
            elif move.state != old[ident].state:
                self._step("sealed", move, new.epoch)
        for ident, move in old.items():
            if ident not in now:
                committed = owners[move.slots[0]].via == ident
                self._step("committed" if committed else "aborted", move, new.epoch)

    def _step(self, step: Step, move: Move, epoch: int) -> None:
        self.steps[step] += 1
        slots = ",".join(map(str, move.slots))
        self._trace.add("map", step, f"{move.id} {move.source} to {move.target}, slots {slots}, epoch {epoch}")
        woken = [future for wanted, future in self._waiting if wanted == step]
        self._waiting = [(wanted, future) for wanted, future in self._waiting if wanted != step]
        for future in woken:
            if not future.done():
                future.set_result(move)


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
