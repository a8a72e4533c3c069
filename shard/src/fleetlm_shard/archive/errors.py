"""What can go wrong with the archive, by what the worker does next.

    ArchiveError
    ├── ArchiveRefused   a person must look (another ring's database, a newer version); tried again, seldom
    ├── Superseded       somebody else moved this volume's position: read it again
    ├── Diverged         another message stands under (session, seq): its slot is halted, nothing overwritten
    └── FeedBroken       the log cannot be read where the archive goes on: a person must look

Must not be done here: PostgreSQL's own errors (`store.py` sorts them).
"""

from __future__ import annotations


class ArchiveError(Exception):
    """Base of the archive's own errors."""


class ArchiveRefused(ArchiveError):
    """The database is not one that this shard may write to.

    Args:
        reason: stable name.
        message: words for a person.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Superseded(ArchiveError):
    """The position in the database is not the one that this worker left there."""


class Diverged(ArchiveError):
    """Another message stands in the archive under this session and seq."""

    def __init__(self, *, slot: int, session: bytes, seq: int) -> None:
        super().__init__(f"slot {slot}: the archive holds another message {seq} of a session")
        self.slot = slot
        self.session = session
        self.seq = seq


class FeedBroken(ArchiveError):
    """Bytes of the log that should be there are not."""
