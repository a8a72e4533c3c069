"""One round of the log: rotate if need be, write, sync, look (docs/log.md; design §6, "Fence").

Promise: when `done` is called with what was found, the batch is on disk (as the policy says) and after that no younger
term was there. Any error ends the log: whoever calls never calls again. Must not be done here: forming
batches, state (`log.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fleetlm_shard.segments import publish

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from fleetlm_shard.disk import Disk, File
    from fleetlm_shard.lanes import Lanes
    from fleetlm_shard.log_types import Fence
    from fleetlm_shard.segments import Prepared

    Done = Callable[["Finished | None", BaseException | None], None]


@dataclass(frozen=True, slots=True)
class Rotation:
    """Go on in a prepared file. `sync_old` says that the old one may hold bytes that are not on disk."""

    prepared: Prepared
    path: str
    header: bytes
    old: File
    sync_old: bool


@dataclass(frozen=True, slots=True)
class Job:
    """One round of the writer. `data` may be empty: a look only, or a sync and a look."""

    disk: Disk
    fence: Fence
    file: File
    data: bytes
    offset: int
    sync: bool
    rotation: Rotation | None
    monotonic: Callable[[], float]

    def submit(self, lanes: Lanes, loop: asyncio.AbstractEventLoop, done: Done) -> None:
        """Do it; `done` is called in the loop, after this has returned.

        The page cache is written to here and now, the disk is waited for elsewhere: by the kernel where it does that,
        else, and for new segments (files, names, two syncs), by the writer's lane.
        """
        if lanes.syncs is None or self.rotation is not None:
            lanes.writer.submit(self.run, done)
            return
        started_s = self.monotonic()

        def synced(error: BaseException | None) -> None:
            if error is not None:
                done(None, error)
                return
            try:
                finished = self._look(self.monotonic() - started_s)
            except BaseException as failed:  # noqa: BLE001  as from a lane: who waits is told
                done(None, failed)
                return
            done(finished, None)

        try:
            self._write()
            if not self.sync:
                loop.call_soon(done, self._look(0.0), None)
            elif not lanes.syncs.start(self.file, synced):
                lanes.writer.submit(self.run, done)  # writes the same bytes to the same place once more
        except BaseException as error:  # noqa: BLE001  as from a lane: who waits is told
            loop.call_soon(done, None, error)

    def run(self) -> Finished:
        """Do it; blocks."""
        if self.rotation is not None:
            self._rotate(self.rotation)
        self._write()
        sync_s = 0.0
        if self.sync:
            started_s = self.monotonic()
            self.file.sync()
            sync_s = self.monotonic() - started_s
        return self._look(sync_s)

    def _write(self) -> None:
        if self.data:
            self.file.pwrite(self.data, self.offset)

    def _look(self, sync_s: float) -> Finished:
        # After the sync and never before: without a younger term now, a younger process will read what is synced.
        self.fence.look()
        return Finished(sync_s, self.disk.free_bytes())

    def _rotate(self, rotation: Rotation) -> None:
        if rotation.sync_old:
            # The new header says where the old segment ends: that must be true.
            rotation.old.sync()
        file = rotation.prepared.file
        file.pwrite(rotation.header, 0)
        file.sync()
        # An elder that was frozen does not even make the name; if it is frozen after this line, its segment is a stray.
        self.fence.look()
        publish(self.disk, rotation.prepared.temp, rotation.path)
        rotation.old.close()


@dataclass(frozen=True, slots=True)
class Finished:
    """What a round found: seconds of the sync (0.0: none), bytes free on the file system."""

    sync_s: float
    free_bytes: int
