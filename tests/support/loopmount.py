"""A small real file system on a loop mount, which can be filled and made read-only; needs root.

Promise: unmounted at the end, whatever happened. Must not be done here: what is written on it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_WRITTEN_BYTES: Final = 1024 * 1024
"""The last of what is filled is written, for the file system's own needs come out of it; the rest is only taken."""


class LoopMount:
    """A mounted ext4.

    Args:
        folder: image and mount point are made here.
        mib: its size.
    """

    def __init__(self, folder: Path, mib: int) -> None:
        self.path = folder / "mount"
        self._image = folder / "image"
        self._filler = self.path / "filler"
        with self._image.open("wb") as file:
            file.truncate(mib * 1024 * 1024)
        self.path.mkdir()
        _run("mkfs.ext4", "-q", "-m", "0", str(self._image))
        self.mount()

    def mount(self) -> None:
        """Mount it (again)."""
        _run("mount", "-o", "loop", str(self._image), str(self.path))

    def unmount(self) -> None:
        """Unmount it; whoever has files open there prevents it."""
        _run("umount", str(self.path))

    def fill(self, *, leave_bytes: int = 0) -> None:
        """Take all but so much, as somebody else on the volume would; called again it takes more."""
        with self._filler.open("ab", buffering=0) as file, suppress(OSError):
            bulk_bytes = self._free_bytes() - leave_bytes - _WRITTEN_BYTES
            if bulk_bytes > 0:
                os.posix_fallocate(file.fileno(), file.tell(), bulk_bytes)
            while (room_bytes := self._free_bytes() - leave_bytes) > 0:
                file.write(bytes(min(room_bytes, 64 * 1024)))

    def free(self) -> None:
        """Give it back."""
        self._filler.unlink()

    def _free_bytes(self) -> int:
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize

    def abort(self) -> None:
        """Make the kernel treat the file system as damaged: it turns read-only under whoever writes."""
        _run("mount", "-o", "remount,abort", str(self.path))

    def repair(self) -> None:
        """What an administrator does then: unmount, check, mount."""
        self.unmount()
        # Status 1: errors were corrected.
        subprocess.run(["e2fsck", "-fy", str(self._image)], check=False, capture_output=True)
        self.mount()


@contextmanager
def loop_mount(folder: Path, *, mib: int) -> Generator[LoopMount]:
    """Make one.

    Raises:
        AssertionError: not root.
    """
    assert os.geteuid() == 0, "this test mounts a file system: run it as root"
    made = LoopMount(folder, mib)
    try:
        yield made
    finally:
        with suppress(subprocess.CalledProcessError):
            made.unmount()


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
