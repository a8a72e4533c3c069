"""Ids that clients choose are checked at the door, ids that we make are unique and ordered by time."""

from __future__ import annotations

import random
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlm_common.errors import Invalid
from fleetlm_common.ids import checked_id, parse_uuid, uuid7


@pytest.mark.parametrize("good", ["a", "x" * 128, "é" * 64, "with space", "\x00", "a/b?c#d%", "🙂"])
def test_legal_ids_pass(good: str) -> None:
    """1 to 128 bytes of UTF-8, whatever they are."""
    assert checked_id(good, "session_id") == good


@pytest.mark.parametrize("bad", ["", "x" * 129, "é" * 65, "\ud800", "a\udfffb"])
def test_illegal_ids_are_refused_by_field_name(bad: str) -> None:
    """Empty, too long in bytes, and what UTF-8 cannot say are refused, naming the field."""
    with pytest.raises(Invalid, match="idempotency_key") as refusal:
        checked_id(bad, "idempotency_key")
    assert refusal.value.body().field == "idempotency_key"


@given(st.integers(0, 2**48 - 1), st.integers())
def test_uuid7_is_a_uuid_of_version_7(now_ms: int, seed: int) -> None:
    """The text parses as RFC 9562 version 7 and carries its time."""
    made = uuid7(now_ms, random.Random(seed))
    parsed = uuid.UUID(made)
    assert str(parsed) == made
    assert parsed.version == 7
    assert parsed.variant == uuid.RFC_4122
    assert parsed.int >> 80 == now_ms
    assert parse_uuid(made, "id") == made


def test_uuids_of_one_millisecond_differ() -> None:
    """74 random bits: a million in one millisecond are all different."""
    entropy = random.Random(7)
    assert len({uuid7(1, entropy) for _ in range(100_000)}) == 100_000


@pytest.mark.parametrize(
    "bad", ["", "x", "0190A6B2-0000-7000-8000-000000000000", "{0190a6b2-0000-7000-8000-000000000000}"]
)
def test_other_forms_of_a_uuid_are_refused(bad: str) -> None:
    """One canonical form, so that equal ids are equal bytes."""
    with pytest.raises(Invalid, match="id"):
        parse_uuid(bad, "id")
