"""Fixtures: the operator installed once a run, a namespace a test, one ring for the tests that only disturb it.

What a dead run left in a cluster that is still up is removed before the first test.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
from collections.abc import AsyncGenerator, Generator
from pathlib import Path
from typing import Final

import pytest

from tests.cluster import images, lifecycle, paths
from tests.cluster.say import ClusterError
from tests.e2e.kubectl import CommandError, run_now
from tests.e2e.published import CLUSTER_GOES
from tests.e2e.rings import Ring, nothing_ended_by_itself
from tests.e2e.traffic import STALLS

LABEL: Final = "fleetlm.io/e2e=test"
"""On every namespace that tests make."""
OPERATOR_NAMESPACE: Final = "fleetlm"
_numbers = itertools.count(1)


def readme_lines() -> list[str]:
    """The commands of the README's Kubernetes section, as they stand there."""
    text = (paths.ROOT / "README.md").read_text()
    section = text.partition("## On Kubernetes\n")[2].partition("\n## ")[0]
    return [line.strip() for line in section.splitlines() if line.startswith("    ")]


@pytest.fixture(scope="session")
def cluster() -> None:
    """A cluster that is up and in reach."""
    try:
        up = lifecycle.is_up()
        run_now("kubectl", "get", "nodes", "--request-timeout=5s")
    except (CommandError, ClusterError, OSError) as error:
        pytest.fail(f"`make e2e` runs these tests, in the client's network of a cluster that it brings up: {error}")
    assert up, "`make e2e` brings a cluster up"


def remove_everything() -> None:
    """Whatever tests, or the README's lines, left in the cluster; what is somebody else's is not touched."""
    ours = run_now("kubectl", "get", "namespaces", "-l", LABEL, "-o", "name")
    every = run_now("kubectl", "get", "namespaces", "-o", "name")
    place = f"namespace/{OPERATOR_NAMESPACE}"
    if place in every and place not in ours:
        pytest.fail(f"{place} in the cluster that is up is not the tests': delete it, or `make cluster-down`")
    if place in ours and run_now("helm", "list", "-q", "-n", OPERATOR_NAMESPACE).strip():
        run_now("helm", "uninstall", "fleetlm", "-n", OPERATOR_NAMESPACE, "--wait")
    run_now("kubectl", "delete", "namespace", "-l", LABEL, "--timeout=120s")
    run_now("kubectl", "delete", "crd", "--ignore-not-found", "shardrings.fleetlm.io", "ringmaps.fleetlm.io")


def install_operator() -> None:
    """By the README's first line as it stands there."""
    try:
        run_now("bash", "-ec", readme_lines()[0], timeout_s=120)
    finally:  # what an installation that failed left is the tests', too
        run_now("kubectl", "label", "namespace", OPERATOR_NAMESPACE, LABEL, "--overwrite")
    run_now("kubectl", "rollout", "status", "deployment", "-n", OPERATOR_NAMESPACE, "--timeout=60s")


@pytest.fixture(scope="session")
def installed(cluster: None) -> Generator[None]:
    """The operator for all namespaces."""
    remove_everything()
    install_operator()
    yield
    if not os.environ.get(CLUSTER_GOES):
        remove_everything()


@pytest.fixture
def namespace(request: pytest.FixtureRequest, installed: None) -> Generator[str]:
    """A namespace for one test; goes after it."""
    yield from make_namespace(request.node.name)


def make_namespace(wish: str) -> Generator[str]:
    """A namespace under the restricted standard; the generator's end deletes it."""
    short = re.sub(r"[^a-z0-9]+", "-", wish.lower().removeprefix("test_"))[:30].strip("-")
    name = f"e2e-{next(_numbers)}-{short}"
    run_now("kubectl", "create", "namespace", name)
    run_now("kubectl", "label", "namespace", name, LABEL, "pod-security.kubernetes.io/enforce=restricted")
    try:
        yield name
    finally:
        run_now("kubectl", "delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def shared_namespace(installed: None) -> Generator[str]:
    """Of the shared ring."""
    yield from make_namespace("shared")


@pytest.fixture(scope="session")
def shared(shared_namespace: str) -> Ring:
    """A ring for tests that disturb its pods, or change its spec and put it back."""
    made = Ring(shared_namespace)
    asyncio.run(made.apply({"version": images.version(), "replicas": 3}))
    STALLS.append(f"a ring of 3 shards and 2 gateways: ready {asyncio.run(made.ready()):.1f} s after `kubectl apply`")
    return made


@pytest.fixture
async def ring(shared: Ring) -> AsyncGenerator[Ring]:
    """The shared ring, as asked, whatever the test before did; afterwards nothing ended that it did not end."""
    await shared.ready()
    yield shared
    await nothing_ended_by_itself(shared)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is `e2e`."""
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker("e2e")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What clients felt."""
    if STALLS:
        terminalreporter.section("stalls")
        for line in STALLS:
            terminalreporter.line(line)
