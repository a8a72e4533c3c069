"""A real API server with its controllers and no nodes, on loopback; the test plays the kubelets.

    with started(folder) as server:                  # etcd, kube-apiserver, kube-controller-manager
        async with PlayedNodes(api, "ns"): ...       # pods become ready, shards announce themselves

Promise: what is proven here is proven on the API server's own admission, schemas, server-side apply, garbage collection
and StatefulSet and Deployment controllers. What needs containers is for tests/e2e. No process outlives the context.
Must not be done here: anything about the operator.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import msgspec
import yaml

from fleetlm_common.control import ShardEndpoint
from fleetlm_common.ids import ShardName, Term
from fleetlm_common.kubeapi import ApiError, KubeApi, Object, Resource
from fleetlm_common.kubemap import read_ring_map
from fleetlm_common.kubenames import COMPONENT_LABEL, ENDPOINT_ANNOTATION, INSTANCE_LABEL, LEASES, RING_MAPS
from fleetlm_operator.observed import is_ready, pod_from
from fleetlm_operator.resources import PODS
from tests.cluster import paths
from tests.cluster.binaries import PROGRAMS, build

ROOT: Final = Path(__file__).parents[2]
NEEDED: Final = ("etcd", "kube-apiserver", "kube-controller-manager")
START_S: Final = 90.0
POLL_S: Final = 0.1
NAMESPACES: Final = Resource("v1", "Namespace", "namespaces")
CRDS: Final = Resource("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions")


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class ApiServer:
    """The three processes; `kubeconfig` is its administrator's.

    Args:
        folder: for data, keys and logs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kubeconfig = folder / "kubeconfig"
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._ports = _free_ports(3)

    @property
    def env(self) -> dict[str, str]:
        """How a process finds it."""
        return {"KUBECONFIG": str(self.kubeconfig)}

    def start(self) -> None:
        """Start etcd and the API server."""
        build([each for each in PROGRAMS if each.name in NEEDED])
        client, peer, secure = self._ports
        (self.folder / "tokens.csv").write_text('admin-token,admin,admin,"system:masters"\n')
        user = {"name": "admin", "user": {"token": "admin-token"}}
        address = {"server": f"https://127.0.0.1:{secure}", "insecure-skip-tls-verify": True}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "it",
            "clusters": [{"name": "it", "cluster": address}],
            "users": [user],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "admin"}}],
        }
        self.kubeconfig.write_text(json.dumps(config))
        key = self.folder / "sa.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        there, peers = f"http://127.0.0.1:{client}", f"http://127.0.0.1:{peer}"
        self._spawn(
            "etcd",
            f"--data-dir={self.folder}/etcd",
            "--unsafe-no-fsync",
            f"--listen-client-urls={there}",
            f"--advertise-client-urls={there}",
            f"--listen-peer-urls={peers}",
            f"--initial-advertise-peer-urls={peers}",
            f"--initial-cluster=default={peers}",
        )
        self._spawn(
            "kube-apiserver",
            f"--etcd-servers={there}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            f"--secure-port={secure}",
            f"--cert-dir={self.folder}/certs",
            "--service-cluster-ip-range=10.79.0.0/24",
            f"--token-auth-file={self.folder}/tokens.csv",
            "--authorization-mode=RBAC",
            f"--service-account-key-file={key}",
            f"--service-account-signing-key-file={key}",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--endpoint-reconciler-type=none",
        )

    def start_controllers(self) -> None:
        """Start the controllers; they end when they find no API server, so they come after it."""
        key = self.folder / "sa.key"
        self._spawn(
            "kube-controller-manager",
            f"--kubeconfig={self.kubeconfig}",
            f"--authentication-kubeconfig={self.kubeconfig}",
            f"--authorization-kubeconfig={self.kubeconfig}",
            f"--service-account-private-key-file={key}",
            "--leader-elect=false",
            "--secure-port=0",
            "--controllers=*,-nodelifecycle",
        )

    def _spawn(self, name: str, *arguments: str) -> None:
        log = (self.folder / f"{name}.log").open("wb")
        with log:
            command = [str(paths.BINARIES / name), *arguments]
            self._processes[name] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def stop(self) -> None:
        """Kill all of it."""
        for process in self._processes.values():
            process.kill()
            process.wait()

    def said(self) -> str:
        """The ends of the logs, for a test that failed."""
        return "\n".join(f"{path.name}: {path.read_text()[-500:]}" for path in sorted(self.folder.glob("*.log")))


