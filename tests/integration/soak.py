"""Hours of moderate load with random kills and pauses of every process, and nothing may grow.

    python -m tests.integration.soak --minutes 60 [--seed N]

The writers, readers and the judge of `kills.py`, and beside them clients that come and go. The last shard and the last
gateway are only ever paused, never killed: they see all others die and return, and would show what leaks.

Promise: status 1 and the facts when the history is not clean, when memory of a process that was never killed grows, or
when a process holds more tasks, sockets, threads or descriptors without clients than it did before the load. Every
sample stands in `samples.csv` of the run's folder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import statistics
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fleetlm_shard.verify import verify
from tests.integration.kills import STOP_S_MAX, Plan, Run
from tests.support.fleet import Fleet, fleet
from tests.support.history import Violation
from tests.support.load import Report
from tests.support.procwatch import Sample, Watch, growth_bytes, sample, settled
from tests.support.rawclient import Lost, Unanswered, raw_socket

GROWTH_BYTES_MAX: Final = 8 * 1024 * 1024
"""Between the second quarter and the last: an allocator's unrest is less, a leak of 40 bytes a message is more."""
SLACK: Final = 4
"""Descriptors, tasks, sockets, threads more than before that are no leak: a pool's thread, a link being made."""
SETTLE_S: Final = 60.0
"""Everything that clients held must be given back this long after the last one left."""
ENV: Final = {
    "FLEETLM_SHARD_HOT_BYTES_MAX": str(4 * 1024 * 1024),
    "FLEETLM_SHARD_SEGMENT_BYTES": str(4 * 1024 * 1024),
    "FLEETLM_SHARD_CHECKPOINT_BYTES": str(1024 * 1024),
    "FLEETLM_SHARD_KEYS_WINDOW_S": "120",
}
"""Small caches: they are full, and turned over, long before the end; what then still grows is a leak."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SoakPlan(Plan):
    """What is run. `kills` counts nothing here: the time ends it."""

    kills: int = 0
    seconds: float
    pause_s: float = 12.0
    stop_share: float = 0.4
    write_pause_s: float = 0.15
    sample_s: float = 5.0
    churn_s: float = 0.5


@dataclass(slots=True)
class SoakReport:
    """What came of it."""

    run: Report
    growth: dict[str, int] = field(default_factory=dict[str, int])
    held: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    leaks: list[str] = field(default_factory=list[str])
    visits: int = 0

    @property
    def problems(self) -> list[str]:
        """Everything that must not be; empty is good."""
        broken = [f"{one.kind} {one.session}: {one.text}" for one in self.run.violations]
        grown = [
            f"{name} grew by {by / 1_048_576:.1f} MiB" for name, by in self.growth.items() if by > GROWTH_BYTES_MAX
        ]
        return [*broken, *grown, *self.leaks]

    def as_json(self) -> str:
        """One line of figures."""
        figures: dict[str, Any] = json.loads(self.run.as_json())
        figures |= {"visits": self.visits, "held": self.held, "leaks": len(self.leaks), "problems": len(self.problems)}
        figures["growth_mib"] = {name: round(by / 1_048_576, 2) for name, by in self.growth.items()}
        return json.dumps(figures)


class Soak(Run):
    """One run against one fleet."""

    def __init__(self, plan: SoakPlan, running: Fleet) -> None:
        super().__init__(plan, running)
        self.soak = plan
        self.visited: list[str] = []
        self.spared = [f"shard-{plan.shards - 1}", f"gateway-{plan.gateways - 1}"]

    async def disturb(self) -> None:
        """Kill and pause until the time is over, one process at a time, or two, or three; visitors all the while."""
        visitors = asyncio.create_task(self._visits())
        returning: dict[str, asyncio.Task[None]] = {}
        try:
            async with asyncio.timeout(self.soak.seconds):
                while True:
                    await asyncio.sleep(self.random.random() * self.plan.pause_s * 2)
                    name = self.random.choice(self.fleet.names)
                    before = returning.pop(name, None)
                    if before is not None:
                        await asyncio.shield(before)
                    hit = self._pause(name) if name in self.spared else self._hit(name)
                    returning[name] = asyncio.create_task(hit)
        except TimeoutError:
            await asyncio.gather(*returning.values())
        finally:
            for task in [visitors, *returning.values()]:
                task.cancel()
            with suppress(asyncio.CancelledError):
                await visitors

    async def _pause(self, name: str) -> None:
        self.report.stopped[name.partition("-")[0]] += 1
        self.fleet.kill(name, signal.SIGSTOP)
        try:
            await asyncio.sleep(self.random.random() * STOP_S_MAX)
        finally:
            self.fleet.kill(name, signal.SIGCONT)

    async def _visits(self) -> None:
        """Clients that come, write a little to a session of their own, and go, some without a word."""
        chance = random.Random(f"{self.plan.seed}-visits")
        while True:
            session = f"visit-{self.plan.seed}-{len(self.visited)}"
            self.visited.append(session)
            self.last_seqs[session] = 0
            with suppress(Lost, Unanswered):
                async with raw_socket(self.websocket_url(chance.randrange(8)), self.history, participant="v") as raw:
                    if await self._joined(raw, session):
                        invocation = self.history.invoke("v", session, self.messages("v", chance.randrange(1, 5)))
                        if not await self._append_raw(raw, invocation):
                            self.history.unknown(invocation)
            await asyncio.sleep(self.soak.churn_s * chance.random() * 2)

    async def _read_finals(self) -> None:
        """Of the long sessions and of each visitor's."""
        long = self.sessions
        self.sessions = [*long, *self.visited]
        try:
            await super()._read_finals()
        finally:
            self.sessions = long


