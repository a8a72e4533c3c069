"""A refusal says the same before and after the wire."""

from __future__ import annotations

import msgspec
import pytest

from fleetlm_common.errors import (
    HTTP_STATUS,
    Conflict,
    ErrorBody,
    FleetError,
    Forbidden,
    IdempotencyConflict,
    Invalid,
    NotFound,
    TooLarge,
    TryAgain,
    Unauthenticated,
    from_body,
)

REFUSALS: list[FleetError] = [
    TryAgain("no room", reason="disk_full", retry_after_ms=5000),
    TryAgain("at once", reason="moving", retry_after_ms=0),
    Invalid("seq is beyond", reason="cursor_ahead", field="seq", last_seq=0),
    TooLarge("content", field="content", limit=65536),
    Unauthenticated("who"),
    Forbidden("not yours"),
    NotFound("none"),
    Conflict("others wrote", last_seq=12),
    IdempotencyConflict("used", field="idempotency_key"),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: f"{refusal.code}")
def test_body_and_back(refusal: FleetError) -> None:
    """Type, code, reason, words and every field survive JSON and msgpack."""
    body = refusal.body()
    for codec in (msgspec.json, msgspec.msgpack):
        again = from_body(codec.decode(codec.encode(body), type=ErrorBody))
        assert type(again) is type(refusal)
        assert again.body() == body


def test_a_newer_peers_code_becomes_try_again() -> None:
    """An unknown code never becomes "was not appended"."""
    again = from_body(ErrorBody("NEW_CODE", "new_reason", "?"))
    assert isinstance(again, TryAgain)
    assert again.reason == "unavailable"


def test_every_code_has_a_status() -> None:
    """REST answers each code with a status of its class."""
    assert {refusal.code for refusal in REFUSALS} == set(HTTP_STATUS)
    assert all(400 <= status <= 503 for status in HTTP_STATUS.values())
