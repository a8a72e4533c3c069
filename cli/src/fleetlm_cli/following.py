"""Which shards of a running `up` have a process: those that are asked for, and members that have not left yet.

Promise: level-triggered: whatever people ask for, in whatever order, processes follow the control plane's files; a
process is ended only when its shard is neither asked for nor a member, which the controller sees to first; its volume
stays. Must not be done here: deciding who is a member, or how processes are kept running (`supervisor.py`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Final

from fleetlm_cli import ports
from fleetlm_cli.children import Layout, port_names, shard_spec, shards_to_run
from fleetlm_cli.exits import Failure
from fleetlm_cli.supervisor import Supervisor
from fleetlm_common.control import ControlPlaneUnavailable, View
from fleetlm_common.filecontrol import FileControlPlane, forget_shard
from fleetlm_common.ids import ShardName

SHARD_PREFIX: Final = "shard-"


class Follower:
    """Keeps the shards' processes as the ring wants them.

    Args:
        layout: what runs at first.
        supervisor: of those processes.
        env: the environment that processes get.
        say: a line for people.
    """

    def __init__(
        self, layout: Layout, supervisor: Supervisor, *, env: Mapping[str, str], say: Callable[[str], None]
    ) -> None:
        self.layout = layout
        self._supervisor = supervisor
        self._env = env
        self._say = say
        self._entropy = random.Random()

    async def run(self) -> None:
        """Follow until cancelled."""
        async for view in FileControlPlane(self.layout.control).watch():
            await self._follow(view)

    async def _follow(self, view: View) -> None:
        if self._supervisor.stopping:
            return
        wanted = shards_to_run(view.spec, view.map)
        running = {name for name in self._supervisor.names() if name.startswith(SHARD_PREFIX)}
        new = [name for name in wanted if name not in running]
        if new:
            self._start(wanted, new)
        for name in sorted(running - set(wanted)):
            self._say(f"{name} has left the ring; stopping it (its volume stays in {self.layout.data(name)})")
            await self._supervisor.remove(name)
            try:
                await asyncio.to_thread(forget_shard, self.layout.control, ShardName(name))
            except ControlPlaneUnavailable as error:
                self._say(f"cannot take back what {name} announced: {error}")
            left = tuple(each for each in self.layout.shard_names if each != name)
            self.layout = dataclasses.replace(self.layout, shard_names=left)

    def _start(self, wanted: tuple[str, ...], new: list[str]) -> None:
        try:
            chosen = ports.choose(
                port_names(shards=wanted, gateways=self.layout.gateways),
                chosen=dict(self.layout.ports),
                remembered=ports.load(self.layout.folder),
                entropy=self._entropy,
            )
            ports.save(self.layout.folder, chosen)
        except (Failure, OSError) as error:
            self._say(f"cannot start {', '.join(new)}: {error}")
            return
        names = (*wanted, *(name for name in self.layout.shard_names if name not in wanted))
        self.layout = dataclasses.replace(self.layout, shard_names=names, ports=chosen)
        for name in new:
            self._say(f"starting {name}")
            self._supervisor.add(shard_spec(self.layout, self._env, name))