@contextmanager
def started(folder: Path) -> Generator[ApiServer]:
    """A server with FleetLM's resources, for as long as the context lasts."""
    server = ApiServer(folder)
    try:
        server.start()
        asyncio.run(_install(server))
        server.start_controllers()
        yield server
    finally:
        server.stop()


async def _install(server: ApiServer) -> None:
    """Wait for the server, then make the custom resources."""
    api = await KubeApi.connect(server.env, agent="test")
    end_s = time.monotonic() + START_S
    try:
        while True:
            try:
                for path in sorted((ROOT / "crds").glob("*.yaml")):
                    body = yaml.safe_load(path.read_text())
                    await api.apply(CRDS, None, body, manager="test")
                await api.list(RING_MAPS, None)
            except ApiError as error:
                if time.monotonic() > end_s:
                    raise AssertionError(f"no API server: {server.said()}") from error
                await asyncio.sleep(POLL_S)
            else:
                return
    finally:
        await api.close()


class PlayedNodes:
    """What nodes and shards would do in one namespace, on polls.

    A pod whose image ends with `:bad` cannot be pulled; a shard announces itself and is ready when the map has it;
    a gateway is ready at once.

    Args:
        api: the connection.
        namespace: where.
    """

    def __init__(self, api: KubeApi, namespace: str) -> None:
        self._api = api
        self._namespace = namespace
        self._task: asyncio.Task[None] | None = None
        self.unready_at_once = 0
        """The most shards of one ring that were away at the same moment since it was all ready."""
        self.held: set[str] = set()
        """Pods that do not become ready."""
        self._was_ready: set[str] = set()
        self._stop = False

    async def __aenter__(self) -> PlayedNodes:
        self._task = asyncio.create_task(self._play())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._stop = True  # not cancelled: a connection that is being made would be left open
        await self._task

    async def _play(self) -> None:
        while not self._stop:
            with contextlib.suppress(ApiError):  # a pod that was deleted meanwhile; the next poll sees it
                await self._poll()
            await asyncio.sleep(POLL_S)

    async def _poll(self) -> None:
        pods = (await self._api.list(PODS, self._namespace)).items
        shards: dict[str, list[bool]] = {}
        for pod in pods:
            labels = pod["metadata"]["labels"]
            ring, shard = labels[INSTANCE_LABEL], labels[COMPONENT_LABEL] == "shard"
            ready = await self._serves(ring, pod) if shard else True
            bad = pod["spec"]["containers"][0]["image"].endswith(":bad") or pod["metadata"]["name"] in self.held
            await self._say(pod, ready=ready and not bad, bad=bad)
            if shard:
                shards.setdefault(ring, []).append(is_ready(pod_from(pod)))
        for ring, states in shards.items():
            wanted = await self._members(ring)
            if wanted and sum(states) == wanted:
                self._was_ready.add(ring)
            if ring in self._was_ready:
                self.unready_at_once = max(self.unready_at_once, wanted - sum(states))

    async def _members(self, ring: str) -> int:
        found = await self._api.get(RING_MAPS, self._namespace, ring)
        ring_map = None if found is None else read_ring_map(found)[1]
        return 0 if ring_map is None else len(ring_map.members)

    async def _serves(self, ring: str, pod: Object) -> bool:
        """The shard announces itself; whether the map has it."""
        name = pod["metadata"]["name"]
        number = name.rpartition("-")[2]
        endpoint = ShardEndpoint(ShardName(f"shard-{number}"), f"volume-{name}", Term(1), "10.0.0.1", 4100, "http://x")
        text = msgspec.json.encode(endpoint).decode()
        body: Object = {"metadata": {"annotations": {ENDPOINT_ANNOTATION: text}}}
        await self._api.merge(LEASES, self._namespace, name, body, manager="shard")
        return await self._members(ring) > int(number)

    async def _say(self, pod: Object, *, ready: bool, bad: bool) -> None:
        status = "True" if ready else "False"
        before = next((each for each in pod["status"].get("conditions", []) if each["type"] == "Ready"), None)
        if before is not None and before["status"] == status:
            return
        waiting: dict[str, Any] = {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        container = {
            "name": pod["spec"]["containers"][0]["name"],
            "image": pod["spec"]["containers"][0]["image"],
            "imageID": "",
            "ready": ready,
            "restartCount": 0,
            "state": waiting if bad else {"running": {"startedAt": now}},
        }
        body: Object = {
            "status": {
                "phase": "Pending" if bad else "Running",
                "conditions": [{"type": "Ready", "status": status, "lastTransitionTime": now}],
                "containerStatuses": [container],
            }
        }
        name = pod["metadata"]["name"]
        await self._api.merge(PODS, self._namespace, name, body, manager="kubelet", subresource="status")
