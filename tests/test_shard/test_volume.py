"""The rules of taking a volume, one by one (design §6, "Fence")."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import msgspec
import pytest

from fleetlm_common.ids import ShardName, Term
from fleetlm_shard.disk import OsDisk
from fleetlm_shard.identity import read_identity
from fleetlm_shard.volume import Volume, keep_term, take_volume
from fleetlm_shard.volume_types import (
    HEARTBEAT_BYTES,
    HEARTBEAT_OFFSET,
    Fenced,
    ForeignVolume,
    TermPaper,
    VolumeFailed,
    VolumeUnreadable,
    decode_paper,
    encode_paper,
    highest_term,
)
from tests.support.explore import drive
from tests.support.faults import Hook, SimCrash, crash_at, fail_at
from tests.support.simdisk import SimVolume
from tests.support.volumes import OURS, Events, Time, take


def test_an_empty_volume_is_formatted_durably_and_the_first_term_is_1() -> None:
    """The first boot writes identity, folders and term 1, all durable, and leaves nothing temporary behind."""
    world = SimVolume()
    volume = take(world.process("a"), "a")
    assert (volume.term, volume.ring_uid, volume.shard, volume.volume_id) == (1, "ring-1", "shard-0", "volume-1")
    assert volume.was_empty
    volume.look()
    assert world.paths() == ["identity", "term-0000000001"]
    world.power_loss()
    assert {"identity", "term-0000000001"} <= set(world.paths())
    disk = world.process("b")
    assert disk.exists("log")
    assert disk.exists("aside")
    assert read_identity(disk) == OURS


def test_each_boot_takes_a_larger_term_and_keeps_the_first_volume_id() -> None:
    """After a kill the lock is free: the next boot goes on at once, with the volume's own id and never "empty"."""
    world = SimVolume()
    for term in (1, 2, 3):
        disk = world.process(f"p{term}")
        volume = take(disk, f"p{term}", identity=msgspec.structs.replace(OURS, volume_id=f"volume-{term}"))
        assert (volume.term, volume.volume_id, volume.was_empty) == (term, "volume-1", term == 1)
        disk.kill()


def test_a_term_file_says_who_took_it() -> None:
    """The paper in a term's file names ring, shard, volume, pod and boot, under a checksum, durably."""
    world = SimVolume()
    take(world.process("a"), "a")
    world.power_loss()
    data = world.read("term-0000000001")
    paper = decode_paper(data[: data.index(b"\0")], TermPaper)
    assert paper == TermPaper(
        term=Term(1), ring_uid="ring-1", shard=ShardName("shard-0"), volume_id="volume-1", pod_uid="pod-a", boot_id="a"
    )


@pytest.mark.parametrize("field", ["ring_uid", "shard"])
def test_a_foreign_volume_is_refused_with_both_names_and_left_as_it_is(field: str) -> None:
    """Another ring's or shard's volume: the error names field, found and wanted; not one byte or name is changed."""
    world = SimVolume()
    take(world.process("a"), "a")
    world.kill("a")
    before = world.stored_fingerprint()
    with pytest.raises(
        ForeignVolume, match=f"volume-1 belongs to {field} '.*', this process is of {field} 'other'"
    ) as e:
        take(world.process("b"), "b", identity=msgspec.structs.replace(OURS, **{field: "other"}))
    assert (e.value.field, e.value.found, e.value.wanted) == (field, getattr(OURS, field), "other")
    assert world.stored_fingerprint() == before


@pytest.mark.parametrize(
    "path",
    [
        "term-0000000001",
        "map-0000000001-0000000007.json",
        "log/0000000001-0000000001.seg",
        "log/0000000003-0000000001.ckpt",
    ],
)
def test_data_without_identity_is_refused(path: str) -> None:
    """Terms, maps or log files without an identity: somebody lost it; the volume is not formatted over."""
    world = SimVolume()
    disk = world.process("a")
    disk.mkdir("log")
    disk.create(path).close()
    with pytest.raises(VolumeUnreadable, match="but no file 'identity'"):
        take(disk, "a")
    assert world.paths() == [path]


