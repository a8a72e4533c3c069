"""The ring that a drill runs against: an `up` on this machine, or a ShardRing through the `kubectl` on the PATH.

Promise: what is done to it are commands that a person would type (and SIGKILL for local processes); a child is told to
stop, and waited for, when the drill is interrupted. Must not be done here: the workload, or judging.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

import aiohttp
import msgspec

from fleetlm_cli import upfile
from fleetlm_cli.asking import has_members, is_steady
from fleetlm_cli.exits import Exit, Failure
from fleetlm_cli.shards import is_ready
from fleetlm_common.control import ControlPlaneUnavailable, View
from fleetlm_common.filecontrol import FileControlPlane, read_status
from fleetlm_common.kubenames import COMPONENT_LABEL, RING_LABEL

POLL_S: Final = 0.2
KILLED_S: Final = 60.0
"""A killed one has a successor that is another by then."""


class DrillRing(Protocol):
    """What drills do to a ring."""

    async def urls(self) -> list[str]: ...  # noqa: D102 - see the classes
    async def is_well(self) -> bool: ...  # noqa: D102
    async def shards(self) -> int: ...  # noqa: D102
    async def kill(self, component: str) -> str: ...  # noqa: D102
    async def restart(self, *, handover: bool | None, timeout_s: float) -> None: ...  # noqa: D102
    async def scale(self, shards: int) -> None: ...  # noqa: D102


async def until(what: str, holds: Callable[[], Awaitable[bool]], *, timeout_s: float) -> None:
    """Look again and again.

    Raises:
        Failure: not within `timeout_s`.
    """
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                if await holds():
                    return
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        raise Failure(f"not within {timeout_s:g} s: {what}") from error


async def run(*command: str, to_stderr: bool = True) -> str:
    """A command to its end; what it prints goes to standard error, or is returned.

    Raises:
        Failure: it cannot be started, or failed, in its words.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr if to_stderr else asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is the drill's to pass on
        )
    except OSError as error:
        raise Failure(f"cannot run {command[0]}: {error.strerror}") from error
    try:
        out, err = await process.communicate()
    except asyncio.CancelledError:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        await process.wait()
        raise
    if process.returncode:
        raise Failure(f"`{' '.join(command)}` ended with {process.returncode}: {err.decode().strip()}")
    return (out or b"").decode()


