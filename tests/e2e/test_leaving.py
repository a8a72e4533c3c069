"""Deleting rings and uninstalling the chart, in both orders: it ends; only what was asked to stay is left."""

from __future__ import annotations

from collections.abc import Generator
from typing import Final

import pytest

import fleetlm_client
from tests.e2e.install import OPERATOR_NAMESPACE, install_operator
from tests.e2e.kubectl import kubectl, run, until
from tests.e2e.rings import Ring

KINDS: Final = (
    "shardrings,ringmaps,statefulsets,deployments,replicasets,pods,services,endpointslices,persistentvolumeclaims,secrets,"
    "configmaps,serviceaccounts,roles,rolebindings,leases,poddisruptionbudgets,networkpolicies"
)
OF_THE_NAMESPACE: Final = frozenset({"serviceaccount/default", "configmap/kube-root-ca.crt"})
"""What Kubernetes puts into every namespace."""
SMALL: Final = {"replicas": 1, "slots": 256, "gateway": {"replicas": 1}}


@pytest.fixture
def operator_again(installed: None) -> Generator[None]:
    """The operator for the tests that follow."""
    yield
    install_operator()


async def left(namespace: str) -> set[str]:
    """Everything in a namespace that did not come with it, by kind and name."""
    names = (await kubectl("get", KINDS, "-n", namespace, "-o", "name", "--ignore-not-found")).split()
    short = {f"{name.partition('/')[0].partition('.')[0]}/{name.partition('/')[2]}" for name in names}
    return short - OF_THE_NAMESPACE


async def leaves(namespace: str, what: set[str]) -> None:
    """Wait until exactly that is left."""
    seen: set[str] = set()

    async def holds() -> bool:
        seen.clear()
        seen.update(await left(namespace))
        return seen == what

    try:
        await until(f"{what or 'nothing'} is left", holds)
    except AssertionError as error:
        raise AssertionError(f"{error}; there is {seen}") from error


async def test_the_ring_first(namespace: str) -> None:
    """What `Retain` keeps stays, and a ring of the same name goes on with it; with `Delete` nothing stays."""
    ring = Ring(namespace)
    await ring.apply(SMALL)
    await ring.ready()
    async with fleetlm_client.connect(await ring.url(), participant_id="p") as client, client.join("kept") as joined:
        assert (await joined.append("before")).seq == 1
    await ring.delete()
    kept = {"ringmap/chat", "persistentvolumeclaim/data-chat-shard-0"}
    await leaves(namespace, kept)
    await ring.apply({**SMALL, "volumeRetention": {"whenDeleted": "Delete"}})
    await ring.ready()
    async with fleetlm_client.connect(await ring.url(), participant_id="p") as client, client.join("kept") as joined:
        assert (await joined.append("after")).seq == 2
    await ring.delete()
    await leaves(namespace, set())


@pytest.mark.long
async def test_the_operator_first(namespace: str, operator_again: None) -> None:
    """Without an operator the ring serves; deleting it then ends all the same."""
    ring = Ring(namespace)
    await ring.apply({**SMALL, "volumeRetention": {"whenDeleted": "Delete"}})
    await ring.ready()
    await run("helm", "uninstall", "fleetlm", "--namespace", OPERATOR_NAMESPACE, "--wait")
    await leaves(OPERATOR_NAMESPACE, set())
    async with fleetlm_client.connect(await ring.url(), participant_id="p") as client, client.join("alone") as joined:
        assert (await joined.append("no operator")).seq == 1
    await ring.delete()
    await leaves(namespace, set())


@pytest.mark.long
async def test_an_install_for_one_namespace(namespace: str, operator_again: None) -> None:
    """Without any right outside of it, beside custom resources that are there already; other namespaces are let be."""
    await run("helm", "uninstall", "fleetlm", "--namespace", OPERATOR_NAMESPACE, "--wait")
    options = (f"--set=watch.namespaces={{{namespace}}}", "--set=crds.install=false")
    await run("helm", "install", "own", "charts/fleetlm", "--namespace", namespace, *options, "--wait")
    try:
        for kind in ("clusterroles", "clusterrolebindings"):
            names = await kubectl("get", kind, "-l", "app.kubernetes.io/instance=own", "-o", "name")
            assert not names.strip()
        ring, other = Ring(namespace), Ring(OPERATOR_NAMESPACE)
        await other.apply(SMALL)
        await ring.apply(SMALL)
        await ring.ready()
        async with fleetlm_client.connect(await ring.url(), participant_id="p") as client, client.join("own") as joined:
            assert (await joined.append("here")).seq == 1
        assert "status" not in await other.read()
        await other.delete()
        await ring.delete()
    finally:
        await run("helm", "uninstall", "own", "--namespace", namespace, "--wait")
