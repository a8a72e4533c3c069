"""What the tests at a real API server with controllers share: the server, and a namespace for each of them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import pytest

from tests.support.apiserver import ApiServer, api_server
from tests.support.operatorworld import World, world_in


@pytest.fixture(scope="session")
def controlled_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    """One for all tests of a worker process; nobody stops it."""
    with api_server(tmp_path_factory.mktemp("apiserver"), controllers=True) as found:
        yield found


@pytest.fixture
async def world(controlled_server: ApiServer, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncGenerator[World]:
    """A namespace named after the test."""
    name = "".join(c if c.isalnum() else "-" for c in request.node.name.removeprefix("test_").lower())
    async with world_in(controlled_server, tmp_path, name[:60].strip("-")) as found:
        yield found
