"""The control plane as files in one folder: what `fleetlm up` uses where Kubernetes is not.

    spec.json           what people ask for: made by `create_ring`, changed by `change_ring`
    map.json            the ring map, replaced by compare-and-swap
    shards/<name>.json  where each shard is, said by the shard itself
    status.json         the controller's one sentence
    lock                flock of whoever replaces one of them

Promise: a file is replaced whole (temporary file, fsync, rename, fsync of the folder) under the lock, so that a crash
between any two steps leaves the old content or the new. A map is shown only after it is durable. A damaged map is never
taken for "there is none", and never overwritten. A watcher never raises and its epochs never go back.
Must not be done here: planning, judging liveness, or file work on the event loop (all of it runs in threads).

The folder must lie on one coherent file system of one machine.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from fleetlm_common import ring
from fleetlm_common.clock import Clock, SystemClock, iso_utc
from fleetlm_common.control import (
    ControlPlaneUnavailable,
    MapConflict,
    RingSpec,
    ShardEndpoint,
    View,
    replaces,
)
from fleetlm_common.decoding import UNREADABLE
from fleetlm_common.ids import Epoch, ShardName
from fleetlm_common.ring import SHARDS_MAX, RingMap

POLL_INTERVAL_S: Final = 0.1
"""How late a watcher may be. A look costs some ten small reads; ten looks a second are not seen in a profile."""
LOCK_WAIT_S_MAX: Final = 2.0
"""A holder keeps the lock for two fsyncs; longer means that it is frozen, and waiting would freeze the caller too."""
LOCK_RETRY_S: Final = 0.005
"""Between two tries for the lock (in a thread)."""
FILE_BYTES_MAX: Final = 1024 * 1024
"""The largest map (1024 ranges, 256 members) is a tenth of it; anything larger is not ours."""

FILE_MODE: Final = 0o600
FOLDER_MODE: Final = 0o700
SPEC_FILE: Final = "spec.json"
MAP_FILE: Final = "map.json"
STATUS_FILE: Final = "status.json"
SHARDS_FOLDER: Final = "shards"
LOCK_FILE: Final = "lock"

_SHARD_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
T = TypeVar("T")


class Status(msgspec.Struct, frozen=True):
    """What the controller last said, and when (RFC 3339); `reason` and `epoch` are for programs that wait for it."""

    sentence: str
    at: str
    reason: str = ""
    epoch: int = 0


def create_ring(folder: Path, spec: RingSpec) -> RingSpec:
    """Make the folder and write `spec` unless a ring lives there already.

    Blocks on the disk; safe to call from any number of processes at once.

    Returns:
        The ring that is there now: `spec`, or the older one.

    Raises:
        ControlPlaneUnavailable: the folder cannot be written, or holds a spec that cannot be read.
    """
    try:
        _make_folder(folder)
        _make_folder(folder / SHARDS_FOLDER)
        with _locked(folder):
            found = _parsed(folder, SPEC_FILE, RingSpec)
            if found is None:
                _replace(folder / SPEC_FILE, msgspec.json.encode(spec))
            return found or spec
    except OSError as error:
        raise _unavailable(folder, error) from error


def change_ring(folder: Path, change: Callable[[RingSpec], RingSpec]) -> RingSpec:
    """Ask for something else; what a ring is for life (uid, slots) stays.

    Blocks on the disk; safe to call from any number of processes at once: `change` is given what is there.

    Returns:
        The spec that is there now.

    Raises:
        ControlPlaneUnavailable: there is no ring in `folder`, or it cannot be read or written.
    """
    try:
        with _locked(folder):
            found = _parsed(folder, SPEC_FILE, RingSpec)
            if found is None:
                raise ControlPlaneUnavailable(f"{folder}: there is no {SPEC_FILE}")
            wanted = change(found)
            if (wanted.uid, wanted.slots) != (found.uid, found.slots):
                raise ValueError("a ring keeps its uid and slots for life")
            if wanted != found:
                _replace(folder / SPEC_FILE, msgspec.json.encode(wanted))
            return wanted
    except OSError as error:
        raise _unavailable(folder, error) from error


def forget_shard(folder: Path, name: ShardName) -> bool:
    """Remove the announcement of a shard whose process has ended, unless it is a member (again).

    What it said of its volume would bind it to that when it joins once more. Blocks on the disk.

    Returns:
        False if it is a member: its announcement stays.

    Raises:
        ControlPlaneUnavailable: the folder cannot be read or written.
    """
    try:
        with _locked(folder):
            current = _parsed(folder, MAP_FILE, RingMap)
            if current is not None and current.member(name) is not None:
                return False
            (folder / SHARDS_FOLDER / f"{name}.json").unlink(missing_ok=True)
            _sync_folder(folder / SHARDS_FOLDER)
            return True
    except OSError as error:
        raise _unavailable(folder, error) from error


def read_status(folder: Path) -> Status | None:
    """What the controller last said; None when it said nothing yet or the file cannot be read. Blocks on the disk."""
    try:
        raw = _read_file(folder / STATUS_FILE)
        return None if raw is None else msgspec.json.decode(raw, type=Status)
    except (OSError, *UNREADABLE):
        return None


class FileControlPlane:
    """`ControlPlane` over a folder.

    One instance belongs to one event loop; it remembers the newest map that it has shown. Every method may be
    cancelled, but what a thread has begun goes on: the outcome of a cancelled change is unknown.

    Args:
        folder: absolute; `create_ring` has made it, or will.
        clock: for the time in `status.json`.
        poll_interval_s: how often `watch` looks.
    """

    def __init__(self, folder: Path, *, clock: Clock | None = None, poll_interval_s: float = POLL_INTERVAL_S) -> None:
        self._folder = folder
        self._clock = clock or SystemClock()
        self._poll_interval_s = poll_interval_s
        self._seen = _Seen()
        self._one_look = asyncio.Lock()
        self._trouble: str | None = None

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._folder

    @property
    def trouble(self) -> str | None:
        """See `ControlPlane.trouble`."""
        return self._trouble

    async def read(self) -> View:
        """What the files say now; see `ControlPlane.read`. An announcement that cannot be read is no news."""
        try:
            async with self._one_look:  # a look that began earlier must not be merged after a later one
                looked = await asyncio.to_thread(_look, self._folder, known_map=self._seen.raw_map)
                self._seen = _merge(self._seen, looked)
                return self._seen.view
        except OSError as error:
            raise _unavailable(self._folder, error) from error
        except ValueError as error:
            raise ControlPlaneUnavailable(f"{self._folder}: {error}") from error

    async def watch(self) -> AsyncIterator[View]:
        """The view now, then each newer one; see `ControlPlane.watch`. What cannot be read is no news."""
        shown: View | None = None
        while True:
            try:
                view = await self.read()
            except ControlPlaneUnavailable as error:
                self._trouble = str(error)
            else:
                self._trouble = None
                if view != shown:
                    shown = view
                    yield view
            await asyncio.sleep(self._poll_interval_s)

    async def announce(self, endpoint: ShardEndpoint) -> None:
        """Write `shards/<name>.json` unless a later term stands there; see `ControlPlane.announce`."""
        if not _SHARD_NAME.fullmatch(endpoint.name):
            raise ValueError(f"{endpoint.name!r} is not a shard's name: lower case letters, digits and hyphens")
        await self._change(lambda: _announce(self._folder, endpoint))

    async def compare_and_swap(self, *, expected: Epoch | None, new: RingMap) -> None:
        """Replace `map.json`; see `ControlPlane.compare_and_swap`."""
        if new.epoch != (expected or 0) + 1:
            raise ValueError(f"the map after epoch {expected} cannot have epoch {new.epoch}")
        await self._change(lambda: _swap(self._folder, expected=expected, new=new))

    async def report(self, sentence: str, *, reason: str = "", epoch: int = 0) -> None:
        """Replace `status.json`."""
        status = Status(sentence, iso_utc(self._clock.now_us()), reason, epoch)
        await self._change(lambda: _replace(self._folder / STATUS_FILE, msgspec.json.encode(status)))

    async def close(self) -> None:
        """Nothing is held between calls."""

    async def _change(self, change: Callable[[], None]) -> None:
        """Run `change` in a thread, under the folder's lock."""

        def under_lock() -> None:
            with _locked(self._folder):
                change()

        try:
            await asyncio.to_thread(under_lock)
        except OSError as error:
            raise _unavailable(self._folder, error) from error


