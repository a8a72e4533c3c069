"""What `up` runs: each process with its environment, as a pod would give it. Pure.

Promise: everything a process is told stands in its environment; secrets only as the name of a file. Variables that the
user has set for components (`FLEETLM_SHARD_FSYNC` …) pass through; the ones below are `up`'s own.
Must not be done here: starting anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleetlm_cli.archivechoice import POSTGRES_FOLDER, ArchiveChoice
from fleetlm_cli.ports import HOST
from fleetlm_cli.supervisor import ChildSpec
from fleetlm_cli.upfile import Up, UpProcess
from fleetlm_common.control import RingSpec, shard_names
from fleetlm_common.ring import RingMap

CONTROLLER: Final = "controller"
ARCHIVE: Final = "archive"
ARCHIVE_STOP_S: Final = 30.0
"""PostgreSQL writes its buffers; shards, which archive, have ended before."""
NO_ARCHIVE: Final = ArchiveChoice()
FIRST_GATEWAY: Final = "gateway-0"
GATEWAY_STOP_S: Final = 30.0
"""A gateway tells its clients `draining`, spreads their leaving and answers what is in flight."""
SHARD_STOP_S: Final = 30.0
"""A shard finishes its batch (`FLEETLM_SHARD_DRAIN_S`) and writes a checkpoint."""
CONTROLLER_STOP_S: Final = 10.0
DEFAULTS: Final = {"FLEETLM_GATEWAY_DRAIN_WINDOW_MS": "1000"}
"""Where one machine differs from a cluster, unless the user says otherwise: a few clients that come back all at once
harm nobody, and whoever pressed Ctrl-C waits."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One `up`: its folder (absolute), how many of what, and the port of each listener by name."""

    folder: Path
    shard_names: tuple[str, ...]
    """In the ring's order."""
    gateways: int
    ports: Mapping[str, int]
    archive: ArchiveChoice = NO_ARCHIVE

    @property
    def control(self) -> Path:
        """The control plane's folder."""
        return self.folder / "control"

    @property
    def logs(self) -> Path:
        """Where each child's log is."""
        return self.folder / "logs"

    @property
    def credential(self) -> Path:
        """The file that shards and gateways share."""
        return self.folder / "credential"

    @property
    def gateway_names(self) -> list[str]:
        """The first one is what clients know."""
        return gateway_names(self.gateways)

    def url(self, name: str) -> str:
        """Where a process serves (for a gateway: clients)."""
        return f"http://{HOST}:{self.ports[name]}"

    def ops_url(self, name: str) -> str:
        """A process's operations port."""
        return f"http://{HOST}:{self.ports[ops_name(name)]}"

    def data(self, shard: str) -> Path:
        """A shard's volume."""
        return self.folder / shard


def ops_name(name: str) -> str:
    """What the operations port of a process is called among the ports."""
    return f"{name} ops"


def gateway_names(count: int) -> list[str]:
    """The first one is what clients know."""
    return [f"gateway-{ordinal}" for ordinal in range(count)]


def shards_to_run(spec: RingSpec, ring_map: RingMap | None) -> tuple[str, ...]:
    """Shards that are asked for, and members that have not left yet, in the ring's order."""
    names = shard_names(spec)
    members = [] if ring_map is None else [member.name for member in ring_map.members]
    return (*names, *(name for name in members if name not in names))


def port_names(*, shards: tuple[str, ...], gateways: int) -> list[str]:
    """Every listener; the controller has an operations port only."""
    serving = [*gateway_names(gateways), *shards]
    return [*serving, *map(ops_name, [*serving, CONTROLLER, ARCHIVE])]


def child_specs(layout: Layout, env: Mapping[str, str]) -> list[ChildSpec]:
    """Every process of `layout`, on top of the environment `env`."""
    shards = [shard_spec(layout, env, name) for name in layout.shard_names]
    gateways = [_gateway(layout, env, name) for name in layout.gateway_names]
    archive = [_archive(layout, env)] if layout.archive.kind == "embedded" else []
    return [*archive, _controller(layout, env), *shards, *gateways]


