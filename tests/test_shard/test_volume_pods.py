"""Which pod may ask a volume's owner to leave (docs/durability.md)."""

from __future__ import annotations

import pytest

from fleetlm_shard.volume import Volume
from tests.support.simdisk import SimVolume
from tests.support.volumes import Events, Time, take


def _two_pods() -> tuple[SimVolume, Volume]:
    """A volume that pod 1 had and pod 2 has."""
    world = SimVolume()
    take(world.process("a"), "a", pod_uid="pod-1")
    world.kill("a")
    return world, take(world.process("b"), "b", pod_uid="pod-2")


def test_a_container_of_a_replaced_pod_does_not_ask_the_later_pod_to_leave() -> None:
    """A kubelet that was frozen starts it again: it waits, and takes the volume only when the later pod's is gone."""
    world, owner = _two_pods()
    asked: list[float] = []

    def meanwhile(now_s: float) -> None:
        if owner.asked_to_leave():
            asked.append(now_s)
        if now_s < 100:
            owner.beat()
        else:
            owner.close()

    events, time = Events(), Time(meanwhile)
    again = take(world.process("c"), "c", pod_uid="pod-1", time=time, log=events)
    assert asked == []
    assert events.names == ["volume_held", "pod_replaced"]
    assert (again.term, time.now_s >= 100) == (3, True)


@pytest.mark.parametrize("pod", ["pod-2", "pod-3", ""], ids=["same-pod", "later-pod", "no-pod"])
def test_everybody_else_asks(pod: str) -> None:
    """The owner's own pod, a pod that came later and a process without a pod: each asks the owner to leave."""
    world, owner = _two_pods()

    def meanwhile(now_s: float) -> None:
        if owner.asked_to_leave():
            owner.close()
        else:
            owner.beat()

    time = Time(meanwhile)
    assert take(world.process("c"), "c", pod_uid=pod, time=time).term == 3
    assert time.now_s < 1


def test_a_term_that_cannot_be_read_is_of_no_pod() -> None:
    """Its paper is damaged: a container of the replaced pod is not known as such, and asks."""
    world, owner = _two_pods()
    disk = world.process("damage")
    disk.open("term-0000000002", writable=True).pwrite(b"X", 5)

    def meanwhile(now_s: float) -> None:
        if owner.asked_to_leave():
            owner.close()

    time = Time(meanwhile)
    assert take(world.process("c"), "c", pod_uid="pod-1", time=time).term == 3
    assert time.now_s < 1
