"""Replay through memory, log and archive: one contiguous stream, a gap only where nobody has it."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator

import asyncpg
import msgspec
import pytest
import pytest_asyncio

from fleetlm_cli.postgres import Postgres
from fleetlm_common import rpc
from fleetlm_common.errors import TryAgain
from fleetlm_shard.archive.asking import SETTINGS
from fleetlm_shard.archive.cold import Cold
from fleetlm_shard.archive.feed import Places, Segment, read_piece
from fleetlm_shard.archive.library import RANGE, Library
from fleetlm_shard.archive.rows import rows_of
from fleetlm_shard.archive.schema import WEEK_US, make_partitions, migrate
from fleetlm_shard.archive.store import Store, Volume, connect
from fleetlm_shard.log_types import Missing, ReadResult, StoredMessage
from fleetlm_shard.records import Message, Record
from tests.support.eventually import eventually
from tests.support.postgres import empty_database, running
from tests.support.shardrig import CONFIG, Rig, shard_rig
from tests.support.simdisk import SimVolume

pytestmark = pytest.mark.asyncio(loop_scope="module")
RETAIN = msgspec.structs.replace(CONFIG, retention_bytes=1, keys_window_s=15.0)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Postgres]:
    """One server for this module."""
    async with running(tmp_path_factory.mktemp("cold")) as postgres:
        yield postgres


async def archive(rig: Rig, volume: SimVolume, dsn: str, *, without: frozenset[int] = frozenset()) -> None:
    """Archive the whole log, as the archiver does; leaves seqs of `without` out, as a prune would."""
    disk = volume.process("archiver")
    log = rig.shard.log
    places = Places([Segment(header, end_pos) for header, end_pos in log.places()], log.durable_pos)
    connection = await connect(dsn, name="test")
    store = Store(connection, Volume("ring-1", "shard-0", "volume-1", 1))
    pos = (await store.open()).pos
    while pos < log.durable_pos:
        piece = read_piece(disk, places, pos)
        kept: list[tuple[int, Record]] = [
            (at, record) for at, record in piece.records if not (isinstance(record, Message) and record.seq in without)
        ]
        await store.write(rows_of(kept, without=()), from_pos=pos, to_pos=piece.end_pos)
        pos = piece.end_pos
    await connection.close()
    rig.shard.cold.shelves = Library(dsn, name="test")


async def trimmed(rig: Rig) -> None:
    """Two checkpoints, then retention takes all sealed segments."""
    rig.clock.advance(100.0)
    for _ in range(100):
        rig.shard.memory.keys.evict(rig.clock.monotonic_s())
    await eventually(lambda: rig.shard.log.stats.rotations > 0, "the log has more than one segment")
    for _ in range(2):
        assert await rig.shard.upkeep.checkpoint()
    await rig.shard.upkeep.retain()
    assert rig.shard.log.trim_pos > 0
    session = rig.shard.memory.sessions.get("s")
    session.ring.clear()
    session.ring_bytes = 0


async def test_what_retention_took_comes_from_the_archive(server: Postgres) -> None:
    """Forwards, backwards, in pages of any size, across the border between archive and log: everything, no gap."""
    volume, dsn = SimVolume(), await empty_database(server)
    async with shard_rig(volume, config=RETAIN) as rig, await rig.client() as client:
        for number in range(1, 201):
            await client.append("s", f"{number} " + "x" * 50_000)
        await archive(rig, volume, dsn)
        await trimmed(rig)
        info = await client.info("s")
        assert (info.earliest_seq, info.last_seq) == (1, 200)
        for limit in (1000, 7):
            after, texts = 0, 0
            while after < 200:
                page = await client.read("s", after=after, limit=limit)
                assert (page.gap, page.first_seq) == (None, after + 1)
                texts += len(page.messages)
                after += len(page.messages)
            assert texts == 200
        before = 201
        while before > 1:
            page = await client.read("s", before=before, limit=11)
            assert page.gap is None
            assert page.first_seq + len(page.messages) == before
            before = page.first_seq
            assert page.has_more == (before > 1)


async def test_a_database_that_does_not_answer_is_no_gap(server: Postgres) -> None:
    """Old messages: TRY_AGAIN. What log and memory hold is served; joining too."""
    volume, dsn = SimVolume(), await empty_database(server)
    async with shard_rig(volume, config=RETAIN) as rig, await rig.client() as client:
        for number in range(1, 201):
            await client.append("s", f"{number} " + "x" * 50_000)
        await archive(rig, volume, dsn)
        await trimmed(rig)
        rig.shard.cold.shelves = Library("postgresql://fleetlm@/none?host=/nowhere", name="test")
        with pytest.raises(TryAgain) as refused:
            await client.read("s", after=0)
        assert refused.value.reason == "unavailable"
        info = await client.info("s")
        assert info.earliest_seq > 1
        page = await client.read("s", after=info.earliest_seq - 1, limit=3)
        assert (page.gap, len(page.messages)) == (None, 3)


async def test_damage_in_the_log_is_filled_and_a_pruned_archive_is_a_gap(server: Postgres) -> None:
    """Whoever has a message serves it; what neither has is named."""
    volume, dsn = SimVolume(), await empty_database(server)
    async with shard_rig(volume) as rig, await rig.client() as client:
        for number in range(1, 11):
            await client.append("s", f"text-{number}-")
        await archive(rig, volume, dsn, without=frozenset({8}))
        for number in (5, 8):
            text = f"text-{number}-".encode()
            [path] = [path for path in volume.paths() if path.endswith(".seg") and text in volume.read(path)]
            volume.flip(path, volume.read(path).index(text))
        session = rig.shard.memory.sessions.get("s")
        session.ring.clear()
        session.ring_bytes = 0
        page = await client.read("s", after=0)
        assert (page.first_seq, len(page.messages), page.gap) == (1, 7, None)
        page = await client.read("s", after=7)
        assert (page.first_seq, len(page.messages)) == (9, 2)
        assert page.gap == rpc.Gap("damaged", 8, 9, 1, 10)


async def test_a_quarantined_message_is_still_read(server: Postgres) -> None:
    """PostgreSQL refused its row; nothing is lost for readers."""
    dsn = await empty_database(server)
    connection = await connect(dsn, name="test")
    store = Store(connection, Volume("ring-1", "shard-0", "volume-1", 1))
    await store.open()
    record = Message(3, "s", 1, 1, "key", b"h" * 16, b'{"id":"x","sender_id":"a"}')
    await store.quarantine(10, record, reason="test")
    await connection.close()
    library = Library(dsn, name="test")
    assert await library.earliest("s") == 1
    assert [it.json for it in await library.read("s", first_seq=1, last_seq=9, limit=5, bytes_max=100)] == [record.json]
    library.close()


async def test_a_cancelled_reader_gives_its_turn_back(server: Postgres) -> None:
    """Cancelling in mid-question costs the connection, not the next reader."""
    dsn = await empty_database(server)
    connection = await asyncpg.connect(dsn)
    await connection.execute(
        "CREATE SCHEMA fleetlm; CREATE TABLE fleetlm.quarantine (session bytea, seq bigint, body bytea)"
    )
    await connection.execute(
        "CREATE FUNCTION fleetlm.slow() RETURNS bytea LANGUAGE sql AS 'SELECT ''s''::bytea FROM pg_sleep(60)';"
        "CREATE VIEW fleetlm.messages AS SELECT fleetlm.slow() AS session, 1::bigint AS seq, ''::bytea AS body"
    )
    library = Library(dsn, name="test")
    readers = [asyncio.create_task(library.earliest("s")) for _ in range(4)]
    async with asyncio.timeout(10):
        # One question a transaction: within one the server's list of its connections stays as it was first seen.
        asleep = "SELECT EXISTS (SELECT FROM pg_stat_get_activity(NULL) WHERE wait_event = 'PgSleep')"
        while not await connection.fetchval(asleep):
            pass
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    await connection.execute(
        "DROP VIEW fleetlm.messages; CREATE TABLE fleetlm.messages (session bytea, seq bigint, body bytea)"
    )
    assert await library.earliest("s") is None
    library.close()
    await connection.close()


async def test_a_page_of_a_long_session_costs_a_page(server: Postgres) -> None:
    """The server walks its index; it neither sorts nor reads what comes after the page."""
    dsn = await empty_database(server)
    connection = await connect(dsn, name="test", settings=SETTINGS)
    await migrate(connection, ring_uid="ring")
    await make_partitions(connection, {10, 11})
    await connection.execute(
        "INSERT INTO fleetlm.messages SELECT 's', n, (10 + n % 2) * $1::bigint + n, 'a', 'k', 'h', 'body'"
        " FROM generate_series(1, 40000) AS n",
        WEEK_US,
    )
    await connection.execute("ANALYZE fleetlm.messages")
    explained = await connection.fetch(f"EXPLAIN ANALYZE {RANGE}", b"s", 100, 40000, 1000)
    plan = "\n".join(row[0] for row in explained)
    scanned = [int(float(each)) for each in re.findall(r"Scan.*actual time=\S+ rows=([0-9.]+)", plan)]
    assert sum(scanned) < 3000, plan
    await connection.close()


class FakeLog:
    """A log that holds some seqs of one session."""

    def __init__(self, held: set[int], last_seq: int) -> None:
        self.held = held
        self.last_seq = last_seq
        self.trim_pos = 0

    def released_pos(self, _: int) -> int:
        """No move released anything."""
        return 0

    async def read(self, session: str, *, first_seq: int, limit: int, bytes_max: int, from_pos: int) -> ReadResult:
        """As `Log.read`."""
        assert from_pos == 0
        chosen = sorted(seq for seq in self.held if seq >= first_seq)
        page, size = [], 0
        for seq in chosen[:limit]:
            if size >= bytes_max:
                break
            page.append(StoredMessage(seq, seq, body(seq)))
            size += len(body(seq))
        missing, expected = [], first_seq
        for message in page:
            if message.seq > expected:
                missing.append(Missing(expected, message.seq - 1, "damaged"))
            expected = message.seq + 1
        return ReadResult(page, missing, has_more=len(page) < len(chosen))


class FakeShelves:
    """An archive that holds some seqs of one session."""

    def __init__(self, held: set[int]) -> None:
        self.held = held

    async def read(
        self, session: str, *, first_seq: int, last_seq: int, limit: int, bytes_max: int
    ) -> list[StoredMessage]:
        """As `Library.read`."""
        page: list[StoredMessage] = []
        size = 0
        for seq in sorted(seq for seq in self.held if first_seq <= seq <= last_seq):
            page.append(StoredMessage(seq, 0, body(seq)))
            size += len(body(seq))
            if len(page) >= limit or size >= bytes_max:
                break
        return page

    async def earliest(self, session: str) -> int | None:
        """As `Library.earliest`."""
        return min(self.held, default=None)


def body(seq: int) -> bytes:
    """Of different lengths."""
    return str(seq).encode() * (1 + seq % 3)


async def test_random_holes_in_both() -> None:
    """Whatever log and archive hold, pages give the union in order, and each hole that is left is one of both."""
    source = random.Random(3)
    for _ in range(3000):
        last_seq = source.randint(1, 12)
        everything = range(1, last_seq + 1)
        in_log = {seq for seq in everything if source.random() < 0.6}
        in_archive = {seq for seq in everything if source.random() < 0.6}
        cold = Cold(FakeLog(in_log, last_seq))  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  it reads no more
        cold.shelves = FakeShelves(in_archive)
        limit, bytes_max = source.randint(1, 13), source.randint(1, 30)
        wanted, expected = sorted(in_log | in_archive), 1
        read: list[int] = []
        while True:
            page = await cold.read("s", first_seq=expected, last_seq=last_seq, limit=limit, slot=0, bytes_max=bytes_max)
            seqs = [message.seq for message in page.messages]
            assert len(seqs) <= limit
            assert all(message.json == body(message.seq) for message in page.messages)
            for hole in page.missing:
                assert not set(range(hole.from_seq, hole.to_seq + 1)) & set(wanted)
            read += seqs
            if not seqs:
                break
            expected = seqs[-1] + 1
            if expected > last_seq:
                break
            assert page.has_more or not any(seq >= expected for seq in wanted)
        assert read == wanted