def _gateway(layout: Layout, env: Mapping[str, str], name: str) -> ChildSpec:
    own = {
        "NAME": name,
        "LISTEN": f"{HOST}:{layout.ports[name]}",
        "OPS_LISTEN": f"{HOST}:{layout.ports[ops_name(name)]}",
        "CREDENTIAL_FILE": str(layout.credential),
    }
    return _child(layout, env, name, module="fleetlm_gateway", own=own, stage=0, stop_s=GATEWAY_STOP_S)


def shard_spec(layout: Layout, env: Mapping[str, str], name: str) -> ChildSpec:
    """One shard's process."""
    own = {
        "NAME": name,
        "DATA": str(layout.data(name)),
        "LISTEN": f"{HOST}:{layout.ports[name]}",
        "OPS_LISTEN": f"{HOST}:{layout.ports[ops_name(name)]}",
        "CREDENTIAL_FILE": str(layout.credential),
    }
    if layout.archive.url_file:
        own["ARCHIVE_URL_FILE"] = layout.archive.url_file
    return _child(layout, env, name, module="fleetlm_shard", own=own, stage=1, stop_s=SHARD_STOP_S)


def _controller(layout: Layout, env: Mapping[str, str]) -> ChildSpec:
    own = {"OPS_LISTEN": f"{HOST}:{layout.ports[ops_name(CONTROLLER)]}"}
    return _child(layout, env, CONTROLLER, module="fleetlm_operator", own=own, stage=2, stop_s=CONTROLLER_STOP_S)


def _archive(layout: Layout, env: Mapping[str, str]) -> ChildSpec:
    own = {
        "DATA": str(layout.folder / POSTGRES_FOLDER),
        "LOG": str(layout.logs / "postgres.log"),
        "OPS_LISTEN": f"{HOST}:{layout.ports[ops_name(ARCHIVE)]}",
    }
    return ChildSpec(
        name=ARCHIVE,
        arguments=("-m", "fleetlm_cli.archivechild"),
        env={**env, **{f"FLEETLM_ARCHIVEDB_{key}": value for key, value in own.items()}},
        ops_url=layout.ops_url(ARCHIVE),
        stage=3,
        stop_s=ARCHIVE_STOP_S,
    )


def _child(
    layout: Layout, env: Mapping[str, str], name: str, *, module: str, own: Mapping[str, str], stage: int, stop_s: float
) -> ChildSpec:
    kind = name.partition("-")[0].upper()
    every = {**own, "CONTROL": f"file:{layout.control}", "LOG_STYLE": "json"}
    return ChildSpec(
        name=name,
        arguments=("-m", module),
        env={**DEFAULTS, **env, **{f"FLEETLM_{kind}_{key}": value for key, value in every.items()}},
        ops_url=layout.ops_url(name),
        stage=stage,
        stop_s=stop_s,
    )


def describe(layout: Layout, *, pid: int, pids: Mapping[str, int]) -> Up:
    """What `up.json` says of these processes, as far as they have been started."""
    gateways = [
        UpProcess(name, "gateway", pids[name], url=layout.url(name), ops_url=layout.ops_url(name))
        for name in layout.gateway_names
    ]
    shards = [
        UpProcess(name, "shard", pids[name], ops_url=layout.ops_url(name), data=str(layout.data(name)))
        for name in layout.shard_names
        if name in pids
    ]
    controller = UpProcess(CONTROLLER, "controller", pids[CONTROLLER], ops_url=layout.ops_url(CONTROLLER))
    archive = [
        UpProcess(ARCHIVE, "archive", pids[ARCHIVE], ops_url=layout.ops_url(ARCHIVE)) for _ in range(ARCHIVE in pids)
    ]
    url = layout.url(FIRST_GATEWAY)
    socket_url = f"ws{url.removeprefix('http')}/socket/websocket"
    return Up(pid, url, socket_url, (*gateways, *shards, controller, *archive))
