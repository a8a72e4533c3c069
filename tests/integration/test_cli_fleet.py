"""The client commands and the bench against a real `fleetlm up`."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from tests.support.fleet import Fleet, fleet


@pytest.fixture
async def running(tmp_path: Path) -> AsyncGenerator[Fleet]:
    async with fleet(tmp_path / "ring", shards=2) as up:
        yield up


async def fleetlm(*arguments: str) -> tuple[int, str, str]:
    """Run `fleetlm` to its end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fleetlm_cli.main", *arguments,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(90):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_a_first_conversation_by_cli(running: Fleet) -> None:
    """The five lines of the README, found by `--data`, and what was written survives SIGKILL of every process."""
    data = ["--data", str(running.data)]
    assert (await fleetlm("append", "demo", "hello", "--as", "alice", *data))[:2] == (0, "demo #1\n")
    for name in running.names:
        running.kill(name)
    await running.wait_ready()
    assert (await fleetlm("append", "demo", "yes", "--as", "helper", "--kind", "text", *data))[:2] == (0, "demo #2\n")
    status, out, err = await fleetlm("tail", "demo", "--after", "0", "--no-follow", *data)
    assert (status, out) == (0, "     1  alice: hello\n     2  helper [text]: yes\n"), err
    status, out, err = await fleetlm("tail", "demo", "--after", "9", "--no-follow", *data)
    assert status == 4
    assert "cursor_ahead" in err
    status, out, err = await fleetlm("sessions", "--json", *data)
    assert [json.loads(line)["session_id"] for line in out.splitlines()] == ["demo"], err


async def test_verify_finds_damage_after_the_fleet_has_ended(running: Fleet) -> None:
    """A living volume is said to be alive; a flipped byte is status 6, and names the file."""
    data = str(running.data)
    for number in range(5):
        assert (await fleetlm("append", f"s{number}", "x" * 500, "--data", data))[0] == 0
    status, out, _ = await fleetlm("verify", data)
    assert status == 0
    assert "newest segment was left out" in out
    assert await running.stop() == 0
    status, out, _ = await fleetlm("verify", data, "--json")
    reports: list[dict[str, Any]] = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert sum(report["messages"] for report in reports) == 5
    shard = Path(next(report["folder"] for report in reports if report["messages"]))
    segment = next(path for path in sorted((shard / "log").glob("*.seg")) if b"xxxx" in path.read_bytes())
    content = bytearray(segment.read_bytes())
    content[content.index(b"xxxx")] ^= 1
    segment.write_bytes(content)
    status, out, _ = await fleetlm("verify", str(shard))
    assert status == 6
    assert segment.name in out


@pytest.mark.parametrize("kind", ["append", "e2e"])
async def test_bench_counts_everything(running: Fleet, kind: str) -> None:
    """Latencies, rate, cost of each process, and where the numbers come from; nothing refused, nothing unanswered."""
    options = ["--connections", "3", "--sessions", "5", "--in-flight", "4", "--duration", "1", "--warm-up", "0.2"]
    status, out, err = await fleetlm("bench", kind, "--data", str(running.data), *options, "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["acked"] > 20
    assert report["rate_per_s"] == pytest.approx(report["acked"] / report["measured_s"], rel=0.01)
    ack = report["ack_ms"]
    assert 0 < ack["p50"] <= ack["p95"] <= ack["p99"] <= ack["max"]
    assert (report["errors"], report["unanswered"]) == ({}, 0)
    assert {process["name"] for process in report["processes"]} == {"load", *running.names}
    assert report["provenance"]["fdatasync"]["p50_ms"] > 0
    if kind == "e2e":
        assert report["delivered"] == report["acked"]
    status, out, _ = await fleetlm("sessions", "--data", str(running.data), "--json")
    written = sum(json.loads(line)["last_seq"] for line in out.splitlines())
    assert written >= report["acked"]
