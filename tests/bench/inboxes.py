"""What joined inboxes cost: `python -m tests.bench.inboxes [--sockets 10000] [--rate 50] [--seconds 20]`.

A whole `fleetlm up` with a PostgreSQL beside it. Each participant wrote once to a session that it shares with nine
others; then the sockets join their inboxes. Measured in turn: nothing happens and no inbox is joined; messages come and
no inbox is joined; all are joined and nothing happens; messages come, each of which is news for ten of them. Printed as
one line of JSON: CPU seconds a second of each part, the gateway's memory a joined inbox, and how long after its
acknowledgement a message was told to an inbox.

Promise: each inbox hears of the newest message of its session, else status 1 (one look may tell of several at once:
`told` counts). Must not be used as a correctness test otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
import tempfile
import time
from array import array
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from fleetlm_cli import benchhost, benchreport
from fleetlm_cli.benchload import connect as connect_socket
from fleetlm_cli.benchtarget import many_files
from fleetlm_cli.benchwire import WireSocket, text_frame
from fleetlm_cli.postgres import Postgres
from fleetlm_client import NewMessage, connect
from tests.support.eventually import poll
from tests.support.fleet import Fleet, fleet

ROOM: Final = 10
"""Participants of a session."""
AT_ONCE: Final = 200
"""Sockets that are opened, and that join, at the same time."""
POLL_S: Final = 0.05
SETTLED_S: Final = 60.0
_ENTRY: Final = re.compile(rb'"session_id":"(room-\d+)","last_seq":(\d+)')
JOIN: Final = b'["1","1","session:room-%d","phx_join",{}]'
WRITE: Final = b'["1","2","session:room-%d","append",{"content":"hello"}]'
LEAVE: Final = b'["1","3","session:room-%d","phx_leave",{}]'
MORE: Final = {"FLEETLM_GATEWAY_SOCKETS": "20000"}
HEARTBEAT: Final = text_frame(b'[null,"h","phoenix","heartbeat",{}]')


@dataclass(slots=True)
class Crowd:
    """What the sockets were told."""

    wrote: int = 0
    pages: int = 0
    told_s: dict[tuple[int, bytes, int], float] = field(default_factory=dict[tuple[int, bytes, int], float])
    """When an inbox first had a session at a seq."""

    def hear(self, number: int, texts: list[bytes]) -> None:
        """What came to one socket."""
        now_s = time.perf_counter()
        for text in texts:
            if b'"status":"ok"' in text:
                self.wrote += b'"inserted_at"' in text
            elif b'"sessions"' in text:
                self.pages += 1
            elif b'"unread"' in text and (found := _ENTRY.search(text)):
                self.told_s.setdefault((number, found.group(1), int(found.group(2))), now_s)


def cpu_s(running: Fleet, server: Postgres) -> dict[str, float]:
    """CPU seconds so far, by part of the system."""
    pid = server.pid
    children = [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    parts = [(name, running.pid(name)) for name in running.names if name.startswith(("gateway", "shard"))]
    found = benchhost.usage([*parts, *((f"postgres-{each}", each) for each in (pid, *children))])
    sums: dict[str, float] = {"gateway": 0.0, "shard": 0.0, "postgres": 0.0}
    for name, used in found.items():
        sums[name.partition("-")[0]] += used.cpu_s
    return sums


async def measured(running: Fleet, server: Postgres, *, seconds: float, rate: float, rooms: int) -> dict[str, Any]:
    """CPU a second; with a rate, what was appended (session, seq) → when it was acknowledged."""
    before, began_s = cpu_s(running, server), time.perf_counter()
    acked_s: dict[tuple[bytes, int], float] = {}
    if rate:
        async with connect(running.url, participant_id="writer") as client:
            for number in range(round(rate * seconds)):
                await asyncio.sleep(max(0.0, began_s + number / rate - time.perf_counter()))
                room = f"room-{number * 7 % rooms}"
                ack = await client.rest.append(room, NewMessage(content="x" * 200))
                acked_s[(room.encode(), ack.seq)] = time.perf_counter()
    await asyncio.sleep(max(0.0, began_s + seconds - time.perf_counter()))
    took_s = time.perf_counter() - began_s
    after = cpu_s(running, server)
    return {"cpu": {name: round((after[name] - before[name]) / took_s, 3) for name in after}, "acked": acked_s}


async def run(*, sockets: int, rate: float, seconds: float) -> dict[str, Any]:
    """All four."""
    crowd, opened = Crowd(), list[WireSocket]()
    with tempfile.TemporaryDirectory(prefix="fleetlm-inboxes-") as name:
        folder = Path(name)
        server = Postgres(folder / "postgres", log=folder / "log")
        await server.start()
        try:
            async with fleet(folder / "ring", shards=2, slots=256, archive=server.dsn, env=MORE) as running:
                for first in range(0, sockets, AT_ONCE):
                    numbers = range(first, min(first + AT_ONCE, sockets))
                    for number in numbers:
                        socket = await connect_socket(running.websocket_url, f"p-{number}", partial(crowd.hear, number))
                        opened.append(socket)
                        socket.send([text_frame(frame % (number // ROOM)) for frame in (JOIN, WRITE)])
                    await _until(lambda want=numbers.stop: crowd.wrote == want)
                    for number in numbers:
                        opened[number].send([text_frame(LEAVE % (number // ROOM))])
                beating = asyncio.create_task(_beat(opened))
                await asyncio.sleep(5.0)  # the archive has them then
                report: dict[str, Any] = {"sockets": sockets, "rate": rate}
                phase = partial(measured, running, server, seconds=seconds, rooms=max(1, sockets // ROOM))
                report["none joined, quiet"] = (await phase(rate=0.0))["cpu"]
                report["none joined, messages"] = (await phase(rate=rate))["cpu"]
                gateway = [("gateway", running.pid("gateway-0"))]
                before = benchhost.usage(gateway)["gateway"].rss_bytes
                began_s = time.perf_counter()
                for number, socket in enumerate(opened):
                    socket.send([text_frame(b'["9","9","inbox:p-%d","phx_join",{}]' % number)])
                    if number % AT_ONCE == AT_ONCE - 1:
                        await _until(lambda want=number + 1: crowd.pages >= want)
                report["join_s"] = round(time.perf_counter() - began_s, 1)
                after = benchhost.usage(gateway)["gateway"].rss_bytes
                report["kib_an_inbox"] = round((after - before) / sockets / 1024, 1)
                report["all joined, quiet"] = (await phase(rate=0.0))["cpu"]
                crowd.told_s.clear()
                found = await phase(rate=rate)
                report["all joined, messages"] = found["cpu"]
                wanted = {
                    (number, room, seq): acked_s
                    for (room, seq), acked_s in found["acked"].items()
                    for number in range(int(room[5:]) * ROOM, int(room[5:]) * ROOM + ROOM)
                }
                newest = {key[:2]: key for key in sorted(wanted)}
                await _until(lambda: all(key in crowd.told_s for key in newest.values()))
                told = [crowd.told_s[key] - acked_s for key, acked_s in wanted.items() if key in crowd.told_s]
                report["told"] = len(told)
                report["told_after_ms"] = benchreport.percentiles(array("d", told))
                beating.cancel()
                for socket in opened:
                    socket.close()
                await running.stop()
        finally:
            await server.stop()
    return report


async def _beat(sockets: list[WireSocket]) -> None:
    while True:
        await asyncio.sleep(20)
        for socket in sockets:
            socket.send([HEARTBEAT])


async def _until(holds: Any) -> None:
    async with asyncio.timeout(SETTLED_S):
        await poll(holds, every_s=POLL_S)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sockets", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=50.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    given = parser.parse_args()
    many_files()
    sys.stdout.write(
        msgspec.json.encode(asyncio.run(run(sockets=given.sockets, rate=given.rate, seconds=given.seconds))).decode()
        + "\n"
    )
