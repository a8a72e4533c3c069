"""The log on a real file system that is full (a loop mount: needs root)."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetlm_shard.disk import OsDisk
from fleetlm_shard.lanes import thread_lanes
from fleetlm_shard.log import Durable, Log
from fleetlm_shard.log_types import LogConfig, LogDiskFull
from fleetlm_shard.records import Message
from fleetlm_shard.recovery import LogBoot
from tests.support.logkit import TestFence, message

pytestmark = pytest.mark.root

CONFIG = LogConfig(
    segment_bytes=1024 * 1024,
    boot_segment_bytes=1024 * 1024,
    batch_bytes_max=128 * 1024,
    reserve_bytes=4 * 1024 * 1024,
    idle_s=0.02,
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An ext4 of 32 MiB."""
    assert os.geteuid() == 0, "this test mounts a file system: run it as root"
    image, mount = tmp_path / "image", tmp_path / "mount"
    with image.open("wb") as file:
        file.truncate(32 * 1024 * 1024)
    mount.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    subprocess.run(["mount", "-o", "loop", str(image), str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


class _Running:
    """A log with threads on that disk."""

    def __init__(self, folder: Path, term: int) -> None:
        disk = OsDisk(folder)
        boot = LogBoot.open(disk, TestFence(disk, term), CONFIG, entropy=random.Random(term))
        self.replayed = [record for _, record in boot.replay()]
        self.durable: list[Durable] = []
        self.stopped: list[BaseException] = []
        loop = asyncio.get_running_loop()
        self.log = Log(
            boot.cut(),
            lanes=thread_lanes(loop, readers=1),
            loop=loop,
            on_durable=self.durable.extend,
            on_stopped=self.stopped.append,
        )
        self.log.start()

    async def settle(self) -> None:
        """Until all that was taken in is durable."""
        while self.log.stats.queued_records:
            await self.log.look()

    async def fill(self) -> int:
        """Append until it is refused; returns the last seq that was taken."""
        seq = len(self.replayed) + len(self.durable)
        while True:
            try:
                self.log.append(message("s", seq + 1, text="x" * 60_000), None)
            except LogDiskFull:
                await self.settle()
                return seq
            seq += 1
            await self.settle()


async def test_a_full_file_system_refuses_appends_and_breaks_nothing(small_disk: Path) -> None:
    """Appends are refused before anything fails; with space again they go on; a boot finds all of it."""
    running = _Running(small_disk, 1)
    last = await running.fill()
    assert last > 200
    assert not running.stopped
    assert running.log.stats.free_bytes > 0
    await running.log.look()
    await running.log.close()
    again = _Running(small_disk, 2)
    assert [record.seq for record in again.replayed if isinstance(record, Message)] == list(range(1, last + 1))
    filler = small_disk / "filler"
    filler.write_bytes(bytes(1024))
    await again.log.close()
    assert not again.stopped


async def test_a_disk_that_somebody_else_fills_stops_nothing_that_was_promised(small_disk: Path) -> None:
    """With every last byte taken by others, what is acknowledged stays; freed space brings appends back."""
    running = _Running(small_disk, 1)
    for seq in range(1, 11):
        running.log.append(message("s", seq, text="x" * 1000), None)
    await running.settle()
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(64 * 1024)) == 64 * 1024:
                pass
        except OSError:
            pass
    rounds = running.log.stats.rounds
    while running.log.stats.rounds < rounds + 2:
        await running.log.look()
    with pytest.raises(LogDiskFull):
        running.log.append(message("s", 11), None)
    filler.unlink()
    await running.log.look()
    await running.log.look()
    running.log.append(message("s", 11), None)
    await running.settle()
    assert [record.seq for _, record, _ in running.durable if isinstance(record, Message)] == list(range(1, 12))
    await running.log.close()
    assert not running.stopped
