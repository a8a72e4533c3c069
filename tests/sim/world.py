"""One run: a world is made of a seed, lives through its faults, is healed, read to its end, and judged.

    make ─► faults and load ─► faults end ─► load ends, everything must settle ─► read from 0 ─► judge

Promise: `run_seed(n)` is a function of `n` and the code. Must not be done here: faults (`nemesis.py`), rules of the
judgement (`support/history.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import random
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Literal

from fleetlm_client.events import CaughtUp, Gap, Message
from fleetlm_common.control import RingSpec
from fleetlm_common.errors import FleetError
from tests.sim.client import SimClient
from tests.sim.control import STEPS, Truth, Weather
from tests.sim.crowd import CROWDED, Crowd
from tests.sim.loop import SimLoop, SimProcess, Stuck
from tests.sim.nemesis import Nemesis
from tests.sim.network import Network
from tests.sim.nodes import ControllerNode, GatewayNode, Node, ShardNode
from tests.sim.people import People
from tests.sim.rest import RESTING, Rest
from tests.sim.rest import SETTINGS as REST_SETTINGS
from tests.sim.trace import Trace
from tests.sim.wire import Watch
from tests.sim.workload import SETTINGS, ClientNode
from tests.support.history import Entry, History, Violation, canonical

HEAL_S = 90.0
"""Simulated seconds after the faults in which every process must serve again: a takeover of a silent owner's volume
takes 10 s, a half-open connection is noticed after at most 60 s."""
PROMPT_S = 5.0
"""Seconds in which whatever still waits when all is well must be answered: longer than a backoff (1 s) and a dial (3 s)
shorter than the deadlines (10 s in gateways, 20 s in the SDK) that would hide a waiter whom everybody forgot."""
FULL_S = 5.0
"""A shard whose disk was full says how long to stay away."""
BRINGUP_S = 30.0
OWED_S = 15.0
"""More than a gateway's 10 s for an answer."""
SLOTS = 8
MOVING = 0.6
"""Part of the runs in which slots move."""
Moment = Literal["scarce", "back"]
MOMENTS: tuple[Moment | None, ...] = (None, None, None, "scarce", "scarce", "back", "back")
"""What makes people ask for a move at the worst moment (`MoveFaults.ask`), in the runs in which slots move."""
SETTINGS_OF: dict[Moment | None, dict[str, Any]] = {
    # A log of small segments, which some disks are slow to prepare, often waits for its next one.
    "scarce": {"file_bytes": 45 * 1024, "round_bytes": 20 * 1024},
    "back": {"clean_after_s": 0.5},
}


@dataclass(frozen=True)
class Outcome:
    """What a run gave."""

    seed: int
    violations: list[Violation]
    digest: str
    faults: list[str]
    figures: dict[str, int]
    trace: Trace


