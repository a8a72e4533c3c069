"""One event is one line; the operations port repeats the component's own word."""

from __future__ import annotations

import asyncio
import io
import json
import re
from pathlib import Path

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, Counter

from fleetlm_common.clock import iso_utc
from fleetlm_common.logs import StreamLogger
from fleetlm_common.ops import Health, OpsServer


class FixedClock:
    """A clock that stands."""

    def now_ms(self) -> int:
        """2026-11-23T23:08:56.123Z."""
        return 1_795_475_336_123

    def now_us(self) -> int:
        """The same in microseconds."""
        return self.now_ms() * 1000 + 456

    def monotonic_s(self) -> float:
        """Zero."""
        return 0.0


def test_a_pod_logs_json_lines() -> None:
    """Time, level, component, event and values; newlines in values stay inside the line."""
    out = io.StringIO()
    StreamLogger("shard-0", stream=out, style="json", clock=FixedClock()).event(
        "log.damaged", level="error", why="a\nb"
    )
    (line,) = out.getvalue().splitlines()
    assert json.loads(line) == {
        "at": "2026-11-23T23:08:56.123456Z",
        "level": "error",
        "component": "shard-0",
        "event": "log.damaged",
        "why": "a\nb",
    }


def test_a_terminal_gets_text_and_levels_filter() -> None:
    """Readable, and quieter when asked; a closed stream is not worth dying for."""
    out = io.StringIO()
    logger = StreamLogger("gw", stream=out, style="text", level="warning", clock=FixedClock())
    logger.event("quiet")
    logger.event("loud", level="warning", n=1)
    assert out.getvalue() == "23:08:56.123 warning gw           loud n=1\n"
    out.close()
    logger.event("nobody listens", level="error")


@pytest.mark.parametrize("now_us", [0, 1, 999_999, 1_795_475_336_123_456])
def test_times_are_rfc_3339(now_us: int) -> None:
    """UTC, microseconds, Z."""
    assert len(iso_utc(now_us)) == 27
    assert iso_utc(now_us).endswith(f"{now_us % 1_000_000:06d}Z")


async def test_the_operations_port() -> None:
    """Readiness has a reason and a status that probes understand; metrics are the registry's."""
    state = Health(ok=False, reason="ReadingLog", message="3 of 9 segments")
    registry = CollectorRegistry()
    Counter("fleetlm_test_moves", "Moves.", registry=registry).inc(3)
    server = OpsServer(registry=registry, ready=lambda: state)
    port = await server.start("127.0.0.1", 0)
    base = f"http://127.0.0.1:{port}"
    try:
        async with aiohttp.ClientSession() as http:
            async with http.get(f"{base}/health/ready") as answer:
                assert answer.status == 503
                assert await answer.json() == {"ok": False, "reason": "ReadingLog", "message": "3 of 9 segments"}
            state = Health(ok=True, reason="Ready")
            async with http.get(f"{base}/health/ready") as answer:
                assert answer.status == 200
            async with http.get(f"{base}/health/live") as answer:
                assert answer.status == 200
            async with http.get(f"{base}/metrics") as answer:
                assert "fleetlm_test_moves_total 3.0" in await answer.text()
    finally:
        await server.stop()


async def test_every_process_says_what_it_holds() -> None:
    """Tasks, descriptors, memory and CPU are on the operations port, documented, and a task more shows as one more."""
    registry = CollectorRegistry()
    server = OpsServer(registry=registry, ready=lambda: Health(ok=True, reason="Ready"))
    url = f"http://127.0.0.1:{await server.start('127.0.0.1', 0)}/metrics"
    idle = asyncio.create_task(asyncio.Event().wait())
    try:
        async with aiohttp.ClientSession() as http:
            before = await _tasks_of(http, url)
            idle.cancel()
            await asyncio.gather(idle, return_exceptions=True)
            assert await _tasks_of(http, url) == before - 1
            async with http.get(url) as answer:
                shown = set(re.findall(r"^# TYPE (\w+)", await answer.text(), re.MULTILINE))
    finally:
        await server.stop()
    page = (Path(__file__).parents[2] / "docs" / "operations" / "metrics.md").read_text()
    section = page.split("## Every process\n")[1].split("\n## ")[0]
    assert set(re.findall(r"`((?:fleetlm_)?process_\w+)`", section)) == shown


async def _tasks_of(http: aiohttp.ClientSession, url: str) -> float:
    async with http.get(url) as answer:
        found = re.search(r"^fleetlm_process_tasks (\S+)", await answer.text(), re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_queries_for_dashboards_name_metrics_that_there_are() -> None:
    """Each name in a query stands in a table above, which other tests compare with what processes show."""
    page = (Path(__file__).parents[2] / "docs" / "operations" / "metrics.md").read_text()
    tables, _, queries = page.partition("\n## Queries for dashboards\n")
    known = set(re.findall(r"`((?:fleetlm|process)_\w+)`", tables))
    asked = {name.removesuffix("_bucket") for name in re.findall(r"\b(?:fleetlm|process)_\w+", queries)}
    assert len(asked) > 20
    assert asked <= known, asked - known
