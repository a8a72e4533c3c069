"""Several rings: two in one namespace, one of the same name in another. Each has its own messages."""

from __future__ import annotations

import asyncio
from collections.abc import Generator

import pytest

import fleetlm_client
from tests.e2e.install import a_namespace
from tests.e2e.rings import Ring

SMALL = {"replicas": 1, "slots": 256, "gateway": {"replicas": 1}}


@pytest.fixture
def elsewhere(installed: None) -> Generator[str]:
    """Another namespace."""
    with a_namespace("elsewhere") as name:
        yield name


@pytest.mark.long
async def test_two_rings_in_a_namespace_and_one_in_another(namespace: str, elsewhere: str) -> None:
    """The same session in three rings is three sessions; deleting one ring leaves the others whole."""
    rings = [Ring(namespace, "one"), Ring(namespace, "two"), Ring(elsewhere, "one")]
    await asyncio.gather(*[ring.apply(SMALL) for ring in rings])
    for ring in rings:
        await ring.ready()
    for at, ring in enumerate(rings):
        async with (
            fleetlm_client.connect(await ring.url(), participant_id="p") as client,
            client.join("same") as joined,
        ):
            for count in range(at + 1):
                assert (await joined.append({"ring": at, "count": count})).seq == count + 1
    await rings[0].delete()
    for at, ring in enumerate(rings[1:], 1):
        assert (await ring.condition("Ready"))["status"] == "True"
        async with (
            fleetlm_client.connect(await ring.url(), participant_id="p") as client,
            client.join("same") as joined,
        ):
            assert (await joined.append({"ring": at})).seq == at + 2
