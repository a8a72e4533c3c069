"""Durable appends a second beside the peers, interleaved in one run: `python -m tests.bench.peers [--json FILE]`.

    shard       one shard, the real process, over its RPC, fsync always
    redis       Redis Streams, appendfsync always
    postgres    PostgreSQL, one INSERT a commit, synchronous_commit on
    nats        NATS JetStream, sync_interval always

The same 256 bytes, the same closed loop from the same process, the same file system, one after the other in rounds
whose order rotates; the figures are medians over rounds, the ratios medians of each round's ratio, so that what slows
the machine for a while slows both sides. Two shapes: one connection with 512 appends unanswered, and 64 connections
with one each.

Promise: after the last round each server is asked how many messages it holds; fewer than were acknowledged is an error.
Must not be used as a correctness test.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

import msgspec
import uvloop

from fleetlm_cli.benchhost import provenance
from tests.bench.peerload import Shape, Tally, closed_loop
from tests.bench.peerservers import Missing, Server, servers
from tests.bench.peerwire import MESSAGE_BYTES, STREAMS, PeerError

NAMES: Final = ("shard", "redis", "postgres", "nats")
SHAPES: Final = (
    Shape(name="pipelined", connections=1, window=512),
    Shape(name="connections-64", connections=64, window=1),
)
WARM_UP_S: Final = 0.4


class Sample(msgspec.Struct, frozen=True):
    """One server, one shape, one round."""

    round: int
    server: str
    shape: str
    appends_per_s: float
    p50_ms: float
    p99_ms: float
    server_cpu_us: float
    """An append, of the server and its children."""
    client_cpu_us: float
    client_busy: float
    """Share of one core that the client used: near 1 the client is what is measured."""


class Bench:
    """The rounds of one run."""

    def __init__(self, running: dict[str, Server], *, seconds: float) -> None:
        self._running = running
        self._seconds = seconds
        self._acked: Counter[str] = Counter()
        self.samples: list[Sample] = []

    async def round(self, number: int) -> None:
        """Each server in each shape, in an order that differs from the last round's."""
        names = list(self._running)
        turn = number % len(names)
        for shape in SHAPES:
            for name in names[turn:] + names[:turn]:
                self.samples.append(await self._one(number, self._running[name], shape))

    async def _one(self, number: int, server: Server, shape: Shape) -> Sample:
        moments: list[tuple[float, float]] = []

        def look() -> None:
            moments.append((server.cpu_s(), time.process_time()))

        tally: Tally = await closed_loop(
            "127.0.0.1",
            server.port,
            shape,
            wire=lambda lane: server.wire(f"{shape.name}-{number}-{lane}"),
            warm_up_s=WARM_UP_S,
            seconds=self._seconds,
            on_begin=look,
            on_end=look,
        )
        self._acked[server.name] += tally.acked_ever
        (server_s, client_s), (server_end_s, client_end_s) = moments
        return Sample(
            round=number,
            server=server.name,
            shape=shape.name,
            appends_per_s=round(tally.acked / self._seconds, 1),
            p50_ms=tally.percentile_ms(50),
            p99_ms=tally.percentile_ms(99),
            server_cpu_us=round((server_end_s - server_s) / tally.acked * 1e6, 2),
            client_cpu_us=round((client_end_s - client_s) / tally.acked * 1e6, 2),
            client_busy=round((client_end_s - client_s) / self._seconds, 2),
        )

    async def check(self) -> dict[str, dict[str, int]]:
        """What was acknowledged is there.

        Raises:
            PeerError: a server holds fewer messages than it acknowledged.
        """
        found: dict[str, dict[str, int]] = {}
        for name, server in self._running.items():
            found[name] = {"acked": self._acked[name], "held": await server.held()}
            if found[name]["held"] < found[name]["acked"]:
                raise PeerError(f"{name} holds fewer messages than it acknowledged: {found[name]}")
        return found


def summary(samples: list[Sample]) -> dict[str, Any]:
    """Medians a shape and server, and the shard's ratio to each peer (median of the rounds' ratios)."""
    out: dict[str, Any] = {}
    for shape in dict.fromkeys(sample.shape for sample in samples):
        of_shape = [sample for sample in samples if sample.shape == shape]
        rates: dict[str, dict[int, float]] = {}
        for sample in of_shape:
            rates.setdefault(sample.server, {})[sample.round] = sample.appends_per_s
        medians = {name: _medians([sample for sample in of_shape if sample.server == name]) for name in rates}
        ratios = {
            name: round(statistics.median(rates["shard"][each] / rate for each, rate in by_round.items()), 3)
            for name, by_round in rates.items()
            if name != "shard" and "shard" in rates
        }
        out[shape] = {"medians": medians, "shard_ratio": ratios}
    return out


def _medians(samples: list[Sample]) -> dict[str, float]:
    fields = ("appends_per_s", "p50_ms", "p99_ms", "server_cpu_us", "client_cpu_us", "client_busy")
    return {name: round(statistics.median(getattr(sample, name) for sample in samples), 3) for name in fields}


async def run(folder: Path, *, names: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    """The report of one run.

    Raises:
        Missing: a server is not installed.
        PeerError: a server refused, or lost something.
    """
    origin = provenance(folder)
    async with servers(folder, names) as running:
        bench = Bench(running, seconds=seconds)
        for number in range(rounds):
            await bench.round(number)
        return {
            "bench": "peers",
            "rounds": rounds,
            "seconds": seconds,
            "message_bytes": MESSAGE_BYTES,
            "sessions_a_connection": STREAMS,
            "versions": {name: server.version for name, server in running.items()},
            "summary": summary(bench.samples),
            "messages": await bench.check(),
            "samples": msgspec.to_builtins(bench.samples),
            "provenance": origin,
        }


def show(report: dict[str, Any]) -> str:
    """The report for people."""
    lines: list[str] = []
    for shape, found in report["summary"].items():
        lines.append(f"{shape}: medians of {report['rounds']} rounds of {report['seconds']:g} s")
        for name, medians in found["medians"].items():
            ratio = found["shard_ratio"].get(name)
            lines.append(
                f"  {name:<9}{medians['appends_per_s']:>10,.0f}/s  p50 {medians['p50_ms']:7.2f} ms"
                f"  p99 {medians['p99_ms']:7.2f} ms  server {medians['server_cpu_us']:6.1f} µs"
                f"  client {medians['client_cpu_us']:5.1f} µs, busy {medians['client_busy']:.0%}"
                + ("" if ratio is None else f"  shard is {ratio:.2f} times that")
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of each server, shape and round")
    parser.add_argument("--servers", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"), help="where all write (a real disk)")
    parser.add_argument("--json", type=Path, default=None, help="write the report there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="peers-") as made:
        folder = Path(made)
        # PostgreSQL runs as another user and must pass through.
        folder.chmod(0o755)
        work = run(folder, names=options.servers, rounds=options.rounds, seconds=options.seconds)
        try:
            report = uvloop.run(work)
        except (Missing, PeerError) as error:
            sys.stderr.write(f"peers: {error}\n")
            sys.exit(1)
    sys.stdout.write(show(report))
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


if __name__ == "__main__":
    main()
