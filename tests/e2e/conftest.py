"""Fixtures: the operator installed once a run, a namespace a test, one ring for the tests that only disturb it.

What a dead run left in a cluster that is still up is removed before the first test.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Generator
from pathlib import Path

import pytest

from tests.cluster import images, lifecycle
from tests.cluster.say import ClusterError
from tests.e2e.install import a_namespace, install_operator, remove_everything
from tests.e2e.kubectl import CommandError, run_now
from tests.e2e.published import CLUSTER_GOES
from tests.e2e.rings import Ring, nothing_ended_by_itself
from tests.e2e.traffic import STALLS


@pytest.fixture(scope="session")
def cluster() -> None:
    """A cluster that is up and in reach."""
    try:
        up = lifecycle.is_up()
        run_now("kubectl", "get", "nodes", "--request-timeout=5s")
    except (CommandError, ClusterError, OSError) as error:
        pytest.fail(f"`make e2e` runs these tests, in the client's network of a cluster that it brings up: {error}")
    assert up, "`make e2e` brings a cluster up"


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
    with a_namespace(request.node.name) as name:
        yield name


@pytest.fixture(scope="session")
def shared_namespace(installed: None) -> Generator[str]:
    """Of the shared ring."""
    with a_namespace("shared") as name:
        yield name


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
