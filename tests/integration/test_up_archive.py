"""`fleetlm up --archive`: a PostgreSQL out of the box or one's own; it has what the logs have, whoever dies."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import msgspec
import psutil

from tests.support.fleet import Fleet, descendants, fleet
from tests.support.postgres import empty_database, running
from tests.support.upcommands import append, fleetlm

WAIT_S = 60.0
POLL_S = 0.05


async def archived(running: Fleet, *, until: int) -> list[int]:
    """Wait until the archive of `running` knows every shard, and `until` messages of the session; returns their seqs.

    A shard without a message of it makes its connection in its own time: PostgreSQL starts together with the shards.
    """
    dsn = (running.data / "archive-url").read_text().strip()
    shards = sum(name.startswith("shard-") for name in running.names)
    seqs: list[int] = []
    known = 0
    async with asyncio.timeout(WAIT_S):
        while len(seqs) < until or known < shards:
            try:
                connection = await asyncpg.connect(dsn)
                try:
                    rows = await connection.fetch(
                        "SELECT seq FROM fleetlm.messages WHERE session = 'demo' ORDER BY seq"
                    )
                    known = await connection.fetchval("SELECT count(*) FROM fleetlm.positions")
                finally:
                    await connection.close()
                seqs = [row["seq"] for row in rows]
            except (OSError, asyncpg.PostgresError):
                pass  # it is starting, or nobody has made its tables yet
            await asyncio.sleep(POLL_S)
    return seqs


async def verified(running: Fleet) -> int:
    """What `fleetlm archive verify` compares, in all volumes; it finds nothing wrong."""
    looked = await asyncio.to_thread(fleetlm, "archive", "verify", str(running.data), "--json")
    assert looked.returncode == 0, looked.stdout + looked.stderr
    return sum(msgspec.json.decode(line)["checked"] for line in looked.stdout.splitlines())


async def test_an_archive_out_of_the_box(tmp_path: Path) -> None:
    """No option: embedded. It is killed, then `up` itself: nothing outlives `up`, nothing is lost."""
    async with fleet(tmp_path / "ring", shards=2, archive="") as first:
        assert "archive" in first.names
        assert await append(first, "one") == 1
        assert await archived(first, until=1) == [1]
        assert await verified(first) == 1
        first.kill("archive")
        assert await append(first, "two") == 2
        await first.wait_ready("archive")
        assert await archived(first, until=2) == [1, 2]
        children = descendants(first.process.pid)
        assert any("postgres" in child.name() for child in children)
        first.process.kill()
        await first.process.wait()
        _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=10)
        assert not alive
    async with fleet(tmp_path / "ring", shards=2, archive="") as second:
        assert await append(second, "three") == 3
        assert await archived(second, until=3) == [1, 2, 3]
        assert await verified(second) == 3
        assert await second.stop() == 0


async def test_none_is_remembered_and_the_archive_is_filled_later(tmp_path: Path) -> None:
    """Without an archive, then again without a word, then with one: it gets what was there before."""
    for option in ("none", ""):
        async with fleet(tmp_path / "ring", shards=1, archive=option) as without:
            assert "archive" not in without.names
            await append(without, "early")
            refused = fleetlm("archive", "verify", str(without.data))
            assert (refused.returncode, "is no `up` with an archive" in refused.stderr) == (2, True)
    async with fleet(tmp_path / "ring", shards=1, archive="embedded") as running:
        assert await archived(running, until=2) == [1, 2]


async def test_a_database_of_ones_own(tmp_path: Path) -> None:
    """By URL and by a file with the URL; `up` starts no PostgreSQL then."""
    async with running(tmp_path) as server:
        dsn = await empty_database(server)
        async with fleet(tmp_path / "ring", shards=1, archive=dsn) as by_url:
            assert "archive" not in by_url.names
            await append(by_url, "one")
            assert await archived(by_url, until=1) == [1]
        (tmp_path / "url").write_text(dsn)
        async with fleet(tmp_path / "ring", shards=1, archive=f"file:{tmp_path / 'url'}") as by_file:
            await append(by_file, "two")
            assert await archived(by_file, until=2) == [1, 2]
            assert await verified(by_file) == 2
