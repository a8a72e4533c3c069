"""The control plane over files: compare-and-swap, crashes between steps, watchers that never go back."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from fleetlm_common import filecontrol
from fleetlm_common.control import (
    ControlPlane,
    ControlPlaneUnavailable,
    MapConflict,
    Pin,
    RingSpec,
    View,
)
from fleetlm_common.filecontrol import FileControlPlane, change_ring, create_ring, forget_shard, read_status
from fleetlm_common.ids import Epoch, ShardName, Slot
from fleetlm_common.ring import encode
from tests.support.memorycontrol import MemoryControlPlane
from tests.support.planecontract import NAMES, SPEC, PlaneContract, endpoint, following, ring_map

SWAPPER = """
import asyncio, sys
from pathlib import Path
from tests.test_common.test_filecontrol import swap_again_and_again
asyncio.run(swap_again_and_again(Path(sys.argv[1]), times=int(sys.argv[2])))
"""


async def swap_again_and_again(folder: Path, *, times: int) -> None:
    """Make `times` maps (0: until killed), against everybody else; says each on standard output once it is made."""
    control = FileControlPlane(folder)
    made = 0
    while made < times or times == 0:
        current = (await control.read()).map
        expected = None if current is None else current.epoch
        try:
            await control.compare_and_swap(expected=expected, new=ring_map((expected or 0) + 1))
        except MapConflict:
            continue
        made += 1
        sys.stdout.write(f"{(expected or 0) + 1}\n")
        sys.stdout.flush()


def swapper(folder: Path, *, times: int) -> subprocess.Popen[str]:
    """`swap_again_and_again` in a process of its own."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", SWAPPER, str(folder), str(times)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root)


