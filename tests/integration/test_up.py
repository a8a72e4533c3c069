"""`fleetlm up` for real: it comes up, survives the death of any child, ends in order, and leaves nobody behind."""

from __future__ import annotations

import asyncio
import shutil
import signal
import socket
import stat
import subprocess
from collections.abc import Generator
from pathlib import Path

import aiohttp
import msgspec
import psutil
import pytest

from fleetlm_cli import upfile
from fleetlm_common.control import RingSpec
from fleetlm_common.filecontrol import create_ring
from tests.support.eventually import eventually
from tests.support.fleet import Fleet, descendants, fleet
from tests.support.upcommands import append, fleetlm


async def contents(running: Fleet) -> list[str]:
    """What the session holds, over REST."""
    async with (
        aiohttp.ClientSession(headers={"X-Participant-Id": "alice"}) as http,
        http.get(f"{running.url}/v1/sessions/demo/messages?after=0") as answer,
    ):
        assert answer.status == 200, await answer.text()
        return [message["content"] for message in (await answer.json())["messages"]]


def addresses(running: Fleet) -> dict[str, tuple[str | None, str | None]]:
    """Where each process listens."""
    return {process.name: (process.url, process.ops_url) for process in running.up.processes}


async def test_a_ring_survives_the_death_of_any_child_and_of_all(tmp_path: Path) -> None:
    """Each child killed: another pid at the same address; `up` ended and started again: the same addresses and data."""
    async with fleet(tmp_path / "ring") as running:
        assert running.names == ["gateway-0", "shard-0", "shard-1", "shard-2", "controller"]
        assert "FleetLM is ready: 3 shards, 1 gateway" in running.printed()
        assert await append(running, "first") == 1
        before = addresses(running)
        for name in running.names:
            old = running.kill(name)
            await running.wait_ready(name)
            assert running.pid(name) != old
        assert addresses(running) == before
        await running.wait_ready()
        assert await append(running, "second") == 2
        children = descendants(running.process.pid)
        assert len(children) == 5
        assert await running.stop() == 0
        assert not any(child.is_running() for child in children)
        assert upfile.read(running.data) is None
    async with fleet(tmp_path / "ring") as running:
        assert addresses(running) == before
        assert await contents(running) == ["first", "second"]


async def test_no_process_outlives_a_killed_up(tmp_path: Path) -> None:
    """SIGKILL: the kernel ends the children; the next `up` on the folder waits for that and comes up at once."""
    async with fleet(tmp_path / "ring", shards=1) as running:
        children = descendants(running.process.pid)
        running.process.kill()
        await running.process.wait()
        _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=5)
        assert len(children) == 3
        assert not alive
        assert upfile.read(running.data) is not None
        looked = fleetlm("ring", "--data", str(running.data))
        assert looked.returncode == 0
        assert "NoAnswer" in looked.stdout
        assert fleetlm("tail", "demo", "--no-follow", "--data", str(running.data)).returncode == 3
    async with fleet(tmp_path / "ring", shards=1) as running:
        await append(running, "still here")


async def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    """Status 130 and nobody left, although a child would not have ended."""
    async with fleet(tmp_path / "ring", shards=1) as running:
        children = descendants(running.process.pid)
        running.kill("gateway-0", signal.SIGSTOP)
        running.process.send_signal(signal.SIGINT)
        await eventually(lambda: "stopping:" in running.printed(), "up heard the first", timeout_s=20)
        assert await running.stop(signal.SIGINT) == 130
        _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=5)
        assert not alive