@dataclass(frozen=True, slots=True)
class _Looked:
    """Bytes as they were found; None where there is no file."""

    spec: bytes | None
    map: bytes | None
    shards: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class _Seen:
    """The newest good look, and the bytes that its map came from."""

    good: View | None = None
    raw_map: bytes | None = None

    @property
    def view(self) -> View:
        """The look; there is one after the first `_merge`."""
        assert self.good is not None
        return self.good


def _merge(seen: _Seen, looked: _Looked) -> _Seen:
    """What is good and newer, on top of what was seen.

    Raises:
        ValueError: what was found is no control plane, or an older one, or another; says why.
    """
    good = seen.good
    spec = _merged_spec(None if good is None else good.spec, looked.spec)
    ring_map = None if good is None else good.map
    if looked.map != seen.raw_map:
        ring_map = _merged_map(ring_map, looked.map, spec)
    members = set() if ring_map is None else {member.name for member in ring_map.members}
    # An announcement that was taken away (`forget_shard`) is forgotten, except a member's, which nobody takes away.
    known = {} if good is None else good.shards
    known = {name: said for name, said in known.items() if name in members or name in looked.shards}
    shards = _merged_shards(known, looked.shards)
    return _Seen(View(spec, ring_map, shards), looked.map)


def _merged_spec(seen: RingSpec | None, raw: bytes | None) -> RingSpec:
    """A ring keeps its uid and slots for life."""
    if raw is None:
        raise ValueError(f"there is no {SPEC_FILE}")
    try:
        spec = msgspec.json.decode(raw, type=RingSpec)
    except UNREADABLE as error:
        raise ValueError(f"{SPEC_FILE} is damaged: {error}") from error
    if seen is not None and (spec.uid, spec.slots) != (seen.uid, seen.slots):
        raise ValueError(f"{SPEC_FILE} names another ring than before")
    return spec


