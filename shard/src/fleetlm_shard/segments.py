"""Files of the log's folder: their names, and how one becomes visible (docs/log.md, "The volume").

Promise: a file has its final name only after all of its bytes are synced; names are made by `link`, never by a rename;
a temporary name carries the term of its process and is used by no other. Must not be done here: what is in the files.
"""

from __future__ import annotations

import itertools
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fleetlm_shard.disk import Disk, File

LOG_FOLDER: Final = "log"
ASIDE_FOLDER: Final = "aside"
_ZEROS: Final = bytes(1024 * 1024)
_SEGMENT: Final = re.compile(r"(\d{10,})-(\d{10,})\.seg")
_INDEX: Final = re.compile(r"(\d{10,})-(\d{10,})-(\d{10,})\.idx")
_CHECKPOINT: Final = re.compile(r"(\d{10,})-(\d{10,})\.ckpt")
_TEMP: Final = re.compile(r"tmp-(\d{10,})-(\d{10,})")


class SegmentId(NamedTuple):
    """Segment `number` of `term`; the order of these is the order of their making."""

    term: int
    number: int


class IndexId(NamedTuple):
    """The index of a segment, made in the term `made_in`.

    A frozen elder may write an index of a segment that it went on filling after the cut: so each term has its own, and
    one counts only if it ends where the chain says that the segment ends.
    """

    segment: SegmentId
    made_in: int


class CheckpointId(NamedTuple):
    """Checkpoint `number` of `term`."""

    term: int
    number: int


def segment_path(each: SegmentId) -> str:
    """The final name of a segment."""
    return f"{LOG_FOLDER}/{each.term:010d}-{each.number:010d}.seg"


def aside_path(each: SegmentId) -> str:
    """The name under which a damaged segment is kept."""
    return f"{ASIDE_FOLDER}/{each.term:010d}-{each.number:010d}.seg"


def index_path(each: IndexId) -> str:
    """The final name of an index."""
    return f"{LOG_FOLDER}/{each.segment.term:010d}-{each.segment.number:010d}-{each.made_in:010d}.idx"


def checkpoint_path(each: CheckpointId) -> str:
    """The final name of a checkpoint."""
    return f"{LOG_FOLDER}/{each.term:010d}-{each.number:010d}.ckpt"


@dataclass(frozen=True, slots=True)
class Listing:
    """The log's folder by kinds, each ascending."""

    segments: list[SegmentId]
    indexes: list[IndexId]
    checkpoints: list[CheckpointId]
    temps: list[tuple[int, str]]
    unknown: list[str]


def parse_names(names: Iterable[str]) -> Listing:
    """Sort the names of the log's folder into kinds."""
    found = Listing([], [], [], [], [])
    for name in names:
        if match := _SEGMENT.fullmatch(name):
            found.segments.append(SegmentId(int(match[1]), int(match[2])))
        elif match := _INDEX.fullmatch(name):
            found.indexes.append(IndexId(SegmentId(int(match[1]), int(match[2])), int(match[3])))
        elif match := _CHECKPOINT.fullmatch(name):
            found.checkpoints.append(CheckpointId(int(match[1]), int(match[2])))
        elif match := _TEMP.fullmatch(name):
            found.temps.append((int(match[1]), f"{LOG_FOLDER}/{name}"))
        else:
            found.unknown.append(f"{LOG_FOLDER}/{name}")
    for kind in (found.segments, found.indexes, found.checkpoints, found.temps):
        kind.sort()
    return found


class TempNames:
    """Temporary names of one process; each is given once. May be shared by threads."""

    def __init__(self, term: int) -> None:
        self._term = term
        self._numbers = itertools.count(1)

    def next(self) -> str:
        """A name that was never given before."""
        return f"{LOG_FOLDER}/tmp-{self._term:010d}-{next(self._numbers):010d}"  # noqa: S108  not /tmp


@dataclass(frozen=True, slots=True)
class Prepared:
    """A zero-filled and synced file that waits for its header and its name."""

    file: File
    temp: str
    size: int


def prepare(disk: Disk, temp: str, *, size: int, pause: Callable[[], None]) -> Prepared:
    """Make a file of `size` zeros, synced; on an error nothing of it remains."""
    file = disk.create(temp)
    try:
        at = 0
        while at < size:
            part = min(len(_ZEROS), size - at)
            file.pwrite(_ZEROS[:part] if part < len(_ZEROS) else _ZEROS, at)
            at += part
            # Synced piece by piece: one sync of the whole would hold up the writer's small ones behind it.
            file.sync()
            pause()
        if not size:
            file.sync()
    except OSError:
        discard(disk, file, temp)
        raise
    return Prepared(file, temp, size)


def discard(disk: Disk, file: File, temp: str) -> None:
    """Forget a temporary file; one that a younger process has cleared away is gone already."""
    file.close()
    with suppress(FileNotFoundError):
        disk.unlink(temp)


def publish(disk: Disk, temp: str, path: str) -> None:
    """Give a synced file its final name, durably."""
    disk.link(temp, path)
    disk.sync_folder(LOG_FOLDER)
    # Not synced again: a temporary name that comes back after a crash is removed by a later boot.
    disk.unlink(temp)


def publish_over(disk: Disk, temp: str, path: str) -> None:
    """Give a synced file the name of one that says the same, durably: the only rename of a volume."""
    disk.replace(temp, path)
    disk.sync_folder(LOG_FOLDER)


def keep_aside(disk: Disk, each: SegmentId) -> None:
    """Hard link a damaged segment to the folder that retention does not touch."""
    disk.mkdir(ASIDE_FOLDER)
    try:
        disk.link(segment_path(each), aside_path(each))
    except FileExistsError:
        return
    disk.sync_folder(ASIDE_FOLDER)