async def soak_run(plan: SoakPlan, folder: Path) -> SoakReport:
    """One run in a folder of its own."""
    async with fleet(folder / "ring", shards=plan.shards, gateways=plan.gateways, env=ENV) as running:
        run = Soak(plan, running)
        before = await sample(running)
        watch = Watch(running, folder / "samples.csv")
        watching = asyncio.create_task(watch.run(every_s=plan.sample_s))
        try:
            report = SoakReport(await run.whole())
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
        report.visits = len(run.visited)
        report.leaks = await settled(running, before, slack=SLACK, within_s=SETTLE_S)
        for name in [*running.names, "up"]:
            samples = watch.of(name)
            report.held[name] = _summary(samples)
            if name in {*run.spared, "up"}:
                report.growth[name] = growth_bytes(samples)
    for volume in sorted((folder / "ring").glob("shard-*")):
        problems = (await asyncio.to_thread(verify, volume)).problems
        report.run.violations += [Violation("changed", volume.name, f"{one.path}: {one.what}") for one in problems]
    return report


def _summary(samples: list[Sample]) -> dict[str, float]:
    """For the report: how many lives, median and largest memory, largest counts."""
    if not samples:
        return {}
    mib = [one.rss_bytes / 1_048_576 for one in samples]
    return {
        "lives": len({one.pid for one in samples}),
        "rss_mib": round(statistics.median(mib), 1),
        "rss_mib_max": round(max(mib), 1),
        **{f"{what}_max": max(getattr(one, what) for one in samples) for what in ("files", "sockets", "tasks")},
    }


def main() -> int:
    """By hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="random when not given")
    parser.add_argument("--pause", type=float, default=12.0, help="mean seconds between hits")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed
    folder = Path(tempfile.mkdtemp(prefix=f"fleetlm-soak-{seed}-"))
    sys.stderr.write(f"seed {seed}, folder {folder}, begun {time.strftime('%H:%M:%S', time.gmtime())} UTC\n")
    plan = SoakPlan(seed=seed, seconds=given.minutes * 60, pause_s=given.pause)
    report = asyncio.run(soak_run(plan, folder))
    sys.stdout.write(report.as_json() + "\n")
    for problem in report.problems[:50]:
        sys.stdout.write(f"{problem}\n")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
