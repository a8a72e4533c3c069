"""Which pod may be replaced next, and what keeps it. Pure.

    broken and outdated            at once: it serves nobody, and changing a bad image back must heal by itself
    outdated, everything else well one at a time: those that are not ready first, then those that serve nothing, then
                                   from the highest ordinal down; with `Handover` it gives its slots away first

Promise: a good pod is replaced only while every other shard serves and every pod that was changed before has become
ready: a bad image stops at the first pod. Must not be done here: deleting (`kubeworld.py` does, by the pod's uid, so
that what was decided about one pod never hits its successor).
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

import msgspec

from fleetlm_common.ids import ShardName
from fleetlm_common.ring import Move
from fleetlm_operator.membership import can_hand_over, is_empty, is_going, map_of
from fleetlm_operator.observed import ContainerStatus, Observed, Pod, Waiting, condition_of, is_ready
from fleetlm_operator.workloads import TEMPLATE_LABEL

UNSCHEDULABLE_AFTER: Final = timedelta(seconds=15)
"""A pod that no node takes for so long is said to be so; a node or a volume may come within seconds."""
RESTARTS_SUSPICIOUS: Final = 3
"""A container that was started again so often and is not ready keeps failing."""
STARTS_AGAIN_MAX: Final = timedelta(seconds=30)
"""So long a container that ended and runs again is waited for: a start takes seconds, and who replaced it then would
make its writers wait for a second one."""
MESSAGE_CHARS_MAX: Final = 300
"""Of a container's last words."""

_IMAGE_TROUBLE: Final = frozenset(
    {"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"}
)
_CONTAINER_TROUBLE: Final = frozenset(
    {"CrashLoopBackOff", "RunContainerError", "CreateContainerError", "CreateContainerConfigError"}
)


class Trouble(msgspec.Struct, frozen=True):
    """Why a pod will not become ready by itself; `reason` is stable."""

    reason: str
    message: str


class Block(msgspec.Struct, frozen=True):
    """A predicate that does not hold; `predicate` is stable."""

    predicate: str
    message: str


class Roll(msgspec.Struct, frozen=True):
    """What to do about outdated pods now."""

    outdated: tuple[int, ...]
    replace: tuple[Pod, ...]
    blocks: tuple[Block, ...]
    subject: str
    """The pod that is waited for, or goes next."""
    hands_over: tuple[int, ...] = ()
    """Shards that give their slots to others before they go."""


def trouble_of(pod: Pod, *, now: datetime, deadline: timedelta) -> Trouble | None:
    """What is wrong with a pod that is not ready; None if it may only need time."""
    if is_ready(pod) or pod.metadata.deletion_timestamp is not None:
        return None
    name = pod.metadata.name
    for container in pod.status.container_statuses:
        waiting = container.state.waiting
        if waiting is not None and waiting.reason in _IMAGE_TROUBLE:
            return Trouble("ImageUnavailable", f"{name}: {waiting.reason}: {_short(waiting.message)}")
        if waiting is not None and waiting.reason in _CONTAINER_TROUBLE:
            return Trouble("ContainerFails", f"{name}: {waiting.reason}: {_last_words(container, waiting)}")
        if container.restart_count >= RESTARTS_SUSPICIOUS and container.last_state.terminated is not None:
            # Between two crashes it runs for a while: the verdict must not change each time.
            return Trouble("ContainerFails", f"{name}: keeps ending: {_last_words(container, None)}")
    scheduled = condition_of(pod, "PodScheduled")
    waited = now - _since(pod, now)
    if scheduled is not None and scheduled.reason == "Unschedulable" and waited > UNSCHEDULABLE_AFTER:
        return Trouble("Unschedulable", f"{name}: {_short(scheduled.message)}")
    if waited > deadline:
        return Trouble("ProgressDeadlineExceeded", f"{name} is not ready after {waited.total_seconds():.0f} s")
    return None


def roll(seen: Observed, *, template: str, applied: bool) -> Roll:
    """The next step towards pods that are all of `template`.

    Args:
        seen: the ring.
        template: value of the template label to reach.
        applied: the StatefulSet has it, and its controller knows.
    """
    outdated = {number: pod for number, pod in seen.pods.items() if pod.metadata.labels.get(TEMPLATE_LABEL) != template}
    numbers = tuple(sorted(outdated))
    if not outdated:
        return Roll((), (), (), "")
    going = [pod for pod in outdated.values() if pod.metadata.deletion_timestamp is not None]
    if not applied:
        block = Block("TemplateApplied", "the StatefulSet does not have the new template yet")
        return Roll(numbers, (), (block,), outdated[numbers[-1]].metadata.name)
    broken = [pod for pod in outdated.values() if pod not in going and _is_broken(pod, seen)]
    if broken:
        return Roll(numbers, tuple(broken), (), broken[0].metadata.name)
    staying = {number: pod for number, pod in outdated.items() if pod not in going and number < seen.ring.spec.replicas}
    if not staying:  # those that leave the ring go as they are
        subject = going[0].metadata.name if going else outdated[numbers[-1]].metadata.name
        return Roll(numbers, (), (), subject)
    number = min(staying, key=lambda each: (is_ready(staying[each]), not is_empty(seen, each), -each))
    candidate = staying[number]
    blocks = _blocks(seen, candidate, template)
    handover = seen.ring.spec.update.strategy == "Handover" and not blocks
    hands_over = handover and can_hand_over(seen, number)
    if handover and _starts_again(candidate, seen) and not is_empty(seen, number):
        blocks = (Block("SlotsHandedOver", f"{candidate.metadata.name} starts again and hands its slots over then"),)
    if hands_over and not is_empty(seen, number):
        blocks = (Block("SlotsHandedOver", f"{candidate.metadata.name} hands its slots over first"),)
    sealed = [move for move in _moves(seen) if f"shard-{number}" in (move.source, move.target)]
    if not blocks and any(move.state == "Sealing" for move in sealed):
        blocks = (Block("NoMoveSealed", f"{candidate.metadata.name} is ending a move"),)
    subject = blocks[0].message.split(" ", 1)[0] if blocks else candidate.metadata.name
    return Roll(numbers, () if blocks else (candidate,), blocks, subject, (number,) if hands_over else ())


