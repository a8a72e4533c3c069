"""The fence of one shard's volume: whose it is, who owns it now, and the ring map that was last seen on it.

Promise: of all processes that ever held this volume only the one with the highest term gets past `look`. The order at
boot, which callers must keep: `take_volume` (the term is durable) → `keep_term` runs from here on → live read of the
ring map, `choose_map`, `store_map` → read the log, make the new segment → `look` → serve. After each sync and before
any word of it leaves the process: `look`. An error of any method here ends the process.
Must not be done here: trusting clocks or the control plane; the fence lies where the data lies.

    keep = asyncio.create_task(keep_term(volume, sleep=asyncio.sleep))   # ends: asked to leave, Fenced, VolumeFailed
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Final

from fleetlm_common.clock import Clock
from fleetlm_common.ids import ShardName, Term
from fleetlm_common.logs import Logger, NullLogger
from fleetlm_common.ring import RingMap
from fleetlm_shard.disk import Disk, File
from fleetlm_shard.identity import settle_identity
from fleetlm_shard.stored_map import read_newest_map, write_map
from fleetlm_shard.terms import Sleep, take_term
from fleetlm_shard.volume_types import (
    BOOT_ID,
    HEARTBEAT_OFFSET,
    Fenced,
    Identity,
    StoredMap,
    VolumeFailed,
    heartbeat,
    leave_path,
    leftovers,
    term_path,
)

TAKEOVER_AFTER_S: Final = 10.0
"""Ten heartbeats: longer than any stall of a disk or a scheduler that an owner survives."""
KEEP_PERIOD_S: Final = 1.0
"""Look, heartbeat and request each second: an asked owner leaves within it, an idle fenced one ends within it."""


class Volume:
    """A volume whose newest term is this process's; made by `take_volume` only.

    `look` and `beat` may be called from any thread; the rest belongs to the process's main task.
    """

    def __init__(
        self, disk: Disk, *, identity: Identity, term: Term, file: File, pod_uid: str, was_empty: bool
    ) -> None:
        self.disk = disk
        self.identity = identity
        self.pod_uid = pod_uid
        self.was_empty = was_empty
        """Nothing had ever been stored here before this boot."""
        self._term = term
        self._file: File | None = file
        self._beats = 0
        self._map_failed = ""
        # The one lock: a heartbeat in another thread must not write to a descriptor that `close` has just given back
        # to the system, where the next file opened (a segment) would get its number.
        self._closing = threading.Lock()
        self._younger = term_path(term + 1)
        self._request = leave_path(term)

    @property
    def term(self) -> Term:
        """This boot's number; larger than any before on this volume."""
        return self._term

    @property
    def ring_uid(self) -> str:
        """The ring that the volume belongs to."""
        return self.identity.ring_uid

    @property
    def shard(self) -> ShardName:
        """The shard that the volume belongs to."""
        return self.identity.shard

    @property
    def volume_id(self) -> str:
        """Made when the volume was formatted; a fresh volume has another one."""
        return self.identity.volume_id

    def look(self) -> None:
        """One stat, after a sync and before anything is said about what it made durable.

        Raises:
            Fenced: a younger process holds the volume.
            VolumeFailed: it cannot be known, which must count as the same.
        """
        try:
            fenced = self.disk.exists(self._younger)
        except OSError as error:
            raise VolumeFailed(f"cannot look at the volume's term: {error}") from error
        if fenced:
            raise Fenced(self._term)

    def beat(self) -> None:
        """Rewrite the heartbeat in place and sync it, so that an idle shard too learns that its disk is gone.

        Raises:
            VolumeFailed: the disk refused, or the volume is closed.
        """
        with self._closing:
            if self._file is None:
                raise VolumeFailed("the volume is closed")
            self._beats += 1
            try:
                self._file.pwrite(heartbeat(self._beats), HEARTBEAT_OFFSET)
                self._file.sync()
            except OSError as error:
                raise VolumeFailed(f"cannot write the heartbeat: {error}") from error

    def asked_to_leave(self) -> bool:
        """Whether a younger process waits for this one: stop sequencing, sync, `close`, exit.

        Raises:
            VolumeFailed: it cannot be known.
        """
        try:
            return self.disk.exists(self._request)
        except OSError as error:
            raise VolumeFailed(f"cannot look for requests to leave: {error}") from error

    def store_map(self, ring: RingMap) -> None:
        """Make `ring` the newest stored map, durably; a map that is not newer changes nothing.

        Raises:
            VolumeFailed: the disk refused, now or once before: what is there of that map may not be durable.
        """
        assert ring.uid == self.ring_uid, "a map of another ring was refused before (ForeignVolume)"
        if self._map_failed:
            raise VolumeFailed(self._map_failed)
        try:
            write_map(self.disk, ring, term=self._term, pod_uid=self.pod_uid)
        except OSError as error:
            self._map_failed = f"cannot store the ring map of epoch {ring.epoch}: {error}"
            raise VolumeFailed(self._map_failed) from error

    def stored_map(self) -> StoredMap | None:
        """The newest stored map, whoever stored it; None if there is none.

        Raises:
            VolumeFailed: the disk refused.
        """
        try:
            return read_newest_map(self.disk, ring_uid=self.ring_uid)
        except OSError as error:
            raise VolumeFailed(f"cannot read the stored ring map: {error}") from error

    def close(self) -> None:
        """Give the volume up: the lock is free and a waiting process goes on at once. Safe to call twice."""
        with self._closing:
            file, self._file = self._file, None
            if file is not None:
                file.close()


