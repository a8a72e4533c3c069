"""Moves, one operation at a time: each slot has one owner at any step, and the ring ends as people asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import msgspec
import pytest

from fleetlm_common.control import Pin, shard_names
from fleetlm_common.ids import ShardName, Slot
from fleetlm_common.ring import RingMap
from fleetlm_operator import moving
from fleetlm_operator.mapsteps import Begin, Commit, after
from fleetlm_operator.memory import BACKOFF_MAX_S
from fleetlm_operator.planning import JOIN_WAIT_S
from tests.test_operator.playedring import PlayedController, PlayedRing


def name(ordinal: int) -> ShardName:
    return ShardName(f"shard-{ordinal}")


def ring_of(shards: int, slots: int = 24) -> tuple[PlayedRing, PlayedController]:
    """A ring at rest and its controller."""
    ring = PlayedRing(shards=shards, slots=slots)
    controller = PlayedController(ring)
    ring.settle([controller])
    assert ring.map is not None
    return ring, controller


def counts(ring: PlayedRing) -> dict[str, int]:
    assert ring.map is not None
    return dict(Counter(found.owner for found in ring.map.owners()))


def the_map(ring: PlayedRing) -> RingMap:
    assert ring.map is not None
    return ring.map


def step(ring: PlayedRing, controller: PlayedController, *, shards: bool = True) -> str:
    """All shards act, the controller takes one step; what it said."""
    ring.run_processes()
    for shard in ring.shards.values() if shards else ():
        shard.act()
    sentence = controller.look().sentence
    assert controller.act()
    return sentence


def until(ring: PlayedRing, controller: PlayedController, holds: Callable[[RingMap], bool]) -> None:
    """Steps until the map is so."""
    for _ in range(50):
        if holds(the_map(ring)):
            return
        step(ring, controller)
    raise AssertionError(the_map(ring))


def is_sealing(ring_map: RingMap) -> bool:
    return any(move.state == "Sealing" for move in ring_map.moves)


# One operation


def test_shards_that_join_get_their_share() -> None:
    """Three become five: as few slots move as can, in few moves."""
    ring, controller = ring_of(3, slots=256)
    ring.ask(shards=5)
    ring.settle([controller])
    assert sorted(counts(ring).values()) == [51, 51, 51, 51, 52]
    assert [member.name for member in the_map(ring).members] == shard_names(ring.spec)
    assert sum(bool(found.via) for found in the_map(ring).owners()) == 102
    assert len(ring.begun) == len(ring.committed) <= 8


def test_shards_that_leave_are_emptied_first_and_say_so_themselves() -> None:
    """Five become two; a member goes only when it serves nothing by its own word."""
    ring, controller = ring_of(5)
    ring.ask(shards=2)
    ring.shards[name(4)].stop()
    for _ in range(60):
        step(ring, controller)
    ring.shards[name(4)].start()
    ring.shards[name(4)].act()
    until(ring, controller, lambda found: not found.slots_of(name(4)))
    assert the_map(ring).member(name(4)) is not None
    sentence = step(ring, controller, shards=False)
    assert the_map(ring).member(name(4)) is not None, "it has not said anything about that map"
    assert "waiting for" in sentence
    ring.settle([controller])
    assert counts(ring) == {"shard-0": 12, "shard-1": 12}
    assert [member.name for member in the_map(ring).members] == shard_names(ring.spec)


def test_a_step_waits_for_the_word_that_it_rests_on() -> None:
    """Begin, then seal when the target is ready, then commit when it has confirmed: one map each."""
    ring, controller = ring_of(1)
    ring.ask(shards=2)
    step(ring, controller)
    assert step(ring, controller).startswith("began to move 12 slots from shard-0 to shard-1")
    epoch = the_map(ring).epoch
    assert step(ring, controller, shards=False).startswith("12 slots left to move, 1 move in flight")
    assert the_map(ring).epoch == epoch
    assert step(ring, controller).startswith(f"sealed move {epoch}.1 (12 slots from shard-0 to shard-1)")
    assert step(ring, controller, shards=False).startswith("12 slots left to move, 1 move in flight (1 sealed)")
    assert step(ring, controller).startswith(f"committed move {epoch}.1")
    owner = the_map(ring).owner_of(Slot(23))
    assert (owner.owner, owner.epoch, owner.via) == (name(1), epoch + 2, f"{epoch}.1")


def test_a_cordoned_shard_is_emptied_and_stays() -> None:
    """It comes back into its share when it is not cordoned any more."""
    ring, controller = ring_of(3)
    ring.ask(cordoned=(name(1),))
    ring.settle([controller])
    assert counts(ring) == {"shard-0": 12, "shard-2": 12}
    assert the_map(ring).member(name(1)) is not None
    ring.ask(cordoned=())
    ring.settle([controller])
    assert counts(ring) == {"shard-0": 8, "shard-1": 8, "shard-2": 8}


def test_a_pin_moves_its_slots_and_holds_them() -> None:
    """Others share the rest evenly; without the pin the ring is even again, and nothing moves that need not."""
    ring, controller = ring_of(3)
    ring.ask(pins=(Pin(Slot(0), Slot(3), name(2)), Pin(Slot(2), Slot(2), name(1)), Pin(Slot(9), Slot(9), name(7))))
    ring.settle([controller])
    owners = [found.owner for found in the_map(ring).owners()]
    assert [owners[slot] for slot in (0, 1, 2, 3)] == [name(2), name(2), name(1), name(2)]
    assert set(counts(ring).values()) == {8}
    ring.ask(pins=(Pin(Slot(0), Slot(13), name(2)),))
    ring.settle([controller])
    assert counts(ring) == {"shard-0": 5, "shard-1": 5, "shard-2": 14}
    begun = len(ring.begun)
    ring.ask(pins=())
    ring.settle([controller])
    assert set(counts(ring).values()) == {8}
    assert len(ring.begun) > begun


def test_a_shard_on_a_cordoned_node_keeps_its_slots_and_gets_none() -> None:
    """Who leaves meanwhile gives to the others; all is even again when the node takes pods."""
    ring, controller = ring_of(3)
    ring.avoided = (name(1),)
    ring.settle([controller])
    assert not ring.begun
    assert controller.look().sentence.endswith("all ready; on cordoned nodes, so without new slots: shard-1")
    ring.ask(cordoned=(name(0),))
    ring.settle([controller])
    assert counts(ring) == {"shard-1": 8, "shard-2": 16}
    ring.ask(cordoned=())
    ring.settle([controller])
    assert counts(ring) == {"shard-0": 8, "shard-1": 8, "shard-2": 8}
    ring.ask(shards=4)
    ring.settle([controller])
    assert counts(ring) == dict.fromkeys(map(name, range(4)), 6), "it gives a shard that joins what is its share"
    ring.ask(cordoned=(name(1),))
    ring.settle([controller])
    ring.ask(cordoned=())
    ring.settle([controller])
    assert counts(ring) == {"shard-0": 8, "shard-2": 8, "shard-3": 8}
    ring.avoided = ()
    ring.settle([controller])
    assert counts(ring) == dict.fromkeys(map(name, range(4)), 6)


@pytest.mark.parametrize("state", ["Copying", "Sealing"])
def test_a_move_to_a_node_that_is_cordoned_meanwhile_is_undone(state: str) -> None:
    """Its slots stay where they are, or go to another shard; nothing is sent there and back."""
    ring, controller = ring_of(2)
    ring.ask(shards=3)
    until(ring, controller, lambda found: any(move.state == state for move in found.moves))
    ring.avoided = (name(2),)
    assert "it is not wanted any more" in step(ring, controller)
    ring.settle([controller])
    assert counts(ring) == {"shard-0": 12, "shard-1": 12}
    assert not ring.committed


def test_node_cordons_on_all_who_may_own_slots_count_for_nobody() -> None:
    """Somebody must take what others give: whoever goes is emptied all the same."""
    ring, controller = ring_of(3)
    ring.avoided = (name(0), name(1), name(2))
    assert controller.look().sentence == "steady at epoch 1, 24 slots on 3 shards, all ready"
    ring.avoided = (name(0), name(1))
    ring.ask(cordoned=(name(2),))
    ring.settle([controller])
    assert counts(ring) == {"shard-0": 12, "shard-1": 12}


def test_every_shard_cordoned_is_held() -> None:
    """Somebody must own the slots."""
    ring, controller = ring_of(2)
    ring.ask(cordoned=(name(0), name(1)))
    assert controller.look().reason == "Held"
    assert controller.look().new_map is None


# What goes wrong


def test_a_seal_that_is_not_confirmed_is_taken_back_and_tried_again_later() -> None:
    """After three seconds the source goes on; the next try waits longer each time, and then it works."""
    ring, controller = ring_of(1)
    ring.ask(shards=2)
    pauses: list[float] = []
    for _ in range(3):
        until(ring, controller, is_sealing)
        step(ring, controller, shards=False)
        sealed_s = ring.now_s
        ring.now_s = sealed_s + moving.SEAL_S_MAX - 0.001
        assert controller.look().new_map is None
        assert controller.look().again_s == pytest.approx(0.001)
        ring.now_s = sealed_s + moving.SEAL_S_MAX
        assert "did not confirm it within 3 s" in step(ring, controller, shards=False)
        assert not the_map(ring).moves
        aborted_s = ring.now_s
        assert "failed" in step(ring, controller)
        while not the_map(ring).moves:
            ring.now_s += 0.25
            step(ring, controller)
        pauses.append(ring.now_s - aborted_s)
    assert pauses == [1.0, 2.0, 4.0]
    ring.settle([controller])
    assert counts(ring) == {"shard-0": 12, "shard-1": 12}


def test_a_target_that_gives_up_is_believed() -> None:
    """Its disk is full: the move is aborted with its reason, and tried again when the pause is over."""
    ring, controller = ring_of(1)
    ring.ask(shards=2)
    until(ring, controller, lambda found: bool(found.moves))
    target = ring.shards[name(1)]
    target.failed.add(the_map(ring).moves[0].id)
    sentence = step(ring, controller)
    assert "shard-1 gave it up: disk_full" in sentence
    assert controller.look().reason == "Moving"
    ring.settle([controller])
    assert counts(ring) == {"shard-0": 12, "shard-1": 12}


def test_a_target_that_gives_up_again_and_again_is_said_to_stall_with_its_reason() -> None:
    """After ten seconds, like a copy that does not get on; with the reason also when nothing can be tried any more."""
    ring, controller = ring_of(1)
    ring.ask(shards=2)
    target = ring.shards[name(1)]

    def fail() -> None:
        until(ring, controller, lambda found: bool(found.moves))
        target.failed.add(the_map(ring).moves[0].id)
        step(ring, controller)
        assert not the_map(ring).moves

    fail()
    failed_s = ring.now_s
    why = "shard-1 gave it up: disk_full"
    while ring.now_s < failed_s + moving.STALLED_S:
        assert controller.look().reason == "Moving"
        assert f" and waits: {why}" in controller.look().sentence
        again_s = controller.look().again_s
        assert again_s is not None
        ring.now_s += again_s
        if controller.look().new_map is not None:
            fail()
    assert ring.now_s == failed_s + moving.STALLED_S
    assert controller.look().reason == "MoveStalled"
    assert f"shard-0 to shard-1 does not get on: it failed 4 times: {why}" in controller.look().sentence
    target.stop()
    ring.now_s += BACKOFF_MAX_S
    ring.ask(forgotten=())
    assert controller.look().new_map is None
    assert f"does not get on: it failed 4 times: {why}" in controller.look().sentence
    assert "waiting for shard-1 to become ready" in controller.look().sentence
    target.start()
    ring.settle([controller])
    assert counts(ring) == {"shard-0": 12, "shard-1": 12}
    assert not controller.memory.failures


def test_a_failure_of_what_nobody_wants_any_more_is_forgotten() -> None:
    """Wanted again, it is tried at once, and is no stall."""
    ring, controller = ring_of(1)
    ring.ask(shards=2)
    until(ring, controller, lambda found: bool(found.moves))
    ring.shards[name(1)].failed.add(the_map(ring).moves[0].id)
    step(ring, controller)
    ring.ask(cordoned=(name(1),))
    ring.settle([controller])
    assert not controller.memory.failures
    ring.ask(cordoned=())
    assert [type(each) for each in controller.look().steps] == [Begin]


@pytest.mark.parametrize("who", [0, 1])
def test_a_copy_that_does_not_get_on_is_said_with_its_reason(who: int) -> None:
    """It waits for the shard that is away, as long as it takes; nothing is lost by that."""
    ring, controller = ring_of(1)
    ring.ask(shards=2)
    until(ring, controller, lambda found: bool(found.moves))
    ring.shards[name(who)].stop()
    step(ring, controller)
    ring.now_s += moving.STALLED_S
    decision = controller.look()
    assert decision.reason == "MoveStalled"
    assert f"does not get on: shard-{who} is not ready" in decision.sentence
    ring.shards[name(who)].start()
    ring.settle([controller])
    assert counts(ring) == {"shard-0": 12, "shard-1": 12}


def test_a_lost_volume_ends_its_moves() -> None:
    """Neither its word nor its data is what the map means."""
    ring, controller = ring_of(1)
    ring.ask(shards=2)
    until(ring, controller, is_sealing)
    ring.shards[name(1)].act()
    said = ring.announcements[name(1)]
    assert said.moves[0].state == "Ready"
    ring.shards[name(1)].act()
    ring.announcements[name(1)] = msgspec.structs.replace(ring.announcements[name(1)], volume_id="another")
    decision = controller.look()
    assert decision.reason == "VolumeLost"
    assert controller.act()
    assert not the_map(ring).moves
    assert counts(ring) == {"shard-0": 24}


def test_shards_that_join_together_are_waited_for_together() -> None:
    """No slot moves twice because one pod was slower; one that never comes holds nobody up for long."""
    ring, controller = ring_of(3)
    ring.ask(shards=5)
    ring.shards[name(4)].up = False
    for _ in range(5):
        step(ring, controller)
        ring.now_s += (JOIN_WAIT_S - 1) / 5
    assert the_map(ring).member(name(3)) is not None
    assert not the_map(ring).moves
    ring.now_s += 1.001
    step(ring, controller)
    assert the_map(ring).moves
    ring.settle([controller])
    assert counts(ring) == dict.fromkeys(map(name, range(4)), 6)
    ring.shards[name(4)].start()
    ring.settle([controller])
    assert sorted(counts(ring).values()) == [4, 5, 5, 5, 5]


def test_an_emptying_shard_does_not_wait_for_who_joins() -> None:
    """A cordoned shard is emptied also while another one is awaited."""
    ring, controller = ring_of(3)
    ring.ask(shards=4, cordoned=(name(0),))
    ring.shards[name(3)].up = False
    step(ring, controller)
    assert {move.source for move in the_map(ring).moves} == {name(0)}


def test_an_older_build_is_not_asked_to_move() -> None:
    """It would not know what a move is: upgrade it first."""
    ring, controller = ring_of(2)
    for each in (0, 1):
        ring.announcements[name(each)] = msgspec.structs.replace(ring.announcements[name(each)], serves=-1)
    ring.spec = msgspec.structs.replace(ring.spec, shards=1)
    decision = controller.look()
    assert decision.new_map is None
    assert decision.reason == "Held"
    assert "must be upgraded first" in decision.sentence


# Changes of mind


@pytest.mark.parametrize("sealed", [False, True])
def test_a_change_of_mind_takes_back_what_is_not_committed(*, sealed: bool) -> None:
    """Up, then down before it ended: what moved already comes back, the rest never goes."""
    ring, controller = ring_of(3)
    ring.ask(shards=5)
    until(ring, controller, is_sealing if sealed else lambda found: bool(found.moves))
    ring.ask(shards=3)
    step(ring, controller, shards=False)
    assert not [move for move in the_map(ring).moves if move.target in {name(3), name(4)}]
    ring.settle([controller])
    assert counts(ring) == dict.fromkeys(map(name, range(3)), 8)
    assert not controller.memory.failures, "that was no failure"


def test_a_commit_is_not_taken_back() -> None:
    """After it only forward: another move brings the slots where people want them now."""
    ring, controller = ring_of(2)
    ring.ask(shards=1)
    until(ring, controller, lambda found: not found.slots_of(name(1)))
    ring.ask(shards=2)
    ring.settle([controller])
    assert counts(ring) == {"shard-0": 12, "shard-1": 12}


def test_a_plan_is_not_changed_by_its_own_progress() -> None:
    """Every move that was begun is committed: none is aborted because another one ended first."""
    for shards, then in ((3, 5), (5, 2), (1, 7), (7, 3), (4, 4)):
        ring, controller = ring_of(shards, slots=101)
        ring.ask(shards=then)
        ring.settle([controller])
        assert sorted(ring.begun) == sorted(ring.committed)
        assert max(counts(ring).values()) - min(counts(ring).values()) <= 1


def test_the_bounds_hold() -> None:
    """Moves of a shard, of the ring, slots of a batch."""
    ring, controller = ring_of(1, slots=1024)
    ring.ask(shards=12)
    seen = 0
    for _ in range(300):
        step(ring, controller)
        found = the_map(ring)
        seen = max(seen, len(found.moves))
        assert max(Counter(move.source for move in found.moves).values(), default=0) <= moving.SHARD_MOVES_MAX
        assert max(Counter(move.target for move in found.moves).values(), default=0) <= moving.SHARD_MOVES_MAX
        assert all(len(move.slots) <= moving.BATCH_SLOTS_MAX for move in found.moves)
    assert seen == moving.SHARD_MOVES_MAX
    ring.ask(shards=24)
    for _ in range(300):
        step(ring, controller)
        assert len(the_map(ring).moves) <= moving.RING_MOVES_MAX
    ring.settle([controller])
    assert set(counts(ring).values()) == {42, 43}


# Steps that do not fit


def test_steps_that_do_not_fit_the_map_make_none() -> None:
    """A commit of what is not sealed, a step of a move that is gone: a defect, not a map."""
    ring, controller = ring_of(2)
    begun = after(the_map(ring), [Begin((Slot(0),), name(0), name(1))])
    with pytest.raises(ValueError, match="not sealed"):
        after(begun, [Commit(begun.moves[0])])
    with pytest.raises(ValueError, match="no such move"):
        after(the_map(ring), [Commit(begun.moves[0])])
    with pytest.raises(ValueError, match="does not own"):
        after(the_map(ring), [Begin((Slot(23),), name(0), name(1))])
    assert controller.look().new_map is None
