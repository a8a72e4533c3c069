"""The archive's store and worker on a real PostgreSQL: exactly once, never over another message, refusals isolated."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio

from fleetlm_cli.postgres import Postgres
from fleetlm_shard.archive.errors import ArchiveRefused, Diverged, Superseded
from fleetlm_shard.archive.feed import Piece
from fleetlm_shard.archive.library import Library
from fleetlm_shard.archive.rows import rows_of
from fleetlm_shard.archive.schema import VERSION, WEEK_US, partition_name
from fleetlm_shard.archive.store import Standing, Store, Volume, connect
from fleetlm_shard.archive.worker import Feed, Report, Worker
from fleetlm_shard.records import CursorMoved, Record, SessionCreated, SessionImported
from tests.support.logkit import AT_US, message
from tests.support.postgres import empty_database, running

VOLUME = Volume("ring-1", "shard-0", "volume-0", 7)
WAIT_S = 20.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Postgres]:
    """One server for this module."""
    async with running(tmp_path_factory.mktemp("archive")) as postgres:
        yield postgres


pytestmark = pytest.mark.asyncio(loop_scope="module")


@asynccontextmanager
async def a_store(dsn: str, volume: Volume = VOLUME) -> AsyncGenerator[tuple[Store, Standing]]:
    """An open store."""
    connection = await connect(dsn, name="test")
    try:
        store = Store(connection, volume)
        yield store, await store.open()
    finally:
        await connection.close()


async def fetch(dsn: str, query: str) -> list[tuple[object, ...]]:
    """Rows of a query."""
    connection = await asyncpg.connect(dsn)
    try:
        return [tuple(row.values()) for row in await connection.fetch(query)]
    finally:
        await connection.close()


def of(*records: Record, at: int = 100) -> list[tuple[int, Record]]:
    """Records with positions."""
    return [(at + number, record) for number, record in enumerate(records)]


async def test_what_a_move_brought_says_what_its_source_may_not_have_archived(server: Postgres) -> None:
    """Metadata and read cursors stand in STATE at the target; the source may leave before its archiver was there."""
    dsn = await empty_database(server)
    state = SessionImported(3, "s", 7, 0, AT_US, b'{"topic":"x"}', {"reader": 5})
    async with a_store(dsn) as (store, _):
        await store.write(rows_of(of(state, CursorMoved(3, "s", "reader", 4)), without=()), from_pos=0, to_pos=500)
    assert await fetch(dsn, "SELECT slot, last_seq, metadata FROM fleetlm.sessions") == [(3, 0, b'{"topic":"x"}')]
    assert await fetch(dsn, "SELECT participant, read_seq FROM fleetlm.participants") == [(b"reader", 5)]


async def test_a_batch_is_there_once_however_often_it_is_written(server: Postgres) -> None:
    """Messages byte for byte, sessions, participants and the position move together; writing again changes nothing."""
    dsn = await empty_database(server)
    records = of(
        SessionCreated(3, "s", AT_US - 1, b'{"topic":"x"}'),
        message("s", 1, text="one"),
        message("s", 2, text="\\u0000 and \\ud800 alone"),
        CursorMoved(3, "s", "reader", 2),
        message("t", 1),
    )
    async with a_store(dsn) as (store, standing):
        assert standing == Standing(0, {})
        rows = rows_of(records, without=())
        assert await store.write(rows, from_pos=0, to_pos=500) == 3
        assert await store.write(rows, from_pos=500, to_pos=500) == 0
    async with a_store(dsn) as (_, standing):
        assert standing == Standing(500, {})
    assert await fetch(dsn, "SELECT session, seq, body FROM fleetlm.messages ORDER BY 1, 2") == [
        (b"s", 1, message("s", 1, text="one").json),
        (b"s", 2, message("s", 2, text="\\u0000 and \\ud800 alone").json),
        (b"t", 1, message("t", 1).json),
    ]
    assert await fetch(
        dsn, "SELECT session, first_seq, last_seq, metadata, inserted_at_us FROM fleetlm.sessions ORDER BY 1"
    ) == [
        (b"s", 1, 2, b'{"topic":"x"}', AT_US - 1),
        (b"t", 1, 1, b"{}", AT_US),
    ]
    assert await fetch(
        dsn, "SELECT participant, session, sent_seq, read_seq FROM fleetlm.participants ORDER BY 1, 2"
    ) == [
        (b"a", b"s", 2, 0),
        (b"a", b"t", 1, 0),
        (b"reader", b"s", 0, 2),
    ]


async def test_another_message_is_never_overwritten(server: Postgres) -> None:
    """The same session and seq with other content stops the batch whole, also in another week's partition."""
    dsn = await empty_database(server)
    async with a_store(dsn) as (store, _):
        await store.write(rows_of(of(message("s", 1), message("s", 2)), without=()), from_pos=0, to_pos=10)
        other = message("s", 2, text="other", at_us=AT_US + 3 * WEEK_US)
        with pytest.raises(Diverged) as diverged:
            await store.write(rows_of(of(message("s", 3), other), without=()), from_pos=10, to_pos=20)
        assert (diverged.value.session, diverged.value.seq) == (b"s", 2)
    assert await fetch(dsn, "SELECT seq, body FROM fleetlm.messages ORDER BY seq") == [
        (1, message("s", 1).json),
        (2, message("s", 2).json),
    ]
    assert await fetch(dsn, "SELECT pos FROM fleetlm.positions") == [(10,)]


