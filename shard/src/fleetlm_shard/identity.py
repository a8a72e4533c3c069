"""Whose volume it is: read the identity, or format an empty volume, once for all time.

Promise: of several processes that format at once one wins, by `link`, and all go on with the winner's identity; it is
durable before anything else is written, so data without identity means that somebody lost it. A volume of somebody else
is refused before a byte is written. Must not be done here: deciding whether an empty volume may serve (the ring map's
word, `VolumeLost`).
"""

from __future__ import annotations

from contextlib import suppress

from fleetlm_shard.disk import Disk
from fleetlm_shard.terms import find_highest_term
from fleetlm_shard.volume_types import (
    ASIDE_FOLDER,
    IDENTITY,
    LOG_FOLDER,
    PAPER_BYTES_MAX,
    ForeignVolume,
    Identity,
    VolumeUnreadable,
    decode_paper,
    encode_paper,
)


def read_identity(disk: Disk) -> Identity | None:
    """The identity as it stands; None on a volume that was never formatted.

    Raises:
        VolumeUnreadable: damaged, or of a newer format.
        OSError: whatever the disk answered.
    """
    try:
        file = disk.open(IDENTITY)
    except FileNotFoundError:
        return None
    try:
        data = file.pread(PAPER_BYTES_MAX, 0)
    finally:
        file.close()
    try:
        return decode_paper(data, Identity)
    except ValueError as error:
        raise VolumeUnreadable(f"the volume's file {IDENTITY!r} is {error}") from error


def settle_identity(disk: Disk, wanted: Identity, *, boot_id: str) -> tuple[Identity, bool]:
    """Return the volume's identity, durable, and whether the volume was empty (then it is formatted as `wanted`).

    Raises:
        ForeignVolume: ring or shard is another one.
        VolumeUnreadable: no identity beside data, no log beside an identity, or an identity that cannot be read.
        OSError: whatever the disk answered.
    """
    # Data first, then the identity: the other way round another process may format and write between the two looks.
    term = find_highest_term(disk)
    found = read_identity(disk)
    was_empty = found is None
    if found is None:
        if term:
            raise VolumeUnreadable(
                f"the volume has files of term {term} but no file {IDENTITY!r}: "
                "it was removed, or this is half a copy of a volume"
            )
        _format(disk, wanted, boot_id=boot_id)
        found = read_identity(disk)
        if found is None:
            raise VolumeUnreadable(f"the file {IDENTITY!r} was removed while the volume was being formatted")
    for field, is_there, is_wanted in (
        ("ring_uid", found.ring_uid, wanted.ring_uid),
        ("shard", found.shard, wanted.shard),
    ):
        if is_there != is_wanted:
            raise ForeignVolume(field=field, found=is_there, wanted=is_wanted, volume_id=found.volume_id)
    if not disk.exists(LOG_FOLDER):
        raise VolumeUnreadable(f"the volume has a file {IDENTITY!r} but no folder {LOG_FOLDER!r}: its log was removed")
    # The name may be in the cache only, of a process that was killed here; a term must not outlive it.
    disk.sync_folder("")
    return found, was_empty


def _format(disk: Disk, identity: Identity, *, boot_id: str) -> None:
    disk.mkdir(LOG_FOLDER)
    disk.mkdir(ASIDE_FOLDER)
    # Folders first: a volume with an identity and no log has lost its log.
    disk.sync_folder("")
    temporary = f"tmp-{IDENTITY}-{boot_id}"
    file = disk.create(temporary)
    try:
        file.pwrite(encode_paper(identity), 0)
        file.sync()
    finally:
        file.close()
    # Exists: another process formatted first. Not found: and it has cleared our temporary name away.
    with suppress(FileExistsError, FileNotFoundError):
        disk.link(temporary, IDENTITY)
    with suppress(FileNotFoundError):
        disk.unlink(temporary)
