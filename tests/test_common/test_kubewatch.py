"""What an API server sends once a minute, and so no short test against a real one sees: bookmarks.

The server is scripted over real HTTP; its bookmarks are those of Kubernetes 1.36, to the byte.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator

import msgspec
import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration

from fleetlm_common import kubenames
from fleetlm_common.kubeapi import KubeApi, Object
from fleetlm_common.kubecontrol import KubernetesControlPlane
from fleetlm_common.kubemap import ring_map_spec
from tests.support.planecontract import SPEC, ring_map

BOOKMARKS = {
    "ringmaps": b'{"type":"BOOKMARK","object":{"kind":"RingMap","apiVersion":"fleetlm.io/v1alpha1",'
    b'"metadata":{"resourceVersion":"8"}}}',
    "leases": b'{"type":"BOOKMARK","object":{"kind":"Lease","apiVersion":"coordination.k8s.io/v1",'
    b'"metadata":{"resourceVersion":"8"},"spec":{}}}',
}


def ring_object(version: int) -> Object:
    """The RingMap of one epoch, as of a version."""
    return {
        "apiVersion": kubenames.API,
        "kind": "RingMap",
        "metadata": {"name": "chat", "resourceVersion": str(version)},
        "spec": ring_map_spec(SPEC, ring_map(1)),
    }


async def answer(request: web.Request) -> web.StreamResponse:
    """Lists have no map yet; a watch sends a bookmark, then (of RingMaps) the map."""
    plural = request.path.rpartition("/")[2]
    if "watch" not in request.query:
        before = {**ring_object(7), "spec": ring_map_spec(SPEC, None)}
        items = [before] if plural == "ringmaps" else []
        return web.json_response({"metadata": {"resourceVersion": "7"}, "items": items})
    stream = web.StreamResponse()
    await stream.prepare(request)
    await stream.write(BOOKMARKS[plural] + b"\n")
    if plural == "ringmaps":
        await stream.write(msgspec.json.encode({"type": "MODIFIED", "object": ring_object(9)}) + b"\n")
    await asyncio.Event().wait()
    return stream


@pytest.fixture
async def plane() -> AsyncGenerator[KubernetesControlPlane]:
    """A component's control plane at the scripted server."""
    application = web.Application()
    application.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    configuration = Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}")

    async def connect() -> KubeApi:
        return KubeApi(configuration, agent="test")

    made = KubernetesControlPlane("default", "chat", connect=connect, entropy=random.Random(1))
    yield made
    await made.close()
    await runner.cleanup()


async def test_a_bookmark_is_a_version_and_nothing_else(plane: KubernetesControlPlane) -> None:
    """The watch goes on after it; the process that watches did end, once a minute."""
    views = plane.watch()
    async with asyncio.timeout(10):
        seen = [await anext(views), await anext(views)]
    assert isinstance(views, AsyncGenerator)
    await views.aclose()
    assert [view.map is None for view in seen] == [True, False]
