"""What every control plane must do: one set of tests, run by each implementation's own test module.

A test module makes a subclass whose fixture `plane` is an empty ring of `SPEC`. Must not be done here: knowing how a
control plane keeps what it is told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from fleetlm_common.control import ControlPlane, MapConflict, RingSpec, ShardEndpoint, View
from fleetlm_common.ids import Epoch, ShardName, Term
from fleetlm_common.ring import Member, RingMap, ranges_from

SPEC = RingSpec(uid="ring-1", slots=8, shards=2)
NAMES = (ShardName("shard-0"), ShardName("shard-1"))


def ring_map(epoch: int, *, uid: str = SPEC.uid, slots: int = SPEC.slots) -> RingMap:
    """A map whose content tells its epoch apart: the first slots belong to shard-0."""
    owners = [(NAMES[slot >= epoch % slots], Epoch(1)) for slot in range(slots)]
    members = tuple(Member(name, f"volume of {name}") for name in NAMES)
    return RingMap(uid=uid, slots=slots, epoch=Epoch(epoch), members=members, ranges=ranges_from(owners))


def endpoint(term: int, *, port: int = 1, ready: bool = False) -> ShardEndpoint:
    """What shard-0 announces."""
    return ShardEndpoint(NAMES[0], "volume", Term(term), "127.0.0.1", port, "http://127.0.0.1:2", ready)


async def following(views: AsyncIterator[View]) -> View:
    """The next view of a watch."""
    async with asyncio.timeout(30):
        return await anext(views)


class PlaneContract:
    """To be subclassed as `Test…` with a fixture `plane`."""

    async def test_a_new_ring_has_no_map(self, plane: ControlPlane) -> None:
        """The first look shows the spec and nothing else."""
        assert await plane.read() == View(SPEC, None, {})

    async def test_a_swap_needs_the_epoch_that_is_there(self, plane: ControlPlane) -> None:
        """Whoever decided on an older map is told so, and changes nothing."""
        await plane.compare_and_swap(expected=None, new=ring_map(1))
        with pytest.raises(MapConflict, match="expected epoch None, found 1"):
            await plane.compare_and_swap(expected=None, new=ring_map(1))
        await plane.compare_and_swap(expected=Epoch(1), new=ring_map(2))
        with pytest.raises(MapConflict):
            await plane.compare_and_swap(expected=Epoch(1), new=ring_map(2))
        assert (await plane.read()).map == ring_map(2)

    async def test_a_swap_goes_one_epoch_up(self, plane: ControlPlane) -> None:
        """Skipping or repeating an epoch is a mistake of the caller, and so is another ring's map."""
        for wrong in (ring_map(2), ring_map(1, uid="other"), ring_map(1, slots=9)):
            with pytest.raises(ValueError, match=r"epoch|ring"):
                await plane.compare_and_swap(expected=None, new=wrong)
        assert (await plane.read()).map is None

    async def test_a_later_term_replaces_an_earlier_announcement(self, plane: ControlPlane) -> None:
        """A frozen process that goes on does not hide the one that took its volume; a boot may change its own word."""
        for said in (endpoint(2), endpoint(1, port=99), endpoint(2, ready=True)):
            await plane.announce(said)
        assert (await plane.read()).shards == {NAMES[0]: endpoint(2, ready=True)}

    async def test_terms_of_two_volumes_are_not_compared(self, plane: ControlPlane) -> None:
        """A shard with another volume is heard whatever its term: the controller must learn of it."""
        await plane.announce(endpoint(5))
        other = msgspec.structs.replace(endpoint(1), volume_id="another")
        await plane.announce(other)
        assert (await plane.read()).shards == {NAMES[0]: other}

    async def test_a_watch_shows_the_view_now_and_then_each_change(self, plane: ControlPlane) -> None:
        """Watchers get the present first, then news only."""
        views = plane.watch()
        assert await following(views) == View(SPEC, None, {})
        await plane.announce(endpoint(1))
        assert (await following(views)).shards == {NAMES[0]: endpoint(1)}
        await plane.compare_and_swap(expected=None, new=ring_map(1))
        assert (await following(views)).map == ring_map(1)

    async def test_writers_that_race_make_each_epoch_once(self, plane: ControlPlane) -> None:
        """Of many that swap at one moment one wins, and the others are told."""
        made: list[int] = []

        async def swapper() -> None:
            while len(made) < 6:
                current = (await plane.read()).map
                epoch = None if current is None else current.epoch
                try:
                    await plane.compare_and_swap(expected=epoch, new=ring_map((epoch or 0) + 1))
                except MapConflict:
                    continue
                made.append((epoch or 0) + 1)

        async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
            for _ in range(4):
                tasks.create_task(swapper())
        assert sorted(made) == list(range(1, len(made) + 1))
        assert (await plane.read()).map == ring_map(len(made))

    async def test_a_watch_that_is_left_leaves_nothing_behind(self, plane: ControlPlane) -> None:
        """Cancelling a watcher ends all that worked for it."""

        async def look() -> None:
            async for _ in plane.watch():
                pass

        before = asyncio.all_tasks()
        watching = asyncio.create_task(look())
        await plane.read()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        assert asyncio.all_tasks() <= before | {watching}
