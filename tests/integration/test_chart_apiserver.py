"""The chart's life at a real API server with its controllers, by Helm 3 and Helm 4; pods are made, and run nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import yaml

from fleetlm_common.kubeapi import KubeApi, Object
from fleetlm_common.kubenames import SHARD_RINGS, Resource
from fleetlm_operator.resources import DEPLOYMENTS, PODS, ROLE_BINDINGS, SERVICE_ACCOUNTS, SERVICES
from tests.support.apiserver import CRDS, NAMESPACES, ApiServer, api_server
from tests.support.helm import CHART, HELMS, HelmError, helm

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(1200)]  # Helm may have to be built first

CLUSTER_ROLES: Final = Resource("rbac.authorization.k8s.io/v1", "ClusterRole", "clusterroles")
WAIT_S: Final = 60.0
"""Two cores that other tests share."""
RINGS: Final = "shardrings.fleetlm.io"
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """One without the project's resources: the chart brings them."""
    with api_server(tmp_path_factory.mktemp("apiserver"), controllers=True, crds=False) as found:
        yield found


class Site:
    """A cluster where people install the chart.

    Args:
        api: the administrator's connection.
        server: the cluster.
        program: which Helm.
        namespace: where the release goes.
    """

    def __init__(self, api: KubeApi, server: ApiServer, program: str, namespace: str) -> None:
        self.api = api
        self.server = server
        self.program = program
        self.namespace = namespace

    async def helm(self, *arguments: str, user: Path | None = None) -> str:
        """Run Helm in the release's namespace."""
        env = self.server.env if user is None else {"KUBECONFIG": str(user)}
        return await asyncio.to_thread(helm, self.program, *arguments, "--namespace", self.namespace, env=env)

    async def replicas(self) -> int | None:
        """Of the operator; None without one."""
        found = await self.api.get(DEPLOYMENTS, self.namespace, "fleetlm-operator")
        return None if found is None else found["spec"]["replicas"]

    async def knows(self, field: str) -> bool:
        """Whether the ShardRing's schema has that field of the spec."""
        found = (await self.api.list(CRDS, None, fields=f"metadata.name={RINGS}")).items
        schema = found[0]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        return field in schema["properties"]["spec"]["properties"]

    async def until(self, what: str, holds: Callable[[], Awaitable[bool]]) -> None:
        """Wait for what another process does."""
        end_s = asyncio.get_running_loop().time() + WAIT_S
        while not await holds():
            assert asyncio.get_running_loop().time() < end_s, f"not within {WAIT_S:g} s: {what}"
            await asyncio.sleep(0.2)

    async def take_over(self) -> None:
        """Make what an earlier release left the next one's, as a person would who moves it to another namespace.

        To delete it instead and begin afresh takes the API server minutes beside other work, now and then.
        """
        owner = {"meta.helm.sh/release-name": "fleetlm", "meta.helm.sh/release-namespace": self.namespace}
        metadata = {"annotations": owner, "labels": {"app.kubernetes.io/managed-by": "Helm"}}
        for each in (await self.api.list(CRDS, None)).items:
            body: Object = {"metadata": metadata}
            await self.api.merge(CRDS, None, each["metadata"]["name"], body, manager="administrator")

    async def leave(self) -> None:
        """What the next test must not find: the release."""
        with contextlib.suppress(HelmError):
            await self.helm("uninstall", "fleetlm")

    async def until_pods(self, count: int) -> None:
        """Wait for the operator's pods: the controllers made them and admission let them in."""

        async def there() -> bool:
            return len((await self.api.list(PODS, self.namespace)).items) == count

        await self.until(f"{count} pods of the operator", there)


@asynccontextmanager
async def connected(server: ApiServer) -> AsyncGenerator[KubeApi]:
    """As administrator."""
    api = await server.api()
    try:
        yield api
    finally:
        await api.close()


@asynccontextmanager
async def a_site(server: ApiServer, program: str) -> AsyncGenerator[Site]:
    """A namespace that takes only `restricted` pods."""
    namespace = f"site-{next(_numbers)}-{program}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    async with connected(server) as api:
        await api.create(NAMESPACES, None, {"metadata": {"name": namespace, "labels": labels}})
        found = Site(api, server, program, namespace)
        await found.take_over()
        try:
            yield found
        finally:
            await found.leave()


@pytest.fixture(params=HELMS)
async def site(server: ApiServer, request: pytest.FixtureRequest) -> AsyncGenerator[Site]:
    """One where others had a release before: what the chart keeps of it is this one's now."""
    async with a_site(server, request.param) as found:
        yield found


@pytest.fixture
def new_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """One where nobody ever had the project's resources."""
    with api_server(tmp_path_factory.mktemp("apiserver"), controllers=True, crds=False) as found:
        yield found


@pytest.fixture(params=HELMS)
async def first_site(new_server: ApiServer, request: pytest.FixtureRequest) -> AsyncGenerator[Site]:
    """The first one of its cluster."""
    async with a_site(new_server, request.param) as found:
        yield found


def earlier_chart(folder: Path) -> Path:
    """The chart as an earlier release might have been: its ShardRing has no `logLevel`."""
    chart = folder / "fleetlm"
    shutil.copytree(CHART, chart)
    path = chart / "files" / "crds" / "fleetlm.io_shardrings.yaml"
    crd = yaml.safe_load(path.read_text())
    del crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["logLevel"]
    path.write_text(yaml.safe_dump(crd))
    return chart


