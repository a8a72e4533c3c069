"""The loop: level-triggered, one change a step, one sentence, any number of controllers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Literal

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from fleetlm_common.control import ControllerPlane, MoveProgress, View
from fleetlm_common.ids import Epoch
from fleetlm_common.logs import Level, Value
from fleetlm_common.ring import RingMap
from fleetlm_operator import controller as controllers
from fleetlm_operator.controller import Controller
from fleetlm_operator.metrics import Metrics
from fleetlm_operator.moving import SEAL_S_MAX
from tests.support.memorycontrol import MemoryControlPlane
from tests.test_operator.views import announced, first_map, seen

SPEC = seen().spec


class Log:
    """Keeps what was said."""

    def __init__(self) -> None:
        self.sentences: list[Value] = []

    def event(self, name: str, /, *, level: Level = "info", **values: Value) -> None:
        if name == "ring":
            self.sentences.append(values["sentence"])


class StillClock:
    """Time that moves when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def now_ms(self) -> int:
        return int(self.now_s * 1000)

    def now_us(self) -> int:
        return int(self.now_s * 1_000_000)

    def monotonic_s(self) -> float:
        return self.now_s


class Rig:
    """A controller with everything that it is given."""

    def __init__(self, control: ControllerPlane) -> None:
        self.registry = CollectorRegistry()
        self.log = Log()
        self.clock = StillClock()
        self.controller = Controller(control, log=self.log, metrics=Metrics(self.registry), clock=self.clock)

    def metric(self, name: str) -> float | None:
        return self.registry.get_sample_value(f"fleetlm_operator_{name}")


@pytest.fixture
def memory() -> MemoryControlPlane:
    return MemoryControlPlane(SPEC)


@asynccontextmanager
async def running(*rigs: Rig) -> AsyncGenerator[None]:
    """Controllers at work."""
    tasks = [asyncio.create_task(rig.controller.run()) for rig in rigs]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110  # there is no event for "some other task got there"
            await asyncio.sleep(0.001)


async def test_a_ring_comes_up(memory: MemoryControlPlane) -> None:
    """Shards announce themselves one after the other; after the last there is a map, and each step was said once."""
    rig = Rig(memory)
    async with running(rig):
        for ordinal in range(3):
            await memory.announce(announced(ordinal))
        await until(lambda: rig.controller.health().reason == "Steady")
    assert memory.view.map == first_map()
    assert memory.sentences[-2:] == [
        "made the first map: 12 slots on 3 shards, epoch 1",
        "steady at epoch 1, 12 slots on 3 shards, all ready",
    ]
    assert rig.log.sentences == memory.sentences
    assert len(set(memory.sentences)) == len(memory.sentences)


async def test_a_sentence_is_said_once(memory: MemoryControlPlane) -> None:
    """Steps that find nothing new are silent."""
    rig = Rig(memory)
    for _ in range(5):
        assert await rig.controller.step()
    assert len(memory.sentences) == len(rig.log.sentences) == 1


async def test_many_controllers_make_one_map(memory: MemoryControlPlane) -> None:
    """Five at the same ring: one map, one epoch, and those who were slower look again."""
    rigs = [Rig(memory) for _ in range(5)]
    async with running(*rigs):
        for ordinal in range(3):
            await memory.announce(announced(ordinal))
        await until(lambda: all(rig.controller.health().reason == "Steady" for rig in rigs))
    assert memory.view.map == first_map()
    assert sum(rig.metric("map_changes_total") or 0 for rig in rigs) == 1


class Hurried(MemoryControlPlane):
    """Another controller makes the map between our look and our swap."""

    async def compare_and_swap(self, *, expected: Epoch | None, new: RingMap) -> None:
        if self.view.map is None:
            await super().compare_and_swap(expected=expected, new=new)
        await super().compare_and_swap(expected=expected, new=new)


async def test_a_conflict_is_looked_at_again() -> None:
    """A swap that came too late changes nothing, claims nothing, and the next step sees what is there."""
    rig = Rig(control := Hurried(SPEC))
    for ordinal in range(3):
        await control.announce(announced(ordinal))
    assert not await rig.controller.step()
    assert control.sentences == []
    assert rig.metric("map_conflicts_total") == 1
    assert await rig.controller.step()
    assert rig.controller.health().reason == "Steady"


