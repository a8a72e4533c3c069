"""The simulated disk behaves like the real one where it must, and worse where Linux allows it."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from fleetlm_shard.disk import Disk, OsDisk
from tests.support.faults import Freeze, Op, SimCrash, crash_at, fail_at, quiet_crashes
from tests.support.simdisk import NOTHING_KEPT, Entry, Loss, Page, SimVolume


def stored(disk: Disk, path: str, data: bytes, *, sync: bool = True) -> None:
    """Write a file; its name stays in the cache."""
    file = disk.create(path)
    file.pwrite(data, 0)
    if sync:
        file.sync()
    file.close()


def answers(disk: Disk) -> list[object]:
    """What a disk answers to one long script, errors by type and errno."""
    said: list[object] = []

    def ask(call: object, *arguments: object) -> None:
        try:
            assert callable(call)
            said.append(call(*arguments))
        except OSError as error:
            said.append((type(error).__name__, error.errno))

    disk.mkdir("log")
    disk.mkdir("log")
    file = disk.create("log/a")
    file.pwrite(b"hello", 3)
    ask(disk.exists, "log/a")
    ask(disk.exists, "log/b")
    ask(disk.listdir, "nowhere")
    ask(disk.open, "nowhere")
    ask(disk.link, "log/a", "log/b")
    ask(disk.link, "log/a", "log/b")
    ask(disk.link, "log/none", "log/c")
    ask(disk.link, "log/a", "nowhere/c")
    ask(disk.listdir, "log")
    ask(disk.listdir, "")
    other = disk.open("log/b")
    ask(other.pread, 100, 1)
    ask(other.pread, 2, 100)
    ask(other.pwrite, b"x", 0)
    ask(other.size)
    ask(other.try_lock)
    ask(other.try_lock)
    ask(file.try_lock)
    other.close()
    ask(file.try_lock)
    view = file.view()
    file.pwrite(b"J", 3)
    ask(bytes, view)
    view.release()
    ask(disk.unlink, "log/a")
    ask(disk.unlink, "log/a")
    file.sync()
    ask(disk.sync_folder, "log")
    ask(file.pread, 8, 0)
    file.close()
    ask(disk.create, "log/b")
    empty = disk.create("empty")
    ask(bytes, empty.view())
    empty.close()
    return said


def test_answers_like_the_operating_system(tmp_path: Path) -> None:
    """One script of every operation and refusal gets the same answers from `SimDisk` and `OsDisk`."""
    assert answers(SimVolume().process("p")) == answers(OsDisk(tmp_path))


def test_bytes_need_a_sync_and_names_a_folder_sync() -> None:
    """A power loss takes bytes without fdatasync, and synced bytes whose name was not synced."""
    volume = SimVolume()
    disk = volume.process("p")
    stored(disk, "kept", b"kept")
    disk.sync_folder("")
    stored(disk, "nameless", b"nameless")
    file = disk.open("kept", writable=True)
    file.pwrite(b"lost", 0)
    assert volume.read("kept") == b"lost"
    volume.power_loss(NOTHING_KEPT)
    assert volume.paths() == ["kept"]
    assert volume.read("kept") == b"kept"
    with pytest.raises(SimCrash):
        file.pread(1, 0)


def test_a_removed_name_may_come_back_and_an_unsynced_folder_takes_its_files_along() -> None:
    """Removals need a folder sync too; a folder whose own name is lost loses what is in it."""
    volume = SimVolume()
    disk = volume.process("p")
    stored(disk, "gone", b"1")
    disk.sync_folder("")
    disk.unlink("gone")
    disk.mkdir("log")
    stored(disk, "log/a", b"2")
    disk.sync_folder("log")
    volume.power_loss(NOTHING_KEPT)
    assert volume.paths() == ["gone"]
    assert not volume.process("q").exists("log")


def test_a_power_loss_keeps_any_subset() -> None:
    """Every subset of two pages and a name is among the choices, and each does what it says."""
    volume = SimVolume()
    disk = volume.process("p")
    stored(disk, "a", b"old")
    disk.sync_folder("")
    file = disk.open("a", writable=True)
    file.pwrite(b"n" * 5000, 0)
    disk.unlink("a")
    disk.link("a", "b") if disk.exists("a") else stored(disk, "b", b"")
    units = volume.unsynced()
    assert units == [Page("p#1", 0), Page("p#1", 1), Entry("a", 0), Entry("b", 0)]
    seen: set[tuple[object, ...]] = set()
    for loss in volume.losses(every=True):
        after = volume.copy()
        after.power_loss(loss)
        seen.add(tuple((path, after.read(path)) for path in after.paths()))
    both = b"n" * 5000
    assert (("a", both),) in seen
    assert (("a", b"n" * 4096), ("b", b"")) in seen
    assert (("a", b"old" + bytes(4093) + b"n" * 904),) in seen
    assert (("a", b"old"),) in seen
    assert () in seen
    assert len(list(volume.losses())) < 2 ** len(units) + 12


def test_a_torn_page_keeps_one_end_of_what_changed() -> None:
    """Torn: the head or the tail of the changed bytes is on disk, the rest is as before."""
    volume = SimVolume()
    disk = volume.process("p")
    stored(disk, "a", b"..........")
    disk.sync_folder("")
    disk.open("a", writable=True).pwrite(b"12345678", 1)
    found: set[bytes] = set()
    for loss in volume.losses():
        after = volume.copy()
        after.power_loss(loss)
        found.add(after.read("a"))
    assert found == {b"..........", b".12345678.", b".1234.....", b".....5678."}


def test_a_failed_sync_loses_its_pages_for_good() -> None:
    """After EIO the bytes stay readable, the next sync succeeds, and a power loss takes them all the same."""
    volume = SimVolume()
    disk = volume.process("p")
    volume.hooks.append(fail_at(1, errno.EIO, only={"sync"}))
    file = disk.create("a")
    disk.sync_folder("")
    file.pwrite(b"lost", 0)
    with pytest.raises(OSError, match="Input/output"):
        file.sync()
    file.sync()
    assert volume.read("a") == b"lost"
    assert volume.unsynced() == [Page("p#1", 0)]
    rewritten = volume.copy()
    volume.power_loss(NOTHING_KEPT)
    assert volume.read("a") == b""
    rewritten.process("p").open("a", writable=True).pwrite(b"kept", 0)
    assert rewritten.unsynced() == [Page("p#1", 0)]


def test_a_failed_folder_sync_leaves_names_in_the_cache() -> None:
    """A failed folder sync makes nothing durable; one that works later does."""
    volume = SimVolume()
    disk = volume.process("p")
    volume.hooks.append(fail_at(1, errno.EIO, only={"sync_folder"}))
    stored(disk, "a", b"1")
    with pytest.raises(OSError, match="Input/output"):
        disk.sync_folder("")
    lost = volume.copy()
    lost.power_loss(NOTHING_KEPT)
    assert lost.paths() == []
    disk.sync_folder("")
    volume.power_loss(NOTHING_KEPT)
    assert volume.paths() == ["a"]


def test_a_kill_frees_locks_and_keeps_the_cache() -> None:
    """A killed process loses its locks at once; what it wrote is readable and not durable; it does nothing more."""
    volume = SimVolume()
    elder, younger = volume.process("elder"), volume.process("younger")
    file = elder.create("term")
    assert file.try_lock()
    file.pwrite(b"1", 0)
    probe = younger.open("term")
    assert not probe.try_lock()
    elder.kill()
    assert probe.try_lock()
    assert probe.pread(1, 0) == b"1"
    with pytest.raises(SimCrash):
        file.pwrite(b"2", 0)
    file.close()
    assert volume.processes() == {"younger"}


def test_a_crash_comes_before_the_nth_operation() -> None:
    """`crash_at` stops exactly there, and the process is dead from then on; others go on."""
    volume = SimVolume()
    disk = volume.process("p")
    volume.hooks.append(crash_at(2, process="p", only={"create", "link"}))
    disk.create("a").close()
    with pytest.raises(SimCrash):
        disk.link("a", "b")
    with pytest.raises(SimCrash):
        disk.exists("a")
    assert volume.process("q").listdir("") == ["a"]
    assert [op.name for op in volume.log] == ["create", "close", "link", "listdir"]


def test_a_split_write_can_stop_in_the_middle() -> None:
    """With `split_writes` a crash between the halves leaves the first half in the cache."""
    volume = SimVolume(split_writes=True)
    disk = volume.process("p")
    volume.hooks.append(crash_at(1, only={"pwrite-rest"}))
    file = disk.create("a")
    with pytest.raises(SimCrash):
        file.pwrite(b"123456", 0)
    assert volume.read("a") == b"123"


def test_full_and_read_only_volumes_refuse() -> None:
    """ENOSPC past the capacity (rewriting in place still works), EROFS for every change."""
    volume = SimVolume(capacity_bytes=10)
    disk = volume.process("p")
    file = disk.create("a")
    file.pwrite(b"0123456789", 0)
    assert disk.free_bytes() == 0
    with pytest.raises(OSError, match="No space") as full:
        file.pwrite(b"x", 10)
    assert full.value.errno == errno.ENOSPC
    file.pwrite(b"x", 9)
    volume.read_only = True
    for call in (lambda: disk.create("b"), lambda: disk.link("a", "b"), lambda: disk.open("a", writable=True)):
        with pytest.raises(OSError, match="Read-only"):
            call()
    assert disk.open("a").pread(10, 0) == b"012345678x"


def test_bit_rot_and_truncation_reach_readers_and_survive() -> None:
    """`flip` and `truncate` change cache and platter alike."""
    volume = SimVolume()
    disk = volume.process("p")
    stored(disk, "a", b"abc")
    disk.sync_folder("")
    volume.flip("a", 1, 0x20)
    assert volume.read("a") == b"aBc"
    volume.truncate("a", 2)
    volume.power_loss(NOTHING_KEPT)
    assert volume.read("a") == b"aB"


def test_a_frozen_process_holds_still_until_it_is_thawed() -> None:
    """`Freeze` stops a thread before its nth operation; others run; after `thaw` it goes on where it was."""
    volume = SimVolume()
    freeze = Freeze(1, process="elder", only={"link"})
    volume.hooks.append(freeze)

    def elder() -> None:
        disk = volume.process("elder")
        disk.create("a").close()
        disk.link("a", "b")

    thread = threading.Thread(target=elder)
    thread.start()
    assert freeze.frozen.wait(10)
    assert volume.process("younger").listdir("") == ["a"]
    freeze.thaw()
    thread.join(10)
    assert volume.paths() == ["a", "b"]


def test_a_process_killed_while_frozen_never_wakes() -> None:
    """Killed in its freeze, the thread ends by `SimCrash` without having done the operation."""
    volume = SimVolume()
    freeze = Freeze(1, only={"create"})
    volume.hooks.append(freeze)
    with quiet_crashes():
        thread = threading.Thread(target=lambda: volume.process("p").create("a"))
        thread.start()
        assert freeze.frozen.wait(10)
        volume.kill("p")
        freeze.thaw()
        thread.join(10)
    assert volume.paths() == []


def test_equal_states_have_equal_fingerprints_and_copies_part() -> None:
    """Two orders of independent steps give one fingerprint; a copy goes its own way."""
    one, two = SimVolume(), SimVolume()
    for volume, order in ((one, "pq"), (two, "qp")):
        for name in order:
            volume.process(name).create(name)
    assert one.fingerprint() == two.fingerprint()
    twin = one.copy()
    twin.process("p").open("p", writable=True).pwrite(b"1", 0)
    assert twin.fingerprint() != one.fingerprint()
    assert one.read("p") == b""


def test_hooks_see_operations_in_order() -> None:
    """A hook gets number, process, name and path, before the effect."""
    volume = SimVolume()
    seen: list[Op] = []
    volume.hooks.append(seen.append)
    disk = volume.process("p")
    disk.create("a").close()
    disk.link("a", "b")
    assert seen == [Op(1, "p", "create", "a"), Op(2, "p", "close", "a"), Op(3, "p", "link", "b")]


def test_loss_defaults_to_nothing() -> None:
    """The plain power loss keeps only what was synced."""
    assert Loss("x").keep == frozenset()
