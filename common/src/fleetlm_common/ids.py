"""Names for the numbers and strings that travel through FleetLM, and the check of those that clients choose.

Promise: a session id or key that passed `checked_id` is 1–128 bytes of UTF-8 and can be stored, sent and shown as it
is. Must not be done here: hashing to slots (`slots.py`) or making ids (the shard makes message ids, once).
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, NewType

from fleetlm_common.errors import Invalid
from fleetlm_common.limits import ID_BYTES_MAX

if TYPE_CHECKING:
    import random

SessionId = NewType("SessionId", str)
"""One conversation; opaque, 1–128 bytes of UTF-8."""
ParticipantId = NewType("ParticipantId", str)
"""Who speaks or reads; opaque, 1–128 bytes of UTF-8."""
IdempotencyKey = NewType("IdempotencyKey", str)
"""Names one append within its session; 1–128 bytes of UTF-8."""
Seq = NewType("Seq", int)
"""Position of a message in its session, from 1; 0 stands for "before the first"."""
Slot = NewType("Slot", int)
"""`crc32(session id) mod slots`; the unit of ownership."""
Epoch = NewType("Epoch", int)
"""Number of the ring map, +1 with each change."""
Term = NewType("Term", int)
"""Number of a boot on a volume; larger with each."""
ShardName = NewType("ShardName", str)
"""A shard's stable name, for example `shard-0`."""
MessageId = NewType("MessageId", str)
"""A message's UUID (version 7) as text of 36 characters."""


def checked_id(value: str, field: str) -> str:
    """Return `value` if it may be an id.

    Args:
        value: what the client sent.
        field: the field's name, for the error.

    Raises:
        Invalid: empty, longer than 128 bytes, or not encodable as UTF-8 (a lone surrogate); names the field.
    """
    try:
        size_bytes = len(value.encode())
    except UnicodeEncodeError as error:
        raise Invalid(f"{field} is not valid Unicode (lone surrogate)", field=field) from error
    if not 1 <= size_bytes <= ID_BYTES_MAX:
        raise Invalid(f"{field} must be 1 to {ID_BYTES_MAX} bytes of UTF-8, this one has {size_bytes}", field=field)
    return value


def uuid7(now_ms: int, entropy: random.Random) -> str:
    """Make a UUID version 7 (RFC 9562) as text.

    Args:
        now_ms: milliseconds since 1970.
        entropy: where the 72 random bits come from (the variant's two free bits are zero, for speed).
    """
    return uuid7_from(uuid7_prefix(now_ms), entropy)


def uuid7_prefix(now_ms: int) -> str:
    """What all ids of one millisecond begin with; for callers that make many."""
    text = f"{now_ms & 0xFFFFFFFFFFFF:012x}"
    return f"{text[:8]}-{text[8:]}-7"


def uuid7_from(prefix: str, entropy: random.Random) -> str:
    """The rest of an id, see `uuid7`."""
    # `hex` of bytes is quicker than formatting a number of more than 64 bits.
    text = entropy.getrandbits(72).to_bytes(9, "big").hex()
    return f"{prefix}{text[:3]}-8{text[3:6]}-{text[6:]}"


def parse_uuid(value: str, field: str) -> str:
    """Return `value` if it is a UUID in its canonical form.

    Raises:
        Invalid: it is not; names the field.
    """
    try:
        parsed = str(uuid.UUID(value))
    except ValueError as error:
        raise Invalid(f"{field} is not a UUID", field=field) from error
    if parsed != value:
        raise Invalid(f"{field} is not a UUID in canonical form", field=field)
    return value
