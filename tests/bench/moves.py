"""What a move costs as there is more to move: `python -m tests.bench.moves [--cases bytes,slot,…] [--json FILE]`.

A whole `fleetlm up` with two shards of 256 slots. All slots stand on shard-0 and are filled there; then slots are
pinned to shard-1 while clients append at a steady rate, and the time until the ring is steady, what was brought over
and how long appends took (from when each was due) are said beside the same appends with no move.

    bytes        half of the slots, 512 MiB in 2,000 sessions
    slot         one slot, 1 GiB in 64 sessions
    idle         half of the slots, 100,000 sessions of one message
    growth       half of the slots, 1,000 and 10,000 and 100,000 sessions of one message
    subscribers  one session with 1,000 sockets that read it, there and back
    restart      a shard of 512 MiB is restarted in place, and with hand-over; then the copy is given back
    million      half of the slots, 1,000,000 sessions of one message

`answer_ms` is the source's own word: from queueing to the answer, mean over its batches. With `--apart` the source has
the first core for itself and everything else the second: what it says then is what exporting costs its appends, and
not what the target's work on the same machine does.

Promise: what was acknowledged is what the sessions hold afterwards, counted; a socket that misses a message of the
`subscribers` case, or gets one twice, ends with status 1. Must not be used as a correctness test otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncGenerator, Container, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from fleetlm_cli import benchhost
from fleetlm_cli.asking import ask, is_steady
from fleetlm_cli.benchload import connect as connect_socket
from fleetlm_cli.benchshard import ShardWire
from fleetlm_cli.benchwire import WireSocket, text_frame
from fleetlm_client import connect
from fleetlm_common.control import Pin
from fleetlm_common.filecontrol import FileControlPlane, read_status
from fleetlm_common.ids import SessionId, ShardName, Slot
from fleetlm_common.slots import slot_of
from tests.support.eventually import poll
from tests.support.fleet import Fleet, fleet

SLOTS: Final = 256
WRITERS: Final = 8
RATE: Final = 200.0
"""Appends a second of all writers together."""
QUIET_S: Final = 8.0
MOVE_S_MAX: Final = 900.0
POLL_S: Final = 0.02
SUBSCRIBERS: Final = 1_000
SOON: Final = {"FLEETLM_SHARD_KEYS_WINDOW_S": "15", "FLEETLM_SHARD_CLEAN_AFTER_S": "5"}
"""Copies are compacted after this instead of a quarter of an hour."""
GIVEN_BACK_S_MAX: Final = 300.0
_SEQ: Final = re.compile(rb'"seq":(\d+)')


@dataclass(slots=True)
class Load:
    """Appends that were due at a steady rate: when each was due, how long it took, and where to."""

    fleet: Fleet
    took: list[tuple[float, float, str]] = field(default_factory=list[tuple[float, float, str]])
    acked: Counter[str] = field(default_factory=Counter[str])
    running: bool = True

    async def run(self, sessions: list[str]) -> None:
        """One writer for each session, until told."""
        async with asyncio.TaskGroup() as tasks:
            for number, session in enumerate(sessions):
                tasks.create_task(self._write(session, number))

    async def _write(self, session: str, number: int) -> None:
        period_s = WRITERS / RATE
        async with (
            connect(self.fleet.url, participant_id=f"writer-{number}") as client,
            client.join(session) as joined,
        ):
            due_s = time.perf_counter() + period_s * number / WRITERS
            while self.running:
                await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
                await joined.append("x" * 200)
                self.took.append((due_s, time.perf_counter() - due_s, session))
                self.acked[session] += 1
                due_s += period_s

    def between(self, begin_s: float, end_s: float, sessions: Container[str] | None = None) -> dict[str, float]:
        """Milliseconds of what was due in that time, in these sessions if some are named."""
        took = sorted(
            took
            for due_s, took, session in self.took
            if begin_s <= due_s < end_s and (sessions is None or session in sessions)
        )
        if not took:
            return {}
        at = {f"p{share}": took[min(len(took) - 1, len(took) * share // 100)] for share in (50, 99)}
        return {name: round(seconds * 1000, 1) for name, seconds in {**at, "max": took[-1]}.items()}


async def moved(running: Fleet, pins: tuple[Pin, ...]) -> float:
    """Pin, and wait until the ring is steady; seconds."""
    began_s = time.perf_counter()
    ask(running.data, lambda spec: msgspec.structs.replace(spec, pins=pins))
    control = FileControlPlane(running.data / "control", poll_interval_s=POLL_S)
    async with asyncio.timeout(MOVE_S_MAX):
        while True:
            view = await control.read()
            status = await asyncio.to_thread(read_status, running.data / "control")
            owners = [] if view.map is None else [found.owner for found in view.map.owners()]
            there = bool(owners) and all(
                owners[slot] == pin.shard for pin in pins for slot in range(pin.first, pin.last + 1)
            )
            if there and is_steady(view, status):
                return time.perf_counter() - began_s
            await asyncio.sleep(POLL_S)


def slot(session: str) -> int:
    """Where it belongs."""
    return slot_of(SessionId(session), SLOTS)


def pin(first: int, last: int, shard: str) -> Pin:
    """Those slots, there."""
    return Pin(Slot(first), Slot(last), ShardName(shard))


async def imported(running: Fleet) -> tuple[float, float]:
    """Messages and bytes that moves brought to shard-1 so far."""
    found = await running.metrics("shard-1")
    return found["fleetlm_shard_imported_messages_total"], found["fleetlm_shard_imported_bytes_total"]


@asynccontextmanager
async def ring(env: Mapping[str, str] | None = None) -> AsyncGenerator[Fleet]:
    """All slots on shard-0."""
    with tempfile.TemporaryDirectory(prefix="fleetlm-moves-") as folder:
        async with fleet(Path(folder) / "ring", shards=2, slots=SLOTS, env=env) as running:
            await moved(running, (pin(0, SLOTS - 1, "shard-0"),))
            yield running
            await running.stop()


async def answered(running: Fleet) -> tuple[float, float]:
    """Seconds and count of the source's answers so far."""
    found = await running.metrics("shard-0")
    return found["fleetlm_shard_answer_seconds_sum"], found["fleetlm_shard_answer_seconds_count"]


