"""Writers and readers through a ring's gateway Service while a test does something to the ring, then the judgement.

    async def script(traffic: Traffic) -> None:
        await replaced(ring.namespace, "chat-shard-0")
        await traffic.progress()
    await under_traffic(ring, script)

Promise: fails on anything acknowledged that is lost, doubled, reordered or changed, on any gap, and when nothing goes
on; how long the slowest append took is printed at the end of the run.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import Final

from tests.e2e.rings import Ring
from tests.support.load import Load, LoadPlan, Report, clean

Script = Callable[["Traffic"], Awaitable[None]]

STALLS: Final[list[str]] = []
"""A line for each run and for the shared ring's bring-up, printed at the end of all tests."""
_seeds = itertools.count(1)
"""Each run has sessions of its own: tests share rings."""


class Traffic(Load):
    """A run whose disturbance is a script."""

    def __init__(self, plan: LoadPlan, url: str, script: Script) -> None:
        super().__init__(plan, [url])
        self._script = script

    async def disturb(self) -> None:
        """Let the load begin, then the script; what it left is over when appends go on."""
        await self.progress()
        await self._script(self)
        await self.progress()


async def under_traffic(ring: Ring, what: str, script: Script) -> Report:
    """One run against a ring that is ready; judged."""
    plan = LoadPlan(seed=next(_seeds), sessions=6, writers=4, readers=3, write_pause_s=0.05)
    report = await reported(ring, what, Traffic(plan, await ring.url(), script))
    acked, delivered = report.figures["acked"], report.figures["delivered"]
    STALLS.append(
        f"{what}: {acked} appends, {delivered} deliveries in {report.seconds:.0f} s,"
        f" slowest append {report.slowest_append_s:.2f} s ({report.slowest_append}),"
        f" {len(report.violations)} broken promises"
    )
    clean(report)
    return report


async def reported(ring: Ring, what: str, traffic: Traffic) -> Report:
    """The report of a whole run; what broke is the caller's to say.

    Raises:
        AssertionError: the run did not come to its end; with what there is to see of the ring.
    """
    try:
        return await traffic.whole()
    except BaseExceptionGroup as group:
        raise AssertionError(f"{what}: {group.exceptions}\n{await ring.evidence()}") from group
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}\n{await ring.evidence()}") from error
