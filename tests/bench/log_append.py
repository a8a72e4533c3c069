"""The log alone: durable appends a second on the real disk, by how many appends are under way at once.

    python -m tests.bench.log_append [--folder /var/tmp/x] [--seconds 3] [--profile]

Closed loop: each of N writers appends its next message when the last one is durable, so batches form by concurrency.
A message has 256 bytes of content. Building the JSON and the record is part of what is timed, as in the shard.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import random
import shutil
import tempfile
import time
from pathlib import Path

import uvloop

from fleetlm_shard.disk import OsDisk
from fleetlm_shard.lanes import thread_lanes
from fleetlm_shard.log import Durable, Log
from fleetlm_shard.log_types import FsyncPolicy, LogConfig
from fleetlm_shard.records import InsertedAt, Message, content_hash, message_json
from fleetlm_shard.recovery import LogBoot
from tests.support.logkit import TestFence

FRAGMENT = b'"sender_id":"alice","sender_kind":"human","kind":"text","content":"%b","metadata":{}' % (b"x" * 256)


class _Writers:
    """N writers, each with a session of its own."""

    def __init__(self, count: int) -> None:
        self.log: Log
        self.done = 0
        self.stop_at_s = 0.0
        self.syncs: list[float] = []
        self._stamp = InsertedAt()
        self._hash = content_hash(FRAGMENT)
        self._seqs = [0] * count
        self._names = [f"session-{number:06d}" for number in range(count)]
        self._jsons = [b'"%b"' % name.encode() for name in self._names]

    def append(self, number: int) -> None:
        """The next message of a writer."""
        seq = self._seqs[number] = self._seqs[number] + 1
        at_us = time.time_ns() // 1000
        record = Message(
            number & 255,
            self._names[number],
            seq,
            at_us,
            "0190c1c2-0000-7000-8000-000000000000",
            self._hash,
            message_json(
                id_text="0190c1c2-0000-7000-8000-000000000000",
                session_json=self._jsons[number],
                seq=seq,
                inserted_at=self._stamp.text(at_us),
                fragment=FRAGMENT,
            ),
        )
        self.log.append(record, number)

    def on_durable(self, entries: list[Durable]) -> None:
        """Each writer goes on."""
        self.done += len(entries)
        if time.monotonic() < self.stop_at_s:
            for _, _, number in entries:
                self.append(number)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def measure(folder: Path, *, concurrency: int, seconds: float, fsync: FsyncPolicy, profile: bool) -> None:
    """One run; prints one line."""
    loop = asyncio.get_running_loop()
    disk = OsDisk(folder)
    config = LogConfig(fsync=fsync)
    boot = LogBoot.open(disk, TestFence(disk, 1), config, entropy=random.Random())
    assert not list(boot.replay())
    writers = _Writers(concurrency)
    ended = loop.create_future()
    log = Log(
        boot.cut(),
        lanes=thread_lanes(loop, readers=config.readers),
        loop=loop,
        on_durable=writers.on_durable,
        on_stopped=ended.set_exception,
        observe_sync=writers.syncs.append,
    )
    writers.log = log
    log.start()
    await asyncio.sleep(0.5)
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    started_s, cpu_s = time.monotonic(), time.process_time()
    writers.stop_at_s = started_s + seconds
    for number in range(concurrency):
        writers.append(number)
    await asyncio.sleep(seconds)
    while log.stats.queued_records:
        await log.look()
    took_s, cpu_s = time.monotonic() - started_s, time.process_time() - cpu_s
    if profile:
        profiler.disable()
        profiler.print_stats("tottime")
    stats = log.stats
    sync_us = sum(writers.syncs) / max(len(writers.syncs), 1) * 1e6
    print(  # noqa: T201
        f"{fsync} concurrency {concurrency:5d}: {writers.done / took_s:9.0f} appends/s, "
        f"{stats.appended_records / max(stats.batches, 1):7.1f} a batch, "
        f"cpu {cpu_s / writers.done * 1e6:6.2f} us each, sync mean {sync_us:6.0f} us"
    )
    await log.close()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--fsync", default="always", choices=["always", "interval", "never"])
    parser.add_argument("--concurrency", type=int, nargs="*", default=[1, 64, 1000])
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    for concurrency in args.concurrency:
        folder = Path(tempfile.mkdtemp(dir=args.folder or "/var/tmp"))
        try:
            uvloop.run(
                measure(folder, concurrency=concurrency, seconds=args.seconds, fsync=args.fsync, profile=args.profile)
            )
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
