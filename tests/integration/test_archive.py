"""A shard with an archive: real processes, a real PostgreSQL; what is in the log is in the archive, exactly."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import msgspec
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fleetlm_cli.postgres import Postgres
from fleetlm_common import rpc
from fleetlm_shard.archive.compare import compare
from fleetlm_shard.archive.pruning import prune
from fleetlm_shard.archive.schema import WEEK_US
from tests.support.clockstep import ClockStep
from tests.support.postgres import empty_database, running
from tests.support.rpcclient import RpcClient, draft
from tests.support.shardprocess import ShardProcess, ShardRing
from tests.support.tcpproxy import READ_BYTES, SocketProxy

WAIT_S = 60.0
WEEK_S = WEEK_US // 1_000_000
POLL_S = 0.05


class Rig:
    """A database, and a ring whose shard archives to it."""

    def __init__(self, folder: Path, server: Postgres, dsn: str) -> None:
        self.server = server
        self.dsn = dsn
        self.ring = ShardRing(folder)
        self.url_file = folder / "archive-url"
        self.url_file.write_text(dsn + "\n")

    @asynccontextmanager
    async def shard(self, env: Mapping[str, str] | None = None) -> AsyncGenerator[ShardProcess]:
        """A running member that archives."""
        own = {"ARCHIVE_URL_FILE": str(self.url_file), **(env or {})}
        async with self.ring.process(env=own) as shard:
            await self.ring.bind(shard.name)
            await shard.event("map.adopted")
            yield shard

    async def archived(self, *, first_seq: int = 1) -> dict[str, list[bytes]]:
        """Bodies by session, ascending."""
        connection = await asyncpg.connect(self.dsn)
        try:
            rows = await connection.fetch("SELECT session, seq, body FROM fleetlm.messages ORDER BY session, seq")
        except asyncpg.UndefinedTableError:
            return {}
        finally:
            await connection.close()
        found: dict[str, list[bytes]] = {}
        for row in rows:
            bodies = found.setdefault(row["session"].decode(), [])
            bodies.append(row["body"])
            assert row["seq"] == first_seq + len(bodies) - 1, "seqs follow each other"
        return found


@asynccontextmanager
async def rig(folder: Path) -> AsyncGenerator[Rig]:
    """Everything but the shard's process."""
    async with running(folder) as server:
        yield Rig(folder, server, await empty_database(server))


async def metric(shard: ShardProcess, name: str) -> float:
    """One series of the shard."""
    _, text = await shard.get("/metrics")
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == f"fleetlm_shard_{name}":
                return sample.value
    raise AssertionError(f"no metric {name}")


async def caught_up(shard: ShardProcess, *, within_s: float = WAIT_S) -> None:
    """Wait until the archive has everything that is durable."""
    async with asyncio.timeout(within_s):
        while True:
            if await metric(shard, "archiving") == 1 and await metric(shard, "archive_lag_bytes") == 0:
                return
            await asyncio.sleep(POLL_S)


async def log_of(client: RpcClient, sessions: list[str]) -> dict[str, list[dict[str, object]]]:
    """What the shard itself replays."""
    return {session: await client.read_all(session) for session in sessions}


def decoded(archived: dict[str, list[bytes]]) -> dict[str, list[dict[str, object]]]:
    """Bodies as values."""
    return {session: [msgspec.json.decode(body) for body in bodies] for session, bodies in archived.items()}


async def append_some(client: RpcClient, sessions: list[str], *, first: int, count: int) -> None:
    """`count` messages to each session."""
    for number in range(first, first + count):
        await asyncio.gather(*(client.append(session, f"{session} {number}") for session in sessions))


