"""What shards say of themselves, as parts of sentences. Pure.

Must not be done here: asking them (`shardwords.py`), conditions (`verdict.py`).
"""

from __future__ import annotations

from typing import Final

from fleetlm_operator.observed import Observed

LOST_WORDS: Final = frozenset({"VolumeLost", "ForeignVolume"})
"""A shard's words for: this is not the volume that the ring map binds me to."""
UNREADABLE_WORDS: Final = frozenset({"VolumeUnreadable", "LogUnreadable"})
"""A shard's words for: a person must look at the volume before I serve anything from it."""
ARCHIVE_WORDS: Final = (
    "ArchiveDiverged",
    "ArchiveRefused",
    "ArchiveFeedBroken",
    "ArchiveAway",
    "ArchiveQuarantined",
)
"""A shard's words for: I serve, and the archive does not get everything; the worst first."""
WORD_CHARS_MAX: Final = 300
"""Of a shard's own sentence."""
NAMED_MAX: Final = 4
"""Shards that are named; more are counted."""


def said_by(seen: Observed, reasons: frozenset[str]) -> str:
    """Which shards say one of these words, and what the first of them says; empty if none does."""
    found = [number for number, word in seen.words.items() if word.reason in reasons and number in seen.pods]
    if not found:
        return ""
    more = f" (the same: {listed(tuple(found[1:]))})" if len(found) > 1 else ""
    return f"{word_of(seen, found[0])}{more}"


def word_of(seen: Observed, number: int) -> str:
    """What a shard says of itself: `shard-1: OpeningSlots: …`; its name if it says nothing."""
    word = seen.words.get(number)
    if word is None:
        return f"shard-{number}"
    return f"shard-{number}: {word.reason}: {word.message[:WORD_CHARS_MAX]}"


def listed(numbers: tuple[int, ...]) -> str:
    """Shards by name; many are counted."""
    named = ", ".join(f"shard-{number}" for number in numbers[:NAMED_MAX])
    return named if len(numbers) <= NAMED_MAX else f"{named} and {len(numbers) - NAMED_MAX} more"
