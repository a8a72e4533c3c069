"""RingMap object ↔ `RingMap` value. Pure.

Promise: what one side writes the other reads, whole or not at all: a map that is not whole raises. Must not be done
here: reading or writing objects (`kubeapi.py`), deciding.
"""

from __future__ import annotations

from typing import Any

import msgspec

from fleetlm_common.control import RingSpec
from fleetlm_common.ids import ShardName
from fleetlm_common.kubeapi import Object
from fleetlm_common.ring import Member, Move, RingMap, SlotRange


class _Member(msgspec.Struct, frozen=True, rename="camel"):
    name: str
    volume_id: str


class _Map(msgspec.Struct, frozen=True):
    format: int
    epoch: int
    members: tuple[_Member, ...]
    ranges: tuple[SlotRange, ...]
    moves: tuple[Move, ...] = ()


class _Spec(msgspec.Struct, frozen=True, rename="camel"):
    uid: str
    slots: int
    shards: int
    in_place: tuple[ShardName, ...] = ()
    map: _Map | None = None


def read_ring_map(found: Object) -> tuple[RingSpec, RingMap | None]:
    """The ring and its map as a RingMap object says.

    Raises:
        ValueError: not a whole map (msgspec's ValidationError is one); says why.
    """
    spec = msgspec.convert(found["spec"], _Spec)
    ring = RingSpec(uid=spec.uid, slots=spec.slots, shards=spec.shards, in_place=spec.in_place)
    if spec.map is None:
        return ring, None
    given = msgspec.to_builtins(spec.map)
    given["members"] = [{"name": member.name, "volume_id": member.volume_id} for member in spec.map.members]
    return ring, msgspec.convert({"uid": spec.uid, "slots": spec.slots, **given}, RingMap)


def ring_map_spec(spec: RingSpec, ring: RingMap | None) -> Object:
    """The `spec` of a RingMap object."""
    made: dict[str, Any] = {"uid": spec.uid, "slots": spec.slots, "shards": spec.shards}
    if spec.in_place:
        made["inPlace"] = list(spec.in_place)
    if ring is not None:
        given: dict[str, Any] = msgspec.to_builtins(ring)
        made["map"] = {
            "format": ring.format,
            "epoch": ring.epoch,
            "members": [_member(member) for member in ring.members],
            "ranges": given["ranges"],
            **({"moves": given["moves"]} if ring.moves else {}),
        }
    return made


def _member(member: Member) -> dict[str, str]:
    return {"name": member.name, "volumeId": member.volume_id}