async def take_volume(
    disk: Disk,
    *,
    identity: Identity,
    pod_uid: str,
    boot_id: str,
    clock: Clock,
    sleep: Sleep,
    log: Logger | None = None,
    takeover_after_s: float = TAKEOVER_AFTER_S,
) -> Volume:
    """Make sure that the volume is ours, outwait its owner and take the next term.

    Nothing is written to a volume that belongs to somebody else. Waits as long as a living owner does not leave.
    Cancel-safe. Its disk operations block; nothing else has to run in the loop before the volume is taken.

    Args:
        disk: the volume's folder.
        identity: whose volume it must be; `volume_id` is used only if the volume is empty and gets formatted.
        pod_uid: the pod of this process; a restarted container of the same pod may use the map stored here.
        boot_id: letters, digits, dots and hyphens, of no other start of a process on this volume, ever.
        clock: only its monotonic time is used, only to outwait a silent owner.
        sleep: for the waiting.
        log: where the waiting is told.
        takeover_after_s: seconds without heartbeat after which a locked term counts as given up.

    Raises:
        ForeignVolume: another ring's or shard's.
        VolumeUnreadable: data without a readable identity.
        VolumeFailed: the disk refused.
    """
    assert BOOT_ID.fullmatch(boot_id), "boot_id becomes part of a file name"
    try:
        found, was_empty = settle_identity(disk, identity, boot_id=boot_id)
        term, file = await take_term(
            disk,
            identity=found,
            pod_uid=pod_uid,
            boot_id=boot_id,
            clock=clock,
            sleep=sleep,
            log=log or NullLogger(),
            takeover_after_s=takeover_after_s,
        )
        try:
            _clear_leftovers(disk, term)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise VolumeFailed(f"cannot take the volume: {error}") from error
    return Volume(disk, identity=found, term=term, file=file, pod_uid=pod_uid, was_empty=was_empty)


def _clear_leftovers(disk: Disk, term: Term) -> None:
    for name in leftovers(disk.listdir(""), term):
        try:
            disk.unlink(name)
        except FileNotFoundError:
            continue  # its maker removed it itself


async def _in_thread(call: Callable[[], bool]) -> bool:
    return await asyncio.to_thread(call)


async def keep_term(
    volume: Volume,
    *,
    sleep: Sleep,
    run_blocking: Callable[[Callable[[], bool]], Awaitable[bool]] = _in_thread,
    period_s: float = KEEP_PERIOD_S,
) -> None:
    """Look, beat and read requests each second, from `take_volume` until the process ends; the disk in a thread.

    Returns when a younger process asks this one to leave. Cancel-safe (a heartbeat under way in its thread ends first
    or finds the volume closed).

    Raises:
        Fenced: end at once, say nothing more.
        VolumeFailed: end.
    """

    def keep() -> bool:
        volume.look()
        volume.beat()
        return volume.asked_to_leave()

    while not await run_blocking(keep):
        await sleep(period_s)
