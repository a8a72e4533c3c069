"""Slot numbering: the only place where a session id becomes a slot.

Promise: `slot_of` never changes for a given number of slots; tests/golden/slots.json holds vectors of it.
"""

from __future__ import annotations

from typing import Final
from zlib import crc32

from fleetlm_common.ids import SessionId, Slot

SLOTS_MIN: Final = 1
"""Tests use small rings; the ShardRing resource asks for 256 or more."""
SLOTS_MAX: Final = 1024
"""The ring map stays one small object."""


def slot_of(session_id: SessionId, slots: int) -> Slot:
    """The slot of a session: CRC-32 (IEEE) of its UTF-8 bytes, modulo the number of slots."""
    return Slot(crc32(session_id.encode()) % slots)
