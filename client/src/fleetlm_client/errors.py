"""What the SDK raises beyond the refusals of FleetLM itself (`fleetlm_common.errors`), by what the caller does next.

    FleetError (fleetlm_common.errors: TryAgain, Invalid, TooLarge, Conflict, …)
    ├── OutcomeUnknown   may have been appended: append again with `keys`, or look into the session
    ├── NotSent          was never sent, so was not appended: append again, any key will do
    ├── NotReachable     no connection could be made in time: check the address, or whether anything runs there
    ├── ConnectionRefused  the server closed for good (close code 4500–4999): reconnecting would not help
    ├── ProtocolMismatch   the server says what this client cannot read: update one of them
    └── ClientClosed       this object was closed by its owner

Promise: an append ends in an answer, in a `Rejected` (was not and will not be appended) or in one of these.
Must not be done here: deciding which (`outbox.py`, `link.py`).
"""

from __future__ import annotations

from fleetlm_common.errors import FleetError


class OutcomeUnknown(FleetError):
    """The deadline of an append passed, or the client was closed, after it was sent and before it was answered.

    Args:
        keys: idempotency keys of its messages; appending the same again with them can never make a second copy.
        last_error: what the server said last, if it said anything.
    """

    code = "OUTCOME_UNKNOWN"

    def __init__(self, *, keys: tuple[str, ...], last_error: FleetError | None = None) -> None:
        said = f"; last answer: {last_error.message}" if last_error is not None else ""
        super().__init__(
            f"not acknowledged in time, it may or may not be appended (key {keys[0]}){said}", reason="outcome_unknown"
        )
        self.keys = keys
        self.last_error = last_error

    @property
    def key(self) -> str:
        """Key of the first message."""
        return self.keys[0]


class NotSent(FleetError):
    """The append was never sent before its deadline passed or the client was closed; it was not appended.

    Args:
        keys: its idempotency keys.
        why: what kept it from being sent.
    """

    code = "NOT_SENT"

    def __init__(self, *, keys: tuple[str, ...], why: str) -> None:
        super().__init__(f"not sent, so not appended: {why}", reason="not_sent")
        self.keys = keys


class NotReachable(FleetError):
    """No connection stood within the time given."""

    code = "NOT_REACHABLE"

    def __init__(self, message: str) -> None:
        super().__init__(message, reason="not_reachable")


class ConnectionRefused(FleetError):
    """The server closed the connection with a code that forbids to reconnect.

    Args:
        close_code: 4500–4999.
        message: the server's words.
    """

    code = "CONNECTION_REFUSED"

    def __init__(self, message: str, *, close_code: int) -> None:
        super().__init__(message, reason="connection_refused")
        self.close_code = close_code


class ProtocolMismatch(FleetError):
    """Connection after connection brought frames that this client cannot read."""

    code = "PROTOCOL_MISMATCH"

    def __init__(self, message: str) -> None:
        super().__init__(f"frames of the server cannot be read: {message}", reason="protocol_mismatch")


class ClientClosed(FleetError):
    """The client or session object was closed by its owner."""

    code = "CLIENT_CLOSED"

    def __init__(self, message: str = "the client is closed") -> None:
        super().__init__(message, reason="client_closed")
