"""The border to the file system: every byte of the shard's volume goes through a `Disk`.

Promise: nothing else in the shard opens, reads, writes, links, locks or removes a file of the volume, so that a
simulated disk (tests/support/simdisk.py) can stop, tear, lose or refuse any single operation.
Must not be done here: decisions. A method is one system call or the loop that finishes a short one; errors are
`OSError`.

Paths are relative to the volume's folder and use "/". All calls block; the caller chooses the thread.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path
from typing import Protocol

FILE_MODE = 0o600
FOLDER_MODE = 0o700


class File(Protocol):
    """An open file of the volume."""

    def pread(self, size_bytes: int, offset: int) -> bytes:
        """Read up to `size_bytes` at `offset`; shorter only at the end of the file."""
        ...

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        ...

    def sync(self) -> None:
        """Make what was written durable (fdatasync). After an error the file must not be trusted any more."""
        ...

    def size(self) -> int:
        """Length in bytes."""
        ...

    def stored_bytes(self) -> int:
        """Space that the file takes; less than its length if it has holes that were never written."""
        ...

    def view(self) -> memoryview:
        """Map the whole file read-only; the view stays valid after `close`. An empty file gives an empty view."""
        ...

    def try_lock(self) -> bool:
        """Take the exclusive lock (flock) without waiting; False if another open file holds it."""
        ...

    def close(self) -> None:
        """Close; a lock taken through this file is released."""
        ...


class Disk(Protocol):
    """One volume's folder."""

    def listdir(self, folder: str) -> list[str]:
        """Names in `folder` ("" is the volume's own), sorted."""
        ...

    def exists(self, path: str) -> bool:
        """One stat: does the name exist."""
        ...

    def create(self, path: str) -> File:
        """Make a new file (mode 0600) open for reading and writing; FileExistsError if the name is taken."""
        ...

    def open(self, path: str, *, writable: bool = False) -> File:
        """Open an existing file; FileNotFoundError if there is none."""
        ...

    def link(self, source: str, target: str) -> None:
        """Give the file a second name; FileExistsError if the name is taken."""
        ...

    def replace(self, source: str, target: str) -> None:
        """Give the name `target` to the file `source`, which loses its own; what had the name before has it no more."""
        ...

    def unlink(self, path: str) -> None:
        """Remove a name."""
        ...

    def mkdir(self, folder: str) -> None:
        """Make a folder (mode 0700); one that exists is left as it is."""
        ...

    def sync_folder(self, folder: str) -> None:
        """Make creations, links, replacements and removals in `folder` durable."""
        ...

    def free_bytes(self) -> int:
        """Space that this process may still use on the file system."""
        ...


class OsFile:
    """`File` over a descriptor of the operating system."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pread(self, size_bytes: int, offset: int) -> bytes:
        """Read, finishing short reads."""
        data = os.pread(self._fd, size_bytes, offset)
        if len(data) == size_bytes or not data:
            return data
        parts = [data]
        got = len(data)
        while got < size_bytes:
            part = os.pread(self._fd, size_bytes - got, offset + got)
            if not part:
                break
            parts.append(part)
            got += len(part)
        return b"".join(parts)

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write, finishing short writes."""
        done = os.pwrite(self._fd, data, offset)
        rest = memoryview(data)
        while done < len(rest):
            done += os.pwrite(self._fd, rest[done:], offset + done)

    def sync(self) -> None:
        """Fdatasync."""
        os.fdatasync(self._fd)

    def fileno(self) -> int:
        """The descriptor."""
        return self._fd

    def size(self) -> int:
        """Fstat."""
        return os.fstat(self._fd).st_size

    def stored_bytes(self) -> int:
        """Fstat: blocks of 512 bytes."""
        return os.fstat(self._fd).st_blocks * 512

    def view(self) -> memoryview:
        """Map the file."""
        if self.size() == 0:
            return memoryview(b"")
        return memoryview(mmap.mmap(self._fd, 0, prot=mmap.PROT_READ))

    def try_lock(self) -> bool:
        """Flock, exclusive, not waiting."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Close the descriptor; safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class OsDisk:
    """`Disk` over a folder of the operating system; the folder must exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, path: str) -> str:
        return f"{self.folder}/{path}" if path else str(self.folder)

    def listdir(self, folder: str) -> list[str]:
        """List a folder."""
        return sorted(os.listdir(self._path(folder)))  # noqa: PTH208  paths here are strings, for speed of the look

    def exists(self, path: str) -> bool:
        """Stat; errors other than "no such file" are raised, for a look that cannot look must not say no."""
        try:
            os.stat(self._path(path))  # noqa: PTH116
        except FileNotFoundError:
            return False
        return True

    def create(self, path: str) -> OsFile:
        """Open with O_EXCL."""
        return OsFile(os.open(self._path(path), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE))

    def open(self, path: str, *, writable: bool = False) -> OsFile:
        """Open an existing file."""
        return OsFile(os.open(self._path(path), (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC))

    def link(self, source: str, target: str) -> None:
        """Hard link."""
        os.link(self._path(source), self._path(target))

    def replace(self, source: str, target: str) -> None:
        """Rename over it, atomically."""
        os.replace(self._path(source), self._path(target))  # noqa: PTH105

    def unlink(self, path: str) -> None:
        """Remove a name."""
        os.unlink(self._path(path))  # noqa: PTH108

    def mkdir(self, folder: str) -> None:
        """Make a folder."""
        try:
            os.mkdir(self._path(folder), FOLDER_MODE)  # noqa: PTH102
        except FileExistsError:
            return

    def sync_folder(self, folder: str) -> None:
        """Fsync of the folder."""
        fd = os.open(self._path(folder), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def free_bytes(self) -> int:
        """Statvfs."""
        found = os.statvfs(self._path(""))
        return found.f_bavail * found.f_frsize
