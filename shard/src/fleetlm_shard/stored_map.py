"""The ring map on the volume: what keeps a boot from believing an older one.

Promise: the epoch of a stored map never goes back, also over crashes and between two processes on one volume. Each map
is a file of its own, complete when its name appears. It is written into a spare file that was made before: a full disk,
also one without a byte left, keeps no shard from acting on a map. Must not be done here: asking the control plane.
"""

from __future__ import annotations

import errno
from typing import Final

from fleetlm_common.ids import Term
from fleetlm_common.ring import RingMap
from fleetlm_shard.disk import Disk
from fleetlm_shard.volume_types import (
    PAPER_BYTES_MAX,
    ForeignVolume,
    Identity,
    MapPaper,
    MapUnavailable,
    StaleMap,
    StoredMap,
    decode_paper,
    encode_paper,
    map_names,
    map_path,
    spare_path,
)

SPARE_BYTES_MIN: Final = 16 * 1024
"""Maps are padded to it: the next one, with some more ranges, finds as much room as this one leaves."""


def choose_map(live: RingMap | None, stored: StoredMap | None, *, identity: Identity, pod_uid: str) -> RingMap:
    """The map that a boot goes by.

    Args:
        live: the answer of a live read; None if the control plane did not answer.
        stored: the newest one on the volume.
        identity: whose volume it is.
        pod_uid: this process's pod; "" is no pod and matches none.

    Raises:
        ForeignVolume: the answer is the map of another ring.
        StaleMap: the answer is older than what was stored, or another map of the same epoch.
        MapUnavailable: no answer, and nothing stored by this very pod.
    """
    if live is not None:
        if live.uid != identity.ring_uid:
            raise ForeignVolume(
                field="ring_uid", found=identity.ring_uid, wanted=live.uid, volume_id=identity.volume_id
            )
        _refuse_stale(live, stored)
        return live
    if stored is None or stored.paper is None:
        raise MapUnavailable("the control plane does not answer and no readable ring map is stored on this volume")
    # Another pod may have slept through any number of changes; a container of the same pod has the pod's own history.
    if not pod_uid or stored.paper.pod_uid != pod_uid:
        raise MapUnavailable(
            f"the control plane does not answer; the ring map stored on this volume (epoch {stored.epoch}) is of pod "
            f"{stored.paper.pod_uid!r}, and only a container restarted in that pod may go by it (this is {pod_uid!r})"
        )
    return stored.paper.ring


def _refuse_stale(live: RingMap, stored: StoredMap | None) -> None:
    if stored is None:
        return
    if live.epoch < stored.epoch:
        raise StaleMap(
            f"the control plane answered with ring map epoch {live.epoch}, "
            f"but epoch {stored.epoch} is stored on this volume"
        )
    if stored.paper is not None and live.epoch == stored.epoch and live != stored.paper.ring:
        raise StaleMap(
            f"the control plane's ring map of epoch {live.epoch} is not the one of that epoch stored on this volume: "
            "an epoch names one map; was the control plane restored from a backup?"
        )


def write_map(disk: Disk, ring: RingMap, *, term: Term, pod_uid: str) -> None:
    """Store `ring` unless a map as new is stored already, then remove what it replaces.

    One call at a time in a process (`Ownership.adopt` holds a lock): all of them share the spare file. None after one
    that failed (`Volume.store_map` sees to it): the spare file may be the stored map by another name then.

    Raises:
        OSError: whatever the disk answered.
    """
    stored = map_names(disk.listdir(""))
    if any(epoch > ring.epoch or (epoch == ring.epoch and by == term) for epoch, by, _ in stored):
        return
    final, spare = map_path(term, ring.epoch), spare_path(term)
    file = disk.open(spare, writable=True) if disk.exists(spare) else disk.create(spare)
    try:
        # As long as the spare file: nothing stays of what was in it, and it needs no blocks but its own.
        data = encode_paper(MapPaper(pod_uid=pod_uid, ring=ring), size_bytes=file.size() or SPARE_BYTES_MIN)
        file.pwrite(data, 0)
        file.sync()
    finally:
        file.close()
    disk.link(spare, final)
    disk.sync_folder("")
    disk.unlink(spare)
    # Only after the new name is durable; never a younger process's.
    for _, by, name in stored:
        if by <= term:
            _remove(disk, name)
    _make_spare(disk, spare, max(SPARE_BYTES_MIN, len(data)))


def _make_spare(disk: Disk, spare: str, size_bytes: int) -> None:
    """Take the room of the next map while there is some: what was just removed leaves as much."""
    file = disk.create(spare)
    try:
        file.pwrite(bytes(size_bytes), 0)
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
    finally:
        file.close()


def read_newest_map(disk: Disk, *, ring_uid: str) -> StoredMap | None:
    """The stored map of the highest epoch (of the highest term, if two processes stored that epoch).

    Raises:
        OSError: whatever the disk answered.
    """
    names = map_names(disk.listdir(""))
    if not names:
        return None
    epoch, term, name = names[-1]
    file = disk.open(name)
    try:
        data = file.pread(PAPER_BYTES_MAX, 0)
    finally:
        file.close()
    try:
        paper = decode_paper(data, MapPaper)
    except ValueError:
        paper = None
    if paper is not None and (paper.ring.uid, paper.ring.epoch) != (ring_uid, epoch):
        paper = None  # intact, but not what its name says: as good as damaged
    return StoredMap(term=term, epoch=epoch, paper=paper)


def _remove(disk: Disk, path: str) -> None:
    try:
        disk.unlink(path)
    except FileNotFoundError:
        return  # another process, older or younger, was here first