async def test_everything_reaches_the_archive_and_metrics_say_so(tmp_path: Path) -> None:
    """Messages, cursors and created sessions; a restart goes on where the last process ended."""
    sessions = [f"s{number}" for number in range(5)]
    async with rig(tmp_path) as it:
        async with it.shard() as shard, await shard.client() as client:
            await client.create("made", b'{"a":1}')
            await append_some(client, sessions, first=0, count=20)
            await client.mark_read("s1", "bob", 7)
            await caught_up(shard)
            assert decoded(await it.archived()) == await log_of(client, sessions)
            assert await metric(shard, "archived_messages_total") == 100
            assert await metric(shard, "archive_batches_total") >= 1
            assert await metric(shard, "archiver_starts_total") == 1
            shard.signal(signal.SIGTERM)
            assert await shard.ended() == 0
        async with it.shard() as shard, await shard.client() as client:
            await append_some(client, sessions, first=20, count=5)
            await caught_up(shard)
            assert decoded(await it.archived()) == await log_of(client, sessions)
            assert await metric(shard, "archived_messages_total") == 25, "only the new ones"
        connection = await asyncpg.connect(it.dsn)
        assert await connection.fetchval("SELECT metadata FROM fleetlm.sessions WHERE session = 'made'") == b'{"a":1}'
        found = await connection.fetchval("SELECT read_seq FROM fleetlm.participants WHERE participant = 'bob'")
        await connection.close()
        assert found == 7


async def test_the_url_may_come_later_and_change(tmp_path: Path) -> None:
    """No file: the shard serves and says so. With the file, then with another URL in it, it archives: no restart."""
    async with rig(tmp_path) as it:
        url = it.url_file.read_text()
        it.url_file.unlink()
        async with it.shard() as shard, await shard.client() as client:
            await append_some(client, ["s"], first=0, count=2)
            await shard.wait_reason("ArchiveAway")
            assert str(it.url_file) in (await shard.get("/health/ready"))[1]
            it.url_file.write_text(url)
            await caught_up(shard)
            assert decoded(await it.archived()) == await log_of(client, ["s"])
            connection = await asyncpg.connect(it.dsn)
            await connection.execute("CREATE ROLE other LOGIN SUPERUSER")
            it.url_file.write_text(it.dsn.replace("//fleetlm@", "//other@"))
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'fleetlm shard-0'"
            )
            await append_some(client, ["s"], first=2, count=1)
            await caught_up(shard)
            used = "SELECT usename FROM pg_stat_activity WHERE application_name = 'fleetlm shard-0'"
            assert await connection.fetchval(used) == "other"
            await connection.close()


async def test_kills_of_shard_archiver_and_database_lose_and_double_nothing(tmp_path: Path) -> None:
    """SIGKILL of each at random moments under load: when all is quiet the archive equals the log."""
    source = random.Random(20261125)
    sessions = [f"s{number}" for number in range(8)]
    async with rig(tmp_path) as it:
        number = 0
        for _ in range(4):
            async with it.shard() as shard, await shard.client() as client:
                for _ in range(3):
                    count = source.randrange(1, 30)
                    await append_some(client, sessions, first=number, count=count)
                    number += count
                    victim = source.choice(["archiver", "database", "none"])
                    if victim == "archiver":
                        for child in psutil.Process(shard.pid).children():
                            child.kill()
                    elif victim == "database":
                        await it.server.crash()
                        await it.server.start()
                await shard.kill()
        async with it.shard() as shard, await shard.client() as client:
            await caught_up(shard)
            assert decoded(await it.archived()) == await log_of(client, sessions)
            found = await compare(tmp_path / "shard-0", it.dsn, progress=lambda _done, _all: None)
            assert (found.ok, found.checked) == (True, number * len(sessions))
        assert number * len(sessions) == sum(map(len, (await it.archived()).values()))


