"""Slots move under load, with and without SIGKILL at random steps; then the judgement.

    python -m tests.integration.moves --repeat 10 [--kills] [--only scale,mind] [--seed N]

A whole `fleetlm up` under the load of `tests/support/load.py` while people scale it, change their mind, pin slots and
restart shards; with `--kills` shards (also those that a move names), gateways and the controller are killed meanwhile.

Promise: any broken promise, and any operation that does not end, ends with status 1 and the facts. How long appends
took is printed for each run: the longest one is what a client saw of the moves.
Must not be done here: judging (`tests/support/history.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec

from fleetlm_cli import upfile
from fleetlm_cli.asking import ask, has_members, is_steady, owns_nothing
from fleetlm_cli.exits import Failure
from fleetlm_common.control import ControlPlaneUnavailable, Pin, RingSpec, View
from fleetlm_common.filecontrol import FileControlPlane, Status, read_status
from fleetlm_common.ids import ShardName, Slot
from fleetlm_common.ring import RingMap
from tests.integration.kills import Plan
from tests.support.eventually import poll
from tests.support.faultload import FaultRun, under_load
from tests.support.load import Report, append_ms

OPERATION_S_MAX: Final = 150.0
"""An operation ends within it, kills and a busy machine included."""
POLL_S: Final = 0.05
SEEN_POLL_S: Final = 0.005
"""A sealed move lasts some tenths of a second."""
MoveState = Literal["Copying", "Sealing"]
MOVE_STATES: Final[tuple[MoveState, ...]] = ("Copying", "Sealing")


@dataclass(slots=True)
class Outcome:
    """One run: the report, how many moves were committed."""

    report: Report
    epoch: int = 0

    def figures(self) -> str:
        """One line."""
        appends = {"append_ms": append_ms(self.report.took_s), "epoch": self.epoch}
        return json.dumps({**json.loads(self.report.as_json()), **appends})


class Mover:
    """People at the ring of a run.

    Args:
        run: the run.
        kills: whether processes are killed while an operation is under way.
    """

    def __init__(self, run: FaultRun, *, kills: bool) -> None:
        self.run = run
        self._kills = kills
        self._control = FileControlPlane(run.fleet.data / "control")

    async def scale(self, count: int, *, wait: bool = True) -> None:
        """Ask for another number of shards."""
        self.ask(lambda spec: msgspec.structs.replace(spec, shards=count))
        if not wait:
            return

        def done(view: View, status: Status | None) -> bool:
            found = upfile.read(self.run.fleet.data)
            running = {process.name for process in found.processes if process.kind == "shard"} if found else set[str]()
            names = {f"shard-{ordinal}" for ordinal in range(count)}
            return running == names and has_members(view, count) and is_steady(view, status)

        await self.until(done, f"{count} shards")

    async def pin(self, pins: tuple[Pin, ...]) -> None:
        """Want slots somewhere."""
        self.ask(lambda spec: msgspec.structs.replace(spec, pins=pins))

        def done(view: View, status: Status | None) -> bool:
            return view.map is not None and is_steady(view, status) and are_where_wanted(view.map, pins)

        await self.until(done, f"{pins}")

    async def empty(self, shard: str | None) -> None:
        """Cordon a shard, or none."""
        self.ask(lambda spec: msgspec.structs.replace(spec, cordoned=() if shard is None else (ShardName(shard),)))

        def done(view: View, status: Status | None) -> bool:
            return is_steady(view, status) if shard is None else owns_nothing(view, ShardName(shard))

        await self.until(done, f"{shard} is empty")

    async def crash(self, pins: tuple[Pin, ...], state: MoveState) -> bool:
        """Want slots somewhere, kill everything once a move is in `state`, start it again, and wait for the slots.

        Returns:
            Whether a move was in `state` when all were dead.
        """
        self.ask(lambda spec: msgspec.structs.replace(spec, pins=pins))
        seen = await self._seen(pins, state)
        if seen:
            await self.run.fleet.kill_all()
            self.run.report.killed["everything"] += 1
            # Nobody is left who could change it.
            ring = (await self._control.read()).map
            seen = ring is not None and any(move.state == state for move in ring.moves)
            await self.run.fleet.start_again()
        await self.pin(pins)
        return seen

    async def _seen(self, pins: tuple[Pin, ...], state: MoveState) -> bool:
        """Wait until a move is in `state`; False if the slots have moved and none was seen in it."""
        async with asyncio.timeout(OPERATION_S_MAX):
            while True:
                with suppress(ControlPlaneUnavailable):
                    ring = (await self._control.read()).map
                    if ring is not None and any(move.state == state for move in ring.moves):
                        return True
                    if ring is not None and are_where_wanted(ring, pins):
                        return False
                await asyncio.sleep(SEEN_POLL_S)

    async def view(self) -> View:
        """What the files say now."""
        return await self._control.read()

    def ask(self, change: Callable[[RingSpec], RingSpec]) -> None:
        """Want something else."""
        ask(self.run.fleet.data, change)

    async def until(self, holds: Callable[[View, Status | None], bool], what: str) -> None:
        """Wait for the ring; under fire if that is asked for."""
        fire = asyncio.create_task(self._fire()) if self._kills else None
        try:
            async with asyncio.timeout(OPERATION_S_MAX):
                while True:
                    with suppress(ControlPlaneUnavailable, Failure):
                        status = await asyncio.to_thread(read_status, self.run.fleet.data / "control")
                        if holds(await self._control.read(), status):
                            return
                    if fire is not None and fire.done():
                        fire.result()
                        fire = asyncio.create_task(self._fire())
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            said = read_status(self.run.fleet.data / "control")
            raise AssertionError(
                f"not within {OPERATION_S_MAX:g} s: {what}; the controller says {said}\n{self.run.evidence()}"
            ) from error
        finally:
            if fire is not None:
                await self._ceased(fire)

    async def _ceased(self, fire: asyncio.Task[None]) -> None:
        """Whoever was killed must come back: `up` gives up on one that dies again and again."""
        with suppress(Exception):
            await fire

    async def _fire(self) -> None:
        """One kill after a random while: mostly of who takes part in a move."""
        chance = self.run.random
        await asyncio.sleep(chance.uniform(0, 2.0))
        names = self.run.fleet.names
        with suppress(ControlPlaneUnavailable):
            view = await self._control.read()
            moves = () if view.map is None else view.map.moves
            parties = [str(name) for move in moves for name in (move.source, move.target) if name in names]
            names = parties if parties and chance.random() < 0.6 else names
        name = chance.choice(names)
        with suppress(ProcessLookupError, KeyError):
            self.run.fleet.kill(name)
            self.run.report.killed[name.partition("-")[0]] += 1
            await self._back(name)

    async def _back(self, name: str) -> None:
        """Wait until it is ready again, or gone for good because it has left the ring."""
        waiting = asyncio.create_task(self.run.fleet.wait_ready(name))
        try:
            await poll(lambda: waiting.done() or name not in self.run.fleet.names, every_s=POLL_S)
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)


def are_where_wanted(ring: RingMap, pins: tuple[Pin, ...]) -> bool:
    """Whether each pinned slot is owned by its shard."""
    owners = [found.owner for found in ring.owners()]
    return all(owners[slot] == pin.shard for pin in pins for slot in range(pin.first, pin.last + 1))


Operation = Callable[[Mover], Awaitable[None]]


async def scale(mover: Mover) -> None:
    """3 → 5 → 2."""
    await mover.scale(5)
    await mover.run.progress()
    await mover.scale(2)
    await mover.run.progress()


async def mind(mover: Mover) -> None:
    """Up, then down before it ended, then up again before that ended."""
    chance = mover.run.random
    for count in (5, 2, 4, 1):
        await mover.scale(count, wait=False)
        await asyncio.sleep(chance.uniform(0, 3.0))
    await mover.scale(3)
    await mover.run.progress()


async def pin(mover: Mover) -> None:
    """Slots by hand, there and back."""
    last = mover.run.random.randrange(1, 16)
    for shard in ("shard-2", "shard-0"):
        await mover.pin((Pin(Slot(0), Slot(last), ShardName(shard)),))
    await mover.pin(())
    await mover.run.progress()


async def handover(mover: Mover) -> None:
    """Each shard is emptied and restarted; the next one's slots go to it."""
    for name in ("shard-0", "shard-1", "shard-2"):
        await mover.empty(name)
        mover.run.fleet.kill(name, signal.SIGTERM)
        await mover.run.fleet.wait_ready(name)
    await mover.empty(None)
    await mover.run.progress()


