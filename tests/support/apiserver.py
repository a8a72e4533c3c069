"""A real API server over a real etcd on loopback, without root, with the real controllers where a test wants them.

    with api_server(folder) as server:                    # objects live, and nothing acts on them
    with api_server(folder, controllers=True) as server:  # StatefulSets make pods, owners take what they own with them

Programs come from `tests.cluster` (built from pinned Go modules into the home directory's cache, minutes the first
time). There are no nodes: `playednodes.py` plays them; what needs containers is for tests/e2e.

Promise: stopped and started servers keep port, data and identities; what accounts of pods asked is on record
(`asked_by`); no process outlives the context. Must not be done here: anything about a component of FleetLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final, NamedTuple

import aiohttp
import yaml

from fleetlm_common.kubeapi import KubeApi, Object
from fleetlm_common.kubenames import Resource
from tests.cluster import paths
from tests.cluster.binaries import PROGRAMS, build

ROOT: Final = Path(__file__).resolve().parents[2]
STARTED_S: Final = 90.0
"""A busy machine of two cores needs some 20 s."""
POLL_S: Final = 0.1
PORTS: Final = (10_000, 30_000)
ADMIN: Final = "admin-token"
NAMESPACES: Final = Resource("v1", "Namespace", "namespaces")
CRDS: Final = Resource("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions")
RECORDED: Final = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],  # a watch is on record when it begins
    "rules": [{"level": "Metadata", "userGroups": ["system:serviceaccounts"]}, {"level": "None"}],
}
"""The audit policy: requests of pods' accounts, nothing of the controllers and the test."""