async def test_a_control_plane_that_is_away_is_waited_for(
    memory: MemoryControlPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readiness says so, nothing ends, and what happened meanwhile is done afterwards."""
    monkeypatch.setattr(controllers, "RETRY_S", 0.001)
    rig = Rig(memory)
    for ordinal in range(3):
        await memory.announce(announced(ordinal))
    memory.away = True
    async with running(rig):
        await until(lambda: rig.controller.health().reason == "ControlPlaneUnavailable")
        assert not rig.controller.health().ok
        memory.away = False
        await until(lambda: rig.controller.health().ok)
        await until(lambda: memory.view.map is not None)
    assert memory.sentences


class Deaf(MemoryControlPlane):
    """Loses every event."""

    async def watch(self) -> AsyncIterator[View]:
        await asyncio.Event().wait()
        yield self.view


async def test_a_lost_event_delays_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Level-triggered: without any event the next regular step does what is to be done."""
    monkeypatch.setattr(controllers, "RESYNC_S", 0.001)
    rig = Rig(control := Deaf(SPEC))
    async with running(rig):
        await until(lambda: rig.controller.health().reason == "WaitingForShards")
        for ordinal in range(3):
            await control.announce(announced(ordinal))
        await until(lambda: control.view.map is not None)


async def test_readiness_is_honest(memory: MemoryControlPlane) -> None:
    """Not before the first look, and not when no step ends any more."""
    rig = Rig(memory)
    assert rig.controller.health().reason == "Starting"
    await rig.controller.step()
    assert rig.controller.health().ok
    rig.clock.now_s += controllers.STALLED_S + 1
    assert rig.controller.health().reason == "Stalled"
    await rig.controller.step()
    assert rig.controller.health().ok


async def begun_move(rig: Rig, memory: MemoryControlPlane) -> None:
    """Ask for one shard less; its slots begin to move."""
    memory.set_spec(msgspec.structs.replace(SPEC, shards=2))
    for ordinal in range(3):
        await memory.announce(msgspec.structs.replace(announced(ordinal), serves=4))
    assert await rig.controller.step()
    assert await rig.controller.step()
    assert memory.view.map is not None
    assert memory.view.map.moves


async def sealing_move(rig: Rig, memory: MemoryControlPlane) -> RingMap:
    """One whose target was ready; returns the map that shows it."""
    await begun_move(rig, memory)
    await say(memory, "Ready")
    assert await rig.controller.step()
    assert memory.view.map is not None
    assert {move.state for move in memory.view.map.moves} == {"Sealing"}
    return memory.view.map


async def say(memory: MemoryControlPlane, state: Literal["Ready", "Confirmed"]) -> None:
    """Each target of a move says that it stands there."""
    assert memory.view.map is not None
    for move in memory.view.map.moves:
        said = memory.view.shards[move.target]
        others = tuple(each for each in said.moves if each.id != move.id)
        await memory.announce(msgspec.structs.replace(said, moves=(*others, MoveProgress(move.id, state))))


class Overtaken(MemoryControlPlane):
    """What `overtake` does is done between our look and our swap, once."""

    overtake: Callable[[], Awaitable[None]] | None = None

    async def compare_and_swap(self, *, expected: Epoch | None, new: RingMap) -> None:
        overtake, self.overtake = self.overtake, None
        if overtake is not None:
            await overtake()
        await super().compare_and_swap(expected=expected, new=new)


async def test_a_commit_that_an_abort_overtook_is_none() -> None:
    """Rule 5: another controller took the seal back, the source writes again: who saw it sealed must not commit."""
    rig = Rig(memory := Overtaken(SPEC))
    for ordinal in range(3):
        await memory.announce(announced(ordinal))
    assert await rig.controller.step()
    sealed = await sealing_move(rig, memory)
    await say(memory, "Confirmed")
    aborted = msgspec.structs.replace(sealed, epoch=Epoch(sealed.epoch + 1), moves=())
    memory.overtake = lambda: memory.compare_and_swap(expected=sealed.epoch, new=aborted)
    assert not await rig.controller.step()
    assert memory.view.map == aborted
    ids = {move.id for move in sealed.moves}
    for _ in range(5):
        assert await rig.controller.step()
        now = memory.view.map
        assert now is not None
        assert now.ranges == sealed.ranges
        assert not ids & {move.id for move in now.moves}


async def test_a_seal_is_timed_by_the_controllers_own_clock(memory: MemoryControlPlane) -> None:
    """It looks again by itself when the time is over, takes the seal back, and counts each step."""
    rig = Rig(memory)
    for ordinal in range(3):
        await memory.announce(announced(ordinal))
    assert await rig.controller.step()
    await sealing_move(rig, memory)
    assert await rig.controller.step()
    rig.clock.now_s += SEAL_S_MAX
    assert await rig.controller.step()
    assert memory.view.map is not None
    assert not memory.view.map.moves
    for step in ("begin", "seal", "abort"):
        assert rig.registry.get_sample_value("fleetlm_operator_map_steps_total", {"step": step}) == 2


async def test_every_metric_moves(memory: MemoryControlPlane) -> None:
    """One scenario in which each documented series changes."""
    rig, hurried = Rig(memory), Rig(control := Hurried(SPEC))
    before = {sample.name: sample.value for metric in rig.registry.collect() for sample in metric.samples}
    for plane in (memory, control):
        for ordinal in range(3):
            await plane.announce(announced(ordinal))
    await hurried.controller.step()
    await rig.controller.step()
    memory.away = True
    await rig.controller.step()
    memory.away = False
    await memory.announce(announced(1, volume_id="empty"))
    await rig.controller.step()
    calm = Rig(third := MemoryControlPlane(SPEC))
    for ordinal in range(3):
        await third.announce(announced(ordinal))
    await calm.controller.step()
    await begun_move(calm, third)
    moved = {
        sample.name
        for each in (rig, hurried, calm)
        for metric in each.registry.collect()
        for sample in metric.samples
        if sample.value != before.get(sample.name)
    }
    assert {name for name in before if not name.endswith("_created")} <= moved
