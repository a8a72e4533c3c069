"""A ring map that exists is whole."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlm_common.ids import Epoch, ShardName, Slot
from fleetlm_common.ring import Member, Move, RingMap, SlotRange, decode, encode, ranges_from

A, B = ShardName("shard-0"), ShardName("shard-1")
MEMBERS = (Member(A, "va"), Member(B, "vb"))


def of(first: int, last: int, owner: ShardName = A, epoch: int = 1) -> SlotRange:
    """A range in few words."""
    return SlotRange(Slot(first), Slot(last), owner, Epoch(epoch))


def ring(*ranges: SlotRange, slots: int = 8, epoch: int = 3) -> RingMap:
    """A map of eight slots."""
    return RingMap("ring", slots, Epoch(epoch), MEMBERS, ranges)


def test_encode_and_decode_are_inverse() -> None:
    """What a map says survives the file."""
    one = ring(of(0, 2), of(3, 7, B, 2))
    assert decode(encode(one)) == one


def test_tables_agree_with_ranges() -> None:
    """Every way to ask for an owner gives the same answer."""
    one = ring(of(0, 2), of(3, 6, B, 2), of(7, 7, A, 3))
    table = one.owners()
    assert [one.owner_of(Slot(slot)) for slot in range(8)] == table
    assert one.slots_of(B) == {3: 2, 4: 2, 5: 2, 6: 2}
    assert one.slots_of(A)[Slot(7)] == 3
    assert one.member(B) == Member(B, "vb")
    assert one.member(ShardName("shard-9")) is None


@pytest.mark.parametrize(
    ("ranges", "complaint"),
    [
        ((), "cover every slot"),
        ((of(0, 6),), "cover every slot"),
        ((of(1, 7),), "cover every slot"),
        ((of(0, 3), of(5, 7)), "hole"),
        ((of(0, 4), of(4, 7)), "overlap"),
        ((of(0, 7, ShardName("shard-9")),), "no member"),
        ((of(0, 7, A, 4),), "newer than its map"),
        ((of(0, 3), of(5, 4), of(5, 7)), "ends before it begins"),
    ],
)
def test_a_map_that_is_not_whole_does_not_exist(ranges: tuple[SlotRange, ...], complaint: str) -> None:
    """Holes, overlaps, strangers and futures are refused, from code and from a file alike."""
    with pytest.raises(ValueError, match=complaint):
        ring(*ranges)
    good = msgspec.to_builtins(ring(of(0, 7)))
    good["ranges"] = msgspec.to_builtins(ranges)
    with pytest.raises(ValueError, match=complaint):
        decode(msgspec.json.encode(good))


@pytest.mark.parametrize("data", [b"", b"{", b"null", b'{"uid":"r"}', b'{"surprise":1}'])
def test_garbage_is_a_value_error(data: bytes) -> None:
    """A half-written or foreign file is one error, which callers turn into "keep the last good copy"."""
    with pytest.raises(ValueError):  # noqa: PT011  the promise is the type
        decode(data)


def test_unknown_fields_are_refused() -> None:
    """A map of a newer format is not read as if nothing were new."""
    raw = msgspec.json.decode(encode(ring(of(0, 7))))
    raw["leases"] = []
    with pytest.raises(ValueError, match="unknown field"):
        decode(msgspec.json.encode(raw))


@given(st.lists(st.tuples(st.sampled_from([A, B]), st.integers(1, 3).map(Epoch)), min_size=1, max_size=64))
def test_folding_a_table_keeps_it(table: list[tuple[ShardName, Epoch]]) -> None:
    """`ranges_from` and `owners` are inverse."""
    made = RingMap("ring", len(table), Epoch(3), MEMBERS, ranges_from(table))
    assert [(found.owner, found.epoch) for found in made.owners()] == table


def move(*slots: int, source: ShardName = A, target: ShardName = B, ident: str = "2.1", epoch: int = 2) -> Move:
    """A move of the ring below: 0 to 3 belong to A, the rest to B."""
    return Move(ident, tuple(map(Slot, slots)), source, target, "Copying", Epoch(epoch))


@pytest.mark.parametrize(
    ("moves", "complaint"),
    [
        ((move(0), move(1)), "share an id"),
        ((move(0, 1), move(1, 2, ident="2.2")), "in two moves"),
        ((move(),), "has no slots"),
        ((move(2, 1),), "do not ascend"),
        ((move(1, 1),), "in two moves"),
        ((move(3, 8),), "slots that are none"),
        ((move(-1, 2),), "slots that are none"),
        ((move(3, 4),), "does not own"),
        ((move(0, target=A),), "goes nowhere"),
        ((move(0, target=ShardName("shard-9")),), "goes to no member"),
        ((move(0, source=ShardName("shard-9")),), "does not own"),
        ((move(0, ident="4.1", epoch=4),), "newer than its map"),
        ((move(0, ident="3.1"),), "id of another epoch"),
        ((move(0, ident="2.0"),), "id that is none"),
    ],
)
def test_a_move_that_takes_what_is_not_there_to_take_is_refused(moves: tuple[Move, ...], complaint: str) -> None:
    """From code and from a file alike: two moves of a slot would make two owners."""
    ranges = (of(0, 3), of(4, 7, B, 2))
    with pytest.raises(ValueError, match=complaint):
        RingMap("ring", 8, Epoch(3), MEMBERS, ranges, moves)
    whole = RingMap("ring", 8, Epoch(3), MEMBERS, ranges)
    written = {**msgspec.to_builtins(whole), "moves": msgspec.to_builtins(moves)}
    with pytest.raises(ValueError, match=complaint):
        decode(msgspec.json.encode(written))


def test_moves_between_two_shards_may_go_both_ways_at_once() -> None:
    """Only slots are exclusive."""
    back = move(4, source=B, target=A, ident="3.1", epoch=3)
    one = RingMap("ring", 8, Epoch(3), MEMBERS, (of(0, 3), of(4, 7, B, 2)), (move(0, 3), back))
    assert decode(encode(one)) == one
