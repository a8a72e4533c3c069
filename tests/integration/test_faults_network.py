"""Bad networks for real: TCP proxies between clients and gateways, and between gateways and shards, under load.

What the system does in each case stands in docs/operations/failures.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.support.eventually import eventually
from tests.support.faultload import FaultRun, Proxied, under_load
from tests.support.load import clean

HOLE_S = 5.0
"""Longer than the four seconds after which a gateway gives up a silent shard."""


async def cut(run: FaultRun) -> None:
    """Every connection is reset, three times."""
    for _ in range(3):
        # Acknowledgements that were on their way are progress without a connection.
        await eventually(lambda: sum(proxy.cut() for proxy in run.proxies) > 0, "there are connections to cut")
        await run.progress()


async def delay(run: FaultRun) -> None:
    """Each chunk takes 100 ms longer, in each direction."""
    for proxy in run.proxies:
        proxy.delay_s = 0.1
    await run.progress()
    for proxy in run.proxies:
        proxy.delay_s = 0.0
    await run.progress()


async def half_open(run: FaultRun) -> None:
    """Both sides stay connected and hear nothing, then what was sent meanwhile arrives after all."""
    for proxy in run.proxies[:1]:
        proxy.hole()
    await asyncio.sleep(HOLE_S)
    for proxy in run.proxies:
        proxy.heal()
    await run.progress()


async def byte_by_byte(run: FaultRun) -> None:
    """Each byte is a packet of its own."""
    for proxy in run.proxies:
        proxy.piece_bytes = 1
    await run.progress()
    for proxy in run.proxies:
        proxy.piece_bytes = 65_536
    await run.progress()


async def turned_round(run: FaultRun) -> None:
    """After a cut, connections come through two at a time, the later one first."""
    for proxy in run.proxies:
        proxy.turn_round = 2
        proxy.cut()
    # Who comes as the odd one waits: until somebody else comes, or for good.
    await asyncio.sleep(1.0)
    for proxy in run.proxies:
        proxy.turn_round = 1
        proxy.cut()
    await run.progress()


async def refused(run: FaultRun) -> None:
    """Nobody gets through for a while, as behind a firewall that resets."""
    for proxy in run.proxies:
        proxy.refuse = True
        proxy.cut()
    await asyncio.sleep(1.0)
    for proxy in run.proxies:
        proxy.refuse = False
    await run.progress()


async def everything(run: FaultRun) -> None:
    """One after the other."""
    for fault in (cut, delay, half_open, byte_by_byte, turned_round, refused):
        await fault(run)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("between", ["clients", "shards"])
async def test_bad_network(tmp_path: Path, between: Proxied) -> None:
    """Cut, slow, half-open, byte by byte, turned round, refused: nothing acknowledged is lost, readers miss nothing."""
    clean(await under_load(tmp_path, everything, proxied=between))


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("between", ["clients", "shards"])
@pytest.mark.parametrize("fault", [cut, delay, half_open, byte_by_byte, turned_round, refused])
async def test_bad_network_again_and_again(
    tmp_path: Path, fault: Callable[[FaultRun], Awaitable[None]], between: Proxied
) -> None:
    """Each fault five times in a row."""

    async def five(run: FaultRun) -> None:
        for _ in range(5):
            await fault(run)

    clean(await under_load(tmp_path, five, proxied=between))
