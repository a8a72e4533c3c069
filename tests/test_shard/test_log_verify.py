"""`verify`: an offline check that writes nothing and finds every wrong byte that matters."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fleetlm_common.ids import ShardName
from fleetlm_shard.chain import index_of, read_chain, read_span
from fleetlm_shard.disk import OsDisk
from fleetlm_shard.housekeeping import write_index
from fleetlm_shard.segment_index import MemoryIndex
from fleetlm_shard.segments import IndexId, TempNames, index_path, parse_names
from fleetlm_shard.verify import VerifyReport, verify, verify_disk
from fleetlm_shard.volume_types import Identity, encode_paper
from tests.support.faults import Op
from tests.support.logkit import SMALL, TestFence, formatted, message, open_log
from tests.support.simdisk import WRITES, SimVolume


async def _fill(volume: SimVolume) -> None:
    formatted(volume)
    for term in (1, 2):
        opened = await open_log(volume.process(f"p{term}"), term)
        seqs = opened.last_seqs()
        for _ in range(12):
            for session in ("a", "b", "c"):
                seqs[session] = seqs.get(session, 0) + 1
                await opened.add(message(session, seqs[session], text="x" * 150))
            if term == 1:
                await opened.checkpoint()
        await opened.close()


@pytest.fixture(scope="module")
def filled() -> SimVolume:
    """Two terms, several segments, indexes, checkpoints."""
    volume = SimVolume()
    asyncio.run(_fill(volume))
    return volume


def _check(volume: SimVolume) -> VerifyReport:
    return verify_disk(volume.process("verify"), "sim", progress=lambda _done, _all: None)


def test_a_whole_volume_has_no_problems_and_is_not_written_to(filled: SimVolume) -> None:
    """Everything is counted, nothing is found, and not one writing operation is made."""
    volume = filled.copy()
    writes: list[Op] = []
    volume.hooks.append(lambda op: writes.append(op) if op.name in WRITES else None)
    report = _check(volume)
    assert report.ok, report.problems
    assert not writes
    assert (report.ring_uid, report.shard, report.owner_alive) == ("ring-1", "shard-0", False)
    assert (report.messages, report.sessions, report.checkpoints) == (72, 3, 2)
    assert report.segments >= 4
    assert report.indexes >= report.segments - 1
    assert not report.strays


@pytest.mark.timeout(600)
def test_every_written_byte_is_looked_at(filled: SimVolume) -> None:
    """A flipped bit in any written byte of any file is a problem (or, past the log's end, a torn tail)."""
    for path in filled.paths():
        content = filled.read(path)
        offsets = [at for at, byte in enumerate(content) if byte]
        for offset in offsets[:: max(len(offsets) // 60, 1)]:
            volume = filled.copy()
            volume.flip(path, offset, 1 << offset % 8)
            report = _check(volume)
            assert not report.ok or report.torn_bytes, f"{path} at {offset}"


def test_missing_files_and_foreign_folders_are_told(filled: SimVolume, tmp_path: Path) -> None:
    """A removed segment is a problem; a folder that is no volume says so."""
    for path in [path for path in filled.paths() if path.endswith(".seg")][:-1]:
        volume = filled.copy()
        volume.drop_name(path)
        assert not _check(volume).ok, path
    report = verify(tmp_path)
    assert [problem.path for problem in report.problems] == ["identity"]


async def test_with_a_living_owner_only_what_is_sealed_is_checked(tmp_path: Path) -> None:
    """The owner's lock on its term file is respected; the report says so."""
    disk = OsDisk(tmp_path)
    file = disk.create("identity")
    file.pwrite(encode_paper(Identity(ring_uid="ring-1", shard=ShardName("shard-0"), volume_id="v-1")), 0)
    file.close()
    term = disk.create("term-0000000001")
    assert term.try_lock()
    opened = await open_log(disk, 1, SMALL)
    for seq in range(1, 80):
        await opened.add(message("s", seq, text="x" * 200))
    report = verify(tmp_path)
    assert report.owner_alive
    assert report.ok, report.problems
    assert 0 < report.messages < 79
    await opened.close()
    term.close()
    after = verify(tmp_path)
    assert not after.owner_alive
    assert after.ok
    assert after.messages == 79


def test_an_index_that_does_not_agree_with_its_segment_is_a_problem(filled: SimVolume) -> None:
    """Whole by all its checksums, and yet it names another place for a message."""
    volume = filled.copy()
    disk = volume.process("forger")
    chain = read_chain(disk, TestFence(disk, 9), parse_names(disk.listdir("log")))
    link = chain.links[0]
    data = read_span(disk, link, link.header.base_pos, link.end_pos).data
    right = index_of(data, link)
    wrong = MemoryIndex()
    for session in ("a", "b", "c"):
        for run in right.runs(session):
            for seq, pos in enumerate(run[1:], run[0]):
                wrong.add(session, seq, pos + (session == "b"))
    path = write_index(disk, TempNames(9), link, wrong, path=index_path(IndexId(link.id, 9)), pause=lambda: None)
    report = _check(volume)
    assert [problem.path for problem in report.problems] == [path]
    assert "'b'" in report.problems[0].what