async def test_an_earlier_tail_fills_the_hole_that_a_later_one_left(server: Postgres) -> None:
    """After a move the new owner may archive later messages first: the elder's come in behind them."""
    dsn = await empty_database(server)
    async with a_store(dsn) as (store, _):
        await store.write(rows_of(of(message("s", 3)), without=()), from_pos=0, to_pos=10)
    async with a_store(dsn, Volume("ring-1", "shard-1", "volume-1", 1)) as (other, _):
        records = of(message("s", 1), message("s", 2), message("s", 3))
        assert await other.write(rows_of(records, without=()), from_pos=0, to_pos=10) == 2
    assert await fetch(dsn, "SELECT first_seq, last_seq FROM fleetlm.sessions") == [(1, 3)]


async def test_a_later_term_takes_over_and_an_elder_writes_nothing_more(server: Postgres) -> None:
    """Nor may it open again."""
    dsn = await empty_database(server)
    async with a_store(dsn) as (elder, _):
        async with a_store(dsn, Volume("ring-1", "shard-0", "volume-0", 8)) as (younger, standing):
            assert standing.pos == 0
            await younger.write(rows_of(of(message("s", 1)), without=()), from_pos=0, to_pos=10)
        with pytest.raises(Superseded):
            await elder.write(rows_of(of(message("s", 2)), without=()), from_pos=0, to_pos=20)
        with pytest.raises(Superseded):
            await elder.open()
    assert await fetch(dsn, "SELECT seq FROM fleetlm.messages") == [(1,)]


async def test_a_foreign_or_newer_database_is_refused_and_left_alone(server: Postgres) -> None:
    """With the words that say what it is."""
    dsn = await empty_database(server)
    async with a_store(dsn):
        pass
    connection = await connect(dsn, name="test")
    try:
        with pytest.raises(ArchiveRefused, match="ring ring-1, this is ring-2"):
            await Store(connection, Volume("ring-2", "shard-0", "volume-0", 1)).open()
        await connection.execute("UPDATE fleetlm.archive SET version = $1", VERSION + 1)
        with pytest.raises(ArchiveRefused, match="upgrade"):
            await Store(connection, VOLUME).open()
    finally:
        await connection.close()


async def test_many_migrate_at_once(server: Postgres) -> None:
    """Shards of one ring start together on an empty database."""
    dsn = await empty_database(server)

    async def one(number: int) -> None:
        async with a_store(dsn, Volume("ring-1", f"shard-{number}", f"volume-{number}", 1)) as (store, _):
            await store.write(rows_of(of(message(f"s{number}", 1)), without=()), from_pos=0, to_pos=10)

    await asyncio.gather(*(one(number) for number in range(8)))
    assert await fetch(dsn, "SELECT count(*) FROM fleetlm.messages") == [(8,)]