def test_an_identity_without_a_log_folder_is_refused() -> None:
    """The log's folder is durable before the identity is, so its absence means that it was removed."""
    world = SimVolume()
    disk = world.process("a")
    file = disk.create("identity")
    file.pwrite(encode_paper(OURS), 0)
    with pytest.raises(VolumeUnreadable, match="no folder 'log'"):
        take(disk, "a")


def test_lost_and_found_is_no_data() -> None:
    """What a fresh file system brings along, and names of others, do not make a volume unusable."""
    world = SimVolume()
    disk = world.process("a")
    disk.mkdir("lost+found")
    disk.create("README").close()
    assert take(disk, "a").was_empty


def test_any_flipped_byte_of_the_identity_is_noticed() -> None:
    """Every single-byte change and every truncation of the identity refuses the boot."""
    world = SimVolume()
    take(world.process("a"), "a")
    world.kill("a")
    size_bytes = len(world.read("identity"))
    for offset in range(size_bytes):
        for damage in ("flip", "truncate"):
            copy = world.copy()
            copy.flip("identity", offset, 0x04) if damage == "flip" else copy.truncate("identity", offset)
            with pytest.raises(VolumeUnreadable, match="'identity' is"):
                take(copy.process("b"), "b")


def test_a_newer_format_is_refused_by_name() -> None:
    """An identity of a format that this build does not know says so."""
    world = SimVolume()
    disk = world.process("a")
    disk.create("identity").pwrite(encode_paper(msgspec.structs.replace(OURS, format=2)), 0)
    with pytest.raises(VolumeUnreadable, match="of format 2, this build reads 1"):
        take(disk, "a")


def test_a_boot_id_is_checked_before_anything_is_written() -> None:
    """A boot id that is no part of a file name is the programmer's mistake."""
    world = SimVolume()
    with pytest.raises(AssertionError, match="file name"):
        take(world.process("a"), "../a")
    assert world.log == []


def test_the_highest_term_counts_segments_and_maps_too() -> None:
    """Term files gone (by hand): names in the log and of stored maps still hold the number up."""
    assert highest_term(["term-0000000002", "tmp-term-0000000009-x", "leave-0000000008", "term-3"], []) == 2
    assert highest_term(["map-0000000004-0000000011.json"], ["0000000003-0000000001.seg"]) == 4
    assert highest_term([], ["tmp-0000000005-1", "0000000006-0000000001.seg", "0000000007-0000000001.idx"]) == 7
    assert highest_term([], []) == 0
    world = SimVolume()
    disk = world.process("a")
    take(disk, "a")
    disk.create("log/0000000005-0000000001.seg").close()
    disk.kill()
    assert take(world.process("b"), "b").term == 6


def test_a_living_owner_is_asked_to_leave_and_then_followed_at_once() -> None:
    """Lock held: a request is put beside the term; the owner sees it, closes, and the younger takes the next term."""
    world = SimVolume()
    elder = take(world.process("a"), "a")
    assert not elder.asked_to_leave()

    def meanwhile(now_s: float) -> None:
        if elder.asked_to_leave():
            elder.close()

    events, time = Events(), Time(meanwhile)
    younger = take(world.process("b"), "b", time=time, log=events)
    assert younger.term == 2
    assert time.now_s < 1
    assert events.names == ["volume_held"]
    assert not younger.asked_to_leave()
    assert [path for path in world.paths() if path.startswith("leave")] == []


def test_an_owner_that_beats_is_waited_for() -> None:
    """As long as heartbeats come, silence never adds up: a slow drain is not cut short."""
    world = SimVolume()
    elder = take(world.process("a"), "a")

    def meanwhile(now_s: float) -> None:
        if now_s < 100:
            elder.beat()
        else:
            elder.close()

    time = Time(meanwhile)
    take(world.process("b"), "b", time=time)
    assert 100 <= time.now_s < 101