class Asked(NamedTuple):
    """A request of a pod's account; `resource` has the subresource behind a slash."""

    group: str
    resource: str
    verb: str
    namespace: str
    name: str
    allowed: bool
    """By RBAC; what admission refused was allowed."""
    made: bool
    """It made an object: an apply does, too, and needs both rights then."""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different.

    Below the range from which the kernel gives ports to who asks for any: a connection of another test that leaves
    this machine's ports in that moment does not take them before their server does, seconds later.
    """
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            port = random.SystemRandom().randrange(*PORTS)
            with contextlib.suppress(OSError):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
                ports.append(port)
        return ports


class ApiServer:
    """etcd, kube-apiserver and, when asked, kube-controller-manager below `folder`.

    Args:
        folder: empty; holds data, certificates, logs and kubeconfigs.
        flags: more flags of the API server.
    """

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder = folder
        self._flags = flags
        self._served: tuple[str, ...] = ()
        self._etcd_port, self._etcd_peer, self.port = free_ports(3)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """How a process finds it, as administrator."""
        return {"KUBECONFIG": str(self.kubeconfig("admin", ADMIN))}

    @property
    def etcd_url(self) -> str:
        """Where etcd listens."""
        return f"http://127.0.0.1:{self._etcd_port}"

    @property
    def pid(self) -> int | None:
        """The API server's process."""
        found = self._processes.get("kube-apiserver")
        return None if found is None else found.pid

    def prepare(self, *, controllers: bool) -> None:
        """Keys, identities, the audit policy. Builds programs that are missing."""
        needed = {"etcd", "kube-apiserver"} | ({"kube-controller-manager"} if controllers else set())
        build([each for each in PROGRAMS if each.name in needed])
        key = self.folder / "sa.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        (self.folder / "tokens.csv").write_text(f'{ADMIN},admin,admin,"system:masters"\n')
        (self.folder / "audit.yaml").write_text(yaml.safe_dump(RECORDED))

    def kubeconfig(self, user: str, token: str, *, port: int | None = None) -> Path:
        """Write a kubeconfig; `port` is that of a proxy before the server."""
        path = self.folder / f"{user}-{port or self.port}.kubeconfig"
        certificate = self.folder / "certs" / "apiserver.crt"
        cluster = {"server": f"https://127.0.0.1:{port or self.port}", "certificate-authority": str(certificate)}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "it",
            "clusters": [{"name": "it", "cluster": cluster}],
            "users": [{"name": user, "user": {"token": token}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": user}}],
        }
        path.write_text(json.dumps(content))
        return path

    async def api(self, *, port: int | None = None) -> KubeApi:
        """A connection as administrator; the caller closes it."""
        return await KubeApi.connect({"KUBECONFIG": str(self.kubeconfig("admin", ADMIN, port=port))}, agent="tests")

    async def account(self, api: KubeApi, namespace: str, name: str) -> Path:
        """A kubeconfig with a token of that ServiceAccount, which must be there."""
        tokens = Resource("v1", "TokenRequest", f"serviceaccounts/{name}/token")
        body: Object = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        token = (await api.create(tokens, namespace, body))["status"]["token"]
        return self.kubeconfig(f"{namespace}-{name}", token)

    async def start_etcd(self) -> None:
        """Start it; an API server reconnects by itself."""
        peer = f"http://127.0.0.1:{self._etcd_peer}"
        self._spawn(
            "etcd",
            f"--data-dir={self.folder}/etcd",
            f"--listen-client-urls={self.etcd_url}",
            f"--advertise-client-urls={self.etcd_url}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        )

    async def start(self) -> None:
        """Start the API server and wait until it is ready."""
        self._spawn(
            "kube-apiserver",
            f"--etcd-servers={self.etcd_url}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            f"--secure-port={self.port}",
            f"--cert-dir={self.folder}/certs",
            f"--token-auth-file={self.folder}/tokens.csv",
            "--authorization-mode=RBAC",
            f"--service-account-key-file={self.folder}/sa.key",
            f"--service-account-signing-key-file={self.folder}/sa.key",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=10.79.0.0/24",
            "--enable-priority-and-fairness=false",
            f"--audit-policy-file={self.folder}/audit.yaml",
            f"--audit-log-path={self.folder}/audit.log",
            "--audit-log-mode=blocking",
            *self._flags,
        )
        await self._answering("/readyz")
        await self._serving()

    async def start_controllers(self) -> None:
        """Start them; they end when they find no API server, so they come after it."""
        kubeconfig = self.kubeconfig("admin", ADMIN)
        self._spawn(
            "kube-controller-manager",
            f"--kubeconfig={kubeconfig}",
            f"--authentication-kubeconfig={kubeconfig}",
            f"--authorization-kubeconfig={kubeconfig}",
            f"--service-account-private-key-file={self.folder}/sa.key",
            "--leader-elect=false",
            "--secure-port=0",
            "--controllers=*,-nodelifecycle",
        )

    def stop(self) -> None:
        """Kill the API server; its port refuses from now on."""
        self._kill("kube-apiserver")

    def stop_etcd(self) -> None:
        """Kill etcd; its data stay."""
        self._kill("etcd")

    def stop_all(self) -> None:
        """Kill everything."""
        for program in tuple(self._processes):
            self._kill(program)

    async def install_crds(self) -> None:
        """The project's own, and wait until they are served."""
        api = await self.api()
        try:
            for path in sorted((ROOT / "crds").glob("*.yaml")):
                body: Object = yaml.safe_load(path.read_text())
                await api.apply(CRDS, None, body, manager="tests")
        finally:
            await api.close()
        self._served = ("ringmaps", "shardrings")
        await self._serving()

    def asked_by(self, account: str) -> list[Asked]:
        """What a ServiceAccount (`namespace:name`) asked so far, in order."""
        found: list[Asked] = []
        for line in (self.folder / "audit.log").read_text().splitlines():
            entry = json.loads(line)
            if entry["user"]["username"] != f"system:serviceaccount:{account}" or "objectRef" not in entry:
                continue
            reference = entry["objectRef"]
            parts = (reference.get("resource", ""), reference.get("subresource", ""))
            found.append(
                Asked(
                    group=reference.get("apiGroup", ""),
                    resource="/".join(part for part in parts if part),
                    verb=entry["verb"],
                    namespace=reference.get("namespace", ""),
                    name=reference.get("name", ""),
                    allowed=entry["annotations"]["authorization.k8s.io/decision"] == "allow",
                    made=entry.get("responseStatus", {}).get("code") == 201,
                )
            )
        return found

    async def _serving(self) -> None:
        """A server that is ready still initializes the storage of custom resources."""
        for plural in self._served:
            await self._answering(f"/apis/fleetlm.io/v1alpha1/{plural}")

    def _spawn(self, program: str, *flags: str) -> None:
        log = (self.folder / f"{program}.log").open("ab")
        with log:
            self._processes[program] = subprocess.Popen(
                [str(paths.BINARIES / program), *flags], stdout=log, stderr=log, env={"HOME": str(self.folder)}
            )

    def _kill(self, program: str) -> None:
        process = self._processes.pop(program, None)
        if process is not None:
            process.send_signal(signal.SIGKILL)
            process.wait()

    async def _answering(self, path: str) -> None:
        """Wait until a GET is answered 200."""
        headers = {"Authorization": f"Bearer {ADMIN}"}
        async with asyncio.timeout(STARTED_S), aiohttp.ClientSession(headers=headers) as session:
            while not await self._answers(session, path):  # noqa: ASYNC110  it is another process that gets ready
                await asyncio.sleep(POLL_S)

    async def _answers(self, session: aiohttp.ClientSession, path: str) -> bool:
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise AssertionError(f"{name} ended: {(self.folder / f'{name}.log').read_text()[-2000:]}")
        try:
            async with session.get(self.url + path, ssl=False) as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False


@contextmanager
def api_server(folder: Path, *flags: str, controllers: bool = False, crds: bool = True) -> Generator[ApiServer]:
    """A server, with the project's resources unless `crds` is false; gone afterwards."""
    server = ApiServer(folder, *flags)
    server.prepare(controllers=controllers)

    async def start() -> None:
        await server.start_etcd()
        await server.start()
        if crds:
            await server.install_crds()
        if controllers:
            await server.start_controllers()

    try:
        asyncio.run(start())
        yield server
    finally:
        server.stop_all()
