"""The control plane on Kubernetes against a real API server: the common contract, and an API server's own ways."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import random
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager
from typing import Final

import msgspec
import pytest

from fleetlm_common import kubenames
from fleetlm_common.control import ControlPlane, ControlPlaneUnavailable, MapConflict, View
from fleetlm_common.ids import Epoch
from fleetlm_common.kubeapi import ApiExpired, KubeApi, Object
from fleetlm_common.kubecontrol import READ_S, TRIES_MAX, KubernetesControlPlane
from fleetlm_common.kubemap import ring_map_spec
from fleetlm_common.ring import RingMap
from tests.support.apiserver import NAMESPACES, ApiServer, api_server
from tests.support.eventually import eventually
from tests.support.planecontract import NAMES, SPEC, PlaneContract, endpoint, following, ring_map
from tests.support.tcpcut import CutProxy

pytestmark = [pytest.mark.apiserver, pytest.mark.timeout(2400)]  # the first test may have to build the server

RING: Final = "chat"
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[ApiServer]:
    """One for all tests here; each has a namespace of its own."""
    with api_server(tmp_path_factory.mktemp("apiserver")) as started:
        yield started


@pytest.fixture
async def api(server: ApiServer) -> AsyncGenerator[KubeApi]:
    """An administrator, past the plane that is tested."""
    made = await server.api()
    yield made
    await made.close()


@pytest.fixture
async def namespace(api: KubeApi) -> str:
    """A namespace of this test."""
    name = f"test-{next(_numbers)}"
    await api.create(NAMESPACES, None, {"metadata": {"name": name}})
    return name


def ring_object(ring: RingMap | None = None) -> Object:
    """What the operator makes."""
    return {
        "apiVersion": kubenames.API,
        "kind": "RingMap",
        "metadata": {"name": RING},
        "spec": ring_map_spec(SPEC, ring),
    }


async def make_leases(api: KubeApi, namespace: str) -> None:
    """What the operator makes for the shards."""
    for ordinal in range(SPEC.shards):
        metadata = {"name": kubenames.shard_pod(RING, ordinal), "labels": kubenames.ring_labels(RING, "shard")}
        await api.create(kubenames.LEASES, namespace, {"metadata": metadata})


@asynccontextmanager
async def connected(
    server: ApiServer, namespace: str, *, port: int | None = None
) -> AsyncGenerator[KubernetesControlPlane]:
    """A component's control plane."""
    made = KubernetesControlPlane(namespace, RING, connect=lambda: server.api(port=port), entropy=random.Random(1))
    try:
        yield made
    finally:
        await made.close()


@pytest.fixture
async def ring(api: KubeApi, namespace: str) -> str:
    """The namespace of a ring without a map."""
    await api.create(kubenames.RING_MAPS, namespace, ring_object())
    await make_leases(api, namespace)
    return namespace


@pytest.fixture
async def plane(server: ApiServer, ring: str) -> AsyncGenerator[KubernetesControlPlane]:
    async with connected(server, ring) as made:
        yield made


async def stop(views: AsyncIterator[View]) -> None:
    """End a watch."""
    assert isinstance(views, AsyncGenerator)
    await views.aclose()


async def until(views: AsyncIterator[View], epoch: int) -> View:
    """Follow a watch to the map of `epoch`; no epoch on the way may be lower than one before."""
    last = 0
    async with asyncio.timeout(60):
        async for view in views:
            found = 0 if view.map is None else view.map.epoch
            assert found >= last, "an epoch went back"
            last = found
            if found >= epoch:
                return view
    raise AssertionError("the watch ended")


class TestContract(PlaneContract):
    """What holds of every control plane holds of this one."""

    @pytest.fixture
    def plane(self, plane: KubernetesControlPlane) -> ControlPlane:
        return plane


async def test_before_the_operator_made_the_ring_watchers_wait(server: ApiServer, api: KubeApi, namespace: str) -> None:
    """A gateway that is there first waits and can say for what; it hears of the ring when it is made."""
    async with connected(server, namespace) as plane:
        with pytest.raises(ControlPlaneUnavailable, match="there is no RingMap; the operator makes it"):
            await plane.read()
        views = plane.watch()
        first = asyncio.ensure_future(anext(views))
        await eventually(lambda: "no RingMap" in (plane.trouble or ""), "the watcher says why")
        await api.create(kubenames.RING_MAPS, namespace, ring_object())
        async with asyncio.timeout(30):
            assert await first == View(SPEC, None, {})
        assert plane.trouble is None
        with pytest.raises(ControlPlaneUnavailable, match="Lease chat-shard-0"):
            await plane.announce(endpoint(1))
        await stop(views)