def test_a_silent_owner_is_taken_over_after_exactly_the_set_time() -> None:
    """Lock held and no heartbeat for `takeover_after_s`: go on without; the elder's next look ends it."""
    world = SimVolume()
    elder = take(world.process("a"), "a")
    elder.beat()
    events, time = Events(), Time()
    younger = take(world.process("b"), "b", time=time, log=events)
    assert 10 <= time.now_s < 10.3
    assert events.names == ["volume_held", "volume_taken_from_silent_owner"]
    younger.look()
    with pytest.raises(Fenced) as fenced:
        elder.look()
    assert fenced.value.term == 1


def test_a_half_written_heartbeat_counts_as_life() -> None:
    """A torn heartbeat differs from the one before, and that is all that a waiting process asks."""
    world = SimVolume(split_writes=True)
    elder_disk = world.process("a")
    elder = take(elder_disk, "a")

    def meanwhile(now_s: float) -> None:
        if 5 < now_s < 5.15:
            world.hooks.append(fail_at(1, errno.EIO, only={"pwrite-rest"}))
            elder._beats = 10**15  # the first half of the digits differs
            with pytest.raises(VolumeFailed):
                elder.beat()

    time = Time(meanwhile)
    take(world.process("b"), "b", time=time)
    assert 15 <= time.now_s < 15.5


def test_time_in_which_the_taker_itself_stood_still_does_not_count() -> None:
    """A taker that was frozen for an hour between two polls has seen one second of silence, not an hour."""
    world = SimVolume()
    elder = take(world.process("a"), "a")
    polls = 0

    def meanwhile(now_s: float) -> None:
        nonlocal polls
        polls += 1

    take(world.process("b"), "b", time=Time(meanwhile, rate=800.0))
    assert polls == 10
    with pytest.raises(Fenced):
        elder.look()


def test_of_two_takers_one_wins_and_the_other_starts_over() -> None:
    """While b waits for a silent a, c takes term 2: b does not take term 2 again, it waits for c and takes term 3."""
    world = SimVolume()
    take(world.process("a"), "a")
    other: list[Volume] = []

    def meanwhile(now_s: float) -> None:
        if not other:
            world.kill("a")
            other.append(take(world.process("c"), "c"))
        elif now_s > 3:
            other[0].close()

    assert take(world.process("b"), "b", time=Time(meanwhile)).term == 3
    assert other[0].term == 2


def test_a_waiting_taker_sees_at_once_that_another_took_over() -> None:
    """While b waits for a frozen a (lock held), c has waited longer and takes over: b turns to c within a poll."""
    world = SimVolume()
    take(world.process("a"), "a")
    other: list[Volume] = []

    def meanwhile(now_s: float) -> None:
        if not other:
            other.append(take(world.process("c"), "c", takeover_after_s=0.1))
        elif other[0].asked_to_leave():
            other[0].close()

    time = Time(meanwhile)
    assert take(world.process("b"), "b", time=time).term == 3
    assert time.now_s < 1


def test_link_settles_a_race_at_the_last_step() -> None:
    """Another takes term 1 just before b's link: b gets EEXIST, starts over, and that file is untouched."""
    world = SimVolume()
    other: list[Volume] = []
    events = Events()

    def overtake(op: object) -> None:
        if not other and getattr(op, "name", "") == "link" and "term-" in getattr(op, "path", ""):
            other.append(take_later())

    def take_later() -> Volume:
        world.hooks.clear()
        volume = take(world.process("c"), "c")
        volume.close()
        return volume

    world.hooks.append(overtake)
    mine = take(world.process("b"), "b", log=events)
    assert (other[0].term, mine.term) == (1, 2)
    assert events.names == ["term_lost_race"]
    assert b'"boot_id":"c"' in world.read("term-0000000001")
    assert world.paths() == ["identity", "term-0000000001", "term-0000000002"]


