"""SIGKILL and SIGSTOP at random under load, then the judgement: nothing acknowledged is lost, doubled or changed.

    python -m tests.integration.kills --kills 300 [--seed N]

A whole `fleetlm up` under the load of `tests/support/load.py` while shards, gateways and the controller are killed or
frozen. Afterwards everything is judged there, and the volumes are checked offline.

Promise: any broken promise ends with status 1, the violations, the seed and the folder with logs and data. The seed
fixes what is killed in which order and what writers choose, not the machine's timing.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fleetlm_shard.verify import verify
from tests.support.fleet import Fleet, fleet
from tests.support.history import Violation
from tests.support.load import Load, LoadPlan, Report

STOP_S_MAX = 3.0
"""Longest freeze: longer than heartbeats between parts, shorter than a takeover."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(LoadPlan):
    """What is run."""

    kills: int
    shards: int = 3
    gateways: int = 2
    pause_s: float = 0.6
    stop_share: float = 0.2


class Run(Load):
    """One run against one fleet."""

    plan: Plan

    def __init__(self, plan: Plan, running: Fleet) -> None:
        super().__init__(
            plan, [process.url for process in running.up.processes if process.kind == "gateway" and process.url]
        )
        self.plan = plan
        self.fleet = running

    async def settle(self) -> None:
        """Every process is ready."""
        await self.fleet.wait_ready()

    def evidence(self) -> str:
        """Logs."""
        return self.fleet.printed()

    async def disturb(self) -> None:
        """Kill until the plan is done; what is only frozen comes on top.

        A process is hit again only once it was ready in between, or once more during its boot: `up` gives up on one
        that dies five times in a row.
        """
        names = self.fleet.names
        returning: dict[str, asyncio.Task[None]] = {}
        try:
            while self.report.killed.total() < self.plan.kills:
                await asyncio.sleep(self.random.random() * self.plan.pause_s * 2)
                name = self.random.choice(names)
                while name in returning and not returning[name].done():
                    name = self.random.choice(names)
                    await asyncio.sleep(0.02)
                if name in returning:
                    await returning.pop(name)
                returning[name] = asyncio.create_task(self._hit(name))
            await asyncio.gather(*returning.values())
        finally:
            for task in returning.values():
                task.cancel()

    async def _hit(self, name: str) -> None:
        kind = name.partition("-")[0]
        if self.random.random() < self.plan.stop_share:
            self.report.stopped[kind] += 1
            sys.stderr.write(f"{time.monotonic() - self.begin_s:8.1f} s  SIGSTOP {name}\n")
            self.fleet.kill(name, signal.SIGSTOP)
            try:
                await asyncio.sleep(self.random.random() * STOP_S_MAX)
            finally:
                with suppress(ProcessLookupError):
                    self.fleet.kill(name, signal.SIGCONT)
            return
        self.report.killed[kind] += 1
        self.fleet.kill(name)
        sys.stderr.write(f"{time.monotonic() - self.begin_s:8.1f} s  SIGKILL {name}\n")
        if self.random.random() < 0.2:
            await self._hit_in_boot(name, kind)
        await self.fleet.wait_ready(name)

    async def _hit_in_boot(self, name: str, kind: str) -> None:
        """Once more, as soon as `up` says that there is a new process."""
        before = self.fleet.killed[name]
        end_s = time.monotonic() + 20
        while self.fleet.pid(name) == before:
            if time.monotonic() > end_s:
                return
            await asyncio.sleep(0.01)
        await asyncio.sleep(self.random.random() * 0.5)
        self.report.killed[kind] += 1
        with suppress(ProcessLookupError):
            self.fleet.kill(name)


async def kill_run(plan: Plan, folder: Path) -> Report:
    """One run in a folder of its own."""
    async with fleet(folder / "ring", shards=plan.shards, gateways=plan.gateways) as running:
        report = await Run(plan, running).whole()
    for volume in sorted((folder / "ring").glob("shard-*")):
        problems = (await asyncio.to_thread(verify, volume)).problems
        report.violations += [Violation("changed", volume.name, f"{one.path}: {one.what}") for one in problems]
    return report


def main() -> int:
    """By hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=None, help="random when not given")
    parser.add_argument("--stops", type=float, default=0.2, help="share of SIGSTOP among the hits")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.6, help="mean seconds between hits")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed
    plan = Plan(
        kills=given.kills,
        seed=seed,
        stop_share=given.stops,
        shards=given.shards,
        gateways=given.gateways,
        pause_s=given.pause,
    )
    folder = Path(tempfile.mkdtemp(prefix=f"fleetlm-kills-{seed}-"))
    sys.stderr.write(f"seed {seed}, folder {folder}\n")
    report = asyncio.run(kill_run(plan, folder))
    sys.stdout.write(report.as_json() + "\n")
    for violation in report.violations[:50]:
        sys.stdout.write(f"{violation.kind} {violation.session}: {violation.text}\n")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