async def test_an_elder_does_not_overwrite_an_announcement(server: ApiServer, ring: str) -> None:
    """The rule holds in the Lease, not only in the memory of those who read both."""
    async with connected(server, ring) as younger, connected(server, ring) as elder, connected(server, ring) as reader:
        await younger.announce(endpoint(2))
        await elder.announce(endpoint(1, port=99))
        assert (await reader.read()).shards == {NAMES[0]: endpoint(2)}


async def test_announcements_that_meet_leave_the_latest_term(server: ApiServer, ring: str) -> None:
    """Eight boots that speak at one moment: the resourceVersion decides each write, the term what stays."""
    async with connected(server, ring) as plane:
        await asyncio.gather(*(plane.announce(endpoint(term)) for term in range(1, 6)))
        assert (await plane.read()).shards == {NAMES[0]: endpoint(5)}


async def test_a_change_of_the_ring_does_not_disturb_a_swap(
    plane: KubernetesControlPlane, api: KubeApi, ring: str
) -> None:
    """`kubectl scale` writes the same object: the swap is tried again, and neither change is lost."""

    async def scale(numbers: range) -> None:
        for shards in numbers:
            body = {"spec": {"shards": shards}}
            await api.merge(kubenames.RING_MAPS, ring, RING, body, manager="test")

    async def swap(numbers: range) -> None:
        for epoch in numbers:
            await plane.compare_and_swap(expected=Epoch(epoch - 1) if epoch > 1 else None, new=ring_map(epoch))

    at_once = 5
    assert at_once < TRIES_MAX, "a swap that loses to each of them has a try left"
    for first in range(1, 16, at_once):
        numbers = range(first, first + at_once)
        await asyncio.gather(scale(numbers), swap(numbers))
    view = await plane.read()
    assert (view.spec.shards, view.map) == (15, ring_map(15))


async def test_an_api_server_that_is_away_is_waited_out(
    server: ApiServer, plane: KubernetesControlPlane, ring: str
) -> None:
    """While it is away calls say so at once and watchers keep silent; afterwards they see what is new."""
    await plane.compare_and_swap(expected=None, new=ring_map(1))
    views = plane.watch()
    await until(views, 1)
    server.stop()
    try:
        for call in (
            plane.read(),
            plane.announce(endpoint(1)),
            plane.compare_and_swap(expected=Epoch(1), new=ring_map(2)),
        ):
            with pytest.raises(ControlPlaneUnavailable):
                await call
        later = asyncio.ensure_future(anext(views))
        await eventually(lambda: plane.trouble is not None, "the watcher notices")
        assert not later.done()
    finally:
        await server.start()
    await plane.compare_and_swap(expected=Epoch(1), new=ring_map(2))
    async with asyncio.timeout(60):
        assert (await later).map == ring_map(2)
    await stop(views)


async def test_an_api_server_that_hangs_is_no_answer(server: ApiServer, plane: KubernetesControlPlane) -> None:
    """A frozen server takes connections and says nothing: a live read has a deadline."""
    await plane.read()
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)
    try:
        async with asyncio.timeout(READ_S * 2):
            with pytest.raises(ControlPlaneUnavailable, match="no answer within"):
                await plane.read()
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert (await plane.read()).spec == SPEC


async def test_a_cut_watch_goes_on_where_it_was(server: ApiServer, plane: KubernetesControlPlane, ring: str) -> None:
    """Connections that break at any moment lose no change and repeat none."""
    async with CutProxy(server.port) as proxy, connected(server, ring, port=proxy.port) as watcher:
        views = watcher.watch()
        await following(views)
        for epoch in range(1, 6):
            proxy.cut()
            await plane.compare_and_swap(expected=Epoch(epoch - 1) if epoch > 1 else None, new=ring_map(epoch))
            assert (await until(views, epoch)).map == ring_map(epoch)
        assert proxy.cuts >= 5
        await stop(views)


def test_a_watch_that_is_left_keeps_no_socket(server: ApiServer) -> None:
    """Not even of a server that never says goodbye: the loop may end, and pytest tells of what the collector finds."""
    pid = server.pid
    assert pid is not None

    async def watch_and_leave() -> None:
        api = await server.api()
        changes = api.watch(NAMESPACES, None, version="0")
        assert (await anext(changes)).type == "ADDED"
        os.kill(pid, signal.SIGSTOP)
        assert isinstance(changes, AsyncGenerator)
        await changes.aclose()
        await api.close()

    try:
        asyncio.run(watch_and_leave())
    finally:
        os.kill(pid, signal.SIGCONT)
    gc.collect()


