"""A real PostgreSQL for tests: one server a test module, one empty database a test.

Promise: a server in a folder of its own on a Unix socket, gone at the end. Must not be done here: assertions.
"""

from __future__ import annotations

import itertools
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg

from fleetlm_cli.postgres import Postgres

_numbers = itertools.count()


@asynccontextmanager
async def running(folder: Path) -> AsyncGenerator[Postgres]:
    """A server that a test may stop and start; without syncs, for a test's machine does not crash."""
    server = Postgres(folder / "postgres", log=folder / "postgres.log", settings={"fsync": "off"})
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def empty_database(server: Postgres) -> str:
    """Make a database; returns where it is."""
    name = f"test_{next(_numbers)}"
    connection = await asyncpg.connect(server.dsn)
    try:
        await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()
    return server.dsn.replace("/fleetlm?", f"/{name}?")
