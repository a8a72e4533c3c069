"""The plan: the first map when every volume is known; afterwards nothing that could lose anything."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlm_common.control import Pin, RingSpec, View
from fleetlm_common.ids import Epoch, ShardName, Slot
from fleetlm_common.ring import Member, Move
from fleetlm_operator.planning import plan
from tests.test_operator.views import announced, first_map, seen


def test_a_ring_waits_for_every_volume() -> None:
    """Before that a map would bind a member to nothing."""
    decision = plan(seen(announced(1)))
    assert decision.new_map is None
    assert decision.reason == "WaitingForShards"
    assert decision.sentence == "waiting for shard-0 and shard-2 to announce a volume (1 of 3 did)"


def test_the_first_map_binds_members_to_volumes() -> None:
    """Epoch 1, even shares, each member with the volume that it announced, ready or not."""
    decision = plan(seen(announced(0), announced(1, ready=False), announced(2), announced(7)))
    assert decision.new_map is not None
    assert decision.new_map.epoch == 1
    assert decision.new_map.uid == "ring-1"
    assert decision.new_map.members == tuple(Member(ShardName(f"shard-{n}"), f"volume-{n}") for n in range(3))
    assert [(found.first, found.last, found.owner, found.epoch) for found in decision.new_map.ranges] == [
        (0, 3, "shard-0", 1),
        (4, 7, "shard-1", 1),
        (8, 11, "shard-2", 1),
    ]
    assert decision.sentence == "made the first map: 12 slots on 3 shards, epoch 1"


def test_more_shards_than_slots_leave_some_without() -> None:
    """Such a ring is odd and whole."""
    made = first_map(shards=3, slots=2)
    assert len(made.members) == 3
    assert {found.owner for found in made.ranges} == {"shard-0", "shard-1"}


def test_two_shards_on_one_volume_are_held() -> None:
    """A copied volume or a mistaken mount would be bound to two owners."""
    decision = plan(seen(announced(0), announced(1, volume_id="volume-0"), announced(2)))
    assert decision.new_map is None
    assert decision.sentence == "held: shard-0 and shard-1 announce the same volume volume-0"


def test_a_ring_at_rest_is_steady() -> None:
    """Nothing to do is said too."""
    decision = plan(seen(*map(announced, range(3)), ring_map=first_map()))
    assert decision == msgspec.structs.replace(decision, new_map=None, reason="Steady")
    assert decision.sentence == "steady at epoch 1, 12 slots on 3 shards, all ready"


def test_a_lost_volume_is_said_and_never_bound_anew() -> None:
    """The shard came back empty: its data is somewhere else or gone, and only people may decide that it is gone."""
    decision = plan(seen(announced(0), announced(1, volume_id="empty"), announced(2), ring_map=first_map()))
    assert decision.new_map is None
    assert decision.reason == "VolumeLost"
    assert "shard-1 lost its volume: the map binds it to volume-1, it announces empty" in decision.sentence


def test_a_volume_that_people_gave_up_is_replaced() -> None:
    """What its shard owns it gets anew, from the archive; its moves are gone; others keep theirs."""
    before = msgspec.structs.replace(
        first_map(),
        moves=(
            Move("1.1", (Slot(0),), ShardName("shard-0"), ShardName("shard-1"), "Sealing", Epoch(1)),
            Move("1.2", (Slot(1),), ShardName("shard-0"), ShardName("shard-2"), "Copying", Epoch(1)),
        ),
    )
    view = seen(announced(0), announced(1, volume_id="fresh", ready=False), announced(2), ring_map=before)
    view = msgspec.structs.replace(view, spec=msgspec.structs.replace(view.spec, given_up=("volume-1",)))
    decision = plan(view)
    assert decision.reason == "VolumeReplaced"
    after = decision.new_map
    assert after is not None
    assert (after.epoch, after.member(ShardName("shard-1"))) == (2, Member(ShardName("shard-1"), "fresh"))
    assert [move.id for move in after.moves] == ["1.2"]
    for one, two in zip(before.owners(), after.owners(), strict=True):
        assert one.owner == two.owner
        assert (two.epoch, two.via) == ((2, "2.0") if two.owner == "shard-1" else (one.epoch, one.via))
    assert plan(msgspec.structs.replace(view, map=after)).reason != "VolumeReplaced", "done once"


@pytest.mark.parametrize("volume_id", ["volume-1", "volume-2", "lost-too"])
def test_a_volume_is_replaced_only_by_one_that_is_nobodys(volume_id: str) -> None:
    """Not by itself, not by another member's, not by one that was given up as well."""
    view = seen(announced(0), announced(1, volume_id=volume_id), announced(2), ring_map=first_map())
    spec = msgspec.structs.replace(view.spec, given_up=("volume-1", "lost-too"))
    decision = plan(msgspec.structs.replace(view, spec=spec))
    assert decision.new_map is None


