"""Volumes of every format version, as they were written then, are read by today's code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from fleetlm_shard.disk import OsDisk
from fleetlm_shard.records import CursorMoved
from fleetlm_shard.verify import verify
from tests.support.logkit import SMALL, message, open_log

GOLDEN = Path(__file__).parent.parent / "golden"


async def test_a_volume_of_version_1_is_read_whole(tmp_path: Path) -> None:
    """Messages byte for byte, positions, trim position, rows; then it accepts appends."""
    folder = tmp_path / "volume"
    shutil.copytree(GOLDEN / "log-v1", folder)
    (folder / "aside").mkdir(exist_ok=True)
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    assert verify(folder).ok
    opened = await open_log(OsDisk(folder), 3, SMALL)
    assert not opened.boot.damage
    assert not opened.boot.strays
    assert opened.log.trim_pos == expected["trim_pos"]
    assert opened.log.durable_pos == expected["end_pos"]
    assert opened.last_seqs() == {"s": 41, "größe": 10, "new": 1}
    assert CursorMoved(2, "größe", "bob", 7) in [record for _, record in opened.replayed]
    for session, messages in expected["messages"].items():
        found = await opened.read_all(session)
        assert [[each.seq, each.pos, each.json.decode()] for each in found] == messages
    row = opened.boot.row("s")
    assert row is not None
    assert (row.first_seq, row.last_seq) == (1, 20)
    meta = opened.boot.checkpoint
    assert meta is not None
    assert dict(meta.opened) == {1: 1}
    await opened.add(message("s", 42))
    assert len(opened.acked) == 1
    await opened.close()