def _merged_map(seen: RingMap | None, raw: bytes | None, spec: RingSpec) -> RingMap:
    """An epoch never goes back, and one epoch has one map."""
    if raw is None:
        raise ValueError(f"{MAP_FILE} is gone")
    try:
        found = ring.decode(raw)
    except ValueError as error:
        raise ValueError(f"{MAP_FILE} is damaged: {error}") from error
    if (found.uid, found.slots) != (spec.uid, spec.slots):
        raise ValueError(f"{MAP_FILE} belongs to another ring than {SPEC_FILE}")
    if seen is not None and found.epoch <= seen.epoch and found != seen:
        raise ValueError(f"{MAP_FILE} went from epoch {seen.epoch} to another of epoch {found.epoch}")
    return found


def _merged_shards(
    seen: Mapping[ShardName, ShardEndpoint], raw: Mapping[str, bytes]
) -> Mapping[ShardName, ShardEndpoint]:
    """What cannot be read is no news, and neither is an elder's word."""
    shards = dict(seen)
    for name, data in raw.items():
        endpoint = _endpoint(data)
        if endpoint is None or endpoint.name != name:
            continue
        known = shards.get(endpoint.name)
        if known is None or replaces(endpoint, known):
            shards[endpoint.name] = endpoint
    return shards