async def test_poisoned_rows_and_a_clock_that_jumps_between_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL refuses rows at random, time jumps by weeks, anybody dies: table and quarantine are the log, once."""
    source = random.Random(20261129)
    sessions = [f"s{number}" for number in range(6)]
    clock = ClockStep(tmp_path)
    for name, value in clock.env.items():
        monkeypatch.setenv(name, value)
    async with rig(tmp_path) as it:
        async with it.shard() as shard, await shard.client() as client:
            await append_some(client, sessions, first=0, count=1)
            await caught_up(shard)
        connection = await asyncpg.connect(it.dsn)
        await connection.execute("ALTER TABLE fleetlm.messages ADD CHECK (position('poison'::bytea IN body) = 0)")
        await connection.close()
        poisoned = number = 0
        for _ in range(4):
            async with it.shard() as shard, await shard.client() as client:
                for _ in range(4):
                    clock.set(source.choice([-3 * WEEK_S, -3600, 0, 5, 2 * WEEK_S]))
                    for session in sessions * source.randrange(1, 12):
                        poison = source.random() < 0.1
                        poisoned += poison
                        number += 1
                        await client.append(session, f"{'poison' if poison else 'good'} {number}")
                    if source.random() < 0.3:
                        for child in psutil.Process(shard.pid).children():
                            child.kill()
                    elif source.random() < 0.3:
                        await it.server.crash()
                        await it.server.start()
                await shard.kill()
        async with it.shard() as shard, await shard.client() as client:
            await caught_up(shard)
            connection = await asyncpg.connect(it.dsn)
            try:
                kept = await connection.fetch(
                    "SELECT session, seq, body, false AS refused FROM fleetlm.messages UNION ALL"
                    " SELECT session, seq, body, true FROM fleetlm.quarantine ORDER BY session, seq"
                )
            finally:
                await connection.close()
            assert sum(row["refused"] for row in kept) == poisoned > 0
            assert all(row["refused"] == (b"poison" in row["body"]) for row in kept)
            found: dict[str, list[bytes]] = {}
            for row in kept:
                found.setdefault(row["session"].decode(), []).append(row["body"])
            assert decoded(found) == await log_of(client, sessions)


async def test_a_bad_network_before_the_database(tmp_path: Path) -> None:
    """Cut, slow, byte by byte, half-open at random under load: afterwards the archive equals the log, exactly."""
    source = random.Random(20261126)
    sessions = [f"s{number}" for number in range(6)]
    async with rig(tmp_path) as it:
        where = parse_qs(urlsplit(it.dsn).query)["host"][0]
        proxy = SocketProxy(Path(where) / ".s.PGSQL.5432")
        port = await proxy.start()
        it.url_file.write_text(f"postgresql://fleetlm@127.0.0.1:{port}{urlsplit(it.dsn).path}?sslmode=disable")
        try:
            async with it.shard() as shard, await shard.client() as client:
                number = 0
                for _ in range(24):
                    number += (count := source.randrange(1, 40))
                    await append_some(client, sessions, first=number - count, count=count)
                    match source.choice(["cut", "slow", "bytes", "half-open", "well"]):
                        case "cut":
                            proxy.cut()
                        case "slow":
                            proxy.delay_s = source.uniform(0, 0.05)
                        case "bytes":
                            proxy.piece_bytes = source.choice([1, 7, 1000])
                        case "half-open":
                            proxy.hole()
                            await append_some(client, sessions, first=number, count=1)
                            number += 1
                            proxy.cut()
                            proxy.heal()
                        case _:
                            proxy.delay_s, proxy.piece_bytes = 0.0, READ_BYTES
                proxy.delay_s, proxy.piece_bytes = 0.0, READ_BYTES
                await caught_up(shard)
                assert proxy.connections > 1
                assert decoded(await it.archived()) == await log_of(client, sessions)
            assert sum(map(len, (await it.archived()).values())) == number * len(sessions)
        finally:
            await proxy.stop()


async def test_a_database_that_is_away_holds_nobody_up(tmp_path: Path) -> None:
    """Appends go on, the lag shows, readiness says why; on its return the archive catches up."""
    async with rig(tmp_path) as it:
        await it.server.stop()
        async with it.shard() as shard, await shard.client() as client:
            await shard.wait_reason("ArchiveAway")
            status, _ = await shard.get("/health/ready")
            assert status == 200
            for number in range(200):
                await client.append(f"s{number % 4}", f"{number} " + "x" * 50_000)
            assert await metric(shard, "archive_failures_total") > 0
            assert await metric(shard, "archive_lag_bytes") > 9_000_000
            assert await metric(shard, "archive_lag_messages") == 200
            await it.server.start()
            await caught_up(shard)
            assert await metric(shard, "archive_lag_messages") == 0
            assert sum(map(len, (await it.archived()).values())) == 200
            await shard.wait_reason("Ready")


async def test_another_rings_database_is_said_and_left_alone(tmp_path: Path) -> None:
    """The shard serves; its readiness names the other ring."""
    async with rig(tmp_path) as it:
        async with it.shard() as shard:
            await caught_up(shard)
        connection = await asyncpg.connect(it.dsn)
        await connection.execute("UPDATE fleetlm.archive SET ring_uid = 'another'")
        await connection.close()
        async with it.shard() as shard, await shard.client() as client:
            await shard.wait_reason("ArchiveRefused")
            await client.append("s", "one")
            assert "another" in (await shard.get("/health/ready"))[1]
        assert await it.archived() == {}


async def test_verify_names_what_is_missing_or_different_and_prune_takes_whole_weeks(tmp_path: Path) -> None:
    """The comparer sees a lost row and a changed one; a pruned week is known to be gone; the log has it yet."""
    async with rig(tmp_path) as it, it.shard() as shard, await shard.client() as client:
        await append_some(client, ["s"], first=0, count=5)
        await caught_up(shard)
        connection = await asyncpg.connect(it.dsn)
        await connection.execute("DELETE FROM fleetlm.messages WHERE seq = 2")
        await connection.execute("UPDATE fleetlm.messages SET body = 'x' WHERE seq = 4")
        found = await compare(tmp_path / "shard-0", it.dsn, progress=lambda _done, _all: None)
        assert (found.missing, found.different, found.ok) == ([("s", 2)], [("s", 4)], False)
        newest_us = await connection.fetchval("SELECT max(inserted_at_us) FROM fleetlm.messages")
        await connection.close()
        assert await prune(it.dsn, age_us=0, now_us=newest_us) == []
        week = newest_us // WEEK_US
        assert week in await prune(it.dsn, age_us=-WEEK_US, now_us=newest_us), "as a week later"
        found = await compare(tmp_path / "shard-0", it.dsn, progress=lambda _done, _all: None)
        assert found.ok
        assert found.pruned == 5
        assert len(await client.read_all("s")) == 5
        await client.append("s", "of the week that was dropped")
        await caught_up(shard)
        assert len((await it.archived(first_seq=6))["s"]) == 1
        assert await metric(shard, "archive_quarantined_total") == 0


MILLION = 1_000_000
LAYERED = {
    "RETENTION_BYTES": str(64 * 1024 * 1024),
    "SEGMENT_BYTES": str(8 * 1024 * 1024),
    "CHECKPOINT_BYTES": str(16 * 1024 * 1024),
    "KEYS_WINDOW_S": "15",
}
MEMORY_BYTES_MAX = 96 * 1024 * 1024
"""By which a shard may grow while a million messages are read: bounded by pages, not by what is read."""


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_a_million_messages_through_all_layers(tmp_path: Path) -> None:
    """Archive, log and memory as one contiguous stream, while appends go on; memory stays bounded."""
    async with rig(tmp_path) as it, it.shard(LAYERED) as shard, await shard.client() as client:

        async def hundred(first: int) -> None:
            drafts = [draft(f"{'x' * 80} {number}", key=f"k{number}") for number in range(first, first + 100)]
            [result] = await client.append_entries("s", rpc.Entry(drafts, None))
            assert result.error is None

        for first in range(0, MILLION, 2000):
            await asyncio.gather(*(hundred(each) for each in range(first, first + 2000, 100)))
        await caught_up(shard, within_s=600)
        total = MILLION
        async with asyncio.timeout(120):
            # Keys of the idempotency window and the last checkpoints hold segments, so it takes some more of both.
            while await metric(shard, "log_trimmed_segments_total") < 24:
                await asyncio.gather(*(hundred(each) for each in range(total, total + 500, 100)))
                total += 500
        begin_bytes = psutil.Process(shard.pid).memory_info().rss
        peak_bytes, after = begin_bytes, 0
        async with await shard.client() as writer:
            while after < total:
                page, _ = await asyncio.gather(
                    client.read("s", after=after), writer.append("s", "meanwhile", key=f"m{after}")
                )
                assert page.gap is None
                for body in page.messages:
                    after += 1
                    assert msgspec.json.decode(body)["seq"] == after
                peak_bytes = max(peak_bytes, psutil.Process(shard.pid).memory_info().rss)
        assert peak_bytes - begin_bytes < MEMORY_BYTES_MAX, f"grew by {(peak_bytes - begin_bytes) >> 20} MiB"
        assert await metric(shard, "archive_reads_total") > 100, "most of it came from the archive"