def test_nothing_is_renamed_and_no_term_file_is_removed_or_written_by_others() -> None:
    """Over five boots, one of them by takeover: each term file is written by its owner only, and all are there."""
    world = SimVolume()
    for number in range(1, 6):
        volume = take(world.process(f"p{number}"), f"p{number}")
        volume.beat()
        if number != 3:
            world.kill(f"p{number}")
    terms = [f"term-{number:010d}" for number in range(1, 6)]
    assert world.paths() == ["identity", *terms]
    removed = {op.path for op in world.log if op.name == "unlink"}
    assert not removed & set(terms)
    for number, path in enumerate(terms, 1):
        assert {op.process for op in world.log if op.name == "pwrite" and path in op.path} == {f"p{number}"}


def test_the_heartbeat_is_rewritten_in_place_and_synced() -> None:
    """A thousand beats leave the file as long as it was; the newest is durable; the paper before it is untouched."""
    world = SimVolume()
    volume = take(world.process("a"), "a")
    before = world.read("term-0000000001")
    for _ in range(1000):
        volume.beat()
    after = world.read_durable("term-0000000001")
    assert len(after) == len(before) == HEARTBEAT_OFFSET + HEARTBEAT_BYTES
    assert after[:HEARTBEAT_OFFSET] == before[:HEARTBEAT_OFFSET]
    assert int(after[HEARTBEAT_OFFSET:]) == 1000


def test_a_look_is_one_stat() -> None:
    """The look on the append path costs one operation, whatever else lies on the volume."""
    world = SimVolume()
    volume = take(world.process("a"), "a")
    done = len(world.log)
    volume.look()
    assert [(op.name, op.path) for op in world.log[done:]] == [("exists", "term-0000000002")]


@pytest.mark.parametrize("method", ["look", "beat", "asked_to_leave"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EROFS])
def test_an_error_of_look_heartbeat_or_request_ends_the_process(method: str, code: int) -> None:
    """A look that cannot look must not say "mine": the error is raised, with the disk's own as its cause."""
    world = SimVolume()
    volume = take(world.process("a"), "a")
    world.hooks.append(fail_at(1, code))
    with pytest.raises(VolumeFailed) as failed:
        getattr(volume, method)()
    assert isinstance(failed.value.__cause__, OSError)
    assert failed.value.__cause__.errno == code


def test_a_heartbeat_whose_sync_fails_is_an_error() -> None:
    """An idle shard learns by its heartbeat that the disk is gone."""
    world = SimVolume()
    volume = take(world.process("a"), "a")
    world.hooks.append(fail_at(1, errno.EIO, only={"sync"}))
    with pytest.raises(VolumeFailed, match="heartbeat"):
        volume.beat()


def test_a_read_only_or_full_volume_says_so() -> None:
    """EROFS and ENOSPC while taking the volume are `VolumeFailed`, in the system's words."""
    world = SimVolume()
    world.read_only = True
    with pytest.raises(VolumeFailed, match="Read-only"):
        take(world.process("a"), "a")
    with pytest.raises(VolumeFailed, match="No space"):
        take(SimVolume(capacity_bytes=100).process("a"), "a")


def test_close_frees_the_lock_and_ends_the_heartbeat() -> None:
    """After `close` the next process goes on at once; a late heartbeat writes nowhere."""
    world = SimVolume()
    elder = take(world.process("a"), "a")
    elder.close()
    elder.close()
    with pytest.raises(VolumeFailed, match="closed"):
        elder.beat()
    time = Time()
    take(world.process("b"), "b", time=time)
    assert time.now_s == 0


def test_leftovers_of_dead_takers_are_cleared_and_those_of_later_ones_are_not() -> None:
    """Temporary names and requests up to this term go; a request to this very term and a later taker's name stay."""
    world = SimVolume()
    take(world.process("a"), "a")
    world.kill("a")
    disk = world.process("x")
    stale = ["tmp-identity-x", "tmp-term-0000000002-x", "tmp-map-0000000001-0000000004", "leave-0000000001"]
    kept = ["leave-0000000002", "tmp-term-0000000003-y", "tmp-map-0000000003-0000000004", "tmp-other"]
    for name in stale + kept:
        disk.create(name).close()
    volume = take(world.process("b"), "b")
    assert volume.term == 2
    assert [name for name in world.paths() if name.startswith(("tmp", "leave"))] == sorted(kept)
    assert volume.asked_to_leave()


