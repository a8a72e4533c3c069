"""Every documented metric of the outer half moves."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from fleetlm_gateway.metrics import OuterMetrics
from tests.support.eventually import eventually
from tests.support.frontrig import WHO, FrontRig, front_rig, on_uvloop, ws_frame

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations" / "metrics.md"


def documented(section: str) -> set[str]:
    """Metric names in a section of the document."""
    text = DOCUMENT.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return set(re.findall(r"`(fleetlm_gateway_\w+)`", text))


def names(registry: CollectorRegistry) -> set[str]:
    """Names as Prometheus shows them (counters with `_total`)."""
    return {family.name + ("_total" if family.type == "counter" else "") for family in registry.collect()}


def test_document_lists_exactly_what_is_declared() -> None:
    """docs/operations/metrics.md names each metric of the outer half, and none that does not exist."""
    registry = CollectorRegistry()
    OuterMetrics(registry)
    assert documented("Gateway: clients") == names(registry) | {"fleetlm_gateway_ready"}


@on_uvloop
async def test_every_metric_moves() -> None:
    """A scenario with joins, appends, gaps, a full socket, refusals, REST and a drain moves every series."""
    async with front_rig(write_buffer_bytes=262_144, frames_per_second=1000, frames_burst=40) as rig:
        moved: set[str] = set()
        before = _values(rig)

        def look() -> None:
            moved.update(name for name, value in _values(rig).items() if value != before.get(name, 0.0))

        client = await rig.connect()
        await client.join("session:s")
        look()
        url = f"{rig.url}/v1/sessions/s/messages"
        for _ in range(3):
            async with rig.http.post(url, json={"content": 1}, headers={"X-Participant-Id": "b"}) as answer:
                assert answer.status == 201
        rig.boundary.trim("s", 2)
        await client.join("session:s", {"cursor": 0}, join_ref="2")
        await rig.refused("vsn=1.0.0")
        for _ in range(60):
            client.push(None, "h", "phoenix", "heartbeat", {})
        while (await client.next())[4].get("status") != "error":
            pass
        stuck = await rig.connect(WHO)
        await stuck.join("session:s")
        stuck.writer.transport.pause_reading()  # type: ignore[attr-defined]
        while rig.value("sockets_full") == 0:
            async with rig.http.post(url, json={"content": "x" * 60_000}, headers={"X-Participant-Id": "b"}):
                pass
        look()
        async with rig.http.put(f"{rig.url}/v1/sessions/s/read", json={"seq": 2}, headers={"X-Participant-Id": "b"}):
            pass
        client.raw(ws_frame(b"", first=0x82))
        await eventually(lambda: rig.value("sockets_closed_total", reason="binary") == 1, "closed")
        rig.front.hub.abort()
        await rig.front.drain()
        look()
        assert names(rig.registry) == moved


def _values(rig: FrontRig) -> dict[str, float]:
    """The sum over each metric's series."""
    found: dict[str, float] = {}
    for family in rig.registry.collect():
        name = family.name + ("_total" if family.type == "counter" else "")
        found[name] = sum(one.value for one in family.samples if not one.name.endswith("_created"))
    return found
