"""A volume in memory that several simulated processes share, with every fault that the real one has.

Place: stands in for `OsDisk` in tests. A `SimVolume` holds the truth (page cache, platter, names, locks), a `SimDisk`
is one process's door to it; `faults.py` has the hooks. Promise: deterministic, and as bad as Linux allows:

- a write is in the page cache until `sync` of *its file*; a name is in the cache until `sync_folder` of *its folder*;
- `power_loss` keeps any subset of what was not synced, whole or torn; a kill keeps the cache and frees the locks;
- a failed `sync` marks its pages clean: still readable, lost at power loss, and the next `sync` "succeeds";
- a lock (flock) belongs to an open file and ends with it or with its process.

Must not be done here: knowing anything about FleetLM's files.

    volume = SimVolume()
    disk = volume.process("elder")                  # a Disk
    volume.hooks.append(crash_at(7))                # SimCrash before the 7th operation; the process is dead then
    volume.hooks.append(fail_at(2, errno.EIO, only={"sync"}))
    for loss in volume.losses():                    # what a power loss may leave, as small choices
        after = volume.copy(); after.power_loss(loss)
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import TYPE_CHECKING, Final, Literal

from tests.support.faults import Hook, Op, SimCrash

if TYPE_CHECKING:
    from fleetlm_shard.disk import Disk, File

PAGE_BYTES: Final = 4096
WRITES: Final = frozenset(
    {"create", "link", "replace", "unlink", "mkdir", "pwrite", "pwrite-rest", "sync", "sync_folder"}
)
"""Operations that change something; a crash before any other one equals a crash before the next of these."""


@dataclass(frozen=True, slots=True, order=True)
class Page:
    """A page of a file whose newest bytes are not on disk."""

    inode: str
    number: int


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """A change of a name that is not on disk; `version` counts the changes of this name since it was synced."""

    path: str
    version: int


Unit = Page | Entry


@dataclass(frozen=True, slots=True)
class Loss:
    """A choice for `power_loss`: which units reached the disk; torn: of each page only one end of the changed bytes."""

    name: str
    keep: frozenset[Unit] = frozenset()
    torn: Literal["whole", "head", "tail"] = "whole"


NOTHING_KEPT: Final = Loss("nothing unsynced is kept")


@dataclass(slots=True)
class _Inode:
    """A file's bytes: as readers see them, as they are on disk, and which pages differ."""

    cache: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    dirty: set[int] = field(default_factory=set[int])
    doomed: set[int] = field(default_factory=set[int])  # a sync of these failed: clean for the kernel, not on disk
    locked_by: tuple[str, int] | None = None

    def copy(self) -> _Inode:
        return _Inode(bytearray(self.cache), bytearray(self.durable), set(self.dirty), set(self.doomed), self.locked_by)

    def write(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        if not len(data):
            return
        end = offset + len(data)
        if end > len(self.cache):
            try:
                self.cache.extend(bytes(end - len(self.cache)))
            except BufferError:  # a view is alive, and a bytearray with views cannot grow: readers keep the old mapping
                self.cache = bytearray(self.cache) + bytes(end - len(self.cache))
        self.cache[offset:end] = data
        pages = range(offset // PAGE_BYTES, (end - 1) // PAGE_BYTES + 1)
        self.dirty.update(pages)
        self.doomed.difference_update(pages)

    def put_on_disk(self, page: int, torn: Literal["whole", "head", "tail"] = "whole") -> None:
        start = page * PAGE_BYTES
        new = bytes(self.cache[start : start + PAGE_BYTES])
        if len(self.durable) < start + len(new):
            self.durable.extend(bytes(start + len(new) - len(self.durable)))
        if torn != "whole":
            new = _tear(bytes(self.durable[start : start + len(new)]), new, torn)
        self.durable[start : start + len(new)] = new


def _tear(old: bytes, new: bytes, torn: Literal["head", "tail"]) -> bytes:
    """The new bytes up to (or from) the middle of what differs, the old ones for the rest."""
    changed = [at for at in range(len(new)) if old[at] != new[at]]
    if not changed:
        return new
    middle = (changed[0] + changed[-1] + 1) // 2
    return new[:middle] + old[middle:] if torn == "head" else old[:middle] + new[middle:]


_FOLDER: Final = "folder"
"""Stands in the table of names for "this is a folder"."""


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


class SimVolume:
    """One volume: what all its processes share.

    Args:
        capacity_bytes: writes beyond it answer ENOSPC.
        split_writes: a `pwrite` is two operations, `pwrite` (first half) and `pwrite-rest`, so that a crash, a fault or
            another process can come in between.
    """

    def __init__(self, *, capacity_bytes: int = 1 << 40, split_writes: bool = False) -> None:
        self.capacity_bytes = capacity_bytes
        self.split_writes = split_writes
        self.read_only = False
        self.hooks: list[Hook] = []
        self.log: list[Op] = []
        self.guard = threading.RLock()
        self._inodes: dict[str, _Inode] = {}
        self._names: dict[str, str] = {}
        self._durable_names: dict[str, str] = {}
        self._pending: dict[str, list[str | None]] = {}
        self._open: dict[tuple[str, int], str] = {}
        self._dead: set[str] = set()
        self._counts: dict[str, int] = {}

    # ---- for tests

    def process(self, name: str) -> SimDisk:
        """A door for a new process; a name is used once, for the dead stay dead."""
        assert name not in self._dead, f"{name} is dead, a new process needs a new name"
        return SimDisk(self, name)

    def kill(self, process: str) -> None:
        """SIGKILL: its files are closed and its locks are free, what it wrote stays in the cache."""
        with self.guard:
            self._dead.add(process)
            for handle in [handle for handle in self._open if handle[0] == process]:
                self.close_file(handle)

    def is_dead(self, process: str) -> bool:
        """Whether it was killed."""
        return process in self._dead

    def processes(self) -> set[str]:
        """Who has files open."""
        return {process for process, _ in self._open}

    def unsynced(self) -> list[Unit]:
        """What a power loss may take, in a fixed order."""
        reachable = self._reachable()
        pages: list[Unit] = [
            Page(number, page)
            for number in sorted(reachable)
            for page in sorted(self._inodes[number].dirty | self._inodes[number].doomed)
        ]
        return pages + [Entry(path, n) for path in sorted(self._pending) for n in range(len(self._pending[path]))]

    def losses(self, *, singles: bool = True, every: bool = False) -> Iterator[Loss]:
        """Choices for `power_loss`: none, all, torn, names only, pages only.

        Args:
            singles: also each unit kept alone, each lost alone, and each prefix.
            every: all subsets instead (2 to the number of units).
        """
        units = self.unsynced()
        whole = frozenset(units)
        if every:
            subsets = chain.from_iterable(combinations(units, size) for size in range(len(units) + 1))
            yield from (Loss(f"kept {list(kept)}", frozenset(kept)) for kept in subsets)
        else:
            yield NOTHING_KEPT
            if units:
                yield Loss("all is kept", whole)
        if any(isinstance(unit, Page) for unit in units):
            yield Loss("all is kept, of pages the head", whole, "head")
            yield Loss("all is kept, of pages the tail", whole, "tail")
        if every or len(units) <= 1:
            return
        yield Loss("names are kept, bytes lost", frozenset(unit for unit in units if isinstance(unit, Entry)))
        yield Loss("bytes are kept, names lost", frozenset(unit for unit in units if isinstance(unit, Page)))
        if singles:
            yield from (Loss(f"only {unit} is kept", frozenset({unit})) for unit in units)
            yield from (Loss(f"only {unit} is lost", whole - {unit}) for unit in units)
            yield from (Loss(f"the first {n} are kept", frozenset(units[:n])) for n in range(2, len(units) - 1))

    def power_loss(self, loss: Loss = NOTHING_KEPT) -> None:
        """Every process dies, the cache is gone; of what was not synced, `loss.keep` is on disk."""
        with self.guard:
            for process in self.processes():
                self.kill(process)
            for number, inode in self._inodes.items():
                for page in sorted(inode.dirty | inode.doomed):
                    if Page(number, page) in loss.keep:
                        inode.put_on_disk(page, loss.torn)
                inode.cache = bytearray(inode.durable)
                inode.dirty.clear()
                inode.doomed.clear()
            for path, versions in self._pending.items():
                for version, value in enumerate(versions):
                    if Entry(path, version) in loss.keep:
                        self._set_durable(path, value)
            self._pending.clear()
            lost = [path for path in self._durable_names if not self._folder_is_durable(_parent(path))]
            for path in lost:
                del self._durable_names[path]
            self._names = dict(self._durable_names)

    def read(self, path: str) -> bytes:
        """The file's bytes as readers see them; no operation."""
        return bytes(self._inode_at(path).cache)

    def read_durable(self, path: str) -> bytes:
        """The file's bytes as they are on disk."""
        return bytes(self._inode_at(path).durable)

    def paths(self) -> list[str]:
        """Every name of a file, sorted."""
        return sorted(path for path, value in self._names.items() if value != _FOLDER)

    def flip(self, path: str, offset: int, bits: int = 1) -> None:
        """Bit rot: flip `bits` of one byte, in cache and on disk."""
        inode = self._inode_at(path)
        for content in (inode.cache, inode.durable):
            if offset < len(content):
                content[offset] ^= bits

    def truncate(self, path: str, size_bytes: int) -> None:
        """Cut a file, in cache and on disk (nothing in the product can)."""
        inode = self._inode_at(path)
        inode.cache = inode.cache[:size_bytes]
        inode.durable = inode.durable[:size_bytes]

    def copy(self) -> SimVolume:
        """The same state, on its own from here; hooks and log are not copied."""
        with self.guard:
            twin = SimVolume(capacity_bytes=self.capacity_bytes, split_writes=self.split_writes)
            twin.read_only = self.read_only
            twin._inodes = {number: inode.copy() for number, inode in self._inodes.items()}
            twin._names = dict(self._names)
            twin._durable_names = dict(self._durable_names)
            twin._pending = {path: list(versions) for path, versions in self._pending.items()}
            twin._open = dict(self._open)
            twin._dead = set(self._dead)
            twin._counts = dict(self._counts)
            return twin

    def fingerprint(self) -> tuple[Hashable, ...]:
        """Equal for equal states, also when they were reached in another order."""
        locks = frozenset((number, inode.locked_by) for number, inode in self._inodes.items() if inode.locked_by)
        held = locks, frozenset(self._open.items()), frozenset(self._dead), self.read_only
        return *self.stored_fingerprint(), held

    def stored_fingerprint(self) -> tuple[Hashable, ...]:
        """The same of what is stored only: equal states have equal futures after a power loss."""
        alive = self._reachable() | set(self._open.values())
        inodes = tuple(
            (number, bytes(inode.cache), bytes(inode.durable), frozenset(inode.dirty), frozenset(inode.doomed))
            for number, inode in sorted(self._inodes.items())
            if number in alive
        )
        names = frozenset(self._names.items()), frozenset(self._durable_names.items())
        return inodes, names, frozenset((path, tuple(versions)) for path, versions in self._pending.items())

    # ---- for SimDisk and SimFile: the kernel

    def step(self, process: str, name: str, path: str) -> None:
        """Count the operation and let the hooks see it; raises what they raise."""
        with self.guard:
            if process in self._dead:
                raise SimCrash(f"{process} is dead")
            op = Op(len(self.log) + 1, process, name, path)
            self.log.append(op)
        try:
            for hook in list(self.hooks):
                hook(op)
        except SimCrash:
            self.kill(process)
            raise
        if process in self._dead:  # killed while a hook held it
            raise SimCrash(f"{process} is dead")
        if self.read_only and name in WRITES - {"sync", "sync_folder"}:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    def lookup(self, path: str) -> str | None:
        """The inode of a name, "folder" of a folder, None if there is none."""
        return _FOLDER if path == "" else self._names.get(path)

    def add_name(self, path: str, number: str) -> None:
        """Give a name, in the cache only."""
        if self.lookup(_parent(path)) != _FOLDER:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if path in self._names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        self._names[path] = number
        self._change(path, number)

    def replace_name(self, path: str, number: str) -> None:
        """Let a name be another file's, in the cache only: one change, so a power loss keeps the old or the new."""
        self._names[path] = number
        self._change(path, number)

    def drop_name(self, path: str) -> None:
        """Take a name away, in the cache only."""
        if path not in self._names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        del self._names[path]
        self._change(path, None)

    def sync_names(self, folder: str) -> None:
        """Make the names in `folder` durable."""
        for path in [path for path in self._pending if _parent(path) == folder]:
            for value in self._pending.pop(path):
                self._set_durable(path, value)

    def names_in(self, folder: str) -> list[str]:
        """The names in `folder`, sorted."""
        if self.lookup(folder) != _FOLDER:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder)
        return sorted(path.rpartition("/")[2] for path in self._names if _parent(path) == folder)

    def new_inode(self, process: str) -> str:
        """An empty file without a name, numbered so that the order among processes does not show."""
        number = f"{process}#{self._count(process + '#')}"
        self._inodes[number] = _Inode()
        return number

    def open_file(self, process: str, number: str) -> int:
        """A descriptor of that process."""
        fd = self._count(process)
        self._open[process, fd] = number
        return fd

    def inode(self, handle: tuple[str, int]) -> _Inode:
        """The inode behind a descriptor."""
        if handle not in self._open:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._inodes[self._open[handle]]

    def close_file(self, handle: tuple[str, int]) -> None:
        """Forget the descriptor and free its lock."""
        number = self._open.pop(handle, None)
        if number is not None and self._inodes[number].locked_by == handle:
            self._inodes[number].locked_by = None

    def used_bytes(self) -> int:
        """Space taken by files that have a name or are open."""
        alive = {number for number in self._names.values() if number != _FOLDER} | set(self._open.values())
        return sum(len(self._inodes[number].cache) for number in alive)

    def _reachable(self) -> set[str]:
        """The inodes that have a name, or may have one after a power loss."""
        numbers = {*self._names.values(), *self._durable_names.values()}
        numbers.update(value for versions in self._pending.values() for value in versions if value)
        return numbers - {_FOLDER}

    def _count(self, what: str) -> int:
        self._counts[what] = self._counts.get(what, 0) + 1
        return self._counts[what]

    def _change(self, path: str, value: str | None) -> None:
        self._pending.setdefault(path, []).append(value)

    def _set_durable(self, path: str, value: str | None) -> None:
        if value is None:
            self._durable_names.pop(path, None)
        else:
            self._durable_names[path] = value

    def _folder_is_durable(self, folder: str) -> bool:
        return folder == "" or (folder in self._durable_names and self._folder_is_durable(_parent(folder)))

    def _inode_at(self, path: str) -> _Inode:
        number = self._names.get(path)
        if number is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return self._inodes[number]


class SimFile:
    """`File` of one process; all state lies in the volume."""

    __slots__ = ("_handle", "_path", "_volume", "_writable")

    def __init__(self, volume: SimVolume, handle: tuple[str, int], path: str, *, writable: bool) -> None:
        self._volume = volume
        self._handle = handle
        self._path = path
        self._writable = writable

    @property
    def fd(self) -> int:
        """The descriptor's number in its process."""
        return self._handle[1]

    def _step(self, name: str) -> None:
        self._volume.step(self._handle[0], name, self._path)

    def pread(self, size_bytes: int, offset: int) -> bytes:
        """Read from the cache."""
        self._step("pread")
        with self._volume.guard:
            return bytes(self._volume.inode(self._handle).cache[offset : offset + size_bytes])

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """Write to the cache; in two operations when the volume splits writes."""
        self._step("pwrite")
        if not self._writable:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF), self._path)
        data = bytes(data)
        half = len(data) // 2 if self._volume.split_writes else 0
        if half:
            self._write(data[:half], offset)
            self._step("pwrite-rest")
        self._write(data[half:], offset + half)

    def _write(self, data: bytes, offset: int) -> None:
        volume = self._volume
        with volume.guard:
            inode = volume.inode(self._handle)
            growth_bytes = max(0, offset + len(data) - len(inode.cache))
            if growth_bytes and volume.used_bytes() + growth_bytes > volume.capacity_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)
            inode.write(data, offset)

    def sync(self) -> None:
        """Fdatasync; a hook's OSError leaves the pages clean and lost, like Linux."""
        try:
            self._step("sync")
        except OSError:
            with self._volume.guard:
                inode = self._volume.inode(self._handle)
                inode.doomed |= inode.dirty
                inode.dirty.clear()
            raise
        with self._volume.guard:
            inode = self._volume.inode(self._handle)
            for page in sorted(inode.dirty):
                inode.put_on_disk(page)
            inode.dirty.clear()

    def size(self) -> int:
        """Length in the cache."""
        self._step("size")
        with self._volume.guard:
            return len(self._volume.inode(self._handle).cache)

    def stored_bytes(self) -> int:
        """Pages of the cache that are not all zeros."""
        self._step("size")
        with self._volume.guard:
            cache = self._volume.inode(self._handle).cache
            pages = (cache[start : start + PAGE_BYTES] for start in range(0, len(cache), PAGE_BYTES))
            return PAGE_BYTES * sum(any(page) for page in pages)

    def view(self) -> memoryview:
        """A mapping: later writes within the size show in it."""
        self._step("view")
        with self._volume.guard:
            return memoryview(self._volume.inode(self._handle).cache).toreadonly()

    def try_lock(self) -> bool:
        """Flock of this open file."""
        self._step("try_lock")
        with self._volume.guard:
            inode = self._volume.inode(self._handle)
            if inode.locked_by not in {None, self._handle}:
                return False
            inode.locked_by = self._handle
            return True

    def close(self) -> None:
        """Free descriptor and lock; the dead have nothing left to close."""
        if self._volume.is_dead(self._handle[0]):
            return
        self._step("close")
        with self._volume.guard:
            self._volume.close_file(self._handle)


