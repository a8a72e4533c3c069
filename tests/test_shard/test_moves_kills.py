"""A move under load whose source or target dies at any step, or at any of its disk operations (docs/moves.md)."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from tests.support.faults import Op, SimCrash
from tests.support.movesload import carry, load
from tests.support.movesrig import MovesRig, moves_rig, session_in
from tests.support.simdisk import NOTHING_KEPT, Loss

SLOTS = [2, 3]
SESSIONS = [session_in(2), session_in(3), session_in(3, number=1), session_in(6)]
STEPS = ["Copying", "Ready", "Sealing", "Confirmed", "Committed"]


async def test_moves_under_load() -> None:
    """There and back and there again: nothing is lost, doubled, reordered or missing."""
    async with moves_rig() as ring, load(ring, SESSIONS) as running:
        for number in range(4):
            await carry(ring, SLOTS, number % 2, 1 - number % 2)
            await running.more(40)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("victims", [(0,), (1,), (0, 1)], ids=["source", "target", "both"])
async def test_whoever_dies_at_a_step(step: str, victims: tuple[int, ...]) -> None:
    """Power is lost right after each step; the move ends all the same, and the history is clean."""
    done: list[str] = []

    async with moves_rig() as ring, load(ring, SESSIONS) as running:

        async def on_step(name: str) -> None:
            if name == step and not done:
                done.append(name)
                for number in victims:
                    await ring.kill(number, loss=NOTHING_KEPT)
                for number in victims:
                    await ring.start(number)

        await running.more(20)
        await carry(ring, SLOTS, 0, 1, on_step)
        await running.more(20)
    assert done


@dataclass
class Death:
    """Kills a shard at one of its disk operations during a move."""

    ring: MovesRig
    number: int
    at_op: int
    loss: Loss | None
    ops: int = 0
    happened: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, op: Op) -> None:
        """Count; at the chosen one the process dies."""
        self.ops += 1
        if self.ops == self.at_op:
            self.happened.set()
            raise SimCrash(f"killed before {op.name} {op.path}")

    async def resurrect(self) -> None:
        """Boot it again when it has died."""
        await self.happened.wait()
        await self.ring.restart(self.number, loss=self.loss)


async def dies_at(number: int, at_op: int, loss: Loss | None) -> bool:
    """A whole move with one death in it; whether it came to it."""
    async with moves_rig() as ring, load(ring, SESSIONS[:3]) as running:
        await running.more(10)
        death = Death(ring, number, at_op, loss)
        waiting = asyncio.ensure_future(death.resurrect())
        ring.volumes[ring.names[number]].hooks.append(death)
        await carry(ring, SLOTS, 0, 1)
        ring.volumes[ring.names[number]].hooks.remove(death)
        if death.happened.is_set():
            await waiting
        else:
            waiting.cancel()
        await running.more(10)
        return death.happened.is_set()


@pytest.mark.parametrize("number", [0, 1], ids=["source", "target"])
@pytest.mark.parametrize("loss", [None, NOTHING_KEPT], ids=["kill", "power"])
async def test_whoever_dies_at_a_disk_operation(number: int, loss: Loss | None) -> None:
    """Before each write, sync, look or listing of a move, some of them in each run."""
    reached = 0
    for at_op in range(1, 60, 7):
        reached += await dies_at(number, at_op, loss)
    assert reached >= 4
