"""Real shards as processes, over a control plane in a folder, without a controller: for tests of one gateway part.

Promise: real `python -m fleetlm_shard`, real files; when the context ends every process has ended. Must not be used
where ownership should change by itself (`fleet.py` has a controller).
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from fleetlm_common.control import RingSpec
from fleetlm_common.filecontrol import FileControlPlane, create_ring
from fleetlm_common.ids import Epoch, ShardName
from fleetlm_common.ring import Member, RingMap, ranges_from

READY_TIMEOUT_S: Final = 60.0
"""Two cores that other tests share."""
SLOTS: Final = 16
CREDENTIAL: Final = b"a credential for tests"


class Shards:
    """Shards of one ring in a folder.

    Args:
        folder: control plane, volumes and output live here.
        count: how many.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.names = [ShardName(f"shard-{number}") for number in range(count)]
        self._folder = folder
        self._processes: dict[str, asyncio.subprocess.Process] = {}
        (folder / "credential").write_bytes(CREDENTIAL)
        create_ring(folder / "control", RingSpec("ring-of-tests", SLOTS, count))

    def control(self) -> FileControlPlane:
        """The control plane, for one more component."""
        return FileControlPlane(self._folder / "control", poll_interval_s=0.02)

    async def start(self, name: str) -> None:
        """Start a shard's process."""
        own = {
            "NAME": name,
            "DATA": str(self._folder / name),
            "LISTEN": "127.0.0.1:0",
            "OPS_LISTEN": "127.0.0.1:0",
            "CONTROL": f"file:{self._folder / 'control'}",
            "CREDENTIAL_FILE": str(self._folder / "credential"),
            "SEGMENT_BYTES": str(4 * 1024 * 1024),
            "DISK_RESERVE_BYTES": "0",
        }
        env = {**os.environ, **{f"FLEETLM_SHARD_{key}": value for key, value in own.items()}}
        with (self._folder / f"{name}.out").open("ab") as output:
            self._processes[name] = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "fleetlm_shard", env=env, stdout=output, stderr=output
            )

    async def make_map(self) -> None:
        """What a controller does first: wait until each shard has said where it is, then give each its slots."""
        control = self.control()
        async with asyncio.timeout(READY_TIMEOUT_S):
            async for seen in control.watch():
                if len(seen.shards) == len(self.names):
                    break
        view = await control.read()
        members = tuple(Member(name, view.shards[name].volume_id) for name in self.names)
        owners = [(self.names[slot * len(self.names) // SLOTS], Epoch(1)) for slot in range(SLOTS)]
        ring = RingMap(view.spec.uid, SLOTS, Epoch(1), members, ranges_from(owners))
        await control.compare_and_swap(expected=None, new=ring)

    async def kill(self, name: str, *, with_signal: int = signal.SIGKILL) -> None:
        """Kill a shard and wait until it is gone."""
        process = self._processes.pop(name)
        process.send_signal(with_signal)
        await process.wait()

    def signal(self, name: str, number: int) -> None:
        """Send a signal, for example SIGSTOP."""
        self._processes[name].send_signal(number)

    async def stop(self) -> None:
        """Kill what still runs."""
        for name in list(self._processes):
            await self.kill(name)

    def printed(self) -> str:
        """What the shards said."""
        return "\n".join(path.read_text() for path in sorted(self._folder.glob("*.out")))


@asynccontextmanager
async def shards(folder: Path, count: int) -> AsyncGenerator[Shards, None]:
    """Started shards with a ring map."""
    made = Shards(folder, count)
    try:
        for name in made.names:
            await made.start(name)
        await made.make_map()
        yield made
    finally:
        await made.stop()