@dataclass
class Played:
    """A worker over a list of records, each its own batch of the log."""

    dsn: str
    records: list[Record]
    piece: int = 1000
    reports: list[Report] = field(default_factory=list[Report])
    worker: Worker | None = None
    task: asyncio.Task[None] | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def read(self, pos: int) -> Piece:
        """Positions are 10 apart."""
        first = pos // 10
        chosen = self.records[first : first + self.piece]
        return Piece([(10 * (first + n), each) for n, each in enumerate(chosen)], pos + 10 * len(chosen), damaged=0)

    def heard(self, _: Report) -> None:
        """The worker's report changed."""
        self.changed.set()

    @property
    def report(self) -> Report:
        """As it stands."""
        assert self.worker is not None
        return self.worker.report

    async def until(self, holds: Callable[[Report], bool]) -> None:
        """Wait for a report."""
        async with asyncio.timeout(WAIT_S):
            while not holds(self.report):
                self.changed.clear()
                await self.changed.wait()

    @property
    def end(self) -> int:
        """The position behind the last record."""
        return 10 * len(self.records)


@asynccontextmanager
async def played(dsn: str, records: list[Record], *, volume: Volume = VOLUME) -> AsyncGenerator[Played]:
    """A running worker."""
    it = Played(dsn, records)
    feed = Feed(it.read)
    it.worker = Worker(dsn=dsn, volume=volume, feed=feed, report=it.heard, entropy=random.Random(1))
    it.task = asyncio.create_task(it.worker.run())
    feed.durable(it.end)
    try:
        yield it
    finally:
        it.task.cancel()
        await asyncio.gather(it.task, return_exceptions=True)


async def test_rows_that_postgresql_refuses_are_quarantined_and_the_rest_flows(server: Postgres) -> None:
    """Poisoned rows at random places; quarantine keeps the records with the reason."""
    dsn = await empty_database(server)
    async with a_store(dsn) as (store, _):
        await store.write(rows_of(of(message("first", 1)), without=()), from_pos=0, to_pos=0)
    await fetch(dsn, "ALTER TABLE fleetlm.messages ADD CHECK (position('poison'::bytea IN body) = 0)")
    source = random.Random(5)
    records: list[Record] = [
        message(f"s{source.randrange(5)}-{n}", 1, text="poison" if source.random() < 0.05 else "good")
        for n in range(200)
    ]
    poisoned = [each for each in records if b"poison" in getattr(each, "json")]  # noqa: B009
    assert poisoned
    async with played(dsn, records) as it:
        await it.until(lambda report: report.pos == it.end)
        assert it.report.quarantined == len(poisoned)
        assert it.report.state == "Archiving"
    assert await fetch(dsn, "SELECT count(*) FROM fleetlm.messages") == [(1 + 200 - len(poisoned),)]
    rows = await fetch(dsn, "SELECT session, seq, reason FROM fleetlm.quarantine ORDER BY pos")
    assert [row[0] for row in rows] == [each.session.encode() for each in poisoned]  # type: ignore[union-attr]
    assert all("CheckViolation" in str(row[2]) for row in rows)


async def test_divergence_halts_one_slot_and_the_floor_stays(server: Postgres) -> None:
    """Others go on; nothing is overwritten; segments from the halt on are not given up, also after a restart."""
    dsn = await empty_database(server)
    async with a_store(dsn, Volume("ring-1", "other", "other", 1)) as (store, _):
        await store.write(rows_of(of(message("bad", 2, text="another")), without=()), from_pos=0, to_pos=10)
    records: list[Record] = [message("good-one", n) for n in range(1, 6)]
    records += [message("bad", n) for n in range(1, 4)] + [message("good-one", n) for n in range(6, 11)]
    slot = message("bad", 1).slot
    async with played(dsn, records) as it:
        await it.until(lambda report: report.pos == it.end)
        assert it.report.halted == [slot]
        assert it.report.floor_pos == 0
    async with played(dsn, records) as it:
        await it.until(lambda report: report.pos == it.end)
        assert it.report.floor_pos == 0
    assert await fetch(dsn, "SELECT count(*) FROM fleetlm.messages WHERE session = 'good-one'") == [(10,)]
    assert await fetch(dsn, "SELECT body FROM fleetlm.messages WHERE session = 'bad'") == [
        (message("bad", 2, text="another").json,)
    ]


