"""A shard of a real `up` that left and is dead for good: `fleetlm shards forget`, and the same name comes again."""

from __future__ import annotations

import fcntl
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from fleetlm_common.control import Forgotten, Pin, RingSpec, ShardEndpoint
from fleetlm_common.filecontrol import change_ring, read_status
from fleetlm_common.ids import ShardName, Slot
from fleetlm_common.ring import RingMap, decode
from tests.integration.test_restore import append, replayed
from tests.support.eventually import eventually
from tests.support.fleet import Fleet, fleet
from tests.support.upcommands import fleetlm

NAME = ShardName("shard-2")
SESSIONS = [f"s{number}" for number in range(24)]
"""With so many each of three shards has some."""

pytestmark = pytest.mark.timeout(240)


def want(ring: Path, **changes: object) -> None:
    """What people can ask of the ring's spec."""

    def change(spec: RingSpec) -> RingSpec:
        return msgspec.structs.replace(spec, **changes)

    change_ring(ring / "control", change)


def the_map(ring: Path) -> RingMap:
    return decode((ring / "control" / "map.json").read_bytes())


def volume_of(ring: Path) -> str:
    """The volume that the map binds shard-2 to; "" when it is no member."""
    member = the_map(ring).member(NAME)
    return "" if member is None else member.volume_id


def said(ring: Path) -> str:
    """The controller's sentence."""
    status = read_status(ring / "control")
    return "" if status is None else status.sentence


def forget(ring: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`fleetlm shards forget shard-2`."""
    return fleetlm("shards", "forget", NAME, "--data", str(ring), *arguments)


async def holds(running: Fleet, what: str, condition: Callable[[], bool]) -> None:
    """Wait for something that real processes bring about."""
    try:
        await eventually(condition, what, timeout_s=60)
    except AssertionError as error:
        raise AssertionError(f"{what}\n{said(running.data)}\n{running.printed()}") from error


async def emptied(running: Fleet) -> None:
    """Each session has a message; shard-2 had some of them and gave them to others."""
    for session in SESSIONS:
        assert await append(running, session, "first", key="1") == 1
    assert the_map(running.data).slots_of(NAME)
    want(running.data, cordoned=(NAME,))
    await holds(running, "it owns nothing", lambda: not the_map(running.data).slots_of(NAME))
    await holds(running, "the ring is at rest", lambda: said(running.data).startswith("steady"))


def freeze(running: Fleet, name: str) -> None:
    """While it does not have the control folder's lock, which nobody else could take then."""
    with (running.data / "control" / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running.kill(name, signal.SIGSTOP)


async def all_there(running: Fleet, texts: list[str]) -> None:
    """Whatever became of shards."""
    for session in SESSIONS:
        assert (await replayed(running, session))[:2] == (texts, []), session


async def test_a_shard_without_its_volume_is_forgotten(tmp_path: Path) -> None:
    """Its folder is gone after its slots moved away: what keeps it is said, then the ring goes on, down and up."""
    ring = tmp_path / "ring"
    async with fleet(ring, slots=24) as running:
        await emptied(running)
    volume = volume_of(ring)
    shutil.rmtree(ring / "shard-2")
    async with fleet(ring, slots=24, wait=False) as running:
        await holds(running, "it says what it lacks", lambda: "shard-2 lost its volume" in said(ring))
        wanted = forget(ring, "--volume", volume, "--yes")
        assert (wanted.returncode, "the ring asks for 3 shards" in wanted.stderr) == (1, True), wanted.stderr
        want(ring, cordoned=(), shards=2)
        told = forget(ring)
        assert told.returncode == 0, told.stderr
        assert f"the ring map binds shard-2 to volume {volume}. shard-2 owns no slot" in told.stdout
        assert f"fleetlm shards forget shard-2 --volume {volume}" in told.stdout
        wrong = forget(ring, "--volume", "another", "--yes")
        assert wrong.returncode == 1
        assert f"the ring map binds it to volume {volume}, not to another" in wrong.stderr
        assert b"forgotten" not in (ring / "control" / "spec.json").read_bytes(), "what is refused is not written"
        done = forget(ring, "--volume", volume, "--yes")
        assert done.returncode == 0, done.stderr
        assert "shard-2 is not forgotten: it has 20 s to answer" in done.stdout
        assert done.stdout.endswith(f"the ring has forgotten shard-2 and its volume {volume}\n")
        await holds(running, "steady without it", lambda: said(ring).startswith("steady"))
        await holds(running, "its process ends", lambda: "shard-2 has left the ring" in running.output.read_text())
        again = forget(ring, "--volume", volume, "--yes")
        assert again.returncode == 0, "it is done already"
        await running.wait_up()
        scaled = fleetlm("shards", "scale", "3", "--data", str(ring))
        assert scaled.returncode == 0, scaled.stderr
        assert volume_of(ring) not in {"", volume}
        assert len(the_map(ring).slots_of(NAME)) == 8
        await all_there(running, ["first"])
        for session in SESSIONS:
            assert await append(running, session, "second", key="2") == 2
        await all_there(running, ["first", "second"])


async def test_a_shard_that_thaws_after_it_was_forgotten(tmp_path: Path) -> None:
    """It serves nobody and ends; its volume joins only when people take their word back. One that lives is refused."""
    ring = tmp_path / "ring"
    async with fleet(ring, slots=24) as running:
        await emptied(running)
        volume = volume_of(ring)
        freeze(running, "controller")
        want(ring, cordoned=(), shards=2)
        lives = forget(ring, "--volume", volume, "--yes")
        assert (lives.returncode, "and is ready: it leaves by itself" in lives.stderr) == (1, True), lives.stderr
        freeze(running, NAME)
        want(ring, pins=(Pin(Slot(0), Slot(0), ShardName("shard-1")),), shards=3, cordoned=(NAME,))
        running.kill("controller", signal.SIGCONT)
        await holds(running, "a move that it has not seen", lambda: 0 in the_map(ring).slots_of(ShardName("shard-1")))
        want(ring, shards=2, cordoned=())
        done = forget(ring, "--volume", volume, "--yes")
        assert (done.returncode, volume_of(ring)) == (0, ""), done.stderr
        running.kill(NAME, signal.SIGCONT)
        await holds(
            running, "nobody speaks for it", lambda: not (ring / "control" / "shards" / "shard-2.json").exists()
        )
        assert NAME not in running.names, "it has ended"
        await all_there(running, ["first"])
        assert fleetlm("shards", "scale", "3", "--no-wait", "--data", str(ring)).returncode == 0
        await holds(running, "its volume is known", lambda: "which people had the ring forget" in said(ring))
        endpoint = msgspec.json.decode((ring / "control" / "shards" / "shard-2.json").read_bytes(), type=ShardEndpoint)
        assert (endpoint.volume_id, volume_of(ring)) == (volume, "")
        assert forget(ring, "--volume", volume, "--take-back").returncode == 0
        assert forget(ring, "--volume", volume, "--take-back").returncode == 2, "there is no such word any more"
        want(ring, pins=())
        scaled = fleetlm("shards", "scale", "3", "--data", str(ring))
        assert scaled.returncode == 0, scaled.stderr
        assert volume_of(ring) == volume
        for session in SESSIONS:
            assert await append(running, session, "second", key="2") == 2
        await all_there(running, ["first", "second"])
    assert Forgotten(NAME, volume) not in change_ring(ring / "control", lambda spec: spec).forgotten
