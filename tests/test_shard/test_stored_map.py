"""The stored ring map: its epoch never goes back, and who may boot by it."""

from __future__ import annotations

import errno

import pytest

from fleetlm_common.ids import Epoch, ShardName, Slot, Term
from fleetlm_common.ring import Member, RingMap, SlotRange
from fleetlm_shard.stored_map import SPARE_BYTES_MIN, choose_map
from fleetlm_shard.volume_types import (
    ForeignVolume,
    Identity,
    MapPaper,
    MapUnavailable,
    StaleMap,
    StoredMap,
    VolumeFailed,
    encode_paper,
)
from tests.support.faults import SimCrash, crash_at, fail_at
from tests.support.simdisk import SimVolume
from tests.support.volumes import OURS, take


def ring(epoch: int, *, uid: str = "ring-1", volume_id: str = "volume-1") -> RingMap:
    """A ring of one shard."""
    name = ShardName("shard-0")
    return RingMap(
        uid=uid,
        slots=256,
        epoch=Epoch(epoch),
        members=(Member(name, volume_id),),
        ranges=(SlotRange(Slot(0), Slot(255), name, Epoch(1)),),
    )


def stored(epoch: int, *, pod_uid: str = "pod-a") -> StoredMap:
    """As the volume answers."""
    return StoredMap(term=Term(1), epoch=Epoch(epoch), paper=MapPaper(pod_uid=pod_uid, ring=ring(epoch)))


def choose(
    live: RingMap | None, kept: StoredMap | None, *, pod_uid: str = "pod-a", identity: Identity = OURS
) -> RingMap:
    """`choose_map` with this test's defaults."""
    return choose_map(live, kept, identity=identity, pod_uid=pod_uid)


def test_a_live_map_as_new_as_the_stored_one_is_taken() -> None:
    """The control plane's word counts whenever it is not older."""
    assert choose(ring(5), None) == ring(5)
    assert choose(ring(5), stored(5)) == ring(5)
    assert choose(ring(6), stored(5), pod_uid="pod-b") == ring(6)


def test_a_live_map_older_than_the_newest_stored_is_refused() -> None:
    """An epoch never goes back, also not by a control plane that answers with the past."""
    with pytest.raises(StaleMap, match="epoch 4, but epoch 5"):
        choose(ring(4), stored(5))


def test_the_epoch_of_an_unreadable_stored_map_binds_all_the_same() -> None:
    """Bit rot in the file does not take back what its name says."""
    rotten = StoredMap(term=Term(1), epoch=Epoch(5), paper=None)
    with pytest.raises(StaleMap):
        choose(ring(4), rotten)
    assert choose(ring(5), rotten) == ring(5)
    with pytest.raises(MapUnavailable):
        choose(None, rotten)


def test_two_maps_of_one_epoch_are_refused() -> None:
    """An epoch names one map: a control plane restored from a backup is noticed."""
    with pytest.raises(StaleMap, match="restored from a backup"):
        choose(ring(5, volume_id="volume-2"), stored(5))


def test_a_map_of_another_ring_is_refused() -> None:
    """The live map's uid must be the volume's."""
    with pytest.raises(ForeignVolume, match="ring_uid"):
        choose(ring(5, uid="ring-2"), None)


def test_without_an_answer_only_the_same_pod_may_use_the_stored_map() -> None:
    """A container restarted in its pod boots by its own map; another pod, a nameless one, or nothing stored waits."""
    assert choose(None, stored(5)) == ring(5)
    for kept, pod_uid in ((stored(5), "pod-b"), (stored(5, pod_uid=""), ""), (None, "pod-a")):
        with pytest.raises(MapUnavailable):
            choose(None, kept, pod_uid=pod_uid)


def test_a_stored_map_is_durable_and_replaces_elder_ones() -> None:
    """After `store_map` a power loss keeps it; one file is left; storing it again or an older one changes nothing."""
    world = SimVolume()
    volume = take(world.process("a"), "a")
    assert volume.stored_map() is None
    for epoch in (3, 5, 5, 4):
        volume.store_map(ring(epoch))
    assert [path for path in world.paths() if path.startswith("map")] == ["map-0000000001-0000000005.json"]
    world.power_loss()
    younger = take(world.process("b"), "b")
    kept = younger.stored_map()
    assert kept == StoredMap(term=Term(1), epoch=Epoch(5), paper=MapPaper(pod_uid="pod-a", ring=ring(5)))
    younger.store_map(ring(5))
    kept = younger.stored_map()
    assert kept is not None
    assert kept.paper == MapPaper(pod_uid="pod-b", ring=ring(5))
    assert [path for path in world.paths() if path.startswith("map")] == ["map-0000000002-0000000005.json"]
    assert [path for path in world.paths() if "tmp" in path] == ["tmp-map-0000000002-0000000000"]


def test_a_full_disk_takes_every_newer_map() -> None:
    """Without one byte left, again and again, also a longer one; each is whole after a power loss."""
    world = SimVolume()
    volume = take(world.process("a"), "a")
    volume.store_map(ring(1))
    world.capacity_bytes = world.used_bytes()
    for epoch in (2, 3, 4):
        longer = ring(epoch, volume_id="x" * 3_000 * epoch)
        volume.store_map(longer)
        after = world.copy()
        after.power_loss()
        after.capacity_bytes += 1_000_000
        kept = take(after.process("b"), "b").stored_map()
        assert kept is not None
        assert kept.paper == MapPaper(pod_uid="pod-a", ring=longer)


