"""One real shard process beside a control plane in files, for tests: start, kill, freeze, look at.

    ring = ShardRing(tmp_path)                      # spec, credential, control folder
    async with ring.shard() as shard:               # started, made a member, ready
        async with await shard.client() as client: ...

Promise: no process outlives the test. The test plays the controller: `bind` makes the map. Must not be done here:
judging what the shard said.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import aiohttp

from fleetlm_common import rpc
from fleetlm_common.control import RingSpec, View
from fleetlm_common.filecontrol import FileControlPlane, create_ring
from fleetlm_common.ids import Epoch, ShardName
from fleetlm_common.ring import Member, RingMap, ranges_from
from tests.support.rpcclient import RpcClient

WAIT_S: Final = 30.0
"""Two cores that other tests share."""
POLL_S: Final = 0.02
SLOTS: Final = 16
SECRET: Final = b"test-credential"


class ShardFailed(AssertionError):
    """The shard did not do what the test needs; carries what it printed."""


@dataclass(slots=True)
class ShardProcess:
    """One process of a shard."""

    ring: ShardRing
    process: asyncio.subprocess.Process
    output: Path
    name: str = "shard-0"

    @property
    def pid(self) -> int:
        """Of the process."""
        return self.process.pid

    def printed(self) -> str:
        """Everything that it wrote."""
        return self.output.read_text()

    async def ops_url(self) -> str:
        """Its operations port, from its first event."""
        line = await self.event("started")
        return f"http://127.0.0.1:{line['ops_port']}"

    async def event(self, name: str) -> dict[str, object]:
        """The first event of that name that it logged; waits for it."""
        import msgspec

        async with asyncio.timeout(WAIT_S):
            while True:
                for line in self.printed().splitlines():
                    if f'"event":"{name}"' in line:
                        return msgspec.json.decode(line, type=dict[str, object])
                if self.process.returncode is not None:
                    raise ShardFailed(f"ended with {self.process.returncode} before {name}:\n{self.printed()}")
                await asyncio.sleep(POLL_S)

    async def get(self, path: str) -> tuple[int, str]:
        """GET on its operations port: status and text."""
        async with aiohttp.ClientSession() as session, session.get(await self.ops_url() + path) as answer:
            return answer.status, await answer.text()

    async def wait_reason(self, reason: str) -> None:
        """Wait until `/health/ready` gives that reason."""
        text = ""
        try:
            async with asyncio.timeout(WAIT_S):
                while True:
                    with contextlib.suppress(aiohttp.ClientError):
                        _, text = await self.get("/health/ready")
                        if f'"reason": "{reason}"' in text:
                            return
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            raise ShardFailed(f"never {reason}, last {text}:\n{self.printed()}") from error

    async def client(self) -> RpcClient:
        """A connection that has said HELLO.

        Raises:
            FleetError: the shard refused.
        """
        return await RpcClient.connect("127.0.0.1", await self.port(), await self.hello())

    async def hello(self) -> rpc.Hello:
        """A good HELLO, as soon as this process (no earlier one of its name) has announced its volume."""
        view = await self.ring.announced(self.name, port=await self.port())
        epoch = 0 if view.map is None else view.map.epoch
        volume_id = view.shards[ShardName(self.name)].volume_id
        return rpc.Hello(rpc.PROTOCOL, self.ring.uid, self.name, volume_id, "test", SECRET, epoch)

    async def port(self) -> int:
        """Where gateways connect."""
        return int(str((await self.event("listening"))["port"]))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process and no other."""
        self.process.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.signal(signal.SIGKILL)
        await self.ended()

    async def ended(self) -> int:
        """Wait for the end; the exit status."""
        try:
            return await asyncio.wait_for(self.process.wait(), WAIT_S)
        except TimeoutError as error:
            raise ShardFailed(f"did not end:\n{self.printed()}") from error


class ShardRing:
    """A ring whose controller is the test."""

    def __init__(self, folder: Path, *, slots: int = SLOTS) -> None:
        self.folder = folder
        self.uid = "test-ring"
        self.slots = slots
        self.control_folder = folder / "control"
        create_ring(self.control_folder, RingSpec(uid=self.uid, slots=slots, shards=1))
        self.control = FileControlPlane(self.control_folder, poll_interval_s=POLL_S)
        self.credential = folder / "credential"
        self.credential.write_bytes(SECRET + b"\n")
        self._starts = 0

    @asynccontextmanager
    async def process(
        self, *, data: Path | None = None, name: str = "shard-0", env: Mapping[str, str] | None = None
    ) -> AsyncGenerator[ShardProcess]:
        """A started process; killed at the end if it still lives."""
        self._starts += 1
        output = self.folder / f"{name}-{self._starts}.log"
        own = {
            "NAME": name,
            "DATA": str(data or self.folder / name),
            "LISTEN": "127.0.0.1:0",
            "OPS_LISTEN": "127.0.0.1:0",
            "CONTROL": f"file:{self.control_folder}",
            "CREDENTIAL_FILE": str(self.credential),
            "LOG_STYLE": "json",
            "LOG_LEVEL": "debug",
            "SEGMENT_BYTES": str(4 * 1024 * 1024),
            **(env or {}),
        }
        with output.open("wb") as stream:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "fleetlm_shard",
                stdout=stream,
                stderr=stream,
                env={**os.environ, **{f"FLEETLM_SHARD_{key}": value for key, value in own.items()}},
            )
        try:
            yield ShardProcess(self, process, output, name)
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGKILL)
                    process.send_signal(signal.SIGCONT)
                await process.wait()

    @asynccontextmanager
    async def shard(
        self, *, data: Path | None = None, env: Mapping[str, str] | None = None
    ) -> AsyncGenerator[ShardProcess]:
        """A process that is a member and ready."""
        async with self.process(data=data, env=env) as shard:
            await self.bind(shard.name)
            await shard.wait_reason("Ready")
            yield shard

    async def announced(self, name: str = "shard-0", *, port: int | None = None) -> View:
        """The view once that shard has announced itself; at that port, if one is named."""
        async with asyncio.timeout(WAIT_S):
            while True:
                view = await self.control.read()
                endpoint = view.shards.get(ShardName(name))
                if endpoint is not None and port in {None, endpoint.port}:
                    return view
                await asyncio.sleep(POLL_S)

    async def bind(self, name: str = "shard-0") -> RingMap:
        """Make the first map, which gives all slots to the shard with the volume that it announced; once."""
        view = await self.announced(name)
        if view.map is not None:
            return view.map
        member = Member(ShardName(name), view.shards[ShardName(name)].volume_id)
        return await self.publish((member,), [ShardName(name)] * self.slots)

    async def publish(self, members: tuple[Member, ...], owners: list[ShardName]) -> RingMap:
        """The next map."""
        current = (await self.control.read()).map
        epoch = Epoch(1 if current is None else current.epoch + 1)
        new = RingMap(
            uid=self.uid,
            slots=self.slots,
            epoch=epoch,
            members=members,
            ranges=ranges_from([(owner, epoch) for owner in owners]),
        )
        await self.control.compare_and_swap(expected=None if current is None else current.epoch, new=new)
        return new
