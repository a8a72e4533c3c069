"""The fence under every interleaving of two and three processes at single file operations, with kills and power loss.

Each process is the product's `take_volume` and `look` around the smallest log that can lose a record: it takes the
volume, reads what elders wrote, writes that and one record of its own into a file of its term, syncs, looks, shows.
Checked in every state: terms are unique; whatever anybody showed is in all that any younger one reads; and after a
power loss at this point, whatever it keeps, the next process boots, above all terms, with everything that was shown.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import pytest

from fleetlm_common.ids import ShardName
from fleetlm_shard.disk import Disk
from fleetlm_shard.volume import Volume, take_volume
from fleetlm_shard.volume_types import Identity
from tests.support.explore import FORGOTTEN, Explorer, Machine, State, drive, run_alone
from tests.support.simdisk import SimVolume

TAKEOVER_AFTER_S = 0.05
"""One poll of silence: when it is seen is left to the interleaving anyhow."""


@dataclass(frozen=True)
class Took:
    """`take_volume` returned."""

    term: int
    volume_id: str


@dataclass(frozen=True)
class Read:
    """What the log held."""

    term: int
    records: frozenset[str]


@dataclass(frozen=True)
class Shown:
    """What was said to the world, after sync and look."""

    term: int
    records: frozenset[str]


class DiskRefused(Exception):
    """The smallest log's own end by a disk error."""


def shard(machine: Machine) -> None:
    """One life of a process: boot, one append, exit."""
    boot(machine)


def boot(machine: Machine) -> tuple[Volume, frozenset[str]]:
    """Take the volume, read the log, write it anew with a record of its own, look, show."""
    volume = drive(
        take_volume(
            machine.disk,
            identity=Identity(ring_uid="ring", shard=ShardName("shard-0"), volume_id=f"by-{machine.name}"),
            pod_uid=machine.name,
            boot_id=machine.name,
            clock=machine,
            sleep=machine.sleep,
            takeover_after_s=TAKEOVER_AFTER_S,
        )
    )
    machine.note(Took(volume.term, volume.volume_id))
    machine.forget(("took", volume.term))
    try:
        records = read_all(machine.disk)
    except OSError as error:
        raise DiskRefused from error
    machine.note(Read(volume.term, records))
    machine.forget(("read", volume.term, records))
    return volume, append(machine, volume, records, 1)


def read_all(disk: Disk) -> frozenset[str]:
    """Every record in the log's folder, whoever wrote it."""
    disk.sync_folder("log")
    records: set[str] = set()
    for name in disk.listdir("log"):
        if name.endswith(".seg"):
            file = disk.open(f"log/{name}")
            records.update(file.pread(1000, 0).decode().split())
            file.close()
    return frozenset(records)


def append(machine: Machine, volume: Volume, records: frozenset[str], number: int) -> frozenset[str]:
    """Write all that is known and one record more into a file of its own, sync, look, show."""
    disk = machine.disk
    records |= {f"{machine.name}{number}"}
    temporary = f"log/tmp-{volume.term:010d}-{number}"
    try:
        file = disk.create(temporary)
        file.pwrite(" ".join(sorted(records)).encode(), 0)
        file.sync()
        file.close()
        disk.link(temporary, f"log/{volume.term:010d}-{number:010d}.seg")
        disk.sync_folder("log")
    except OSError as error:
        raise DiskRefused from error
    volume.look()
    machine.note(Shown(volume.term, records))
    machine.forget(("shown", volume.term, records))
    return records


def serving(machine: Machine) -> None:
    """A process that lives on: it beats, goes when it is asked to, appends once more."""
    volume, records = boot(machine)
    for number in range(2, 4):
        volume.beat()
        if volume.asked_to_leave():
            volume.close()
            return
        records = append(machine, volume, records, number)