class World:
    """Everything of one run.

    Args:
        seed: where all chance comes from.

    Attributes:
        tight: bounds are so small that the run meets them: hot state, buffers, pages, outboxes.
        people: in a run in which slots move: who asks for what. Chance of moves has a generator of its own, so that
            runs without moves are the same whatever is changed about moves.
        moment: in such a run: when people ask for one move more.
        rest: in some of them: the spell before the last read.
        crowd: in some of them: more sessions than slots.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.trace = Trace()
        self.loop = SimLoop(self.trace)
        self.trace.now = self.loop.time
        self.context = contextvars.copy_context()
        self.network = Network(self.loop, random.Random(self.rng.getrandbits(64)), self.trace)
        self.processes: list[SimProcess] = []
        rng, moves_rng = self.rng, random.Random(f"moves of {seed}")
        self.tight = rng.random() < 0.3
        shards = rng.choice((1, 2, 2, 3))
        moving = moves_rng.random() < MOVING
        crowd_rng = random.Random(f"crowd of {seed}")
        self.crowd = Crowd(crowd_rng) if moving and crowd_rng.random() < CROWDED else None
        slots = SLOTS if self.crowd is None else self.crowd.slots
        self.control = Truth(RingSpec(uid="ring-sim", slots=slots, shards=shards), self.loop, self.trace)
        self.weather = Weather(random.Random(rng.getrandbits(64)))
        sessions = rng.choice((1, 2, 3)) if self.crowd is None else self.crowd.sessions
        self.sessions = [f"session-{number}" for number in range(sessions)]
        burials_rng = random.Random(f"burials of {seed}")
        self.people = People(self, moves_rng, burials_rng) if moving else None
        self.shard_settings = _moving_settings(moves_rng) if self.people is not None else {}
        self.moment_rng = random.Random(f"moment of {seed}")
        self.moment = self.moment_rng.choice(MOMENTS) if self.people is not None else None
        self.shard_settings |= SETTINGS_OF.get(self.moment, {})
        rest_rng = random.Random(f"rest of {seed}")
        self.rest = Rest(self, rest_rng) if self.people is not None and rest_rng.random() < RESTING else None
        if self.rest is not None:
            self.shard_settings |= REST_SETTINGS
        self.shards = [ShardNode(self, f"shard-{number}") for number in range(shards)]
        self.gateways = [GatewayNode(self, f"gateway-{n}", 4000 + n) for n in range(rng.choice((1, 2, 2)))]
        self.controllers = [ControllerNode(self, f"controller-{n}") for n in range(rng.choice((1, 2)))]
        self.clients = [
            ClientNode(self, f"client-{n}", rng.sample(self.sessions, rng.randrange(1, len(self.sessions) + 1)))
            for n in range(rng.choice((1, 2, 3)))
        ]
        self.nemesis = Nemesis(self, moves_rng)
        self.history = History(gaps_allowed=self.nemesis.may_lose)
        self.loop.executor_delay = self.shards[0].drive.delay_s

    @property
    def nodes(self) -> list[Node]:
        """All machines."""
        return [*self.controllers, *self.shards, *self.gateways, *self.clients]

    def later(self, delay_s: float, act: Callable[[], object]) -> None:
        """The world does something later."""
        self.loop.call_later(delay_s, act, context=self.context)

    # --- the run

    async def live(self) -> None:
        """From bring-up to the last read."""
        for node in [*self.controllers, *self.shards, *self.gateways]:
            node.start()
        await self._until(self._serves, BRINGUP_S, "bring-up")
        for client in self.clients:
            client.start()
        if self.people is not None:
            self.people.begin()
        await self.nemesis.rage()
        self.trace.add("world", "heal")
        self.nemesis.heal()
        if self.people is not None:
            self.people.settle()
        await asyncio.sleep(self.rng.uniform(0.2, 0.8))
        for client in self.clients:
            client.writing = False
        self.trace.add("world", "writing ends")
        await self._until(self._calm, HEAL_S, "calm")
        prompt_s = PROMPT_S + (FULL_S if "full" in self.nemesis.kinds else 0.0)
        await self._until(self._settled, prompt_s, "settle")
        await self._until(self._nothing_under_way, OWED_S, "gateways")
        if self.rest is not None:
            await self.rest.run()
            await self._until(self._calm, HEAL_S, "calm after the rest")
        await self._read_all()
        await self._until(self._readers_converged, prompt_s, "readers")
        await self._wait_for_what_is_owed()
        for watch in self._watches():
            watch.finish()

    async def _until(self, holds: Callable[[], str], within_s: float, what: str) -> None:
        """Wait until `holds` has nothing to complain about."""
        deadline_s = self.loop.time() + within_s
        while complaint := holds():
            if self.loop.time() > deadline_s:
                self.history.broken("unhealed", "", f"{what}: {complaint} (waited {within_s:g} s)")
                raise Stuck(f"{what}: {complaint}")
            await asyncio.sleep(0.05)

    async def _wait_for_what_is_owed(self) -> None:
        """Until nobody is owed an answer, at most as long as answers may take; one run in eight listens on anyway."""
        until_s = self.loop.time() + OWED_S
        idle = self.rng.random() < 1 / 8
        while self.loop.time() < until_s and (idle or any(watch.owed for watch in self._watches())):  # noqa: ASYNC110
            await asyncio.sleep(0.25)

    def _watches(self) -> list[Watch]:
        """Of the clients' newest lives."""
        return [watch for each in self.clients if each.client is not None for watch in each.client.watches]

    def _calm(self) -> str:
        """All is well: everybody lives and serves, and no connection is left that only one end believes in."""
        for client in self.clients:
            if not client.alive:
                return f"{client.name} is down"
        for connection in self.network.connections:
            if connection.silent:
                return f"{connection.name} is half open"
        return self._serves() or ("" if self.people is None else self.people.at_rest())

    def _serves(self) -> str:
        for gateway in self.gateways:
            if gateway.parts is None or not gateway.alive or not self.network.listens(gateway.port):
                return f"{gateway.name} is down"
            health = gateway.parts.boundary.ready()
            if not health.ok or health.message:
                return f"{gateway.name}: {health.reason} {health.message}"
        for shard in self.shards:
            if not shard.ready:
                return f"{shard.name} is not ready"
        return ""

    def _settled(self) -> str:
        for client in self.clients:
            if client.pending:
                return f"{client.name} waits for {client.pending[0].invocation.keys}"
        return ""

    def _nothing_under_way(self) -> str:
        """What a dead client had asked for may still be written: not after the last read."""
        for gateway in self.gateways:
            if gateway.lanes:
                return f"{gateway.name} still has appends of {gateway.lanes:g} sessions"
        return ""

    def _readers_converged(self) -> str:
        for client in self.clients:
            for session, place in client.places.items():
                log = self.history.log(session)
                last = log[-1].seq if log else 0
                if place.cursor < last:
                    return f"{client.name} is at {place.cursor} of {last} in {session}"
        return ""

    async def _read_all(self) -> None:
        """A reader who was never there before reads every session from its beginning."""
        process = SimProcess(self.loop, "auditor/1")
        self.processes.append(process)
        client = SimClient(
            "auditor",
            ports=[gateway.port for gateway in self.gateways],
            settings=SETTINGS,
            entropy=random.Random(self.rng.getrandbits(64)),
            clock=self.clients[0].clock,
            history=self.history,
            life=1,
        )
        process.spawn(client.run(), name="auditor")

        async def audit() -> None:
            for name in self.sessions:
                entries, gaps = await _read_session(client, name)
                self.history.final(name, entries, gaps=gaps)

        task = process.spawn(audit(), name="audit")
        await asyncio.wait({task}, timeout=HEAL_S)
        if not task.done():
            self.history.broken("unhealed", "", "the last read does not end")
            raise Stuck("the last read does not end")
        task.result()
        for watch in client.watches:
            watch.finish()
            watch.lost()
        process.kill()