def mean_ms(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Of the answers between."""
    return round((after[0] - before[0]) / max(1.0, after[1] - before[1]) * 1000, 2)


def keep_apart(running: Fleet) -> None:
    """The source on the first core; its ring, and this process, on the second."""
    for pid, core in [(os.getpid(), 1), *((running.pid(name), int(name != "shard-0")) for name in running.names)]:
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {core})


async def case(
    names: list[str], *, messages: int, size_bytes: int, first: int, last: int, apart: bool
) -> dict[str, Any]:
    """Fill, append, move slots `first` to `last` while appending, count what is there."""
    async with ring() as running:
        wire = await ShardWire.open(running.data)
        await wire.fill(names, messages=messages, size_bytes=size_bytes, batch=min(50, max(1, 500_000 // size_bytes)))
        wire.close()
        load = Load(running)
        # Half of the writers in what moves, half in what stays.
        inside = [name for name in names if first <= slot(name) <= last]
        outside = [f"stays-{number}" for number in range(10_000) if not first <= slot(f"stays-{number}") <= last]
        sessions = [*inside[: WRITERS // 2], *outside[: WRITERS // 2]]
        if apart:
            keep_apart(running)
        writing = asyncio.create_task(load.run(sessions))
        await asyncio.sleep(1.0)
        quiet_s, quiet = time.perf_counter(), await answered(running)
        await asyncio.sleep(QUIET_S)
        before, moving = await imported(running), await answered(running)
        began_s = time.perf_counter()
        rest = tuple(pin(low, high, "shard-0") for low, high in ((0, first - 1), (last + 1, SLOTS - 1)) if low <= high)
        took_s = await moved(running, (*rest, pin(first, last, "shard-1")))
        ended_s = time.perf_counter()
        after, moved_then = await imported(running), await answered(running)
        load.running = False
        await writing
        brought = after[1] - before[1]
        report: dict[str, Any] = {
            "sessions": len(names),
            "moved_sessions": len(inside),
            "slots": last - first + 1,
            "seconds": round(took_s, 2),
            "slots_per_s": round((last - first + 1) / took_s, 1),
            "messages": round(after[0] - before[0]),
            "mib": round(brought / 2**20, 1),
            "mib_per_s": round(brought / 2**20 / took_s, 1),
            "us_per_session": round(took_s / len(inside) * 1e6, 1),
            "append_ms": {
                "quiet": load.between(quiet_s, began_s),
                "moving": load.between(began_s, ended_s),
                "moving_staying": load.between(began_s, ended_s, outside[: WRITERS // 2]),
            },
            "answer_ms": {"quiet": mean_ms(quiet, moving), "moving": mean_ms(moving, moved_then)},
            "rss_mib": {
                name: round(benchhost.usage([(name, running.pid(name))])[name].rss_bytes / 2**20)
                for name in ("shard-0", "shard-1")
            },
        }
        for name in sessions:
            await whole(running, name, load.acked[name] + (messages if name in inside else 0))
        return report


async def whole(running: Fleet, session: str, wanted: int) -> None:
    """The session holds what was acknowledged, no more and no less.

    Raises:
        SystemExit: it does not.
    """
    async with connect(running.url, participant_id="reader") as client:
        got = (await client.rest.session(session)).last_seq
    if got != wanted:
        raise SystemExit(f"{session} holds {got} messages, {wanted} were acknowledged")


class Crowd:
    """Sockets that joined one session, live; each must get each message once."""

    def __init__(self) -> None:
        self.last = dict.fromkeys(range(SUBSCRIBERS), 0)
        self.wrong: list[str] = []
        self.joined = 0
        self.came_s: dict[int, float] = {}
        """When the last socket had it, by seq."""

    def hear(self, number: int, texts: list[bytes]) -> None:
        """What came to one socket."""
        for text in texts:
            if b'"messages"' not in text:
                self.joined += b'"status":"ok"' in text
                continue
            for found in _SEQ.finditer(text):
                seq, last = int(found.group(1)), self.last[number]
                if seq != last + 1:
                    self.wrong.append(f"socket {number} got {seq} after {last}")
                self.last[number] = seq
                self.came_s[seq] = time.perf_counter()


async def subscribers() -> dict[str, Any]:
    """Move the one session there and back while it is written to."""
    session = "crowded"
    own = slot(session)
    async with ring() as running, AsyncExitStack() as stack:
        crowd, sockets = Crowd(), list[WireSocket]()

        @stack.callback
        def hang_up() -> None:
            for socket in sockets:
                socket.close()

        for number in range(SUBSCRIBERS):
            socket = await connect_socket(running.websocket_url, f"reader-{number}", partial(crowd.hear, number))
            socket.send([text_frame(b'["1","1","session:%s","phx_join",{"cursor":0}]' % session.encode())])
            sockets.append(socket)
        async with asyncio.timeout(60):
            await poll(lambda: crowd.joined == SUBSCRIBERS, every_s=POLL_S)
        appended_s: dict[int, float] = {}
        phases: dict[str, list[int]] = {"quiet": [], "moving": []}
        phase, writing = "quiet", True

        async def write() -> None:
            async with connect(running.url, participant_id="writer") as client, client.join(session) as joined:
                while writing:
                    began_s = time.perf_counter()
                    ack = await joined.append("x" * 200)
                    appended_s[ack.seq] = began_s
                    phases[phase].append(ack.seq)
                    await asyncio.sleep(max(0.0, 0.1 - (time.perf_counter() - began_s)))

        task = asyncio.create_task(write())
        await asyncio.sleep(QUIET_S)
        phase, took = "moving", list[float]()
        for shard in ("shard-1", "shard-0") * 3:
            others = tuple(
                pin(low, high, "shard-0") for low, high in ((0, own - 1), (own + 1, SLOTS - 1)) if low <= high
            )
            took.append(await moved(running, (*others, pin(own, own, shard))))
        writing = False
        await task
        last = max(appended_s)
        async with asyncio.timeout(30):
            await poll(lambda: bool(crowd.wrong) or min(crowd.last.values()) == last, every_s=POLL_S)
        if crowd.wrong:
            raise SystemExit(f"{len(crowd.wrong)} broken streams, first: {crowd.wrong[0]}")

        def ms(seqs: list[int]) -> dict[str, float]:
            spans = sorted(crowd.came_s[seq] - appended_s[seq] for seq in seqs)
            return {
                "p50": round(spans[len(spans) // 2] * 1000, 1),
                "max": round(spans[-1] * 1000, 1),
                "appends": len(spans),
            }

        return {
            "sockets": SUBSCRIBERS,
            "moves": len(took),
            "seconds_each": [round(each, 2) for each in took],
            "append_to_last_socket_ms": {name: ms(seqs) for name, seqs in phases.items()},
        }


async def restart() -> dict[str, Any]:
    """A shard's restart as `fleetlm shards restart` does it, both ways."""
    names = [f"r-{number}" for number in range(2_000)]
    report: dict[str, Any] = {}
    async with ring(SOON) as running:
        wire = await ShardWire.open(running.data)
        await wire.fill(names, messages=16, size_bytes=16_000)
        wire.close()
        for how in ("--in-place", "--handover"):
            load = Load(running)
            writing = asyncio.create_task(load.run([f"{how}-{number}" for number in range(WRITERS)]))
            await asyncio.sleep(QUIET_S)
            before, began_s = stored(running), time.perf_counter()
            command = ("shards", "restart", "shard-0", how, "--data", str(running.data))
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "fleetlm_cli.main", *command, stdout=asyncio.subprocess.DEVNULL
            )
            if await process.wait():
                raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
            ended_s = time.perf_counter()
            report[how.removeprefix("--")] = found = {
                "seconds": round(ended_s - began_s, 1),
                "append_ms": {
                    "quiet": load.between(0.0, began_s),
                    "meanwhile": load.between(began_s, ended_s),
                },
                "volumes_mib": {"before": before, "after": stored(running)},
            }
            if how == "--handover":
                found["given_back"] = await given_back(running, load, before)
            load.running = False
            await writing
            for name, acked in load.acked.items():
                await whole(running, name, acked)
    return report


