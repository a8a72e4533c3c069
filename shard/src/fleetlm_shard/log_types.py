"""What the two halves of the shard say to each other about the log: values, settings, errors. No behaviour.

    LogError
    ├── LogBusy        too much is queued: answer TRY_AGAIN overloaded
    ├── LogDiskFull    the reserve is all that is left: answer TRY_AGAIN disk_full; appends resume when space returns
    ├── LogStopped     a write, sync, look or the fence failed: nothing more will be acknowledged, the process must end
    ├── GroupTooLarge  a group that must not be split is larger than a batch may be: answer TOO_LARGE
    └── LogUnreadable  boot cannot tell what the log was (words for a person in the message): refuse to serve

Promise: a *position* (`pos`) is an offset in the logical log of the shard (docs/log.md) and never comes twice for two
different records. Must not be done here: I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BATCH_BYTES_MAX: Final = 1024 * 1024
"""One group commit: a sync of more takes longer than it saves, and everybody in it waits for all of it."""
QUEUE_BYTES_MAX: Final = 32 * 1024 * 1024
"""Appended and not durable: half a second of a slow disk; more would only be answered after its deadline."""
QUEUE_RECORDS_MAX: Final = 50_000
"""The same, counted: small records cost memory by their number."""
READ_BYTES_MAX: Final = 1024 * 1024
"""Most bytes of messages of one `read`, whatever is asked for."""


class LogError(Exception):
    """Base of the log's refusals."""


class LogBusy(LogError):
    """`QUEUE_BYTES_MAX` or `QUEUE_RECORDS_MAX` is reached."""


class LogDiskFull(LogError):
    """Only the reserve is left, or the next segment could not be prepared."""


class LogStopped(LogError):
    """The log's writer has stopped for good; `__cause__` says why."""


class GroupTooLarge(LogError):
    """A group is larger than one batch may be."""


class LogUnreadable(LogError):
    """Boot refuses: what is on the volume cannot be put together without risking that a wrong record is served."""


FsyncPolicy = Literal["always", "interval", "never"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """Settings of the log; sizes in bytes.

    `fsync`: `always` acknowledges after fdatasync; `interval` after the write, with an fdatasync each
    `fsync_interval_ms`; `never` leaves it to the operating system (segments, tables and marks are still synced).
    """

    segment_bytes: int = 64 * 1024 * 1024
    boot_segment_bytes: int = 4 * 1024 * 1024
    """Length of the segment that a boot makes: small, for nobody is served before it is written."""
    batch_bytes_max: int = BATCH_BYTES_MAX
    queue_bytes_max: int = QUEUE_BYTES_MAX
    queue_records_max: int = QUEUE_RECORDS_MAX
    reserve_bytes: int = 64 * 1024 * 1024
    """Free space that appends never use: checkpoints, marks and the next boot's segment need it."""
    fsync: FsyncPolicy = "always"
    fsync_interval_ms: int = 100
    idle_s: float = 1.0
    """How often an idle log looks at its term, and when it writes its mark."""
    readers: int = 2
    """Threads that read messages back."""

    def __post_init__(self) -> None:
        """Refuse sizes that do not go together."""
        if self.segment_bytes < 4096 + 2 * self.batch_bytes_max:
            raise ValueError("segment_bytes must hold two batches of batch_bytes_max")


class Fence(Protocol):
    """The volume's term, as the log sees it (`volume.Volume` is one)."""

    @property
    def term(self) -> int:
        """This boot's term."""
        ...

    @property
    def ring_uid(self) -> str:
        """The ring that the volume belongs to."""
        ...

    @property
    def shard(self) -> str:
        """The shard that the volume belongs to."""
        ...

    def look(self) -> None:
        """One stat: raises if a younger term exists, or if it cannot be known."""
        ...


class CheckpointRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One session as a checkpoint knows it. Positions and seqs of durable records only.

    `first_seq`/`first_pos`: its first message ever (0, 0: none yet); `last_seq`/`last_pos`: its last.
    `metadata`: the JSON object given at creation, or `{}`. `cursors`: participant → last read seq.
    `trimmed_seq`: what is missing up to there was trimmed by the shard that the session came from.
    """

    slot: int
    first_seq: int
    first_pos: int
    last_seq: int
    last_pos: int
    inserted_at_us: int
    metadata: bytes
    cursors: dict[str, int]
    trimmed_seq: int = 0


class MoveFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What moves left in the log (docs/moves.md), as a checkpoint keeps it.

    Attributes:
        copied: slots of which it holds what was imported.
        confirmed: slot → id of the move whose CONFIRMED stands in the log.
        epoch: of the newest map that a SEALED or CONFIRMED names.
    """

    copied: tuple[int, ...] = ()
    confirmed: dict[int, str] = {}
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Damage:
    """`[from_pos, to_pos)` of the log is unreadable; up to `lost_max` messages in it that nobody can name."""

    from_pos: int
    to_pos: int
    lost_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMeta:
    """What a checkpoint says beside its rows.

    Attributes:
        pos: every record below it is in the rows.
        keys_from_pos: where the idempotency window began; boot replays from the smaller of both.
        opened: slot → epoch at which this shard opened it.
        facts: what moves left.
    """

    pos: int
    keys_from_pos: int
    opened: Mapping[int, int]
    facts: MoveFacts


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A durable message as read back and verified."""

    seq: int
    pos: int
    json: bytes


@dataclass(frozen=True, slots=True)
class Missing:
    """Seqs `from_seq` to `to_seq` (inclusive) that this log does not hold (any more)."""

    from_seq: int
    to_seq: int
    reason: Literal["trimmed", "damaged"]


@dataclass(frozen=True, slots=True)
class ReadResult:
    """A page: durable messages ascending from the asked seq, and the holes before, between and after them.

    `missing` says what is known to be missing up to the last message that the indexes name for this page; of what lies
    beyond, the caller knows `last_seq`. `has_more`: the log holds later messages of the session.
    """

    messages: Sequence[StoredMessage]
    missing: Sequence[Missing]
    has_more: bool


@dataclass(slots=True)
class LogStats:
    """Numbers for metrics; kept by the log's owner, read by anybody in its loop."""

    appended_records: int = 0
    appended_bytes: int = 0
    batches: int = 0
    rounds: int = 0
    marks: int = 0
    rotations: int = 0
    segments: int = 0
    segment_bytes: int = 0
    queued_records: int = 0
    queued_bytes: int = 0
    durable_pos: int = 0
    checkpoint_pos: int = 0
    checkpoints: int = 0
    checkpoint_failures: int = 0
    seal_failures: int = 0
    background_failures: int = 0
    trim_pos: int = 0
    trimmed_segments: int = 0
    compacted_segments: int = 0
    compacted_bytes: int = 0
    free_bytes: int = 0
    reads: int = 0
    damage: list[Damage] = field(default_factory=list[Damage])
    strays: list[str] = field(default_factory=list[str])


def lost_seqs(damage: Sequence[Damage], last_pos: int) -> int:
    """By how much a session's seq must skip: unnamed messages that may have followed its last known record.

    Args:
        damage: everything known to be damaged (`Log.damage`).
        last_pos: position of the session's last known message (0 if it has none).
    """
    return sum(each.lost_max for each in damage if each.lost_max and last_pos < each.to_pos)