async def test_a_forgotten_version_is_listed_anew(
    server: ApiServer, plane: KubernetesControlPlane, ring: str, api: KubeApi
) -> None:
    """A watcher that was away for longer than the server remembers (410) sees what is now."""
    async with CutProxy(server.port) as proxy, connected(server, ring, port=proxy.port) as watcher:
        before = (await api.list(kubenames.RING_MAPS, ring)).version
        views = watcher.watch()
        await following(views)
        proxy.close()
        for epoch in (1, 2):
            await plane.compare_and_swap(expected=Epoch(epoch - 1) if epoch > 1 else None, new=ring_map(epoch))
        server.stop()  # a server that starts remembers nothing from before
        await server.start()
        with pytest.raises(ApiExpired):
            async for _ in api.watch(kubenames.RING_MAPS, ring, version=before):
                pass
        await proxy.open()
        assert (await until(views, 2)).map == ring_map(2)
        await stop(views)


async def test_a_ring_map_that_went_back_is_not_believed(
    plane: KubernetesControlPlane, api: KubeApi, ring: str
) -> None:
    """An etcd restored from a backup, or a RingMap made anew: what was seen stays, and a live read refuses."""
    for epoch in (1, 2, 3):
        await plane.compare_and_swap(expected=Epoch(epoch - 1) if epoch > 1 else None, new=ring_map(epoch))
    views = plane.watch()
    await until(views, 3)
    found = await api.get(kubenames.RING_MAPS, ring, RING)
    assert found is not None
    await api.delete(kubenames.RING_MAPS, ring, RING, uid=found["metadata"]["uid"])
    with pytest.raises(ControlPlaneUnavailable, match="there is no RingMap"):
        await plane.read()
    await api.create(kubenames.RING_MAPS, ring, ring_object(ring_map(2)))
    with pytest.raises(ControlPlaneUnavailable, match="went from epoch 3 to another of epoch 2"):
        await plane.read()
    for epoch in (3, 4):
        await api.merge(kubenames.RING_MAPS, ring, RING, {"spec": ring_map_spec(SPEC, ring_map(epoch))}, manager="test")
    assert (await until(views, 4)).map == ring_map(4)
    await stop(views)


async def test_a_damaged_map_is_no_news(plane: KubernetesControlPlane, api: KubeApi, ring: str) -> None:
    """A map with a hole (an edit by hand) is refused by readers, and watchers keep the last good one and say so."""
    await plane.compare_and_swap(expected=None, new=ring_map(1))
    views = plane.watch()
    await until(views, 1)
    damaged = ring_map_spec(SPEC, ring_map(2))
    damaged["map"]["ranges"] = damaged["map"]["ranges"][:-1]
    await api.merge(kubenames.RING_MAPS, ring, RING, {"spec": damaged}, manager="test")
    with pytest.raises(ControlPlaneUnavailable, match="damaged"):
        await plane.read()
    later = asyncio.ensure_future(anext(views))
    await eventually(lambda: "damaged" in (plane.trouble or ""), "the watcher says why")
    assert not later.done()
    with pytest.raises(ControlPlaneUnavailable, match="damaged"):
        await plane.compare_and_swap(expected=Epoch(2), new=ring_map(3))
    await api.merge(kubenames.RING_MAPS, ring, RING, {"spec": ring_map_spec(SPEC, ring_map(3))}, manager="test")
    async with asyncio.timeout(30):
        assert (await later).map == ring_map(3)
    await stop(views)


async def test_announcements_that_cannot_be_read_are_no_news(
    plane: KubernetesControlPlane, api: KubeApi, ring: str
) -> None:
    """Nonsense on one Lease, or another shard's word on it, hides neither the map nor the others."""
    await plane.announce(endpoint(1))
    foreign = msgspec.json.encode(endpoint(9)).decode()
    for said in ("nonsense", foreign):
        body = {"metadata": {"annotations": {kubenames.ENDPOINT_ANNOTATION: said}}}
        await api.merge(kubenames.LEASES, ring, kubenames.shard_pod(RING, 1), body, manager="test")
        assert (await plane.read()).shards == {NAMES[0]: endpoint(1)}


async def test_two_swaps_of_one_epoch_have_one_winner(server: ApiServer, ring: str) -> None:
    """Two operators that decide at one moment: one map, one conflict."""
    async with connected(server, ring) as one, connected(server, ring) as two:
        done = await asyncio.gather(
            *(each.compare_and_swap(expected=None, new=ring_map(1)) for each in (one, two)), return_exceptions=True
        )
        assert [type(each) for each in done if each is not None] == [MapConflict]
