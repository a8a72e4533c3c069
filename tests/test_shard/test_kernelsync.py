"""fdatasync by the kernel, on real files; what it cannot do a thread does."""

from __future__ import annotations

import asyncio
import errno
import os
import platform
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fleetlm_shard import kernelsync
from fleetlm_shard.disk import File, OsDisk, OsFile
from fleetlm_shard.kernelsync import KernelSync, open_kernel_sync
from fleetlm_shard.lanes import Lanes, thread_lanes
from fleetlm_shard.writer import Finished, Job

Outcome = tuple[Finished | None, BaseException | None]


class Fence:
    """Counts looks; `error` is what the next one raises."""

    def __init__(self) -> None:
        self.looks = 0
        self.error: Exception | None = None

    @property
    def term(self) -> int:
        return 1

    def look(self) -> None:
        self.looks += 1
        if self.error is not None:
            raise self.error


@asynccontextmanager
async def kernel() -> AsyncGenerator[KernelSync]:
    """One; a machine of the tests that has none must say so."""
    sync = open_kernel_sync(asyncio.get_running_loop())
    assert sync is not None, "this kernel, or a filter in front of it, refuses io_setup"
    try:
        yield sync
    finally:
        sync.close()


@asynccontextmanager
async def lanes() -> AsyncGenerator[Lanes]:
    """With threads and the kernel."""
    opened = thread_lanes(asyncio.get_running_loop(), readers=1)
    try:
        yield opened
    finally:
        opened.close()


def descriptors() -> int:
    """How many this process has."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def synced(sync: KernelSync, file: File) -> BaseException | None:
    """What it says of that file."""
    said: asyncio.Future[BaseException | None] = asyncio.get_running_loop().create_future()
    assert sync.start(file, said.set_result)
    assert not said.done()
    return await asyncio.wait_for(said, 10)


async def round_of(job: Job, lanes: Lanes) -> Outcome:
    """Do it."""
    loop = asyncio.get_running_loop()
    said: asyncio.Future[Outcome] = loop.create_future()
    job.submit(lanes, loop, lambda finished, error: said.set_result((finished, error)))
    assert not said.done(), "never before `submit` has returned"
    return await asyncio.wait_for(said, 10)


def job(folder: Path, file: File, fence: Fence, *, data: bytes = b"", sync: bool = True) -> Job:
    """A round without a rotation."""
    return Job(OsDisk(folder), fence, file, data, 5, sync, None, time.monotonic)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def test_files_are_synced_one_after_the_other(tmp_path: Path) -> None:
    """Each answer comes once, through the loop, and the next sync may begin in it; no descriptor is left."""
    before = descriptors()
    file = OsDisk(tmp_path).create("file")
    async with kernel() as sync:
        answers: list[BaseException | None] = []
        ended = asyncio.Event()

        def again(error: BaseException | None) -> None:
            answers.append(error)
            if len(answers) == 100:
                ended.set()
                return
            file.pwrite(b"x" * 500, 500 * len(answers))
            assert sync.start(file, again)

        assert sync.start(file, again)
        await asyncio.wait_for(ended.wait(), 10)
        assert answers == [None] * 100
    file.close()
    assert descriptors() == before


async def test_the_end_waits_for_what_is_under_way(tmp_path: Path) -> None:
    """Who waits for a sync is told although everything ends."""
    file = OsDisk(tmp_path).create("file")
    answers: list[BaseException | None] = []
    async with kernel() as sync:
        file.pwrite(b"x" * 1_000_000, 0)
        assert sync.start(file, answers.append)
    assert answers == [None]
    file.close()


async def test_what_the_disk_says_is_said() -> None:
    """The kernel's answer is the error that fdatasync would have raised."""
    async with kernel() as sync:
        call: Any = sync._call

        def failing(number: Any, *arguments: Any) -> int:
            found = int(call(number, *arguments))
            if number.value == sync._getevents:
                kernelsync._EVENT.pack_into(sync._event, 0, 0, 0, -errno.EIO, 0)
            return found

        sync._call = failing
        file = OsFile(os.memfd_create("file"))
        error = await synced(sync, file)
        assert isinstance(error, OSError)
        assert (error.errno, error.strerror) == (errno.EIO, os.strerror(errno.EIO))
        file.close()


async def test_a_round_writes_syncs_and_looks(tmp_path: Path) -> None:
    """Afterwards the bytes are there and the term was looked at once; a round without a sync does the same without."""
    file = OsDisk(tmp_path).create("file")
    async with lanes() as opened:
        assert opened.syncs is not None
        for looks, sync in enumerate((True, False), 1):
            fence = Fence()
            data = b"round %d" % looks
            finished, error = await round_of(job(tmp_path, file, fence, data=data, sync=sync), opened)
            assert error is None
            assert finished is not None
            assert (finished.sync_s > 0, finished.free_bytes > 0, fence.looks) == (sync, True, 1)
            assert file.pread(100, 5) == data
    file.close()


@pytest.mark.parametrize("sync", [True, False], ids=["sync", "no-sync"])
async def test_a_look_that_fails_fails_the_round(tmp_path: Path, sync: bool) -> None:
    """A younger term is there: nobody hears that the round was good."""
    file = OsDisk(tmp_path).create("file")
    async with lanes() as opened:
        fence = Fence()
        fence.error = OSError(errno.EIO, "no look")
        assert await round_of(job(tmp_path, file, fence, data=b"x", sync=sync), opened) == (None, fence.error)
    file.close()


async def test_a_write_that_fails_fails_the_round(tmp_path: Path) -> None:
    """Said as from a lane, not raised where the round was begun; nothing was looked at."""
    (tmp_path / "file").touch()
    file = OsDisk(tmp_path).open("file")  # for reading only
    async with lanes() as opened:
        finished, error = await round_of(job(tmp_path, file, fence := Fence(), data=b"x"), opened)
        assert finished is None
        assert isinstance(error, OSError)
        assert (error.errno, fence.looks) == (errno.EBADF, 0)
    file.close()


async def test_what_the_kernel_does_not_sync_a_thread_does(tmp_path: Path) -> None:
    """A file without fsync is refused when it is begun; the thread's error is the round's."""
    reading, writing = os.pipe()
    file = OsFile(writing)
    async with lanes() as opened:
        assert opened.syncs is not None
        assert not opened.syncs.start(file, lambda error: None)
        finished, error = await round_of(job(tmp_path, file, fence := Fence()), opened)
        assert finished is None
        assert isinstance(error, OSError)
        assert (error.errno, fence.looks) == (errno.EINVAL, 0)
    os.close(reading)
    file.close()


async def test_a_kernel_without_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A call that is refused, another system, another processor: threads do it all."""
    machine = platform.machine()
    loop = asyncio.get_running_loop()
    with monkeypatch.context() as patch:
        patch.setitem(kernelsync._NUMBERS, machine, (99_999,) * 4)
        assert open_kernel_sync(loop) is None
        opened = thread_lanes(loop, readers=1)
    assert opened.syncs is None
    file = OsDisk(tmp_path).create("file")
    finished, error = await round_of(job(tmp_path, file, fence := Fence(), data=b"x"), opened)
    assert (finished is not None, error, fence.looks) == (True, None, 1)
    opened.close()
    file.close()
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert open_kernel_sync(loop) is None