@dataclass
class Judge:
    """Checks a state; losses that leave the same bytes are tried once."""

    singles: bool = True
    tried: set[Hashable] = field(default_factory=set[Hashable])

    def __call__(self, state: State) -> None:
        notes = [note for process in state.processes for note in process.notes]
        took = [note for note in notes if isinstance(note, Took)]
        shown = [note for note in notes if isinstance(note, Shown)]
        assert len({note.term for note in took}) == len(took), "two processes own one term"
        assert len({note.volume_id for note in took}) <= 1, "the volume has two identities"
        for process in state.processes:
            assert process.ended in {"", "returned", "killed", "Fenced", "VolumeFailed", "DiskRefused"}, process.ended
        judge_reads(shown, [note for note in notes if isinstance(note, Read)])
        said = max((note.term for note in took), default=0), frozenset(name for note in shown for name in note.records)
        here = said, hash(state.volume.stored_fingerprint())
        if here in self.tried:
            return
        self.tried.add(here)
        for loss in state.volume.losses(singles=self.singles):
            after = state.volume.copy()
            after.power_loss(loss)
            key = said, tuple((path, after.read(path)) for path in after.paths())
            if key not in self.tried:
                self.tried.add(key)
                self.judge_boot(after, took, shown, f"after power loss, {loss.name}")

    def judge_boot(self, volume: SimVolume, took: list[Took], shown: list[Shown], when: str) -> None:
        """A new process boots alone and has everything."""
        process = run_alone(volume, "next", shard)
        assert process.ended == "returned", f"{when}: the next boot ends by {process.ended}"
        mine = next(note for note in process.notes if isinstance(note, Took))
        assert all(mine.term > note.term and mine.volume_id == note.volume_id for note in took), (
            f"{when}: {mine} after {took}"
        )
        judge_reads(shown, [note for note in process.notes if isinstance(note, Read)])


def judge_reads(shown: list[Shown], reads: list[Read]) -> None:
    """Whatever an elder showed, at any time, every younger one has read."""
    for one in shown:
        for two in reads:
            assert one.term >= two.term or one.records <= two.records, f"{one} is missing in {two}"


def private(label: str) -> bool:
    """Nobody else can notice these: the bytes of files under temporary names, and of files that never change."""
    name, _, path = label.partition(" ")
    if "tmp-" in path:
        return name in {"pwrite", "sync", "try_lock", "close"}
    return name in {"pread", "close"} and (path == "identity" or path.startswith(("leave-", "log/")))


def keeps(label: str, answer: Hashable, since: Sequence[str]) -> Hashable:
    """What `take_volume` still knows: the identity, and what it saw since it last began to look for terms."""
    if label == "pread identity":
        return answer
    if any(op == "listdir log" or op.startswith("create tmp-term") for op in since):
        return FORGOTTEN
    if label == "listdir log":  # no folder is an empty one
        return max(answer, default="") if isinstance(answer, tuple) else ""
    if label == "listdir " and isinstance(answer, tuple) and any(not op.startswith("unlink") for op in since):
        return max((name for name in answer if name.startswith(("term-", "map-"))), default="")
    return answer


def formatted() -> SimVolume:
    """A volume on which one process has lived and exited."""
    volume = SimVolume()
    run_alone(volume, "first", shard)
    return volume


def test_two_boots_on_an_empty_volume_in_every_order() -> None:
    """Two processes format, take, read and append, interleaved at every operation, power lost at every point."""
    explorer = Explorer(Judge(), private=private, keeps=keeps, alike=True)
    explorer.run(SimVolume(), {"A": shard, "B": shard})
    assert explorer.ends == {("returned", "returned"), ("returned", "Fenced"), ("Fenced", "returned")}


@pytest.mark.long
def test_three_boots_with_two_of_them_frozen_anywhere() -> None:
    """An elder frozen at every step of its boot, a younger one at every step of its own, a third, and on they go."""
    explorer = Explorer(Judge(singles=False), private=private, keeps=keeps, alike=True, switches=2)
    explorer.run(formatted(), {"A": shard, "B": shard, "C": shard})
    assert ("Fenced", "Fenced", "returned") in explorer.ends


def test_a_kill_at_every_step_of_two_boots() -> None:
    """One of two processes is killed at any operation, the other frozen at any: nothing shown is lost."""
    explorer = Explorer(Judge(), private=private, keeps=keeps, alike=True, switches=2, kills=1)
    explorer.run(formatted(), {"A": shard, "B": shard})
    assert ("killed", "returned") in explorer.ends


def test_an_input_output_error_at_every_step_of_two_boots() -> None:
    """Any one operation answers EIO: its process ends by `VolumeFailed` or is unharmed, nothing shown is lost."""
    explorer = Explorer(Judge(), private=private, keeps=keeps, alike=True, switches=2, errors=1)
    explorer.run(formatted(), {"A": shard, "B": shard})
    assert {("VolumeFailed", "returned"), ("returned", "VolumeFailed")} <= explorer.ends


def test_an_owner_that_serves_and_is_taken_over_at_every_step() -> None:
    """A serving owner leaves when it is asked, or is frozen, outwaited and then fenced; nothing shown is lost."""
    explorer = Explorer(Judge(), private=private, keeps=keeps, switches=2)
    explorer.run(formatted(), {"A": serving, "B": shard})
    assert explorer.ends == {("returned", "returned"), ("Fenced", "returned"), ("returned", "Fenced")}
