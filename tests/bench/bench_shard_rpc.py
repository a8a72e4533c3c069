"""Durable appends a second of one shard over its RPC: `python -m tests.bench.bench_shard_rpc [--json]`.

The real process on a real folder, fsync `always`, 256-byte messages; the client runs in this process, so that both
share the machine's cores. Two shapes: one connection with many requests in flight, and 64 connections with one each.

Promise: counts acknowledgements, each of which means that the message is on disk. Must not be used as a correctness
test.

Where the time of an append goes stands in docs/perf/optimisations.md.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvloop

from fleetlm_common import rpc
from fleetlm_common.rpc import Kind
from tests.support.rpcclient import RpcClient, fragment
from tests.support.shardprocess import ShardProcess, ShardRing

MESSAGE_BYTES = 256
SESSIONS = 200


class Result(msgspec.Struct, frozen=True):
    """One shape's numbers."""

    shape: str
    appends: int
    seconds: float
    appends_per_s: int
    p50_ms: float
    p99_ms: float
    shard_cpu_us_per_append: float


@dataclass(slots=True)
class _Lane:
    """One connection with `window` requests in flight."""

    client: RpcClient
    window: int
    name: str
    sent: int = 0
    done: int = 0
    until_s: float = 0.0

    async def run(self, seconds: float) -> list[float]:
        """Send for that long; returns the latency of each append."""
        body = fragment("x" * (MESSAGE_BYTES - len(fragment(""))))
        latencies: list[float] = []
        started: dict[int, float] = {}
        finished = asyncio.Event()
        now = time.perf_counter
        self.until_s = now() + seconds
        wire, epoch = self.client.wire, self.client.epoch

        def send() -> None:
            self.sent += 1
            started[self.sent] = now()
            drafts = [rpc.Draft(f"{self.name}-{self.sent}", body)]
            request = rpc.Append(epoch, f"session-{self.name}-{self.sent % SESSIONS}", [rpc.Entry(drafts)])
            wire.send(Kind.APPEND, self.sent, rpc.encode(request))

        def on_frame(kind: int, ident: int, payload: bytes) -> None:
            assert kind == Kind.APPENDED, payload
            self.done += 1
            at_s = now()
            latencies.append(at_s - started.pop(ident))
            if at_s < self.until_s:
                send()
            elif not started:
                finished.set()

        wire._on_frame = on_frame
        for _ in range(self.window):
            send()
        await finished.wait()
        return latencies


async def _measure(shard: ShardProcess, shape: str, *, connections: int, window: int, seconds: float) -> Result:
    clients = [await shard.client() for _ in range(connections)]
    lanes = [_Lane(client, window, f"{shape}-{number}") for number, client in enumerate(clients)]
    cpu_s, began_s = _cpu_s(shard.pid), time.perf_counter()
    latencies = [each for lane in await asyncio.gather(*(lane.run(seconds) for lane in lanes)) for each in lane]
    took_s, cpu_s = time.perf_counter() - began_s, _cpu_s(shard.pid) - cpu_s
    for client in clients:
        await client.close()
    cuts = statistics.quantiles(latencies, n=100)
    return Result(
        shape=shape,
        appends=len(latencies),
        seconds=round(took_s, 2),
        appends_per_s=int(len(latencies) / took_s),
        p50_ms=round(cuts[49] * 1000, 3),
        p99_ms=round(cuts[98] * 1000, 3),
        shard_cpu_us_per_append=round(cpu_s / len(latencies) * 1e6, 2),
    )


def _cpu_s(pid: int) -> float:
    """User and system seconds of a process so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


async def _main(seconds: float, folder: Path) -> list[Result]:
    ring = ShardRing(folder, slots=256)
    env = {"SEGMENT_BYTES": str(64 * 1024 * 1024), "LOG_LEVEL": "info"}
    async with ring.shard(env=env) as shard:
        await _measure(shard, "warm-up", connections=1, window=64, seconds=1)
        return [
            await _measure(shard, "pipelined", connections=1, window=512, seconds=seconds),
            await _measure(shard, "connections-64", connections=64, window=1, seconds=seconds),
        ]


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each shape")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of words")
    parser.add_argument("--folder", type=Path, default=None, help="where the volume is made (a real disk)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = uvloop.run(_main(options.seconds, Path(folder)))
    for result in results:
        if options.json:
            sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
        else:
            sys.stdout.write(
                f"{result.shape}: {result.appends_per_s:,} durable appends/s, p50 {result.p50_ms} ms, "
                f"p99 {result.p99_ms} ms, shard CPU {result.shard_cpu_us_per_append} µs an append\n"
            )


if __name__ == "__main__":
    main()
