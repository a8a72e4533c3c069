"""`fleetlm drill` against a real `fleetlm up`; its judge; its command lines to a `kubectl` that writes them down."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from fleetlm_cli.drillload import Saw, judge
from fleetlm_cli.drillring import until
from fleetlm_common.filecontrol import FileControlPlane
from tests.support.fleet import Fleet, fleet

QUICK: Final = ("--quiet", "1", "--sessions", "4", "--yes", "--json")
RING: Final = {
    "metadata": {"generation": 3},
    "spec": {"replicas": 3},
    "status": {
        "conditions": [
            {"type": kind, "status": status, "observedGeneration": 3}
            for kind, status in (("Ready", "True"), ("Progressing", "False"), ("Degraded", "False"))
        ]
    },
}
KUBECTL: Final = """#!{python}
import json, sys
words = sys.argv[1:]
with open({log!r}, "a") as log:
    log.write(" ".join(words) + "\\n")
deleted = sum(" delete pod " in line for line in open({log!r}))
pods = [dict(metadata=dict(name=f"chat-{{kind}}-{{n}}", uid=f"{{kind}}-{{n}}-{{deleted}}"),
             status=dict(conditions=[dict(type="Ready", status="True")]))
        for kind in ("shard", "gateway") if words[-3:][0].endswith("=" + kind) for n in range(2)]
if "get" in words:
    print(json.dumps({{"spec": {{}}}} if "node" in words else {{"items": pods}} if "pods" in words else {ring}))