async def test_a_database_that_dies_and_returns_has_everything_once(tmp_path: Path) -> None:
    """SIGQUIT of the server in the middle of the stream, again and again: nothing lost, nothing twice."""
    async with running(tmp_path) as own:
        dsn = await empty_database(own)
        records: list[Record] = [message(f"s{n % 7}", n // 7 + 1) for n in range(700)]
        it = Played(dsn, records, piece=20)
        feed = Feed(it.read)
        it.worker = Worker(dsn=dsn, volume=VOLUME, feed=feed, report=it.heard, entropy=random.Random(1))
        it.task = asyncio.create_task(it.worker.run())
        for share in (100, 350, 600):
            feed.durable(10 * share)
            await it.until(lambda report, pos=10 * share: report.pos >= pos - 200)  # type: ignore[misc]
            await own.crash()
            # Who has nothing to write does not notice.
            feed.durable(10 * share + 500)
            await it.until(lambda report: report.state == "Away")
            await own.start()
        feed.durable(it.end)
        await it.until(lambda report: report.pos == it.end)
        it.task.cancel()
        await asyncio.gather(it.task, return_exceptions=True)
        found = await fetch(dsn, "SELECT session, seq, body FROM fleetlm.messages ORDER BY 1, 2")
        assert found == sorted((e.session.encode(), e.seq, e.json) for e in records)  # type: ignore[union-attr]


async def test_partitions_are_weeks(server: Postgres) -> None:
    """Also far in the past and future, as a clock that jumps would have it."""
    dsn = await empty_database(server)
    times = [0, AT_US, AT_US + 52 * WEEK_US, 40_000_000 * 1_000_000_000]
    async with a_store(dsn) as (store, _):
        records = of(*(message("s", n + 1, at_us=at) for n, at in enumerate(times)))
        await store.write(rows_of(records, without=()), from_pos=0, to_pos=10)
    for at in times:
        name = partition_name(at // WEEK_US)
        assert await fetch(dsn, f"SELECT count(*) FROM fleetlm.{name}") == [(1,)]


async def test_two_archive_one_session_at_once(server: Postgres) -> None:
    """Both sides of a move, or an elder beside the younger, in batches that overlap: each message once."""
    dsn = await empty_database(server)
    source = random.Random(11)

    async def one(name: str) -> None:
        pos, first = 0, 1
        async with a_store(dsn, Volume("ring-1", name, name, 1)) as (store, _):
            while first <= 120:
                count = source.randint(1, 9)
                batch = [message(session, n) for n in range(first, first + count) for session in ("s", "t")]
                await store.write(rows_of(of(*batch), without=()), from_pos=pos, to_pos=pos + 1)
                pos, first = pos + 1, first + count

    await asyncio.gather(*(one(f"volume-{number}") for number in range(4)))
    found = await fetch(dsn, "SELECT session, seq, count(*) FROM fleetlm.messages GROUP BY 1, 2 HAVING count(*) > 1")
    assert found == []
    query = "SELECT count(*) FROM (SELECT session FROM fleetlm.messages GROUP BY 1 HAVING count(*) >= 120) AS whole"
    assert await fetch(dsn, query) == [(2,)]


GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("version", range(1, VERSION + 1))
async def test_a_database_of_each_version_migrates(server: Postgres, version: int) -> None:
    """What that version had written (a dump by pg_dump) is read, written on, and compared with what comes again."""
    dsn = await empty_database(server)
    await fetch_all(dsn, (GOLDEN / f"archive-v{version}.sql").read_text())
    messages = [
        message("s", 1, text="one"),
        message("s", 2, text="\\u0000 and \\ud800 alone"),
        message("s", 3, text="new"),
    ]
    async with a_store(dsn) as (store, standing):
        assert standing == Standing(500, {})
        assert await store.write(rows_of(of(*messages), without=()), from_pos=500, to_pos=700) == 1
    assert await fetch(dsn, "SELECT version FROM fleetlm.archive") == [(VERSION,)]
    library = Library(dsn, name="test")
    found = await library.read("s", first_seq=1, last_seq=9, limit=9, bytes_max=1 << 20)
    assert [(each.seq, each.json) for each in found] == [(each.seq, each.json) for each in messages]
    [kept] = await library.read("t", first_seq=2, last_seq=2, limit=9, bytes_max=1 << 20)
    assert kept.json == message("t", 2).json, "what was quarantined is read, too"
    library.close()
    assert await fetch(dsn, "SELECT first_seq, last_seq, metadata FROM fleetlm.sessions WHERE session = 's'") == [
        (1, 3, b'{"topic":"x"}')
    ]
    assert await fetch(dsn, "SELECT read_seq FROM fleetlm.participants WHERE participant = 'reader'") == [(2,)]


async def fetch_all(dsn: str, script: str) -> None:
    """Run a script."""
    connection = await asyncpg.connect(dsn)
    await connection.execute(script)
    await connection.close()