def replaced_in_place(seen: Observed, rolled: Roll) -> tuple[ShardName, ...]:
    """Shards whose pods are replaced now, or on their way out, with the strategy `InPlace`; in order of ordinals.

    The map says so before such a pod is asked to end, so that it ends at once; every other waits for its slots to go.
    """
    if seen.ring.spec.update.strategy != "InPlace":
        return ()
    return tuple(
        ShardName(f"shard-{number}")
        for number, pod in seen.pods.items()
        if number in rolled.outdated and (is_going(pod) or pod in rolled.replace)
    )


def _moves(seen: Observed) -> tuple[Move, ...]:
    ring_map = map_of(seen)
    return () if ring_map is None else ring_map.moves


def _blocks(seen: Observed, candidate: Pod, template: str) -> tuple[Block, ...]:
    """The predicates for replacing a pod that does no harm where it is."""
    update = seen.ring.spec.update
    others = {number: pod for number, pod in seen.pods.items() if pod.metadata.uid != candidate.metadata.uid}
    blocks: list[Block] = []
    changed = [pod for pod in others.values() if pod.metadata.labels.get(TEMPLATE_LABEL) == template]
    unready = [pod for pod in changed if not is_ready(pod)]
    if unready:
        blocks.append(Block("ChangedPodsReady", f"{unready[0].metadata.name} was changed and is not ready yet"))
    settling = [pod for pod in changed if is_ready(pod) and _ready_for(pod, seen.now) < update.min_ready_seconds]
    if settling:
        text = f"{settling[0].metadata.name} must be ready for {update.min_ready_seconds} s"
        blocks.append(Block("MinReadySeconds", text))
    expected = 0 if seen.stateful_set is None else seen.stateful_set.replicas
    names = {number: pod.metadata.name for number, pod in others.items() if not is_ready(pod)}
    own = candidate.metadata.name
    away = [
        names.get(number, f"shard-{number}")
        for number in range(expected)
        if (number not in others or number in names) and not (number in seen.pods and seen.pods[number] is candidate)
    ]
    if len(away) >= update.max_unavailable:
        blocks.append(Block("OtherShardsReady", f"{away[0]} is away; {own} must not go as well"))
    return tuple(blocks)


def _starts_again(pod: Pod, seen: Observed) -> bool:
    """Its container ended a moment ago and comes back: it serves within seconds, and can then hand over.

    In a ring of one shard nobody could take its slots.
    """
    if is_ready(pod) or seen.ring.spec.replicas == 1 or seen.now - _since(pod, seen.now) > STARTS_AGAIN_MAX:
        return False
    return any(
        container.state.waiting is None and (container.restart_count > 0 or container.state.terminated is not None)
        for container in pod.status.container_statuses
    )


def _is_broken(pod: Pod, seen: Observed) -> bool:
    """It cannot become ready as it is, however long one waits."""
    deadline = timedelta(seconds=seen.ring.spec.update.progress_deadline_seconds)
    trouble = trouble_of(pod, now=seen.now, deadline=deadline)
    return pod.status.phase == "Failed" or (trouble is not None and trouble.reason != "ProgressDeadlineExceeded")


def _last_words(container: ContainerStatus, waiting: Waiting | None) -> str:
    ended = container.state.terminated or container.last_state.terminated
    if ended is not None:
        return f"exit status {ended.exit_code}: {_short(ended.message or ended.reason)}"
    return _short(waiting.message if waiting else "")


def _since(pod: Pod, now: datetime) -> datetime:
    """Since when it is not ready: since it was made, or since it was ready last."""
    condition = condition_of(pod, "Ready")
    times = [pod.metadata.creation_timestamp, condition.last_transition_time if condition else None]
    return max((time for time in times if time is not None), default=now)


def _ready_for(pod: Pod, now: datetime) -> float:
    return (now - _since(pod, now)).total_seconds()


def _short(text: str) -> str:
    """One line, not too long: the end is what says it."""
    line = " ".join(text.split())
    return line if len(line) <= MESSAGE_CHARS_MAX else "…" + line[-MESSAGE_CHARS_MAX:]