def test_a_shard_that_is_away_is_waited_for() -> None:
    """Silence moves nothing."""
    decision = plan(seen(announced(0), announced(1, ready=False), ring_map=first_map()))
    assert decision.new_map is None
    assert decision.reason == "ShardsNotReady"
    assert decision.sentence.startswith("shard-2 announced nothing yet; waiting for shard-1 to become ready")


def test_a_shard_that_is_asked_for_joins_without_slots() -> None:
    """It is bound to the volume that it announced; nothing moves before it serves."""
    decision = plan(seen(*map(announced, range(4)), shards=4, ring_map=first_map()))
    assert decision.new_map is not None
    assert decision.new_map.members[3] == Member(ShardName("shard-3"), "volume-3")
    assert decision.new_map.ranges == first_map().ranges
    assert decision.sentence == "shard-3 joined (epoch 2, 12 slots on 4 shards)"


def test_a_shard_that_joins_with_another_ones_volume_is_held() -> None:
    """Also when it comes later."""
    views = seen(*map(announced, range(3)), announced(3, volume_id="volume-1"), shards=4, ring_map=first_map())
    decision = plan(views)
    assert decision.new_map is None
    assert decision.sentence.startswith("held: shard-1 and shard-3 announce the same volume volume-1")


def test_the_worst_finding_comes_first() -> None:
    """A lost volume outweighs what is held, which outweighs who is not ready."""
    views = seen(
        announced(0, volume_id="x"),
        announced(1, ready=False),
        announced(3, volume_id="volume-1"),
        shards=4,
        ring_map=first_map(),
    )
    decision = plan(views)
    assert decision.reason == "VolumeLost"
    lost, held, absent = (decision.sentence.find(word) for word in ("lost its volume", "held:", "announced nothing"))
    assert 0 <= lost < held < absent


@pytest.mark.parametrize(
    "spec",
    [
        RingSpec("r", 0, 3),
        RingSpec("r", 9999, 3),
        RingSpec("r", 8, 0),
        RingSpec("r", 8, 999),
        RingSpec("r", 8, 3, pins=(Pin(Slot(7), Slot(8), ShardName("shard-0")),)),
        RingSpec("r", 8, 3, pins=(Pin(Slot(2), Slot(1), ShardName("shard-0")),)),
    ],
)
def test_a_spec_out_of_bounds_is_said(spec: RingSpec) -> None:
    """What nobody can build is not tried."""
    decision = plan(View(spec, None, {}))
    assert decision.new_map is None
    assert decision.reason == "InvalidSpec"


def test_a_map_of_another_ring_is_held() -> None:
    """Files that were mixed up are for people to sort out."""
    other = msgspec.structs.replace(first_map(), uid="ring-2")
    assert plan(seen(*map(announced, range(3)), ring_map=other)).reason == "Held"


@given(
    shards=st.integers(-1, 8),
    has_map=st.booleans(),
    there=st.lists(st.tuples(st.integers(0, 8), st.sampled_from([None, "x", "y"]), st.booleans()), max_size=9),
)
def test_a_plan_never_takes_a_slot_from_its_owner(
    shards: int, *, has_map: bool, there: list[tuple[int, str | None, bool]]
) -> None:
    """Whatever is observed: without a move no owner changes; the same view gives the same decision."""
    endpoints = [announced(number, volume_id=volume, ready=ready) for number, volume, ready in there]
    view = seen(*endpoints, shards=shards, ring_map=first_map() if has_map else None)
    decision = plan(view)
    assert decision == plan(view)
    assert decision.sentence
    assert decision.new_map is None or not has_map or decision.new_map.ranges == first_map().ranges