async def test_commands_see_and_restart_what_runs(tmp_path: Path) -> None:
    """`ring` shows every slot's owner; `shards restart` gives each shard a new process and a later term, one by one."""
    async with fleet(tmp_path / "ring", shards=2, slots=16, gateways=2) as running:
        data = str(running.data)
        shown = msgspec.json.decode(fleetlm("ring", "--data", data, "--json").stdout)
        assert [(row["name"], row["ranges"], row["ready"], row["term"]) for row in shown["shards"]] == [
            ("shard-0", [[0, 7, 1]], True, 1),
            ("shard-1", [[8, 15, 1]], True, 1),
        ]
        assert "8–15 (1)" in fleetlm("ring", "--data", data).stdout
        old = {name: running.pid(name) for name in running.names}
        restarted = fleetlm("shards", "restart", "--data", data, "--json")
        assert [msgspec.json.decode(line)["name"] for line in restarted.stdout.splitlines()] == ["shard-0", "shard-1"]
        changed = {name for name in running.names if running.pid(name) != old[name]}
        assert changed == {"shard-0", "shard-1"}
        shown = msgspec.json.decode(fleetlm("ring", "--data", data, "--json").stdout)
        assert [row["term"] for row in shown["shards"]] == [2, 2]
        wrong = fleetlm("shards", "restart", "shard-7", "--data", data)
        assert (wrong.returncode, wrong.stderr) == (
            2,
            "fleetlm: there is no shard 'shard-7'; there are shard-0, shard-1\n",
        )


async def test_a_second_up_disturbs_nothing(tmp_path: Path) -> None:
    """It is refused by name of the holder's pid, and the first one goes on as if nothing had been."""
    async with fleet(tmp_path / "ring", shards=1) as running:
        before = running.up
        second = fleetlm("up", "--data", str(running.data), "--port", "0")
        assert second.returncode == 1
        assert f"(pid {running.process.pid})" in second.stderr
        assert running.up == before
        await append(running, "undisturbed")


async def test_shards_are_for_new_rings(tmp_path: Path) -> None:
    """Another number does not change a ring that is there: `up` names the command that does, and runs what is there."""
    async with fleet(tmp_path / "ring", shards=1) as running:
        await append(running, "here")
    async with fleet(tmp_path / "ring", shards=2) as running:
        assert "`fleetlm shards scale 2` changes that" in running.printed()
        assert running.names == ["gateway-0", "shard-0", "controller"]
        assert await contents(running) == ["here"]


async def test_a_lost_volume_is_refused_not_replaced(tmp_path: Path) -> None:
    """A shard whose volume is gone does not start afresh: it says so where people look, and the others serve."""
    async with fleet(tmp_path / "ring", shards=2, slots=16):
        pass
    shutil.move(tmp_path / "ring" / "shard-1", tmp_path / "lost")
    async with fleet(tmp_path / "ring", shards=2, slots=16, wait=False) as running:
        said = "shard-1 is not ready: VolumeLost"
        await eventually(lambda: said in running.output.read_text(), said, timeout_s=60)
        shown = msgspec.json.decode(fleetlm("ring", "--data", str(running.data), "--json").stdout)
        assert [(row["reason"], row["slots"]) for row in shown["shards"]] == [("Ready", 8), ("VolumeLost", 8)]
        assert shown["epoch"] == 1
    shutil.rmtree(tmp_path / "ring" / "shard-1")
    shutil.move(tmp_path / "lost", tmp_path / "ring" / "shard-1")
    async with fleet(tmp_path / "ring", shards=2, slots=16) as running:
        await append(running, "all is well")