def test_a_power_loss_after_each_operation_of_the_first_boot_leaves_a_bootable_volume() -> None:
    """Whatever the loss keeps at whatever step, the next boot works, with a larger term if one was taken."""
    steps = SimVolume()
    take(steps.process("a"), "a")
    for number in range(1, len(steps.log) + 1):
        world = SimVolume()
        world.hooks.append(crash_at(number))
        with pytest.raises(SimCrash):
            take(world.process("a"), "a")
        for loss in world.losses(every=len(world.unsynced()) <= 5):
            after = world.copy()
            after.power_loss(loss)
            assert take(after.process("b"), "b").term in {1, 2}, (number, loss)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_an_error_at_each_operation_of_a_boot_harms_nothing(code: int) -> None:
    """Each operation of a boot fails once: `VolumeFailed`, its end frees the lock, the next boot works."""

    def hook(number: int) -> Hook:
        return fail_at(number, code, process="a")

    steps = SimVolume()
    take(steps.process("a"), "a")
    for number in range(1, len(steps.log) + 1):
        world = SimVolume()
        world.hooks.append(hook(number))
        with pytest.raises(VolumeFailed):
            take(world.process("a"), "a")
        world.kill("a")
        time = Time()
        take(world.process("b"), "b", time=time)
        assert time.now_s == 0


async def test_keep_term_beats_until_it_is_asked() -> None:
    """Each second: look, heartbeat, requests; a request ends it without an error."""
    world = SimVolume()
    volume = take(world.process("a"), "a")
    rounds = 0

    async def sleep(seconds: float) -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 3:
            world.process("b").create("leave-0000000001").close()

    await keep_term(volume, sleep=sleep)
    assert rounds == 3
    assert int(world.read("term-0000000001")[HEARTBEAT_OFFSET:]) == 4


async def test_keep_term_raises_when_fenced_and_when_the_disk_fails() -> None:
    """A younger term ends an idle owner within a second, an error too; no heartbeat follows a failed look."""
    world = SimVolume()
    volume = take(world.process("a"), "a")
    world.hooks.append(fail_at(1, errno.EIO, only={"exists"}))
    with pytest.raises(VolumeFailed):
        await keep_term(volume, sleep=asyncio.sleep)
    world.process("b").create("term-0000000002").close()
    with pytest.raises(Fenced):
        await keep_term(volume, sleep=asyncio.sleep)
    assert int(world.read("term-0000000001")[HEARTBEAT_OFFSET:]) == 0


def test_a_cancelled_taker_leaves_no_lock_behind() -> None:
    """Cancelled while it waits, a taker holds nothing: the owner's death lets the next one in at once."""
    world = SimVolume()
    take(world.process("a"), "a")

    async def cancelled(seconds: float) -> None:
        raise asyncio.CancelledError

    time = Time()
    taker = take_volume(world.process("b"), identity=OURS, pod_uid="b", boot_id="b", clock=time, sleep=cancelled)
    with pytest.raises(asyncio.CancelledError):
        drive(taker)
    world.kill("a")
    assert take(world.process("c"), "c").term == 2


def test_the_same_on_a_real_folder(tmp_path: Path) -> None:
    """Identity, terms, takeover and fence with real files and locks."""
    elder = take(OsDisk(tmp_path), "a")
    elder.beat()
    younger = take(OsDisk(tmp_path), "b", takeover_after_s=1.0)
    assert (elder.term, younger.term) == (1, 2)
    assert elder.asked_to_leave() is False, "requests to elder terms are cleared by the younger owner"
    younger.look()
    with pytest.raises(Fenced):
        elder.look()
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "aside": 0o700,
        "identity": 0o600,
        "log": 0o700,
        "term-0000000001": 0o600,
        "term-0000000002": 0o600,
    }
    elder.close()
    younger.close()
