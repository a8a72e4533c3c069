"""Fuzzing of a whole `fleetlm up`, at every entrance, with a well-behaved client beside.

    python -m tests.fuzz.run --count 100000 --seed 7           make fuzz N=100000 SEED=7
    python -m tests.fuzz.run --seed 7 --surface rest --case 4711      one case again

Promise: status 1, and the seed, the surface and the number of each case that was not answered as promised; the same for
a process that ended, a fault that a process logged, a leak, or harm to the client beside.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp

from fleetlm_common import rpc
from fleetlm_common.control import View
from fleetlm_common.filecontrol import FileControlPlane
from fleetlm_common.ids import SessionId, ShardName
from fleetlm_common.slots import slot_of
from tests.fuzz.surfaces import Phoenix, Rest, Surface, WebSocketBytes, Wrong
from tests.fuzz.wire import ShardWire, rogue
from tests.fuzz.wsclient import BadServer
from tests.support.faultload import proxied_fleet
from tests.support.fleet import Fleet
from tests.support.history import Acked, Entry, History, canonical
from tests.support.procwatch import Sample, sample, settled
from tests.support.rawclient import raw_socket
from tests.support.tcpproxy import Through

SHARES: Final = {"phoenix": 0.4, "websocket": 0.2, "rest": 0.25, "shard": 0.145, "rogue": 0.005}
"""Of the cases: a rogue shard costs a connection and a backoff each, so there are fewer."""
WORKERS: Final = 6
"""Connections of each surface at once."""
GROWTH_BYTES_MAX: Final = 24 * 1024 * 1024
"""From after the warm-up to the end. 10⁵ cases that leave 250 bytes each are more."""
ENV: Final = {
    "FLEETLM_SHARD_HOT_BYTES_MAX": str(2 * 1024 * 1024),
    "FLEETLM_SHARD_SEGMENT_BYTES": str(4 * 1024 * 1024),
    "FLEETLM_SHARD_CHECKPOINT_SESSIONS": "500",
    "FLEETLM_SHARD_KEYS_WINDOW_S": "15",
    "FLEETLM_SHARD_KEYS_MAX": "1000",
}
FAULTS: Final = ("socket_fault", "http_fault", "request.failed", "Traceback", "exception was never retrieved")
"""What must not stand in any process's log."""
NAMES: Final = tuple(SHARES)


@dataclass(slots=True)
class Report:
    """What came of it."""

    seed: int
    counts: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in NAMES})
    wrong: list[str] = field(default_factory=list[str])
    seconds: float = 0.0
    friend_messages: int = 0
    friend_slowest_s: float = 0.0
    friend_again: int = 0
    growth: dict[str, int] = field(default_factory=dict[str, int])

    def as_json(self) -> str:
        """One line of figures."""
        values: dict[str, Any] = {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "cases": {name: counts.total() for name, counts in self.counts.items()},
            "answers": {name: dict(counts.most_common()) for name, counts in self.counts.items()},
            "friend": {
                "messages": self.friend_messages,
                "slowest_s": round(self.friend_slowest_s, 3),
                "tried_again": self.friend_again,
            },
            "growth_mib": {name: round(by / 1_048_576, 2) for name, by in self.growth.items()},
            "wrong": len(self.wrong),
        }
        return json.dumps(values)


