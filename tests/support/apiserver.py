"""A real API server over a real etcd on loopback, without root: what `kubecontrol` is tested against.

Programs come from `tests.cluster` (built from pinned Go modules into the home directory's cache, minutes the first
time). There are no nodes and no controllers: objects live, and nothing acts on them.

Promise: stopped and started servers keep port, data and identities; everything is gone when the context ends.
"""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import aiohttp
import yaml

from fleetlm_common.kubeapi import KubeApi, Object, Resource
from tests.cluster import paths
from tests.cluster.binaries import PROGRAMS, build

ROOT: Final = Path(__file__).resolve().parents[2]
STARTED_S: Final = 90.0
"""A busy machine of two cores needs some 20 s."""
POLL_S: Final = 0.1
ADMIN: Final = "admin-token"
NAMESPACES: Final = Resource("v1", "Namespace", "namespaces")
CRDS: Final = Resource("apiextensions.k8s.io/v1", "CustomResourceDefinition", "customresourcedefinitions")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class ApiServer:
    """etcd and kube-apiserver below `folder`.

    Args:
        folder: empty; holds data, certificates, logs and kubeconfigs.
        flags: more flags of the API server.
    """

    def __init__(self, folder: Path, *flags: str) -> None:
        self.folder = folder
        self._flags = flags
        self._served: tuple[str, ...] = ()
        self._etcd_port, self._etcd_peer, self.port = free_port(), free_port(), free_port()
        self._etcd: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"https://127.0.0.1:{self.port}"

    @property
    def etcd_url(self) -> str:
        """Where etcd listens."""
        return f"http://127.0.0.1:{self._etcd_port}"

    @property
    def pid(self) -> int | None:
        """The API server's process."""
        return None if self._server is None else self._server.pid

    def prepare(self) -> None:
        """Keys, identities, kubeconfig. Builds programs that are missing."""
        build([each for each in PROGRAMS if each.name in {"etcd", "kube-apiserver"}])
        key = self.folder / "sa.key"
        subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
        (self.folder / "tokens.csv").write_text(f'{ADMIN},admin,admin,"system:masters"\n')
        self.kubeconfig("admin", ADMIN)

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

    async def start_etcd(self) -> None:
        """Start it; an API server reconnects by itself."""
        peer = f"http://127.0.0.1:{self._etcd_peer}"
        self._etcd = self._spawn(
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
        self._server = self._spawn(
            "kube-apiserver",
            f"--etcd-servers={self.etcd_url}",
            "--bind-address=127.0.0.1",
            f"--secure-port={self.port}",
            f"--cert-dir={self.folder}/certs",
            f"--token-auth-file={self.folder}/tokens.csv",
            "--authorization-mode=RBAC",
            f"--service-account-key-file={self.folder}/sa.key",
            f"--service-account-signing-key-file={self.folder}/sa.key",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=10.79.0.0/24",
            "--enable-priority-and-fairness=false",
            *self._flags,
        )
        await self._answering("/readyz")
        await self._serving()

    def stop(self) -> None:
        """Kill the API server; its port refuses from now on."""
        _kill(self._server)
        self._server = None

    def stop_etcd(self) -> None:
        """Kill etcd; its data stay."""
        _kill(self._etcd)
        self._etcd = None

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

    async def _serving(self) -> None:
        """A server that is ready still initializes the storage of custom resources."""
        for plural in self._served:
            await self._answering(f"/apis/fleetlm.io/v1alpha1/{plural}")

    def _spawn(self, program: str, *flags: str) -> subprocess.Popen[bytes]:
        log = (self.folder / f"{program}.log").open("ab")
        with log:
            return subprocess.Popen(
                [str(paths.BINARIES / program), *flags], stdout=log, stderr=log, env={"HOME": str(self.folder)}
            )

    async def _answering(self, path: str) -> None:
        """Wait until a GET is answered 200."""
        headers = {"Authorization": f"Bearer {ADMIN}"}
        async with asyncio.timeout(STARTED_S), aiohttp.ClientSession(headers=headers) as session:
            while not await self._answers(session, path):  # noqa: ASYNC110  it is another process that gets ready
                await asyncio.sleep(POLL_S)

    async def _answers(self, session: aiohttp.ClientSession, path: str) -> bool:
        for name, process in (("etcd", self._etcd), ("kube-apiserver", self._server)):
            if process is not None and process.poll() is not None:
                raise AssertionError(f"{name} ended: {(self.folder / f'{name}.log').read_text()[-2000:]}")
        try:
            async with session.get(self.url + path, ssl=False) as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False


def _kill(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        process.send_signal(signal.SIGKILL)
        process.wait()


@asynccontextmanager
async def api_server(folder: Path, *flags: str) -> AsyncGenerator[ApiServer]:
    """A server with the project's resources, gone afterwards."""
    server = ApiServer(folder, *flags)
    await asyncio.to_thread(server.prepare)
    try:
        await server.start_etcd()
        await server.start()
        await server.install_crds()
        yield server
    finally:
        server.stop()
        server.stop_etcd()