async def silent(views: asyncio.Task[View], looks: int = 5) -> bool:
    """Whether a watch shows nothing for some looks."""
    done, _ = await asyncio.wait({views}, timeout=looks * 0.01)
    return not done


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A ring without a map."""
    create_ring(tmp_path / "control", SPEC)
    return tmp_path / "control"


@pytest.fixture
def plane(folder: Path) -> FileControlPlane:
    return FileControlPlane(folder, poll_interval_s=0.01)


class TestContract(PlaneContract):
    """What holds of every control plane holds of files, and of the one in memory that other tests use."""

    @pytest.fixture(params=["files", "memory"])
    def plane(self, request: pytest.FixtureRequest, folder: Path) -> ControlPlane:
        return FileControlPlane(folder, poll_interval_s=0.01) if request.param == "files" else MemoryControlPlane(SPEC)


async def test_an_elder_does_not_overwrite_an_announcement(folder: Path) -> None:
    """The rule holds in the file, not only in the memory of those who read both."""
    await FileControlPlane(folder).announce(endpoint(2))
    await FileControlPlane(folder).announce(endpoint(1, port=99))
    assert (await FileControlPlane(folder).read()).shards == {NAMES[0]: endpoint(2)}


def test_racing_controllers_lose_no_swap(folder: Path) -> None:
    """Six processes make 20 maps each: every epoch is made by exactly one of them."""
    racers = [swapper(folder, times=20) for _ in range(6)]
    made = [int(line) for racer in racers for line in racer.communicate(timeout=60)[0].split()]
    assert [racer.returncode for racer in racers] == [0] * 6
    assert sorted(made) == list(range(1, 121))
    assert asyncio.run(FileControlPlane(folder).read()).map == ring_map(120)


def test_a_killed_writer_leaves_a_whole_map(folder: Path) -> None:
    """SIGKILL at any step of a swap: the map is the last that was acknowledged or the one after it."""
    entropy = random.Random(3)
    for _ in range(12):
        with swapper(folder, times=0) as writer:
            assert writer.stdout is not None
            acknowledged = int(writer.stdout.readline())
            deadline_s = time.monotonic() + entropy.uniform(0, 0.05)
            while time.monotonic() < deadline_s:
                acknowledged = int(writer.stdout.readline())
            writer.kill()
            # Not `communicate`: with a timeout it reads past what this stream has already taken from the pipe.
            rest = writer.stdout.read().split()
        acknowledged = int(rest[-1]) if rest else acknowledged
        found = asyncio.run(FileControlPlane(folder).read()).map
        assert found is not None
        assert found == ring_map(found.epoch)
        assert found.epoch in {acknowledged, acknowledged + 1}


async def test_what_a_crash_left_half_written_is_not_read(folder: Path, plane: FileControlPlane) -> None:
    """A crash before the rename leaves a temporary file: readers do not see it, writers replace it."""
    await plane.compare_and_swap(expected=None, new=ring_map(1))
    (folder / "map.json.tmp").write_bytes(encode(ring_map(2))[:40])
    (folder / "shards" / "shard-0.json.tmp").write_bytes(b"{")
    assert await plane.read() == View(SPEC, ring_map(1), {})
    await plane.compare_and_swap(expected=Epoch(1), new=ring_map(2))
    await plane.announce(endpoint(1))
    assert await plane.read() == View(SPEC, ring_map(2), {NAMES[0]: endpoint(1)})


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def no_text(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"shard-0", b"shard\xff0"))


def huge(path: Path) -> None:
    path.write_bytes(b" " * (filecontrol.FILE_BYTES_MAX + 1))


def gone(path: Path) -> None:
    path.unlink()


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def older(path: Path) -> None:
    path.write_bytes(encode(ring_map(1)))


def another_of_the_same_epoch(path: Path) -> None:
    path.write_bytes(encode(msgspec.structs.replace(ring_map(3), epoch=Epoch(2))))


def of_another_ring(path: Path) -> None:
    path.write_bytes(encode(ring_map(3, uid="other")))


def of_other_slots(path: Path) -> None:
    path.write_bytes(encode(ring_map(3, slots=9)))


DAMAGES = [truncated, emptied, zeroed, huge, gone, a_folder]


@pytest.mark.parametrize(
    "damage", [*DAMAGES, older, another_of_the_same_epoch, of_another_ring, of_other_slots], ids=lambda it: it.__name__
)
async def test_a_watcher_keeps_the_last_good_map(
    folder: Path, plane: FileControlPlane, damage: Callable[[Path], None]
) -> None:
    """Whatever becomes of the map file: a watcher neither raises nor goes back, a live read is refused."""
    await plane.compare_and_swap(expected=None, new=ring_map(1))
    await plane.compare_and_swap(expected=Epoch(1), new=ring_map(2))
    views = plane.watch()
    assert (await following(views)).map == ring_map(2)
    damage(folder / "map.json")
    later = asyncio.ensure_future(anext(views))
    assert await silent(later)
    with pytest.raises(ControlPlaneUnavailable, match=re.escape(str(folder))):
        await plane.read()
    if (folder / "map.json").is_dir():
        (folder / "map.json").rmdir()
    (folder / "map.json").write_bytes(encode(ring_map(3)))
    assert (await asyncio.wait_for(later, 10)).map == ring_map(3)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda it: it.__name__)
async def test_a_watcher_keeps_the_last_good_spec(
    folder: Path, plane: FileControlPlane, damage: Callable[[Path], None]
) -> None:
    """A ring whose spec cannot be read has no news and no live view."""
    views = plane.watch()
    assert (await following(views)).spec == SPEC
    damage(folder / "spec.json")
    later = asyncio.ensure_future(anext(views))
    assert await silent(later)
    with pytest.raises(ControlPlaneUnavailable):
        await plane.read()
    later.cancel()


@pytest.mark.parametrize("damage", [*DAMAGES, no_text], ids=lambda it: it.__name__)
async def test_a_damaged_announcement_hides_no_other(
    folder: Path, plane: FileControlPlane, damage: Callable[[Path], None]
) -> None:
    """One shard's file is that shard's matter: the map and the others are still news, its last good word stays."""
    await plane.announce(endpoint(1))
    await plane.read()
    damage(folder / "shards" / "shard-0.json")
    other = msgspec.structs.replace(endpoint(1), name=NAMES[1])
    await plane.announce(other)
    await plane.compare_and_swap(expected=None, new=ring_map(1))
    assert await plane.read() == View(SPEC, ring_map(1), {NAMES[0]: endpoint(1), NAMES[1]: other})


@pytest.mark.parametrize("damage", [truncated, emptied, zeroed, huge, a_folder], ids=lambda it: it.__name__)
async def test_a_damaged_map_is_not_taken_for_none(
    folder: Path, plane: FileControlPlane, damage: Callable[[Path], None]
) -> None:
    """A controller that has just started sees damage as damage: it makes no first map over it, and reads none."""
    await plane.compare_and_swap(expected=None, new=ring_map(1))
    damage(folder / "map.json")
    fresh = FileControlPlane(folder)
    with pytest.raises(ControlPlaneUnavailable):
        await fresh.read()
    with pytest.raises(ControlPlaneUnavailable):
        await fresh.compare_and_swap(expected=None, new=ring_map(1))
    later = asyncio.ensure_future(anext(FileControlPlane(folder, poll_interval_s=0.01).watch()))
    assert await silent(later)
    later.cancel()


async def test_a_map_is_durable_before_it_is_shown(plane: FileControlPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename is visible before it is durable: a reader that meets a new map syncs the folder first."""
    await FileControlPlane(plane.folder).compare_and_swap(expected=None, new=ring_map(1))
    synced: list[Path] = []
    monkeypatch.setattr(filecontrol, "_sync_folder", synced.append)
    assert (await plane.read()).map == ring_map(1)
    assert synced == [plane.folder]
    await plane.read()
    assert synced == [plane.folder]