async def inplace(mover: Mover) -> None:
    """Each shard is restarted with its slots, beside `handover` for comparison: SIGTERM, no move."""
    for name in ("shard-0", "shard-1", "shard-2"):
        mover.run.fleet.kill(name, signal.SIGTERM)
        await mover.run.fleet.wait_ready(name)
    await mover.run.progress()


async def crash(mover: Mover) -> None:
    """Everything dies at once in mid-move, while it copies and while it is sealed; started again, the move ends."""
    shards = itertools.cycle(("shard-2", "shard-0"))
    for state in MOVE_STATES:
        hit = False
        while not hit:
            hit = await mover.crash((Pin(Slot(0), Slot(15), ShardName(next(shards))),), state)
            await mover.run.progress()


OPERATIONS: Final[dict[str, Operation]] = {
    "scale": scale,
    "mind": mind,
    "pin": pin,
    "handover": handover,
    "inplace": inplace,
    "crash": crash,
}


async def moves_run(folder: Path, operation: Operation, *, kills: bool, seed: int, archive: str = "none") -> Outcome:
    """One operation under load in a folder of its own; with an archive that one is killed, too."""
    plan = Plan(kills=0, seed=seed, shards=3, gateways=2, sessions=8, writers=6, readers=4, write_pause_s=0.02)
    outcome = Outcome(Report(plan))

    async def script(run: FaultRun) -> None:
        mover = Mover(run, kills=kills)
        await operation(mover)
        found = (await mover.view()).map
        outcome.epoch = 0 if found is None else found.epoch

    outcome.report = await under_load(folder, script, plan=plan, archive=archive)
    return outcome


def main() -> int:
    """By hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--kills", action="store_true", help="SIGKILL at random steps as well")
    parser.add_argument("--only", default=",".join(OPERATIONS), help="operations, by commas")
    parser.add_argument("--seed", type=int, default=None, help="of the first run; random when not given")
    given = parser.parse_args()
    first = random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed
    broken = 0
    for seed in range(first, first + given.repeat):
        for name in given.only.split(","):
            folder = Path(tempfile.mkdtemp(prefix=f"fleetlm-moves-{name}-{seed}-"))
            sys.stderr.write(f"{name}, seed {seed}, folder {folder}\n")
            outcome = asyncio.run(moves_run(folder, OPERATIONS[name], kills=given.kills, seed=seed))
            sys.stdout.write(f"{name} {outcome.figures()}\n")
            sys.stdout.flush()
            broken += bool(outcome.report.violations)
            for violation in outcome.report.violations[:20]:
                sys.stdout.write(f"  {violation.kind} {violation.session}: {violation.text}\n")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
