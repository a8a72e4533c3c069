"""What a shard and its archiver say to each other: JSON lines over the archiver's standard input and output.

    shard ──► Start, then Placed whenever its segments change, Durable whenever more is durable
    shard ◄── Report (`worker.py`) whenever it changes

Must not be done here: I/O.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from fleetlm_common.logs import Level
from fleetlm_shard.archive.feed import Segment


class Start(msgspec.Struct, frozen=True, tag="start"):
    """First line: where the log is, whose it is, and where it goes."""

    folder: str
    dsn: str
    ring_uid: str
    shard: str
    volume_id: str
    term: int
    log_style: Literal["json", "text", "auto"]
    log_level: Level
    retention_s: float = 0.0
    """How long the archive keeps messages at least; 0: for ever."""


class Placed(msgspec.Struct, frozen=True, tag="placed"):
    """The segments of the log, oldest first."""

    segments: list[Segment]
    durable_pos: int


class Durable(msgspec.Struct, frozen=True, tag="durable"):
    """The log is durable, and was looked at, up to here."""

    pos: int


Said = Start | Placed | Durable
"""A line of the shard."""