def _moving_settings(rng: random.Random) -> dict[str, Any]:
    """Of shards whose slots move: copies go soon or late, a SIGTERM hands slots over or not."""
    return {"clean_after_s": rng.choice((0.5, 3.0, 60.0)), "handover_s": rng.choice((0.0, 0.0, 3.0))}


async def _read_session(client: SimClient, name: str) -> tuple[list[Entry], list[tuple[int, int]]]:
    entries: list[Entry] = []
    gaps: list[tuple[int, int]] = []
    while True:
        session = client.join(name, cursor=0)
        try:
            await session.__aenter__()
            break
        except FleetError:
            await asyncio.sleep(0.2)
    async for event in session:
        if isinstance(event, Message):
            entries.append(Entry(event.seq, event.id, canonical(event.content)))
        elif isinstance(event, Gap):
            gaps.append((event.from_seq, event.next_seq))
        elif isinstance(event, CaughtUp):
            break
    session.close()
    return entries, gaps


def run_seed(seed: int) -> Outcome:
    """Live through one seed and judge it; nothing of its world is left in memory."""
    with _collected_by_hand():
        return _run(seed)


def _run(seed: int) -> Outcome:
    """See `run_seed`; a function of its own, so that no name keeps the world when memory is collected."""
    world = World(seed)
    loop = world.loop
    asyncio.set_event_loop(None)
    try:
        try:
            with contextlib.nullcontext() if world.crowd is None else world.crowd.small_pages():
                loop.run_until_complete(loop.create_task(world.live()))
        except Stuck as error:
            world.trace.add("world", "stuck", str(error))
            if not world.history.found:
                world.history.broken("unhealed", "", str(error))
        violations = world.history.judge() if not _is_unhealed(world) else world.history.found
        figures = {**world.history.figures(), "events": loop.events, "ms": int(loop.time() * 1000) - 1_000_000}
        figures |= {f"moves {step}": world.control.steps[step] for step in STEPS}
        return Outcome(seed, violations, world.trace.digest(), loop.all_faults(), figures, world.trace)
    finally:
        world.trace.close()
        for process in world.processes:
            process.kill()
        loop.bury()
        loop.close()


@contextlib.contextmanager
def _collected_by_hand() -> Generator[None]:
    """Memory is collected once, after the run: when that happens is not a function of the seed."""
    collecting = gc.isenabled()
    gc.disable()
    # What was there before is not looked at: modules and tests are most of what a collection would go through.
    gc.freeze()
    unraisable, sys.unraisablehook = sys.unraisablehook, _nothing
    try:
        yield
    finally:
        # Twice: the first closes coroutines of the dead, and what their `finally`s make keeps the world once more.
        gc.collect()
        gc.collect()
        gc.unfreeze()
        sys.unraisablehook = unraisable
        if collecting:
            gc.enable()


def _is_unhealed(world: World) -> bool:
    return any(each.kind == "unhealed" for each in world.history.found)


def _nothing(_: object) -> None:
    """What coroutines of dead processes say when they are collected is no news."""
