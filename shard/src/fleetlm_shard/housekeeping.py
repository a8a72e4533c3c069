"""Slow work beside the log's hot path, for the background lane: indexes, deletions.

Promise: each step may be cut off anywhere and done again; nothing is removed here that the log still refers to (the
caller made that durable before). Must not be done here: state of the log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from fleetlm_shard.segment_index import IndexMeta
from fleetlm_shard.segments import (
    LOG_FOLDER,
    discard,
    index_path,
    parse_names,
    publish,
    segment_path,
)
from fleetlm_shard.table import KIND_INDEX, TableBuilder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fleetlm_shard.chain import Link
    from fleetlm_shard.disk import Disk
    from fleetlm_shard.segment_index import MemoryIndex
    from fleetlm_shard.segments import SegmentId, TempNames


def write_index(
    disk: Disk,
    temps: TempNames,
    link: Link,
    index: MemoryIndex,
    *,
    path: str,
    publish: Callable[[Disk, str, str], None] = publish,
    pause: Callable[[], None],
) -> str:
    """Write a sealed segment's index; durable when it returns. Returns its path.

    `publish` gives it its name: a new one, or that of the index in whose place it comes.
    """
    temp = temps.next()
    file = disk.create(temp)
    try:
        builder = TableBuilder(file, KIND_INDEX)
        for key, value in index.entries(link.header.base_pos, pause):
            builder.add(key, value)
        meta = IndexMeta(link.header, link.end_pos, index.messages, index.inserted_at_us_max)
        builder.finish(msgspec.json.encode(meta))
        file.sync()
        publish(disk, temp, path)
    except Exception:  # also that of `pause`
        discard(disk, file, temp)
        raise
    file.close()
    return path


def unlink_all(disk: Disk, paths: Iterable[str]) -> None:
    """Remove names that may have gone already."""
    for path in paths:
        try:
            disk.unlink(path)
        except FileNotFoundError:
            continue


def delete_segments(disk: Disk, ids: Iterable[SegmentId]) -> None:
    """Remove segments with all their indexes, oldest first; damaged ones live on in the folder for them."""
    gone = set(ids)
    if not gone:
        return
    listing = parse_names(disk.listdir(LOG_FOLDER))
    for each in sorted(gone):
        unlink_all(disk, [segment_path(each)])
        unlink_all(disk, [index_path(own) for own in listing.indexes if own.segment == each])
    disk.sync_folder(LOG_FOLDER)
