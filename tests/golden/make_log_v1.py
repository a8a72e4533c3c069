"""Makes `log-v1/`: a small volume as format version 1 wrote it. Run once per format version, never again.

    python -m tests.golden.make_log_v1

What is committed is the output of the code of its time; `test_log_golden.py` reads it with today's. Running this again
with newer code would only show that the code can read what it writes.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from fleetlm_common.ids import ShardName
from fleetlm_shard.disk import OsDisk
from fleetlm_shard.records import CursorMoved, SessionCreated, SlotsOpened
from fleetlm_shard.volume_types import Identity, encode_paper
from tests.support.logkit import SMALL, message, open_log

FOLDER = Path(__file__).parent / "log-v1"


async def make(folder: Path) -> None:
    """Two terms: a graceful end, then a kill with an unproven tail; every kind of record and file."""
    disk = OsDisk(folder)
    file = disk.create("identity")
    file.pwrite(encode_paper(Identity(ring_uid="ring-1", shard=ShardName("shard-0"), volume_id="golden")), 0)
    file.close()
    first = await open_log(disk, 1, SMALL)
    first.log.append(SlotsOpened(3, [0, 1, 2]), None)
    first.log.append(SessionCreated(2, "größe", 1_795_475_336_000_000, b'{"topic":"gold"}'), None)
    for seq in range(1, 41):
        await first.add(message("s", seq, text="x" * (seq * 5)))
        if seq % 4 == 0:
            await first.add(message("größe", seq // 4))
        if seq in {10, 20}:
            await first.checkpoint()
    assert await first.log.trim(max_bytes=2 * SMALL.segment_bytes, max_age_s=None, now_ms=0)
    first.log.append(CursorMoved(2, "größe", "bob", 7), None)
    await first.settle()
    await first.close()
    second = await open_log(disk, 2, SMALL)
    await second.add(message("s", 41), message("new", 1))
    expected = {
        "messages": {
            session: [[each.seq, each.pos, each.json.decode()] for each in await second.read_all(session)]
            for session in ("s", "größe", "new")
        },
        "trim_pos": second.log.trim_pos,
        "end_pos": second.log.durable_pos,
    }
    # Not closed: the last batch has no mark after it.
    (folder / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    FOLDER.mkdir()
    asyncio.run(make(FOLDER))
