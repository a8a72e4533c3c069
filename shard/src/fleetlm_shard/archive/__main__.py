"""`python -m fleetlm_shard.archive`: the archiver of one shard, started by it and by nobody else (`archiver.py`).

It reads the log's files and writes to PostgreSQL, away from the process that acknowledges. It ends when its standard
input does: when the shard ends, however that came about.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from pathlib import Path

import msgspec
import uvloop

from fleetlm_common.clock import SystemClock
from fleetlm_common.logs import Level, StreamLogger
from fleetlm_shard.archive.feed import Places, Segment, read_piece
from fleetlm_shard.archive.link import Durable, Placed, Said, Start
from fleetlm_shard.archive.pruning import prune_on
from fleetlm_shard.archive.store import Volume
from fleetlm_shard.archive.worker import Feed, Report, Worker
from fleetlm_shard.disk import OsDisk

LINE_BYTES_MAX = 16 * 1024 * 1024
"""Of a line from the shard: some 300 bytes a segment."""

_decode = msgspec.json.Decoder(Said).decode


async def _lines() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=LINE_BYTES_MAX)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin.buffer)
    return reader


def _say(report: Report) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()


async def _run() -> int:
    lines = await _lines()
    start = _decode(await lines.readline())
    assert isinstance(start, Start), "the first line starts"
    disk = OsDisk(Path(start.folder))
    events = StreamLogger(f"{start.shard}-archive", style=start.log_style, level=start.log_level, clock=SystemClock())
    segments: list[Segment] = []
    feed = Feed(lambda pos: read_piece(disk, Places(segments, feed.durable_pos), pos))
    said = ("", "")

    def report(now: Report) -> None:
        nonlocal said
        _say(now)
        if (now.state, now.why) != said:
            said = (now.state, now.why)
            level: Level = "info" if now.state == "Archiving" else "warning"
            events.event("archive", level=level, state=now.state, why=now.why, pos=now.pos)

    async def hear() -> None:
        nonlocal segments
        while line := await lines.readline():
            news = _decode(line)
            if isinstance(news, Placed):
                segments = news.segments
                feed.durable(news.durable_pos)
            elif isinstance(news, Durable):
                feed.durable(news.pos)

    worker = Worker(
        dsn=start.dsn,
        volume=Volume(start.ring_uid, start.shard, start.volume_id, start.term),
        feed=feed,
        report=report,
        entropy=random.Random(os.urandom(32)),
    )
    tasks = {asyncio.create_task(hear()), asyncio.create_task(worker.run())}
    if start.retention_s:
        age_us = int(start.retention_s * 1_000_000)
        pruning = prune_on(start.dsn, age_us=age_us, clock=SystemClock(), events=events, sleep=asyncio.sleep)
        tasks.add(asyncio.create_task(pruning))
    done, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in rest:
        task.cancel()
    for task in done:
        # A fault of ours is printed; the shard sees the end and starts another.
        task.result()
    return 0


def main() -> int:
    """Run until standard input ends."""
    return uvloop.run(_run())


if __name__ == "__main__":
    sys.exit(main())