class LocalRing:
    """The `up` that runs on `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        upfile.find(folder)

    async def urls(self) -> list[str]:
        """Every gateway."""
        return [each.url for each in upfile.find(self._folder).processes if each.url is not None]

    async def is_well(self) -> bool:
        """Every process is ready, as many shards as asked for, and nothing moves."""
        view = await self._view()
        status = await asyncio.to_thread(read_status, self._folder / "control")
        if view is None or not is_steady(view, status) or not has_members(view, view.spec.shards):
            return False
        processes = [each for each in upfile.find(self._folder).processes if each.kind in {"shard", "gateway"}]
        if sum(each.kind == "shard" for each in processes) != view.spec.shards:
            return False
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as http:
            return all([await is_ready(http, each) for each in processes])

    async def _view(self) -> View | None:
        try:
            return await FileControlPlane(self._folder / "control").read()
        except ControlPlaneUnavailable:
            return None

    async def shards(self) -> int:
        """As many as are asked for."""
        view = await self._view()
        if view is None:
            raise Failure(f"cannot read the ring in {self._folder}", status=Exit.NOT_RUNNING)
        return view.spec.shards

    async def kill(self, component: str) -> str:
        """SIGKILL of the first one; another runs in its place when this returns."""
        victim = next(each for each in upfile.find(self._folder).processes if each.kind == component)
        os.kill(victim.pid, signal.SIGKILL)

        async def followed() -> bool:
            return upfile.find(self._folder).process(victim.name).pid != victim.pid

        await until(f"`up` starts {victim.name} again", followed, timeout_s=KILLED_S)
        return f"{victim.name} (pid {victim.pid})"

    async def restart(self, *, handover: bool | None, timeout_s: float) -> None:
        """`fleetlm shards restart`; `timeout_s` is its own affair."""
        how = () if handover is None else ("--handover" if handover else "--in-place",)
        await self._fleetlm("restart", *how)

    async def scale(self, shards: int) -> None:
        """`fleetlm shards scale`."""
        await self._fleetlm("scale", str(shards))

    async def _fleetlm(self, *arguments: str) -> None:
        await run(sys.executable, "-m", "fleetlm_cli.main", "shards", *arguments, "--data", str(self._folder))


class KubernetesRing:
    """The ShardRing `name` in `namespace`, whose gateways answer at `url`."""

    def __init__(self, namespace: str, name: str, url: str) -> None:
        self._namespace, self._name, self._url = namespace, name, url

    async def _kubectl(self, *arguments: str, to_stderr: bool = True) -> str:
        return await run("kubectl", "-n", self._namespace, *arguments, to_stderr=to_stderr)

    async def _get(self, *arguments: str) -> dict[str, Any]:
        found = await self._kubectl("get", *arguments, "-o", "json", to_stderr=False)
        try:
            return msgspec.json.decode(found, type=dict[str, Any])
        except msgspec.DecodeError as error:
            raise Failure(f"kubectl get {' '.join(arguments)} did not answer with JSON: {error}") from error

    async def urls(self) -> list[str]:
        """The one that was given."""
        return [self._url]

    async def is_well(self) -> bool:
        """The operator has seen the newest spec, and says Ready, Settled, not Degraded."""
        ring = await self._get("shardring", self._name)
        generation = ring["metadata"]["generation"]
        said = {
            each["type"]: each["status"]
            for each in ring.get("status", {}).get("conditions", [])
            if each.get("observedGeneration") == generation
        }
        return (said.get("Ready"), said.get("Progressing"), said.get("Degraded")) == ("True", "False", "False")

    async def shards(self) -> int:
        """As many as are asked for."""
        return int((await self._get("shardring", self._name))["spec"]["replicas"])

    async def _pods(self, component: str) -> dict[str, str]:
        """Uid of each pod that is Ready and not about to go."""
        found = await self._get("pods", "-l", f"{RING_LABEL}={self._name},{COMPONENT_LABEL}={component}")
        return {
            pod["metadata"]["name"]: pod["metadata"]["uid"]
            for pod in sorted(found["items"], key=lambda pod: pod["metadata"]["name"])
            if "deletionTimestamp" not in pod["metadata"]
            and any(
                each["type"] == "Ready" and each["status"] == "True"
                for each in pod.get("status", {}).get("conditions", [])
            )
        }

    async def _replace(self, component: str, name: str, *how: str, timeout_s: float) -> None:
        """Delete a pod; as many as before are Ready without it when this returns."""
        before = await self._pods(component)
        await self._kubectl("delete", "pod", name, *how)

        async def followed() -> bool:
            now = await self._pods(component)
            return len(now) >= len(before) and before[name] not in now.values()

        await until(f"a successor of {name} is Ready", followed, timeout_s=timeout_s)

    async def kill(self, component: str) -> str:
        """The first pod, without grace."""
        pods = await self._pods(component)
        if not pods:
            raise Failure(f"no {component} of {self._name} is Ready")
        name = next(iter(pods))
        await self._replace(component, name, "--grace-period=0", "--force", timeout_s=600)
        return name

    async def restart(self, *, handover: bool | None, timeout_s: float) -> None:
        """Pods are deleted one by one: a ShardRing has no field that restarts it. They hand over by themselves."""
        assert handover is None
        for name in await self._pods("shard"):
            await self._replace("shard", name, "--wait=false", timeout_s=timeout_s)
            await until(f"{self._name} is well after {name}", self.is_well, timeout_s=timeout_s)

    async def scale(self, shards: int) -> None:
        """`kubectl scale`; the operator moves slots."""
        await self._kubectl("scale", "shardring", self._name, f"--replicas={shards}")

    async def schedulable(self, node: str) -> bool:
        """Nobody has cordoned it."""
        return not (await self._get("node", node))["spec"].get("unschedulable", False)

    async def drain(self, node: str, *, timeout_s: float) -> None:
        """`kubectl drain`, also of whatever else runs there."""
        how = ("--ignore-daemonsets", "--delete-emptydir-data", f"--timeout={timeout_s:g}s")
        await run("kubectl", "drain", node, *how)

    async def uncordon(self, node: str) -> None:
        """Pods may come again."""
        await run("kubectl", "uncordon", node)
