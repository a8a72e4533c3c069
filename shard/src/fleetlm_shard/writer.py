"""What the writer lane does for one batch: rotate if need be, write, sync, look (docs/log.md; design §6, "Fence").

Promise: when `run` returns, the batch is on disk (as the policy says) and after that no younger term was there. Any
error ends the log: whoever calls never calls again. Must not be done here: forming batches, state (`log.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fleetlm_shard.segments import publish

if TYPE_CHECKING:
    from collections.abc import Callable

    from fleetlm_shard.disk import Disk, File
    from fleetlm_shard.log_types import Fence
    from fleetlm_shard.segments import Prepared


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

    def run(self) -> Finished:
        """Do it; blocks."""
        if self.rotation is not None:
            self._rotate(self.rotation)
        if self.data:
            self.file.pwrite(self.data, self.offset)
        sync_s = 0.0
        if self.sync:
            started_s = self.monotonic()
            self.file.sync()
            sync_s = self.monotonic() - started_s
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