class SimDisk:
    """`Disk` of one process."""

    __slots__ = ("name", "volume")

    def __init__(self, volume: SimVolume, name: str) -> None:
        self.volume = volume
        self.name = name

    def kill(self) -> None:
        """SIGKILL this process."""
        self.volume.kill(self.name)

    def listdir(self, folder: str) -> list[str]:
        """Names as they stand in the cache."""
        self.volume.step(self.name, "listdir", folder)
        with self.volume.guard:
            return self.volume.names_in(folder)

    def exists(self, path: str) -> bool:
        """Stat."""
        self.volume.step(self.name, "exists", path)
        with self.volume.guard:
            return self.volume.lookup(path) is not None

    def create(self, path: str) -> SimFile:
        """A new file; its name is in the cache only."""
        self.volume.step(self.name, "create", path)
        with self.volume.guard:
            number = self.volume.new_inode(self.name)
            self.volume.add_name(path, number)
            return SimFile(self.volume, (self.name, self.volume.open_file(self.name, number)), path, writable=True)

    def open(self, path: str, *, writable: bool = False) -> SimFile:
        """An existing file."""
        self.volume.step(self.name, "open", path)
        with self.volume.guard:
            if writable and self.volume.read_only:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
            number = self.volume.lookup(path)
            if number is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            if number == _FOLDER:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            return SimFile(self.volume, (self.name, self.volume.open_file(self.name, number)), path, writable=writable)

    def link(self, source: str, target: str) -> None:
        """A second name, in the cache only."""
        self.volume.step(self.name, "link", target)
        with self.volume.guard:
            number = self.volume.lookup(source)
            if number is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source)
            self.volume.add_name(target, number)

    def replace(self, source: str, target: str) -> None:
        """A rename over `target`: two names change, in the cache only."""
        self.volume.step(self.name, "replace", target)
        with self.volume.guard:
            number = self.volume.lookup(source)
            if number is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source)
            self.volume.replace_name(target, number)
            self.volume.drop_name(source)

    def unlink(self, path: str) -> None:
        """A name less, in the cache only."""
        self.volume.step(self.name, "unlink", path)
        with self.volume.guard:
            self.volume.drop_name(path)

    def mkdir(self, folder: str) -> None:
        """A folder, in the cache only; one that exists stays."""
        self.volume.step(self.name, "mkdir", folder)
        with self.volume.guard:
            if self.volume.lookup(folder) is None:
                self.volume.add_name(folder, _FOLDER)

    def sync_folder(self, folder: str) -> None:
        """Fsync of a folder; a failed one changes nothing (names are journalled: they are not forgotten in silence)."""
        self.volume.step(self.name, "sync_folder", folder)
        with self.volume.guard:
            self.volume.sync_names(folder)

    def free_bytes(self) -> int:
        """What the capacity leaves."""
        self.volume.step(self.name, "free_bytes", "")
        with self.volume.guard:
            return max(0, self.volume.capacity_bytes - self.volume.used_bytes())


if TYPE_CHECKING:  # the fake is held to the real border by the type checkers
    _disk: type[Disk] = SimDisk
    _file: type[File] = SimFile
