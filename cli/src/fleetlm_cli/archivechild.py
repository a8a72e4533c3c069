"""`python -m fleetlm_cli.archivechild`: the embedded PostgreSQL as a child of `up`, with an operations port.

Promise: ready when PostgreSQL answers; SIGTERM ends both in order; if PostgreSQL dies this process does, and `up`
starts it again. Must not be done here: anything about tables.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry

from fleetlm_cli.postgres import Postgres, PostgresFailed
from fleetlm_common.clock import SystemClock
from fleetlm_common.config import ConfigError, fail, host_port, load
from fleetlm_common.logs import StreamLogger
from fleetlm_common.ops import Health, OpsServer

PREFIX = "FLEETLM_ARCHIVEDB_"
EXIT_FAILED = 74


class ArchiveConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `up` tells this process."""

    data: str
    """Folder of PostgreSQL's data; made if it is not there."""
    log: str
    """File for PostgreSQL's own output."""
    ops_listen: str
    """host:port for health."""


async def _run(config: ArchiveConfig) -> int:
    log = StreamLogger("archive", style="json", clock=SystemClock())
    server = Postgres(Path(config.data), log=Path(config.log))
    health = Health(ok=False, reason="Starting", message="PostgreSQL is starting")
    ops = OpsServer(registry=CollectorRegistry(), ready=lambda: health)
    await ops.start(*host_port(config.ops_listen, variable=PREFIX + "OPS_LISTEN"))
    loop, asked = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    ended: asyncio.Task[int] | None = None
    try:
        await server.start()
        log.event("started", pid=server.pid)
        health = Health(ok=True, reason="Ready")
        ended = asyncio.create_task(server.wait())
        stop = asyncio.create_task(asked.wait())
        await asyncio.wait({ended, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if not ended.done():
            return 0
        log.event("failed", level="error", status=ended.result())
    except PostgresFailed as error:
        log.event("failed", level="error", why=str(error))
    finally:
        health = Health(ok=False, reason="Stopping")
        await server.stop()
        if ended is not None:
            ended.cancel()
        await ops.stop()
    return EXIT_FAILED


def main() -> int:
    """Run until a signal or the server's end; the exit status."""
    try:
        return asyncio.run(_run(load(ArchiveConfig, prefix=PREFIX, env=os.environ)))
    except ConfigError as error:
        return fail(error, component="archive")


if __name__ == "__main__":
    sys.exit(main())
