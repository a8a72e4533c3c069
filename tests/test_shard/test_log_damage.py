"""Rot: any byte flipped, any truncation, in any file of a small volume.

Promises checked for each: nothing wrong is ever served; what is missing is said; only the damaged part is missing; no
session ever gets a seq again that it had.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from fleetlm_shard.log_types import LogConfig, LogUnreadable
from fleetlm_shard.records import Message
from fleetlm_shard.segments import parse_names
from tests.support.logkit import Opened, message, open_log
from tests.support.simdisk import SimVolume

CONFIG = LogConfig(
    segment_bytes=8 * 1024, boot_segment_bytes=8 * 1024, batch_bytes_max=2048, reserve_bytes=0, idle_s=3600.0
)
SESSIONS = ("a", "b", "c", "never")


@dataclass
class Kept:
    """A volume at rest and what it holds."""

    volume: SimVolume
    messages: list[Message] = field(default_factory=list[Message])

    def last_seq(self, session: str) -> int:
        """The true one."""
        return max((each.seq for each in self.messages if each.session == session), default=0)


async def _fill() -> Kept:
    kept = Kept(SimVolume())
    seqs: dict[str, int] = {}

    async def add(opened: Opened, *sessions: str, text: str = "") -> None:
        made: list[Message] = []
        for session in sessions:
            seqs[session] = seqs.get(session, 0) + 1
            made.append(message(session, seqs[session], text=text))
        await opened.add(*made)
        kept.messages += made

    first = await open_log(kept.volume.process("one"), 1, CONFIG)
    await add(first, "a", "b")
    await add(first, "a")
    await first.checkpoint()
    for _ in range(4):
        await add(first, "a", "b", "b", text="x" * 300)
    await first.close()
    second = await open_log(kept.volume.process("two"), 2, CONFIG)
    await add(second, "a", "c")
    await add(second, "b", "c", "c")
    await second.close()
    return kept


@pytest.fixture(scope="module")
def kept() -> Kept:
    """Two terms, a rotation, an index, a checkpoint, a graceful end: everything acknowledged is provably on disk."""
    made = asyncio.run(_fill())
    kinds = parse_names(path.removeprefix("log/") for path in made.volume.paths())
    assert kinds.checkpoints
    assert kinds.indexes
    assert len(kinds.segments) == 4
    return made


async def examine(kept: Kept, volume: SimVolume, what: str) -> int:
    """Boot, read everything; returns how many messages are missing, -1 if boot refused with words."""
    try:
        opened = await open_log(volume.process("younger"), 3, CONFIG)
    except LogUnreadable:
        return -1
    truth = {(each.session, each.seq): each.json for each in kept.messages}
    missing = 0
    for session in SESSIONS:
        found = await opened.read_all(session)
        for each in found:
            assert truth.get((session, each.seq)) == each.json, f"{what}: {session}/{each.seq} is not what was written"
        lost = kept.last_seq(session) - len(found)
        missing += lost
        assert opened.next_seq(session) > kept.last_seq(session), f"{what}: {session} gets a seq twice"
    assert not missing or opened.log.damage, f"{what}: {missing} messages are missing and nothing is said"
    opened.log.append(message("a", opened.next_seq("a")), None)
    await opened.settle()
    assert len(opened.acked) == 1, what
    return missing


def _offsets(content: bytes, messages: list[Message]) -> list[int]:
    """Every byte of the format, every seventh inside a message's JSON (they are all alike), some of the zeros."""
    alike: set[int] = set()
    for each in messages:
        start = content.find(each.json)
        if start >= 0:
            alike.update(at for at in range(start, start + len(each.json)) if at % 7)
    offsets = {at for at, byte in enumerate(content) if byte} - alike
    return sorted({*offsets, *range(0, len(content), 251), len(content) - 1})


@pytest.mark.timeout(900)
def test_every_flipped_byte_costs_at_most_its_record(kept: Kept) -> None:
    """One flipped bit of any byte of any file: at most one message is missing, and never a boot."""

    async def run() -> None:
        for path in kept.volume.paths():
            for offset in _offsets(kept.volume.read(path), kept.messages):
                volume = kept.volume.copy()
                volume.flip(path, offset, 1 << offset % 8)
                what = f"{path} at {offset}"
                missing = await examine(kept, volume, what)
                assert 0 <= missing <= 1, f"{what}: {missing} messages are missing"

    asyncio.run(run())


@pytest.mark.timeout(900)
def test_every_truncation_costs_at_most_what_was_cut_off(kept: Kept) -> None:
    """Any file cut to any length: what lies in other files and before the cut is there."""

    async def run() -> None:
        for path in kept.volume.paths():
            content = kept.volume.read(path)
            written = len(content.rstrip(b"\0"))
            lengths = sorted({*range(0, written, 13), written - 1, written, written + 20, len(content) - 1})
            for length in (each for each in lengths if 0 <= each < len(content)):
                volume = kept.volume.copy()
                volume.truncate(path, length)
                missing = await examine(kept, volume, f"{path} cut to {length}")
                ends = [content.find(each.json) + len(each.json) for each in kept.messages if each.json in content]
                beyond = sum(end > length for end in ends)
                assert missing <= beyond, f"{path} cut to {length}: {missing} missing, {beyond} were cut off"
                assert missing >= 0 or length < 4096, f"{path} cut to {length}: boot refused"

    asyncio.run(run())


def test_every_file_of_the_log_may_be_lost(kept: Kept) -> None:
    """One file removed: nothing wrong is served, and what is missing is said (or boot says that it cannot)."""

    async def run() -> dict[str, int]:
        results: dict[str, int] = {}
        for path in kept.volume.paths():
            if path == "log/0000000002-0000000001.seg":
                # The newest segment: without it the volume looks like one from before that boot. Nothing on the
                # volume tells; the checkpoint of a running shard would.
                continue
            volume = kept.volume.copy()
            volume.drop_name(path)
            volume.sync_names("log")
            results[path] = await examine(kept, volume, f"without {path}")
        return results

    results = asyncio.run(run())
    assert all(missing >= 0 for missing in results.values()), results
    assert results["log/0000000001-0000000001.ckpt"] == 0
    assert results["log/0000000001-0000000001-0000000001.idx"] == 0