def test_without_room_for_the_next_map_this_one_is_stored() -> None:
    """What could not be kept in reserve is told by the disk when it is needed."""
    world = SimVolume()
    volume = take(world.process("a"), "a")
    world.capacity_bytes = world.used_bytes() + SPARE_BYTES_MIN + 1
    volume.store_map(ring(1))
    kept = volume.stored_map()
    assert kept is not None
    assert kept.epoch == 1
    with pytest.raises(VolumeFailed, match="epoch 2"):
        volume.store_map(ring(2))


def test_an_elder_never_removes_a_youngers_map_nor_hides_its_epoch() -> None:
    """A frozen elder that stores what it had read changes nothing for the younger one."""
    world = SimVolume()
    elder = take(world.process("a"), "a")
    younger = take(world.process("b"), "b")
    younger.store_map(ring(7))
    elder.store_map(ring(6))
    elder.store_map(ring(7))
    kept = younger.stored_map()
    assert kept is not None
    assert (kept.term, kept.epoch) == (2, 7)
    elder.store_map(ring(8))
    kept = younger.stored_map()
    assert kept is not None
    assert (kept.term, kept.epoch) == (1, 8), "a newer map is the truth, whoever saw it"
    assert "map-0000000002-0000000007.json" in world.paths()


def test_the_epoch_holds_through_a_power_loss_at_every_step_of_storing() -> None:
    """Crash before each operation of `store_map`, lose what is not synced: the map is the old or the new one, whole."""
    steps = SimVolume()
    volume = take(steps.process("a"), "a")
    volume.store_map(ring(1))
    first = len(steps.log)
    volume.store_map(ring(2))
    for number in range(1, len(steps.log) - first + 1):
        world = SimVolume()
        volume = take(world.process("a"), "a")
        volume.store_map(ring(1))
        world.hooks.append(crash_at(number))
        with pytest.raises(SimCrash):
            volume.store_map(ring(2))
        for loss in world.losses(every=len(world.unsynced()) <= 6):
            after = world.copy()
            after.power_loss(loss)
            kept = take(after.process("b"), "b").stored_map()
            assert kept is not None, (number, loss)
            assert kept.paper in [MapPaper(pod_uid="pod-a", ring=ring(epoch)) for epoch in (1, 2)], (number, loss)


def test_any_flipped_byte_or_truncation_of_a_stored_map_is_noticed() -> None:
    """A damaged file is no map; only its epoch is still believed."""
    world = SimVolume()
    volume = take(world.process("a"), "a")
    volume.store_map(ring(5))
    path = "map-0000000001-0000000005.json"
    for offset in range(len(world.read(path))):
        world.flip(path, offset)
        assert volume.stored_map() == StoredMap(term=Term(1), epoch=Epoch(5), paper=None)
        world.flip(path, offset)
    world.truncate(path, len(world.read(path)) - 1)
    assert volume.stored_map() == StoredMap(term=Term(1), epoch=Epoch(5), paper=None)


def test_a_map_whose_name_lies_is_not_read() -> None:
    """An intact paper under the name of another epoch does not count as that epoch's map."""
    world = SimVolume()
    volume = take(world.process("a"), "a")
    volume.store_map(ring(5))
    world.process("a").link("map-0000000001-0000000005.json", "map-0000000001-0000000009.json")
    assert volume.stored_map() == StoredMap(term=Term(1), epoch=Epoch(9), paper=None)


def test_a_disk_error_is_raised() -> None:
    """Neither storing nor reading hides an error."""
    world = SimVolume()
    volume = take(world.process("a"), "a")
    world.hooks.append(fail_at(1, errno.ENOSPC, only={"pwrite"}))
    with pytest.raises(VolumeFailed, match="epoch 5"):
        volume.store_map(ring(5))
    world.hooks.append(fail_at(1, errno.EIO, only={"listdir"}))
    with pytest.raises(VolumeFailed, match="stored ring map"):
        volume.stored_map()


@pytest.mark.parametrize("operation", ["sync_folder", "unlink"])
def test_after_a_map_that_could_not_be_stored_none_is(operation: str) -> None:
    """Not that one, whose name may be there and not durable; no newer one, which would be written over it in place."""
    world = SimVolume()
    volume = take(world.process("a"), "a")
    volume.store_map(ring(1))
    world.hooks.append(fail_at(1, errno.EIO, only={operation}))
    for epoch in (2, 2, 3):
        with pytest.raises(VolumeFailed, match="epoch 2"):
            volume.store_map(ring(epoch))


def test_a_map_of_a_newer_format_is_not_read() -> None:
    """A paper of a format that this build does not know binds by its epoch only."""
    world = SimVolume()
    volume = take(world.process("a"), "a")
    paper = MapPaper(pod_uid="pod-a", ring=ring(5), format=2)
    world.process("a").create("map-0000000001-0000000005.json").pwrite(encode_paper(paper), 0)
    assert volume.stored_map() == StoredMap(term=Term(1), epoch=Epoch(5), paper=None)