"""


@pytest.fixture
async def running(tmp_path: Path) -> AsyncGenerator[Fleet]:
    async with fleet(tmp_path / "ring", shards=2) as up:
        yield up


async def start(*arguments: str, env: Mapping[str, str] | None = None) -> asyncio.subprocess.Process:
    """Run `fleetlm drill`."""
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fleetlm_cli.main", "drill", *arguments, env={**os.environ, **(env or {})},
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def drill(*arguments: str, env: Mapping[str, str] | None = None) -> tuple[int | None, str, str]:
    """Run it to its end."""
    process = await start(*arguments, env=env)
    async with asyncio.timeout(110):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


def held(result: tuple[int | None, str, str]) -> dict[str, Any]:
    """The verdict of a drill whose promises held."""
    status, out, err = result
    assert status == 0, f"{out}\n{err}"
    verdict: dict[str, Any] = json.loads(out)
    assert verdict["held"] is True
    assert verdict["broken"] == {"lost": [], "repeated": [], "reordered": [], "errors": []}
    assert min(verdict["quiet"]["appends"], verdict["during"]["appends"]) > 20
    return verdict


@pytest.mark.parametrize("kind", ["shard", "gateway"])
async def test_a_kill_is_made_and_judged(running: Fleet, kind: str) -> None:
    """The process is another one afterwards; nothing acknowledged was lost; too long a stall is status 1."""
    before = running.pid(f"{kind}-0")
    held(await drill(f"kill-{kind}", "--data", str(running.data), *QUICK))
    assert running.pid(f"{kind}-0") != before
    status, out, _ = await drill(f"kill-{kind}", "--data", str(running.data), *QUICK, "--stall-max", "0")
    assert (status, json.loads(out)["held"]) == (1, False)


@pytest.mark.long
@pytest.mark.parametrize("how", ["--in-place", "--handover"])
async def test_a_rolling_restart(running: Fleet, how: str) -> None:
    """Every shard is another process afterwards, and no slot is kept away from one."""
    before = [running.pid("shard-0"), running.pid("shard-1")]
    held(await drill("rolling-restart", how, "--data", str(running.data), *QUICK))
    assert not {running.pid("shard-0"), running.pid("shard-1")} & set(before)
    assert (await FileControlPlane(running.data / "control").read()).spec.cordoned == ()


@pytest.mark.long
async def test_scaling_there_and_back(running: Fleet) -> None:
    """Three shards meanwhile, two afterwards; interrupted, it scales back, says so and gives no verdict."""
    control = FileControlPlane(running.data / "control")
    held(await drill("scale", "3", "--data", str(running.data), *QUICK))
    assert (await control.read()).spec.shards == 2
    process = await start("scale", "3", "--data", str(running.data), *QUICK)

    async def asked() -> bool:
        return (await control.read()).spec.shards == 3

    try:
        await until("three shards are asked for", asked, timeout_s=30)
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(60):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    assert (process.returncode, out) == (130, b""), err
    assert b"scaling back to 2 shards" in err
    assert (await control.read()).spec.shards == 2


async def test_refusals(running: Fleet, tmp_path: Path) -> None:
    """Nobody to ask, nothing to change, no cluster named: status 2, and nothing was done."""
    data, before = ["--data", str(running.data)], running.pid("shard-0")
    for arguments, word in (
        (["kill-shard", *data], "--yes"),
        (["scale", "2", *data, "--yes"], "2 shards already"),
        (["drain-node", "n1", "--yes", "--kubernetes", "a/b"], "--url"),
        (["drain-node", "n1", "--yes"], "--kubernetes"),
        (["kill-shard", "--yes", "--kubernetes", "ab", "--url", running.url], "NAMESPACE/RING"),
        (["rolling-restart", "--handover", "--yes", "--kubernetes", "a/b", "--url", running.url], "by itself"),
    ):
        status, out, err = await drill(*arguments)
        assert (status, out) == (2, ""), err
        assert word in err
    assert (await drill("kill-shard", "--yes", "--data", str(tmp_path)))[0] == 3
    assert running.pid("shard-0") == before


async def test_the_words_to_kubectl(running: Fleet, tmp_path: Path) -> None:
    """A `kubectl` that only writes down what it is told; the workload goes to a real gateway meanwhile."""
    log, stand_in = tmp_path / "words", tmp_path / "bin" / "kubectl"
    stand_in.parent.mkdir()
    stand_in.write_text(KUBECTL.format(python=sys.executable, log=str(log), ring=repr(RING)))
    stand_in.chmod(0o755)
    env = {"PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    there = ("--kubernetes", "talk/chat", "--url", running.url, *QUICK)
    shard = "-n talk delete pod chat-shard-"
    for arguments, expected in (
        (["drain-node", "n1"], [
            "drain n1 --ignore-daemonsets --delete-emptydir-data --timeout=600s", "uncordon n1",
        ]),
        (["scale", "5"], ["-n talk scale shardring chat --replicas=5", "-n talk scale shardring chat --replicas=3"]),
        (["kill-shard"], [f"{shard}0 --grace-period=0 --force"]),
        (["kill-gateway"], ["-n talk delete pod chat-gateway-0 --grace-period=0 --force"]),
        (["rolling-restart"], [f"{shard}0 --wait=false", f"{shard}1 --wait=false"]),
    ):  # fmt: skip
        log.write_text("")
        held(await drill(*arguments, *there, env=env))
        assert [line for line in log.read_text().splitlines() if " get " not in line] == expected


def honest() -> Saw:
    """Three messages, as they should be."""
    return Saw(acked=[(1, 1), (2, 2), (3, 3)], read=[(1, 1), (2, 2), (3, 3)], log=[(1, 1), (2, 2), (3, 3)])


def test_the_judge_notices_lies() -> None:
    """A lost, a repeated, a reordered, a foreign message and an error are each named; the truth is not."""
    assert not judge({"s": honest()}).any
    lost, unread, repeated, reordered, foreign, error = (honest() for _ in range(6))
    lost.log.pop()
    lost.read.pop()
    unread.read.pop(1)
    repeated.log.append((4, 2))
    repeated.read.append((4, 2))
    reordered.log[1:] = reordered.read[1:] = [(2, 3), (3, 2)]
    reordered.acked[1:] = [(2, 3), (3, 2)]
    foreign.read[2] = (3, 7)
    error.errors.append("append 4: FORBIDDEN no")
    assert [len(judge({"s": one}).lost) for one in (lost, unread, repeated, reordered)] == [1, 1, 0, 0]
    assert [len(judge({"s": one}).repeated) for one in (lost, repeated, reordered)] == [0, 2, 0]
    assert [len(judge({"s": one}).reordered) for one in (lost, repeated, reordered)] == [0, 0, 2]
    assert [len(judge({"s": one}).errors) for one in (lost, foreign, error)] == [0, 1, 1]
