"""How far the archive is behind: `python -m tests.bench.archive [--rate 5000] [--seconds 30] [--shards 3]`.

A whole `fleetlm up` with a PostgreSQL beside it and `fleetlm bench append` as an open loop, all on this machine. The
lag of a message is the time from its `inserted_at` to the commit of the transaction that archived it, as the server
stamps it. Printed as one line of JSON; with an archive and without one in turn, for what it costs appends.

Promise: every message that was acknowledged is counted, and is in the archive. Must not be used as a correctness test.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import asyncpg
import msgspec

from fleetlm_cli.postgres import Postgres
from tests.bench.lot import one
from tests.support.fleet import fleet

CAUGHT_UP_S: Final = 300.0
_LAGS: Final = (
    "SELECT percentile_cont(ARRAY[0.5, 0.95, 0.99, 1.0]) WITHIN GROUP (ORDER BY lag_ms) FROM ("
    " SELECT extract(epoch FROM pg_xact_commit_timestamp(xmin)) * 1e3 - inserted_at_us / 1e3 AS lag_ms"
    " FROM fleetlm.messages) AS lags"
)


async def lags(dsn: str, count: int) -> dict[str, float]:
    """Wait until `count` messages are archived; their lags in milliseconds, and how long the rest took."""
    connection = await asyncpg.connect(dsn)
    try:
        began_s = time.monotonic()
        async with asyncio.timeout(CAUGHT_UP_S):
            while await connection.fetchval("SELECT count(*), pg_sleep(0.1) FROM fleetlm.messages") < count:
                pass
        rest_s = time.monotonic() - began_s
        found = await connection.fetchval(_LAGS)
    finally:
        await connection.close()
    names = ("p50_ms", "p95_ms", "p99_ms", "max_ms")
    return {**{name: round(value, 1) for name, value in zip(names, found, strict=True)}, "rest_s": round(rest_s, 2)}


async def run(*, rate: float, seconds: float, shards: int, archived: bool) -> dict[str, Any]:
    """One run."""
    arguments = ["append", "--rate", str(rate), "--duration", str(seconds), "--warm-up", "0"]
    with tempfile.TemporaryDirectory(prefix="fleetlm-bench-archive-") as name:
        folder = Path(name)
        server = Postgres(folder / "postgres", log=folder / "log", settings={"track_commit_timestamp": "on"})
        await server.start()
        try:
            archive = server.dsn if archived else "none"
            async with fleet(folder / "ring", shards=shards, slots=256, archive=archive) as running:
                report = await one(arguments, data=running.data)
                found: dict[str, Any] = {"archived": archived, "append": report}
                if archived:
                    found["lag"] = await lags(server.dsn, int(report["acked"]))
                return found
        finally:
            await server.stop()


async def _main(given: argparse.Namespace) -> None:
    for number in range(2 * given.rounds):
        found = await run(rate=given.rate, seconds=given.seconds, shards=given.shards, archived=number % 2 == 0)
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=5000.0)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    asyncio.run(_main(parser.parse_args()))