class Fuzz:
    """One run against one fleet of two shards behind proxies; shard-1 is the one whose words are damaged."""

    def __init__(self, running: Fleet, view: View, report: Report) -> None:
        self.fleet = running
        self.report = report
        self.history = History()
        self._view = view
        self._writing = True
        self.rogue_share = 0.0
        self._rogue_session = self._sessions_of("shard-1", 1)[0]
        self._friend_session, *self._wire_sessions = self._sessions_of("shard-0", 4)
        parts = urlsplit(running.url)
        self._gateway = parts.hostname or "", parts.port or 0

    def _sessions_of(self, shard: str, count: int) -> list[str]:
        ring = self._view.map
        assert ring is not None
        names = (SessionId(f"of-{shard}-{at}") for at in range(10_000))
        owned = (name for name in names if ring.owner_of(slot_of(name, ring.slots)).owner == shard)
        return list(itertools.islice(owned, count))

    def surface(self, name: str) -> Surface:
        """A worker at an entrance."""
        if name == "shard":
            shard = self._view.shards[ShardName("shard-0")]
            secret = (self.fleet.data / "credential").read_bytes().strip()
            uid = self._view.spec.uid
            hello = rpc.Hello(rpc.PROTOCOL, uid, "shard-0", shard.volume_id, "mad", secret, 1)
            return ShardWire("127.0.0.1", shard.port, hello, self._wire_sessions)
        if name == "rogue":
            return Rogue(self.fleet.url, self._rogue_session)
        makers: dict[str, Callable[[str, int], Surface]] = {
            "phoenix": Phoenix, "websocket": WebSocketBytes, "rest": Rest,
        }  # fmt: skip
        return makers[name](*self._gateway)

    async def cases(self, name: str, numbers: range) -> None:
        """Run cases one after the other."""
        surface = self.surface(name)
        try:
            for number in numbers:
                chance = random.Random(f"{self.report.seed}-{name}-{number}")
                try:
                    self.report.counts[name][await surface.case(chance)] += 1
                except (Wrong, BadServer, OSError, EOFError, ValueError) as error:
                    self.report.counts[name]["WRONG"] += 1
                    self.report.wrong.append(f"--surface {name} --case {number}: {error!r}")
                    await surface.close()
                    surface = self.surface(name)
        finally:
            await surface.close()

    async def all(self, first: dict[str, int], counts: dict[str, int]) -> None:
        """So many cases of each surface, from `first` on."""
        async with asyncio.TaskGroup() as group:
            for name, count in counts.items():
                for worker in range(WORKERS):
                    numbers = range(first[name] + worker, first[name] + count, WORKERS)
                    group.create_task(self.cases(name, numbers))

    async def friend(self) -> None:
        """A client that does everything right: its messages arrive, in order, in time, over one socket."""
        stream = self.history.open_stream("friend", self._friend_session, 0)

        def on_push(_: str, event: str, payload: dict[str, Any]) -> None:
            if event == "messages":
                for one in payload["messages"]:
                    self.history.deliver(stream, Entry(one["seq"], one["id"], canonical(one["content"])))

        async with raw_socket(self.fleet.websocket_url, self.history, participant="friend", on_push=on_push) as raw:
            joined = await raw.join(self._friend_session, cursor=0)
            assert joined["status"] == "ok", joined
            while self._writing:
                number = self.report.friend_messages
                key = f"friend-{number}"
                content = {"key": key}
                asked = self.history.invoke("friend", self._friend_session, [(key, content)])
                append = {"content": content, "idempotency_key": key}
                begin_s = time.monotonic()
                reply = await raw.request(self._friend_session, "append", append)
                while reply["status"] != "ok":
                    # A machine that is busy with other things may be too slow for a deadline; nothing else may be.
                    assert reply["response"]["code"] == "TRY_AGAIN", reply
                    self.report.friend_again += 1
                    reply = await raw.request(self._friend_session, "append", append)
                self.report.friend_slowest_s = max(self.report.friend_slowest_s, time.monotonic() - begin_s)
                ack = reply["response"]
                self.history.ack(asked, [Acked(ack["seq"], ack["id"], ack["deduped"])])
                self.report.friend_messages += 1
                await asyncio.sleep(0.02)
            page = await raw.request(self._friend_session, "replay", {"after": 0, "limit": 1000})
            found = list(page["response"]["messages"])
            while page["response"]["has_more"]:
                after = found[-1]["seq"]
                page = await raw.request(self._friend_session, "replay", {"after": after, "limit": 1000})
                found += page["response"]["messages"]
        entries = [Entry(one["seq"], one["id"], canonical(one["content"])) for one in found]
        self.history.final(self._friend_session, entries)
        if stream.cursor != len(entries):
            self.report.wrong.append(f"the friend was delivered {stream.cursor} of {len(entries)}")
        self.report.wrong += [f"the friend: {one}" for one in self.history.judge()]

    async def run(self, count: int) -> None:
        """Warm-up, the cases, and what they left."""
        pids = {name: self.fleet.pid(name) for name in self.fleet.names}
        before = await sample(self.fleet)
        friend = asyncio.create_task(self.friend())
        warm = {name: max(WORKERS, round(count * share * 0.2)) for name, share in SHARES.items()}
        rest = {name: max(WORKERS, round(count * share) - warm[name]) for name, share in SHARES.items()}
        try:
            await self.all(dict.fromkeys(NAMES, 0), warm)
            middle = await sample(self.fleet)
            rogues = rest.pop("rogue")
            await self.all(warm, rest)
            # Alone: sessions of the others live on that shard, too.
            self.rogue_share = 0.3
            await self.all(warm, {"rogue": rogues})
            self.rogue_share = 0.0
            end = await sample(self.fleet)
        finally:
            self._writing = False
            await friend
        self._look_at_memory(middle, end)
        self.report.wrong += await settled(self.fleet, before, slack=4, within_s=20)
        for name, pid in pids.items():
            if self.fleet.pid(name) != pid:
                self.report.wrong.append(f"{name} died: {self.fleet.printed()}")

    def _look_at_memory(self, middle: list[Sample], end: list[Sample]) -> None:
        was = {one.name: one.rss_bytes for one in middle}
        for one in end:
            grown = self.report.growth[one.name] = one.rss_bytes - was[one.name]
            if grown > GROWTH_BYTES_MAX:
                self.report.wrong.append(f"{one.name} grew by {grown} bytes")


