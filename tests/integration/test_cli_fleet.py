"""The client commands and the bench against a real `fleetlm up`."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import threading
import urllib.request
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.fleet import Fleet, fleet

APPENDED: Final = re.compile(r"^fleetlm_shard_appended_messages_total ([0-9.e+]+)", re.MULTILINE)
STALL_S: Final = 1.0
"""How long a frozen shard stands still: the fault itself, no wait for something."""


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
    async with asyncio.timeout(110):
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
    assert set(report["elsewhere"]) == {"processes_s", "steal_s"}
    if kind == "e2e":
        assert report["delivered"] == report["acked"]
    status, out, _ = await fleetlm("sessions", "--data", str(running.data), "--json")
    written = sum(json.loads(line)["last_seq"] for line in out.splitlines())
    assert written >= report["acked"]


async def test_bench_open_loop_offers_what_it_was_told(running: Fleet, tmp_path: Path) -> None:
    """Everything that was due is sent and answered, whatever the system did meanwhile; the picture is a PNG."""
    picture = tmp_path / "out.png"
    options = ["--connections", "3", "--sessions", "5", "--rate", "100", "--duration", "1", "--warm-up", "0.2"]
    status, out, err = await fleetlm(
        "bench", "e2e", "--data", str(running.data), *options, "--plot", str(picture), "--json"
    )
    assert status == 0, err
    report = json.loads(out)
    assert report["loop"] == "open"
    assert report["offered_per_s"] == pytest.approx(100, abs=3)
    assert report["acked"] == report["delivered"] == round(report["offered_per_s"] * report["measured_s"])
    assert (report["errors"], report["unanswered"], report["unsent"]) == ({}, 0, 0)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    status, _, err = await fleetlm("bench", "e2e", "--plot", str(tmp_path / "out.svg"))
    assert status == 2
    assert "PNG" in err


async def test_bench_open_loop_charges_a_stall_to_every_append_that_was_due(running: Fleet) -> None:
    """A shard that stands still for a second: appends that were due meanwhile waited, and each says so."""
    options = ["--connections", "1", "--sessions", "1", "--rate", "200", "--duration", "3", "--warm-up", "0"]
    bench = asyncio.create_task(fleetlm("bench", "append", "--data", str(running.data), *options, "--json"))
    control = await asyncio.to_thread(_session_owner, running)
    running.kill(control, signal.SIGSTOP)
    try:
        await asyncio.to_thread(threading.Event().wait, STALL_S)
    finally:
        running.kill(control, signal.SIGCONT)
    status, out, err = await bench
    assert status == 0, err
    report = json.loads(out)
    assert report["acked"] == round(report["offered_per_s"] * report["measured_s"])
    # A closed loop would have one slow append; here a good part of three seconds' appends is late.
    assert report["ack_ms"]["p95"] > 200


def _session_owner(running: Fleet) -> str:
    """The shard whose log grows: the one that the bench's only session belongs to."""
    sizes: dict[str, float] = {}
    while True:
        for process in running.up.processes:
            if process.kind != "shard" or process.ops_url is None:
                continue
            with urllib.request.urlopen(f"{process.ops_url}/metrics") as answer:
                found = re.search(
                    r"^fleetlm_shard_appended_messages_total ([0-9.e+]+)", answer.read().decode(), re.MULTILINE
                )
            assert found is not None, "the metric's name has changed"
            now = float(found.group(1))
            if now > sizes.setdefault(process.name, now) + 10:
                return process.name


async def test_bench_fanout_reaches_every_socket(running: Fleet, tmp_path: Path) -> None:
    """The last socket is never earlier than the first; one sample an append."""
    picture = tmp_path / "fan.png"
    status, out, err = await fleetlm(
        "bench",
        "fanout",
        "--data",
        str(running.data),
        "--sockets",
        "20",
        "--appends",
        "5",
        "--plot",
        str(picture),
        "--json",
    )
    assert status == 0, err
    report = json.loads(out)
    assert len(report["samples"]) == 5
    assert 0 < report["first_ms"]["p50"] <= report["last_ms"]["p50"] <= report["last_ms"]["max"]
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")


async def test_bench_idle_counts_the_gateways_memory(running: Fleet) -> None:
    """Opened and joined sockets, and what the gateway grew by for each; by address alone it is refused."""
    status, out, err = await fleetlm("bench", "idle", "--data", str(running.data), "--sockets", "200", "--json")
    assert status == 0, err
    report = json.loads(out)
    assert 0 < report["gateway_mib_before"] <= report["gateway_mib_joined"]
    assert report["kib_a_socket_joined"] < 200
    status, _, err = await fleetlm("bench", "idle", "--url", running.url)
    assert status == 1
    assert "--data" in err


async def test_bench_replay_reads_everything_that_was_written(tmp_path: Path) -> None:
    """Cold and hot, at the shard and at a socket; a message that is missing would end the command."""
    options = ["--messages", "300", "--hot-messages", "20", "--sessions", "2", "--duration", "0.2"]
    status, out, err = await fleetlm("bench", "replay", *options, "--folder", str(tmp_path), "--json")
    assert status == 0, err
    report = json.loads(out)
    for door in ("shard", "socket"):
        assert report[f"{door}_cold_per_s"] > 0
        assert report[f"{door}_hot_per_s"] > 0
        assert report[f"{door}_cold_shard_mib"]["peak"] >= report[f"{door}_cold_shard_mib"]["before"]
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - a test may block


async def test_bench_boot_writes_kills_and_boots(tmp_path: Path) -> None:
    """A log of the size that was asked for, one figure a boot, nothing left behind."""
    options = ["--mib", "8", "--sessions", "50", "--boots", "1"]
    status, out, err = await fleetlm("bench", "boot", *options, "--folder", str(tmp_path), "--json")
    assert status == 0, err
    report = json.loads(out)
    assert report["log_mib"] >= 8
    assert len(report["samples"]["ready_s"]) == 1
    assert report["ready_s"] > 0
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - a test may block