async def test_a_release_from_install_to_uninstall(first_site: Site, tmp_path: Path) -> None:
    """Resources are upgraded with the chart, rolled back with it, and kept, with every ring, when it goes."""
    site = first_site
    said = await site.helm("install", "fleetlm", str(earlier_chart(tmp_path)), "--set", "ring.create=true")
    assert "was left out" in said
    assert "helm upgrade fleetlm" in said
    await site.until_pods(1)
    assert not await site.knows("logLevel")
    said = await site.helm("upgrade", "fleetlm", str(CHART), "--reuse-values", "--set", "operator.replicas=2")
    assert "wait --for=condition=Ready shardring/chat" in said
    assert await site.knows("logLevel")
    assert await site.replicas() == 2
    ring = await site.api.get(SHARD_RINGS, site.namespace, "chat")
    assert ring is not None
    await site.helm("rollback", "fleetlm", "1")
    assert not await site.knows("logLevel")
    assert await site.replicas() == 1
    kept = await site.api.get(SHARD_RINGS, site.namespace, "chat")
    assert kept is not None, "a rollback to a release without the ring keeps it"
    assert kept["metadata"]["uid"] == ring["metadata"]["uid"]
    await site.helm("upgrade", "fleetlm", str(CHART))
    await site.helm("uninstall", "fleetlm")
    assert await site.replicas() is None
    assert not [
        each
        for each in (await site.api.list(ROLE_BINDINGS, site.namespace)).items
        if "fleetlm" in each["metadata"]["name"]
    ]
    assert not [
        each for each in (await site.api.list(CLUSTER_ROLES, None)).items if "fleetlm" in each["metadata"]["name"]
    ]
    assert await site.api.get(SERVICES, site.namespace, "fleetlm-operator") is None
    assert await site.knows("logLevel")
    assert await site.api.get(SHARD_RINGS, site.namespace, "chat") is not None
    await site.helm("install", "fleetlm", str(CHART))
    assert await site.replicas() == 1, "the same release again takes over what it left"


async def test_a_second_release_leaves_the_resources_to_the_first(site: Site) -> None:
    """Refused with words that lead to the way out, which works."""
    await site.helm("install", "fleetlm", str(CHART), "--set", f"watch.namespaces={{{site.namespace}}}")
    second = ("install", "second", str(CHART), "--set", f"watch.namespaces={{{site.namespace}}}")
    with pytest.raises(HelmError, match="CustomResourceDefinition"):
        await site.helm(*second)
    await site.helm(*second, "--set", "crds.install=false")
    await site.helm("uninstall", "second")
    assert await site.knows("slots")


async def test_namespaced_without_cluster_rights(site: Site, server: ApiServer) -> None:
    """Somebody who may do everything in one namespace and nothing outside installs it there."""
    for path in sorted((CHART.parents[1] / "crds").glob("*.yaml")):
        await site.api.apply(CRDS, None, yaml.safe_load(path.read_text()), manager="administrator")
    account = {"kind": "ServiceAccount", "name": "default", "namespace": site.namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}
    binding: Object = {"metadata": {"name": "team"}, "roleRef": role, "subjects": [account]}
    await site.api.create(ROLE_BINDINGS, site.namespace, binding)

    async def there() -> bool:
        return await site.api.get(SERVICE_ACCOUNTS, site.namespace, "default") is not None

    await site.until("the namespace has its account", there)
    team = await server.account(site.api, site.namespace, "default")
    own = ("--set", "crds.install=false", "--set", f"watch.namespaces={{{site.namespace}}}")
    with pytest.raises(HelmError, match="forbidden"):
        await site.helm("install", "fleetlm", str(CHART), "--set", "crds.install=false", user=team)
    with contextlib.suppress(HelmError):
        await site.helm("uninstall", "fleetlm", user=team)
    await site.helm("install", "fleetlm", str(CHART), *own, user=team)
    await site.until_pods(1)
    await site.helm("upgrade", "fleetlm", str(CHART), *own, "--set", "operator.replicas=2", user=team)
    assert await site.replicas() == 2
    await site.helm("rollback", "fleetlm", "1", user=team)
    await site.helm("uninstall", "fleetlm", user=team)
    assert await site.replicas() is None


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
async def test_helm_test_says_how_the_operator_is(site: Site, phase: str) -> None:
    """The hook's pod is admitted, and its end is Helm's."""
    await site.helm("install", "fleetlm", str(CHART), "--set", f"watch.namespaces={{{site.namespace}}}")
    running = asyncio.create_task(site.helm("test", "fleetlm", "--timeout", "60s"))
    hook = "fleetlm-operator-test"

    async def there() -> bool:
        return await site.api.get(PODS, site.namespace, hook) is not None

    await site.until("the hook's pod is admitted", there)
    body: Object = {"status": {"phase": phase}}
    await site.api.merge(PODS, site.namespace, hook, body, manager="kubelet", subresource="status")
    if phase == "Succeeded":
        assert "Succeeded" in await running
    else:
        with pytest.raises(HelmError):
            await running