def _endpoint(data: bytes | None) -> ShardEndpoint | None:
    """An announcement, if it is a whole one."""
    if data is None:
        return None
    try:
        return msgspec.json.decode(data, type=ShardEndpoint)
    except UNREADABLE:
        return None


def _announce(folder: Path, endpoint: ShardEndpoint) -> None:
    """Runs under the lock: what stands there cannot change between look and replacement."""
    path = folder / SHARDS_FOLDER / f"{endpoint.name}.json"
    known = _endpoint(_read_file(path))
    if known is None or replaces(endpoint, known):
        _replace(path, msgspec.json.encode(endpoint))


def _swap(folder: Path, *, expected: Epoch | None, new: RingMap) -> None:
    """Runs under the lock: what stands there cannot change between look and replacement."""
    spec = _parsed(folder, SPEC_FILE, RingSpec)
    if spec is None:
        raise ControlPlaneUnavailable(f"{folder}: there is no {SPEC_FILE}")
    if (new.uid, new.slots) != (spec.uid, spec.slots):
        raise ValueError(f"a map of ring {new.uid} ({new.slots} slots) for ring {spec.uid} ({spec.slots} slots)")
    current = _parsed(folder, MAP_FILE, RingMap)
    found = None if current is None else current.epoch
    if found != expected:
        raise MapConflict(expected=expected, found=found)
    _replace(folder / MAP_FILE, ring.encode(new))


def _parsed(folder: Path, name: str, kind: type[T]) -> T | None:
    """What a file holds, None when there is no file; a damaged one is never taken for none."""
    raw = _read_file(folder / name)
    try:
        return None if raw is None else msgspec.json.decode(raw, type=kind)
    except UNREADABLE as error:
        raise ControlPlaneUnavailable(f"{folder}: {name} is damaged: {error}") from error


def _look(folder: Path, *, known_map: bytes | None) -> _Looked:
    """Read everything; a map that is news is made durable first.

    A rename is seen before it is durable, and nobody may act on a map that a power cut takes back.
    """
    raw_map = _read_file(folder / MAP_FILE)
    if raw_map is not None and raw_map != known_map:
        _sync_folder(folder)
    shards: dict[str, bytes] = {}
    for path in sorted((folder / SHARDS_FOLDER).glob("*.json"))[:SHARDS_MAX]:
        shards[path.stem] = b""
        with suppress(OSError):  # one announcement that cannot be read does not hide the others
            shards[path.stem] = _read_file(path) or b""
    return _Looked(_read_file(folder / SPEC_FILE), raw_map, shards)


def _read_file(path: Path) -> bytes | None:
    """The whole file, or None when there is none."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    if len(data) > FILE_BYTES_MAX:
        raise OSError(errno.EFBIG, f"{path.name} is larger than {FILE_BYTES_MAX} bytes")
    return data


def _replace(path: Path, data: bytes) -> None:
    """Old or new content after a crash at any step; only under the lock: the temporary name is always the same."""
    temporary = path.with_name(path.name + ".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, FILE_MODE)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make names durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    """Make `folder` (and nothing above it that is missing stays open to others) and make its name durable."""
    if not folder.is_dir():
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        _sync_folder(folder.parent)


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Hold the folder's lock; closing the file releases it, so does the end of the process.

    Raises:
        ControlPlaneUnavailable: somebody held it for all of `LOCK_WAIT_S_MAX`.
    """
    deadline_s = time.monotonic() + LOCK_WAIT_S_MAX
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, FILE_MODE)
    try:
        while not _try_lock(descriptor):
            if time.monotonic() >= deadline_s:
                raise ControlPlaneUnavailable(f"{folder}: the lock was held for {LOCK_WAIT_S_MAX:g} s")
            time.sleep(LOCK_RETRY_S)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Take the lock without waiting."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _unavailable(folder: Path, error: OSError) -> ControlPlaneUnavailable:
    """The file system's refusal in the control plane's words."""
    return ControlPlaneUnavailable(f"{folder}: {error.strerror or error}")
