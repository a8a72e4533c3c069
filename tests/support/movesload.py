"""Writers and readers that follow slots from shard to shard, and a controller that carries a move to its end.

Place: over `movesrig.py`. Promise: each writer has one append in flight and retries it with its key until it is
acknowledged; the history that comes out is judged by `history.py`. Must not be done here: faults (tests have hooks).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final

from fleetlm_common.errors import FleetError
from fleetlm_common.ids import SessionId, Slot
from fleetlm_common.ring import Move
from fleetlm_common.slots import slot_of
from tests.support.eventually import eventually
from tests.support.history import Acked, Entry, History, canonical
from tests.support.movesrig import MovesRig
from tests.support.shardrig import SLOTS, Rig

ABORT_S: Final = 1.0
"""A controller waits 3 s; in one process without load much less is enough."""
AGAIN_S: Final = 0.005
NOT_THERE: Final = (FleetError, OSError, TimeoutError)

OnStep = Callable[[str], Awaitable[None]]


class Load:
    """Everybody who uses the ring."""

    def __init__(self, ring: MovesRig, sessions: list[str]) -> None:
        self.ring = ring
        self.sessions = sessions
        self.history = History(key_of=lambda content: str(json.loads(content)), gaps_allowed=False)
        self.stopping = False
        self.acked = 0

    def owner(self, session: str) -> Rig | None:
        """The shard that owns it, if it lives."""
        slot = slot_of(SessionId(session), SLOTS)
        return self.ring.rigs.get(self.ring.map.owner_of(Slot(slot)).owner)

    async def write(self, session: str) -> None:
        """Append, one after the other, until told to stop."""
        number, client, of = 0, None, None
        while not self.stopping:
            text = f"{session}/{number}"
            number += 1
            asked = self.history.invoke(session, session, [(text, text)])
            while True:
                rig = self.owner(session)
                with suppress(*NOT_THERE):
                    if client is not None and (of is not rig or client.lost.is_set()):
                        client = None
                    if client is None and rig is not None:
                        client, of = await rig.client(), rig
                    if client is not None:
                        [ack] = await client.append(session, text)
                        break
                await asyncio.sleep(AGAIN_S)
            self.history.ack(asked, [Acked(ack.seq, ack.id, ack.deduped)])
            self.acked += 1

    async def more(self, count: int) -> None:
        """Wait until so many more appends are acknowledged."""
        wanted = self.acked + count
        await eventually(lambda: self.acked >= wanted, f"{count} more appends are acknowledged", timeout_s=20)

    async def judge(self) -> None:
        """Read everything from the beginning, and fail with every broken promise."""
        for session in self.sessions:
            rig = self.owner(session)
            assert rig is not None
            async with await rig.client() as client:
                self.history.final(
                    session,
                    [
                        Entry(int(str(each["seq"])), str(each["id"]), canonical(each["content"]))
                        for each in await client.read_all(session)
                    ],
                )
        assert self.history.judge() == []


@asynccontextmanager
async def load(ring: MovesRig, sessions: list[str]) -> AsyncGenerator[Load]:
    """Writers, one a session; at the end they have finished what they asked, and it is judged."""
    made = Load(ring, sessions)
    tasks = [asyncio.ensure_future(made.write(session)) for session in sessions]
    try:
        yield made
        made.stopping = True
        await asyncio.wait_for(asyncio.gather(*tasks), 20)
        await made.judge()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _nothing(_: str) -> None:
    """No fault at this step."""


async def carry(ring: MovesRig, slots: list[int], source: int, target: int, on_step: OnStep = _nothing) -> Move:
    """What a controller does until the slots are there; `on_step` hears of each step after it is in the map."""
    while True:
        move = await ring.begin(slots, source, target, acted=False)
        await on_step("Copying")
        await ring.says(move, "Ready", timeout_s=20)
        await on_step("Ready")
        await ring.seal(move, acted=False)
        await on_step("Sealing")
        with suppress(AssertionError):
            await ring.says(move, "Confirmed", timeout_s=ABORT_S)
            await on_step("Confirmed")
            await ring.commit(move, acted=False)
            await on_step("Committed")
            return move
        await ring.abort(move, acted=False)
        await on_step("Aborted")