@pytest.fixture
def taken_port() -> Generator[int]:
    """A port on which somebody else listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_taken_port_is_refused_before_anything_is_made(tmp_path: Path, taken_port: int) -> None:
    """Words with the port and what to do, status 1, and no ring in the folder."""
    refused = fleetlm("up", "--data", str(tmp_path / "ring"), "--port", str(taken_port))
    assert refused.returncode == 1
    assert f"port {taken_port} is taken by another program; choose one with --port" in refused.stderr
    assert not (tmp_path / "ring" / "control").exists()


def test_a_ring_keeps_its_slots(tmp_path: Path) -> None:
    """Another number is refused, status 2, and the ring is as it was."""
    create_ring(tmp_path / "ring" / "control", spec := RingSpec("uid", 16, 1))
    refused = fleetlm("up", "--data", str(tmp_path / "ring"), "--port", "0", "--slots", "32")
    assert refused.returncode == 2
    assert "has 16 slots, and a ring keeps them for life" in refused.stderr
    assert create_ring(tmp_path / "ring" / "control", RingSpec("other", 1, 1)) == spec


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--archive", "yes"), "--archive yes: must be embedded, none, file:/PATH or postgresql://"),
        (("--archive", "file:/no/such"), "--archive: /no/such cannot be read"),
        (("--archive", "postgres://a:secret@localhost/x"), "--archive: a password does not belong into a command line"),
        (("--archive", "postgres://a@localhost/x?password=secret"), "--archive: a password"),
        (("--shard", "3"), "No such option: --shard"),
        (("--shards", "0"), "--shards"),
        (("--slots", "4000"), "--slots"),
        (("--port", "70000"), "--port"),
        (("extra",), "extra"),
    ],
)
def test_what_cannot_be_is_a_usage_error(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    """Status 2, the option by name, nothing made."""
    refused = fleetlm("up", "--data", str(tmp_path / "ring"), *arguments)
    assert refused.returncode == 2
    assert words in refused.stderr
    assert not (tmp_path / "ring").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """A home folder given by mistake: refused, and nothing is added to it."""
    (tmp_path / "letter.txt").write_text("dear")
    refused = fleetlm("up", "--data", str(tmp_path), "--port", "0")
    assert refused.returncode == 2
    assert "holds other files and no FleetLM ring" in refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """The file system's own reason, status 1."""
    (tmp_path / "file").touch()
    refused = fleetlm("up", "--data", str(tmp_path / "file" / "ring"), "--port", "0")
    assert refused.returncode == 1
    assert f"cannot use the folder {tmp_path}/file/ring: Not a directory" in refused.stderr


@pytest.fixture
def read_only(tmp_path: Path) -> Generator[Path]:
    """A file system that is mounted read-only, with an empty ring folder on it."""
    point = tmp_path / "mount"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=0755", "tmpfs", point], check=True)
    try:
        (point / "ring").mkdir()
        subprocess.run(["mount", "-o", "remount,ro", point], check=True)
        yield point / "ring"
    finally:
        subprocess.run(["umount", point], check=True)


@pytest.mark.root
def test_a_read_only_folder_is_named(read_only: Path) -> None:
    """The file system's own reason, status 1, for a folder that is there and one that is not."""
    for folder in (read_only, read_only / "deeper"):
        refused = fleetlm("up", "--data", str(folder), "--port", "0")
        assert refused.returncode == 1
        assert f"cannot use the folder {folder}: Read-only file system" in refused.stderr


def test_a_configuration_that_a_child_refuses_ends_up_at_once(tmp_path: Path) -> None:
    """An unknown variable: the child's own words, status 78, nobody left, `up.json` gone; mended, it comes up."""
    arguments = ("up", "--data", str(tmp_path / "ring"), "--port", "0", "--shards", "1")
    refused = fleetlm(*arguments, env={"FLEETLM_SHARD_FSINK": "always"})
    assert refused.returncode == 78
    assert "shard-0 refuses its configuration" in refused.stderr
    assert "unknown variable FLEETLM_SHARD_FSINK" in refused.stderr
    assert upfile.read(tmp_path / "ring") is None


async def test_everything_belongs_to_its_owner_only(tmp_path: Path) -> None:
    """Files 0600 in folders 0700, and the credential neither on a command line nor in the environment."""
    async with fleet(tmp_path / "ring", shards=1) as running:
        secret = (running.data / "credential").read_text().strip()
        told = [
            word for child in descendants(running.process.pid) for word in (*child.cmdline(), *child.environ().values())
        ]
        assert len(secret) == 64
        assert not any(secret in word for word in told)
        assert secret not in running.printed()
        for path in [running.data, *running.data.rglob("*")]:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
