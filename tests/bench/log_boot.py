"""Boot of the log alone: 1 GiB, 100,000 sessions, a checkpoint some way before the end, 100,000 keys in the window.

    python -m tests.bench.log_boot [--folder /var/tmp/x] [--mib 1024] [--sessions 100000]

The process that wrote is cut off without a graceful end. Prints the time of each step (page cache warm).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import shutil
import tempfile
import time
from pathlib import Path

import uvloop

from fleetlm_shard.disk import OsDisk
from fleetlm_shard.lanes import thread_lanes
from fleetlm_shard.log import Durable, Log
from fleetlm_shard.log_types import CheckpointRow, LogConfig
from fleetlm_shard.records import Message
from fleetlm_shard.recovery import LogBoot
from tests.support.logkit import TestFence, message

WINDOW_KEYS = 100_000
AFTER_CHECKPOINT = 50_000


async def write(folder: Path, *, size_bytes: int, sessions: int) -> None:
    """Fill the log through its own door, checkpoint, write on, stop dead."""
    loop = asyncio.get_running_loop()
    disk, config = OsDisk(folder), LogConfig(idle_s=3600.0)
    boot = LogBoot.open(disk, TestFence(disk, 1), config, entropy=random.Random(1))
    assert not list(boot.replay())
    last: list[int] = []
    rows: dict[str, CheckpointRow] = {}

    def on_durable(entries: list[Durable]) -> None:
        for pos, record, _ in entries:
            assert isinstance(record, Message)
            old = rows.get(record.session)
            first = (old.first_seq, old.first_pos) if old else (record.seq, pos)
            rows[record.session] = CheckpointRow(1, *first, record.seq, pos, record.inserted_at_us, b"{}", {})
        last.extend(pos for pos, _, _ in entries)
        del last[:-WINDOW_KEYS]

    lanes = thread_lanes(loop, readers=1)
    log = Log(boot.cut(), lanes=lanes, loop=loop, on_durable=on_durable, on_stopped=print)
    log.start()
    template = message("session-000000", 1, text="x" * 256)
    seq, number, names = 1, 0, [f"session-{n:06d}" for n in range(sessions)]

    async def add(count: int) -> None:
        nonlocal seq, number
        for _ in range(count):
            log.append(
                Message(
                    1, names[number], seq, template.inserted_at_us, template.key, template.content_hash, template.json
                ),
                None,
            )
            number += 1
            if number == sessions:
                number, seq = 0, seq + 1
        while log.stats.queued_records:
            await log.look()

    while log.durable_pos < size_bytes:
        await add(1000)
    pos, window = log.durable_pos, last[0]
    started_s = time.monotonic()
    checkpoint = asyncio.ensure_future(log.checkpoint(dict(rows), pos=pos, keys_from_pos=window, opened={}))
    worst_s = 0.0
    while not checkpoint.done():
        before_s = time.monotonic()
        await asyncio.sleep(0.001)
        worst_s = max(worst_s, time.monotonic() - before_s - 0.001)
    await checkpoint
    took_s = time.monotonic() - started_s
    print(f"checkpoint of {len(rows)} rows: {took_s:.2f} s, loop held up at most {worst_s * 1e3:.1f} ms")  # noqa: T201
    await add(AFTER_CHECKPOINT)
    await log.close()


def boot_again(folder: Path) -> None:
    """Time the steps."""
    disk = OsDisk(folder)
    started_s = time.monotonic()
    boot = LogBoot.open(disk, TestFence(disk, 2), LogConfig(), entropy=random.Random(2))
    opened_s = time.monotonic()
    count = sum(1 for _ in boot.replay())
    replayed_s = time.monotonic()
    boot.cut()
    cut_s = time.monotonic()
    print(  # noqa: T201
        f"boot: open {opened_s - started_s:.3f} s, replay of {count} records {replayed_s - opened_s:.3f} s, "
        f"cut {cut_s - replayed_s:.3f} s, together {cut_s - started_s:.3f} s"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--sessions", type=int, default=100_000)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=args.folder or "/var/tmp"))
    try:
        uvloop.run(write(folder, size_bytes=args.mib << 20, sessions=args.sessions))
        boot_again(folder)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
