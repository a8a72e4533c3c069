"""The refusals of FleetLM, one type for each thing that a caller does next, and their form on the wire.

    FleetError
    ├── TryAgain             retry later with the same key; the outcome is unknown (reasons below)
    ├── Rejected             was not and will not be done as asked
    │   ├── Invalid          mend the request; `field` names what, reason `cursor_ahead` carries `last_seq`
    │   ├── TooLarge         make it smaller; `field` names what, `limit` how far
    │   ├── Unauthenticated  bring credentials
    │   ├── Forbidden        ask somebody who may
    │   ├── NotFound         look elsewhere
    │   ├── Conflict         read what others wrote, decide anew; carries `last_seq`
    │   └── IdempotencyConflict  the key was used for other content; choose a new one
    └── Moved                (between gateway and shard only) ask `owner`, whose map has `epoch`

Promise: `body()` and `from_body()` are inverse; clients see exactly these fields.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec

TryAgainReason = Literal["moving", "draining", "overloaded", "disk_full", "unavailable"]


class ErrorBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """A refusal as clients see it (JSON) and as shards send it (msgpack)."""

    code: str
    reason: str
    message: str
    retry_after_ms: int | None = None
    field: str | None = None
    limit: int | None = None
    last_seq: int | None = None


class FleetError(Exception):
    """Base of every refusal."""

    code: str = "UNAVAILABLE"
    reason: str
    message: str

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason

    def body(self) -> ErrorBody:
        """The refusal as it goes over the wire."""
        return ErrorBody(self.code, self.reason, self.message)


class TryAgain(FleetError):
    """Not now; whether it was done is unknown, so retry with the same key.

    Args:
        message: why, for people.
        reason: `moving`, `draining`, `overloaded`, `disk_full` or `unavailable`.
        retry_after_ms: when a retry makes sense.
    """

    code = "TRY_AGAIN"

    def __init__(self, message: str, *, reason: TryAgainReason, retry_after_ms: int = 250) -> None:
        super().__init__(message, reason=reason)
        self.retry_after_ms = retry_after_ms

    def body(self) -> ErrorBody:
        """The refusal as it goes over the wire."""
        return ErrorBody(self.code, self.reason, self.message, retry_after_ms=self.retry_after_ms)


class Rejected(FleetError):
    """Was not and will not be done as asked."""

    default_reason: str = "rejected"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str | None = None,
        limit: int | None = None,
        last_seq: int | None = None,
    ) -> None:
        super().__init__(message, reason=reason or self.default_reason)
        self.field = field
        self.limit = limit
        self.last_seq = last_seq

    def body(self) -> ErrorBody:
        """The refusal as it goes over the wire."""
        return ErrorBody(
            self.code, self.reason, self.message, field=self.field, limit=self.limit, last_seq=self.last_seq
        )


class Invalid(Rejected):
    """The request is wrong; `field` names what."""

    code = "INVALID"
    default_reason = "invalid"


class TooLarge(Rejected):
    """The request is larger than a limit; `field` names what, `limit` how far."""

    code = "TOO_LARGE"
    default_reason = "too_large"


class Unauthenticated(Rejected):
    """Nobody knows who asks."""

    code = "UNAUTHENTICATED"
    default_reason = "unauthenticated"


class Forbidden(Rejected):
    """Who asks may not."""

    code = "FORBIDDEN"
    default_reason = "forbidden"


class NotFound(Rejected):
    """There is no such thing."""

    code = "NOT_FOUND"
    default_reason = "not_found"


class Conflict(Rejected):
    """`expected_seq` is not the session's `last_seq`, which it carries."""

    code = "CONFLICT"
    default_reason = "expected_seq"


class IdempotencyConflict(Rejected):
    """The key was used in this session for other content."""

    code = "IDEMPOTENCY_CONFLICT"
    default_reason = "key_reused"


class Moved(FleetError):
    """Somebody else owns the slot.

    Args:
        owner: the shard to ask.
        epoch: the epoch of the map that says so.
    """

    code = "MOVED"

    def __init__(self, *, owner: str, epoch: int) -> None:
        super().__init__(f"owned by {owner} at epoch {epoch}", reason="moved")
        self.owner = owner
        self.epoch = epoch


_REJECTED: Final[dict[str, type[Rejected]]] = {
    kind.code: kind for kind in (Invalid, TooLarge, Unauthenticated, Forbidden, NotFound, Conflict, IdempotencyConflict)
}

HTTP_STATUS: Final[dict[str, int]] = {
    "TRY_AGAIN": 503,
    "INVALID": 400,
    "TOO_LARGE": 413,
    "UNAUTHENTICATED": 401,
    "FORBIDDEN": 403,
    "NOT_FOUND": 404,
    "CONFLICT": 409,
    "IDEMPOTENCY_CONFLICT": 409,
}
"""REST status of each code; `TRY_AGAIN overloaded` is 429."""

_TRY_AGAIN_REASONS: Final[dict[str, TryAgainReason]] = {
    "moving": "moving",
    "draining": "draining",
    "overloaded": "overloaded",
    "disk_full": "disk_full",
    "unavailable": "unavailable",
}


def from_body(body: ErrorBody) -> FleetError:
    """The exception that `body` came from; an unknown code (a newer peer) becomes `TryAgain unavailable`."""
    kind = _REJECTED.get(body.code)
    if kind is not None:
        return kind(body.message, reason=body.reason, field=body.field, limit=body.limit, last_seq=body.last_seq)
    reason = _TRY_AGAIN_REASONS.get(body.reason, "unavailable")
    return TryAgain(
        body.message, reason=reason, retry_after_ms=250 if body.retry_after_ms is None else body.retry_after_ms
    )