class Rogue:
    """Good requests whose answers a rogue shard damages: each is answered with some status in time."""

    def __init__(self, url: str, session: str) -> None:
        self._url = f"{url}/v1/sessions/{session}"
        self._http = aiohttp.ClientSession(headers={"X-Participant-Id": "r"}, timeout=aiohttp.ClientTimeout(20))

    async def case(self, chance: random.Random) -> str:
        """See `Surface`."""
        choice = chance.randrange(4)
        try:
            if choice == 0:
                asked = self._http.post(f"{self._url}/messages", json={"content": chance.random()})
            elif choice == 1:
                asked = self._http.get(f"{self._url}/messages", params={"after": 0, "limit": 5})
            elif choice == 2:
                asked = self._http.get(self._url)
            else:
                asked = self._http.put(f"{self._url}/read", json={"seq": 1})
            async with asked as answer:
                return f"http-{answer.status}"
        except (aiohttp.ClientError, TimeoutError) as error:
            raise Wrong(f"no answer: {error!r}") from error

    async def close(self) -> None:
        """See `Surface`."""
        await self._http.close()


@asynccontextmanager
async def fuzzed(folder: Path, report: Report) -> AsyncGenerator[Fuzz]:
    """A fleet whose gateway reaches its shards through proxies, the one before shard-1 a rogue while `rogue_share`."""
    chance = random.Random(f"{report.seed}-rogue-proxy")
    made: list[Fuzz] = []

    def share() -> float:
        return made[0].rogue_share if made else 0.0

    def through(name: str) -> Callable[[], Through] | None:
        return (lambda: rogue(chance, share)) if name == "shard-1" else None

    data = folder / "ring"
    async with proxied_fleet(data, shards=2, gateways=1, env=ENV, through=through) as (running, _):
        view = await FileControlPlane(data / "control").read()
        made.append(Fuzz(running, view, report))
        yield made[0]


async def fuzz_run(count: int, seed: int, folder: Path) -> Report:
    """One whole run."""
    report = Report(seed)
    begin_s = time.monotonic()
    async with fuzzed(folder, report) as fuzz:
        await fuzz.run(count)
    for log in sorted((folder / "ring" / "logs").glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()
        report.wrong += [f"{log.name}: {line[:500]}" for line in lines if any(word in line for word in FAULTS)]
    report.seconds = time.monotonic() - begin_s
    return report


async def one_case(seed: int, name: str, number: int, folder: Path) -> Report:
    """One case again, in a fleet of its own."""
    report = Report(seed)
    async with fuzzed(folder, report) as fuzz:
        fuzz.rogue_share = 0.3
        await fuzz.cases(name, range(number, number + 1))
        sys.stderr.write(fuzz.fleet.printed()[-4000:] + "\n")
    return report


def main() -> int:
    """By hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=None, help="random when not given")
    parser.add_argument("--surface", choices=NAMES, help="with --case: one case again")
    parser.add_argument("--case", type=int)
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed
    folder = Path(tempfile.mkdtemp(prefix=f"fleetlm-fuzz-{seed}-"))
    sys.stderr.write(f"seed {seed}, folder {folder}\n")
    if given.surface is not None and given.case is not None:
        report = asyncio.run(one_case(seed, given.surface, given.case, folder))
    else:
        report = asyncio.run(fuzz_run(given.count, seed, folder))
    sys.stdout.write(report.as_json() + "\n")
    for one in report.wrong[:50]:
        sys.stdout.write(one + "\n")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
