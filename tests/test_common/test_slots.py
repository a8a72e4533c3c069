"""Slot numbering never changes: an id that moved to another slot would be an id whose messages are lost."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from fleetlm_common.ids import SessionId
from fleetlm_common.slots import slot_of

ROOT = Path(__file__).parents[2]


class Vector(msgspec.Struct):
    """One id and its slots in rings of several sizes."""

    session_id: str
    crc32: int
    slots: dict[str, int]


class Vectors(msgspec.Struct):
    """The golden file."""

    about: str
    vectors: list[Vector]


GOLDEN = msgspec.json.decode((ROOT / "tests/golden/slots.json").read_bytes(), type=Vectors)


@pytest.mark.parametrize("vector", GOLDEN.vectors, ids=lambda vector: repr(vector.session_id)[:20])
def test_golden_vectors(vector: Vector) -> None:
    """Each id has the slot that every release before gave it."""
    for slots, slot in vector.slots.items():
        assert slot_of(SessionId(vector.session_id), int(slots)) == slot


def test_known_crc() -> None:
    """The checksum is the IEEE one: the standard's own check value."""
    assert slot_of(SessionId("123456789"), 2**32) == 0xCBF43926


def test_slot_numbering_exists_once() -> None:
    """No other module computes a slot: two numberings mixed up is a mistake of an earlier system."""
    sources = [path for member in ROOT.glob("*/src") for path in member.rglob("*.py")]
    assert len(sources) > 10
    users = [path for path in sources if re.search(r"\bzlib\b|binascii\.crc", path.read_text(encoding="utf-8"))]
    assert [path.name for path in users] == ["slots.py"]