async def test_a_frozen_holder_of_the_lock_freezes_nobody(folder: Path, plane: FileControlPlane) -> None:
    """A change gives up in bounded time; looks need no lock."""
    with (folder / "lock").open("ab") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(ControlPlaneUnavailable, match="the lock was held"):
            await plane.compare_and_swap(expected=None, new=ring_map(1))
        assert (await plane.read()).map is None
    await plane.compare_and_swap(expected=None, new=ring_map(1))


def test_files_belong_to_their_owner_only(tmp_path: Path) -> None:
    """Files are 0600 in folders 0700, whatever the umask."""
    folder = tmp_path / "control"

    async def write_each_file() -> None:
        plane = FileControlPlane(folder)
        await plane.compare_and_swap(expected=None, new=ring_map(1))
        await plane.announce(endpoint(1))
        await plane.report("did this")

    old = os.umask(0)
    try:
        create_ring(folder, SPEC)
        asyncio.run(write_each_file())
    finally:
        os.umask(old)
    for path in [folder, *folder.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


async def test_the_sentence_is_left_where_people_look(folder: Path, plane: FileControlPlane) -> None:
    """`status.json` has the newest sentence with its time; one that cannot be read is none."""
    assert read_status(folder) is None
    await plane.report("did this")
    await plane.report("did that")
    status = read_status(folder)
    assert status is not None
    assert status.sentence == "did that"
    assert re.fullmatch(r"\d{4}-.*Z", status.at)
    truncated(folder / "status.json")
    assert read_status(folder) is None


def test_a_ring_is_created_once(tmp_path: Path) -> None:
    """Whoever comes later gets the ring that is there; a damaged spec is not replaced."""
    assert create_ring(tmp_path / "control", SPEC) == SPEC
    assert create_ring(tmp_path / "control", RingSpec("ring-2", 16, 4)) == SPEC
    truncated(tmp_path / "control" / "spec.json")
    with pytest.raises(ControlPlaneUnavailable, match=r"spec\.json is damaged"):
        create_ring(tmp_path / "control", SPEC)


def test_a_ring_needs_a_folder_that_can_be_written(tmp_path: Path) -> None:
    """The refusal names the folder."""
    (tmp_path / "file").touch()
    with pytest.raises(ControlPlaneUnavailable, match=r"file/control: Not a directory"):
        create_ring(tmp_path / "file" / "control", SPEC)


@pytest.mark.parametrize("name", ["", "../x", "Shard", "a/b", ".", "shard-", "x" * 64])
async def test_a_shards_name_is_no_path(plane: FileControlPlane, name: str) -> None:
    """A name that could leave the folder, or that no pod could have, is refused."""
    with pytest.raises(ValueError, match="not a shard's name"):
        await plane.announce(msgspec.structs.replace(endpoint(1), name=ShardName(name)))


async def test_a_control_plane_in_memory_can_be_away() -> None:
    """While it is away everything raises and watchers are silent; afterwards they see what is new."""
    memory = MemoryControlPlane(SPEC)
    views = memory.watch()
    await following(views)
    memory.away = True
    later = asyncio.ensure_future(anext(views))
    memory.set_spec(msgspec.structs.replace(SPEC, shards=3))
    assert await silent(later)
    with pytest.raises(ControlPlaneUnavailable):
        await memory.read()
    memory.away = False
    assert (await asyncio.wait_for(later, 10)).spec.shards == 3


def test_a_process_stopped_in_the_middle_continues_harmlessly(folder: Path) -> None:
    """SIGSTOP for some swaps of another process, then SIGCONT: still no epoch is made twice.

    The frozen one may hold the lock: then the other is refused in bounded time, and has made none.
    """
    frozen = swapper(folder, times=30)
    assert frozen.stdout is not None
    first = frozen.stdout.readline()
    frozen.send_signal(signal.SIGSTOP)
    try:
        other = swapper(folder, times=3)
        made = other.communicate(timeout=60)[0].split()
    finally:
        frozen.send_signal(signal.SIGCONT)
    made += [first.strip(), *frozen.communicate(timeout=60)[0].split()]
    assert sorted(map(int, made)) == list(range(1, len(made) + 1))


def test_what_people_ask_for_can_change(folder: Path) -> None:
    """Another number of shards, a pin: seen by the next look; what a ring is for life stays."""
    pinned = msgspec.structs.replace(SPEC, shards=SPEC.shards + 2, pins=(Pin(Slot(1), Slot(2), NAMES[0]),))
    assert change_ring(folder, lambda _: pinned) == pinned
    assert asyncio.run(FileControlPlane(folder).read()).spec == pinned
    with pytest.raises(ValueError, match="for life"):
        change_ring(folder, lambda spec: msgspec.structs.replace(spec, slots=spec.slots + 1))
    with pytest.raises(ControlPlaneUnavailable, match="there is no"):
        change_ring(folder.parent, lambda spec: spec)
    assert create_ring(folder, SPEC) == pinned


async def test_changes_of_the_spec_do_not_lose_each_other(folder: Path) -> None:
    """Two who each add something read under the lock what the other wrote."""

    def pin(number: int) -> None:
        one = Pin(Slot(number), Slot(number), NAMES[0])
        change_ring(folder, lambda spec: msgspec.structs.replace(spec, pins=(*spec.pins, one)))

    await asyncio.gather(*(asyncio.to_thread(pin, number) for number in range(6)))
    found = await FileControlPlane(folder).read()
    assert sorted(one.first for one in found.spec.pins) == list(range(6))


async def test_what_a_shard_announced_can_be_taken_back(folder: Path, plane: FileControlPlane) -> None:
    """Its volume may be another one when it comes again; a member's announcement stays, whoever asks."""
    await plane.announce(endpoint(1))
    await plane.announce(msgspec.structs.replace(endpoint(1), name=ShardName("shard-5")))
    assert (await plane.read()).shards.keys() == {NAMES[0], "shard-5"}
    await plane.compare_and_swap(expected=None, new=ring_map(1))
    assert forget_shard(folder, ShardName("shard-5"))
    assert not forget_shard(folder, NAMES[0])
    assert forget_shard(folder, ShardName("shard-9"))
    assert (await plane.read()).shards.keys() == {NAMES[0]}
    (folder / "shards" / "shard-0.json").unlink()
    assert (await plane.read()).shards.keys() == {NAMES[0]}, "a member that is known is not forgotten"