async def given_back(running: Fleet, load: Load, before: dict[str, int]) -> dict[str, Any]:
    """Wait until the copy that a hand-over left is compacted: when it began and ended, and what appends felt."""
    first = stored(running)["shard-1"]
    began_s = time.perf_counter()
    async with asyncio.timeout(GIVEN_BACK_S_MAX):
        await poll(lambda: stored(running)["shard-1"] < first * 0.95, every_s=0.2)
        compacting_s = time.perf_counter()
        await poll(
            lambda: stored(running)["shard-1"] - before["shard-1"] < (first - before["shard-1"]) // 4, every_s=0.2
        )
    ended_s = time.perf_counter()
    return {
        "waited_s": round(compacting_s - began_s, 1),
        "seconds": round(ended_s - compacting_s, 1),
        "append_ms": load.between(compacting_s, ended_s),
        "volumes_mib": stored(running),
    }


def stored(running: Fleet) -> dict[str, int]:
    """MiB that each shard's volume takes."""
    return {
        name: round(sum(each.stat().st_blocks * 512 for each in (running.data / name).rglob("*")) / 2**20)
        for name in ("shard-0", "shard-1")
    }


async def run(cases: list[str], *, apart: bool) -> dict[str, Any]:
    """Each case, said as it ends."""
    reports: dict[str, Any] = {}

    def say(name: str, report: dict[str, Any]) -> None:
        reports[name] = report
        sys.stdout.write(msgspec.json.encode({name: report}).decode() + "\n")
        sys.stdout.flush()

    half = {"first": SLOTS // 2, "last": SLOTS - 1}
    if "bytes" in cases:
        names = [f"b-{number}" for number in range(2_000)]
        say("bytes", await case(names, messages=16, size_bytes=16_000, apart=apart, **half))
    if "slot" in cases:
        own = 200
        names = [name for number in range(40_000) if slot(name := f"s-{number}") == own][:64]
        say("slot", await case(names, messages=1_000, size_bytes=16_700, first=own, last=own, apart=apart))
    counts = ([1_000, 10_000, 100_000] if "growth" in cases else []) or ([100_000] if "idle" in cases else [])
    counts += [1_000_000] if "million" in cases else []
    for count in counts:
        names = [f"i-{number}" for number in range(count)]
        say(f"idle-{count}", await case(names, messages=1, size_bytes=100, apart=apart, **half))
    if "subscribers" in cases:
        say("subscribers", await subscribers())
    if "restart" in cases:
        say("restart", await restart())
    return reports


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="bytes,slot,growth,subscribers,restart")
    parser.add_argument("--apart", action="store_true", help="the source alone on the first core")
    parser.add_argument("--json", type=Path, help="write everything there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        provenance = benchhost.provenance(Path(folder))
    reports = asyncio.run(run(arguments.cases.split(","), apart=arguments.apart))
    if arguments.json:
        arguments.json.write_bytes(
            msgspec.json.format(msgspec.json.encode({"provenance": provenance, **reports})) + b"\n"
        )


if __name__ == "__main__":
    main()
