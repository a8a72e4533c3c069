"""The load and the judge of `kills.py` around a fault that a test scripts, on a fleet whose network may be made bad.

    async def script(run: FaultRun) -> None:
        run.shard_proxies["shard-0"].cut()
        await run.progress()
    report = await under_load(tmp_path, script, proxied="shards")

Promise: whatever the script does, at the end every session was read from its beginning and judged, every reader has
everything, volumes were checked offline; `clean` fails with all facts. Must not be done here: faults themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from fleetlm_common.control import ControlPlaneUnavailable, View
from fleetlm_common.filecontrol import FileControlPlane
from fleetlm_common.ids import ShardName
from fleetlm_shard.disk import OsDisk
from fleetlm_shard.identity import read_identity
from fleetlm_shard.verify import verify
from tests.integration.kills import Plan, Run
from tests.support.fleet import Fleet, fleet
from tests.support.history import Violation
from tests.support.load import Report
from tests.support.tcpproxy import TcpProxy, Through

BEHIND: Final = "127.0.0.2"
"""Shards say that they are here; proxies are. Gateways so reach every shard through one."""

Script = Callable[["FaultRun"], Awaitable[None]]
Proxied = Literal["nothing", "clients", "shards"]


class FaultRun(Run):
    """A run whose disturbance is a script."""

    def __init__(self, plan: Plan, running: Fleet, script: Script) -> None:
        super().__init__(plan, running)
        self.client_proxies: list[TcpProxy] = []
        self.shard_proxies: dict[str, TcpProxy] = {}
        self._script = script

    @property
    def proxies(self) -> list[TcpProxy]:
        """All of them."""
        return [*self.client_proxies, *self.shard_proxies.values()]

    async def disturb(self) -> None:
        """Let the load begin, then the script."""
        await self.progress()
        await self._script(self)


@asynccontextmanager
async def proxied_fleet(
    folder: Path,
    *,
    shards: int,
    gateways: int,
    env: Mapping[str, str] | None = None,
    through: Callable[[str], Callable[[], Through] | None] = lambda _: None,
) -> AsyncGenerator[tuple[Fleet, dict[str, TcpProxy]]]:
    """A fleet whose gateways reach each shard through a proxy; `through` may make one of them a rogue."""
    proxies: dict[str, TcpProxy] = {}
    advertised = {**(env or {}), "FLEETLM_SHARD_ADVERTISE_HOST": BEHIND}
    async with fleet(folder, shards=shards, gateways=gateways, slots=16, env=advertised, wait=False) as running:
        try:
            for name, endpoint in (await _announced(folder / "control", shards)).shards.items():
                proxies[name] = TcpProxy("127.0.0.1", endpoint.port, through=through(name))
                await proxies[name].start(BEHIND, endpoint.port)
            await running.wait_up()
            yield running, proxies
        finally:
            for proxy in proxies.values():
                await proxy.stop()


async def _announced(control: Path, shards: int) -> View:
    """Wait until all shards have said where they are."""
    async with asyncio.timeout(60):
        while True:
            with suppress(ControlPlaneUnavailable, OSError):
                view = await FileControlPlane(control).read()
                if len(view.shards) == shards:
                    return view
            await asyncio.sleep(0.05)


async def under_load(
    folder: Path,
    script: Script,
    *,
    proxied: Proxied = "nothing",
    plan: Plan | None = None,
    env: Mapping[str, str] | None = None,
    archive: str = "none",
) -> Report:
    """One run in a folder of its own; see the module."""
    plan = plan or Plan(kills=0, seed=1, shards=2, gateways=2, sessions=4, writers=4, readers=3)
    ring = folder / "ring"
    if proxied == "shards":
        async with proxied_fleet(ring, shards=plan.shards, gateways=plan.gateways, env=env) as (running, proxies):
            run = FaultRun(plan, running, script)
            run.shard_proxies = proxies
            report = await run.whole()
    else:
        async with fleet(
            ring, shards=plan.shards, gateways=plan.gateways, slots=16, env=env, archive=archive
        ) as running:
            run = FaultRun(plan, running, script)
            try:
                if proxied == "clients":
                    await _before_gateways(run)
                report = await run.whole()
            finally:
                for proxy in run.client_proxies:
                    await proxy.stop()
    ring_map = (await FileControlPlane(ring / "control").read()).map
    assert ring_map is not None
    for volume in sorted(ring.glob("shard-*")):
        if ring_map.member(ShardName(volume.name)) is None and read_identity(OsDisk(volume)) is None:
            continue  # it was killed before it had made anything, and nobody asked for it again
        problems = (await asyncio.to_thread(verify, volume)).problems
        report.violations += [Violation("changed", volume.name, f"{one.path}: {one.what}") for one in problems]
    return report


async def _before_gateways(run: FaultRun) -> None:
    """Clients go through proxies from now on."""
    for at, url in enumerate(run.urls):
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        proxy = TcpProxy(parts.hostname, parts.port)
        run.client_proxies.append(proxy)
        run.urls[at] = f"http://127.0.0.1:{await proxy.start()}"
