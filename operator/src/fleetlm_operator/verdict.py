"""What people are told: conditions, phase, operation, one sentence. Pure.

Promise: each reason is stable and explained in docs/kubernetes/conditions.md (a test compares); the status is a
function of what was observed, planned and refused, and small whatever the ring's size: lists in it are bounded. Times
come from the status before, so that nothing changes while nothing happens. Must not be done here: deciding what to do.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final, Literal

import msgspec

from fleetlm_common.kubeapi import Object
from fleetlm_common.kubenames import CLIENT_PORT, gateway_workload, ordinal_of, selector
from fleetlm_operator.membership import cordons_ignored, map_of, view_of
from fleetlm_operator.observed import Observed, is_ready
from fleetlm_operator.planning import volumes_lost
from fleetlm_operator.resources import DEPLOYMENTS
from fleetlm_operator.ringplan import Apply, Plan
from fleetlm_operator.rolling import Block, Trouble, trouble_of
from fleetlm_operator.telling import ARCHIVE_WORDS, LOST_WORDS, UNREADABLE_WORDS, listed, said_by, word_of

MESSAGE_CHARS_MAX: Final = 1000
"""Of a condition's message; the schema takes 1,024."""
BLOCKS_MAX: Final = 8
"""Predicates in the status; the schema takes as many."""
BLOCK_CHARS_MAX: Final = 500
"""Of what a predicate waits for; the schema takes 512."""
MOVES_WAIT: Final = {"ShardsNotReady": "ShardsServe", "MoveStalled": "MovesGetOn", "Held": "MapUsable"}
"""Predicates of moves, by the plan's word for what keeps them."""
GATEWAY_STARTS: Final = timedelta(seconds=30)
"""A gateway that comes (a node was drained, a pod was deleted) is no trouble while another one serves."""

ReadyReason = Literal["Serving", "NoRingMap", "VolumeLost", "ShardsNotReady", "GatewaysNotReady", "Deleting"]
ProgressingReason = Literal[
    "Settled",
    "BringUp",
    "RollingUpgrade",
    "VolumeGrowth",
    "GatewayRollout",
    "Scaling",
    "Rebalancing",
    "StorageNotExpandable",
    "CordonsIgnored",
    "NotForgotten",
    "Stalled",
    "Paused",
    "Deleting",
]
DegradedReason = Literal[
    "AllWell",
    "VolumeLost",
    "VolumeUnreadable",
    "DiskFull",
    "MapHeld",
    "ShardsNotReady",
    "LogDamaged",
    "GatewaysNotReady",
    "ArchiveDiverged",
    "ArchiveRefused",
    "ArchiveFeedBroken",
    "ArchiveAway",
    "ArchiveQuarantined",
]
StalledReason = Literal[
    "NotStalled",
    "ForeignObject",
    "EarlierRingLeaves",
    "RingMapUnreadable",
    "RingMapMismatch",
    "RingMapLost",
    "CredentialEmpty",
    "ImageUnavailable",
    "ContainerFails",
    "Unschedulable",
    "ProgressDeadlineExceeded",
    "GatewaysStuck",
    "MovesStalled",
    "ChangeRefused",
]
PausedReason = Literal["NotPaused", "PausedBySpec"]


class Refusal(msgspec.Struct, frozen=True):
    """An action that the API server refused, in its words."""

    action: str
    message: str
    storage: bool
    """It was about the size of a volume."""


class Said(msgspec.Struct, frozen=True):
    """One condition before it has times."""

    status: Literal["True", "False"]
    reason: str
    message: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that is said about a ring after one step."""

    phase: str
    sentence: str
    conditions: dict[str, Said]
    operation: str
    done: int
    total: int
    subject: str
    blocks: tuple[Block, ...]
    all_there: bool
    """Every pod that should serve does."""

    @property
    def settled(self) -> bool:
        """Nothing is under way that time alone would change."""
        return self.all_there and not self.operation and self.conditions["Stalled"].status == "False"


class _Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the conditions are made of."""

    seen: Observed
    plan: Plan
    has_map: bool
    lost: str
    """Which shards have another volume than the map's, in a sentence."""
    unready: tuple[int, ...]
    unserved: tuple[int, ...]
    """Of these, those that own slots."""
    troubles: tuple[Trouble, ...]
    gateways: int
    gateways_ready: int
    gateways_rolling: bool
    refusals: tuple[Refusal, ...]


def judge(seen: Observed, plan: Plan, refusals: tuple[Refusal, ...]) -> Verdict:
    """Say how the ring is."""
    facts = _facts(seen, plan, refusals)
    operation, done, total, subject = _operation(facts)
    stalled = _stalled(facts, operation)
    conditions = {
        "Ready": _ready(facts),
        "Progressing": _progressing(facts, operation, stalled),
        "Degraded": _degraded(facts, operation, stalled),
        "Stalled": stalled,
        "Paused": _paused(facts),
    }
    return Verdict(
        phase=_phase(facts, conditions, operation),
        sentence=_sentence(facts, conditions, operation),
        conditions=conditions,
        operation=operation,
        done=done,
        total=total,
        subject=subject,
        blocks=_blocks(facts, operation)[:BLOCKS_MAX],
        all_there=not facts.unready and facts.gateways_ready >= facts.gateways,
    )


def status_object(seen: Observed, plan: Plan, verdict: Verdict) -> Object:
    """The status to write."""
    ring, gateways = seen.ring, seen.deployment
    ready = sum(is_ready(pod) for pod in seen.pods.values())
    there = seen.map_seen.map if seen.map_seen is not None else None
    version = plan.images.shard.rpartition("/")[2].partition(":")[2] or plan.images.shard
    match = selector(ring.name, "shard")
    status: Object = {
        "observedGeneration": ring.generation,
        "phase": verdict.phase,
        "message": verdict.sentence[:MESSAGE_CHARS_MAX],
        "replicas": len(seen.pods),
        "readyReplicas": ready,
        "updatedReplicas": len(seen.pods) - len(plan.roll.outdated),
        "selector": ",".join(f"{key}={value}" for key, value in match.items()),
        # A map that is gone does not make the ring forget that it had one: `RingMapLost` rests on this number.
        "epoch": max(there.epoch if there is not None else 0, ring.status.epoch),
        "members": 0 if there is None else len(there.members),
        "version": version,
        "images": {"shard": plan.images.shard, "gateway": plan.images.gateway},
        "gateway": {
            "replicas": gateways.replicas if gateways else 0,
            "readyReplicas": gateways.ready if gateways else 0,
            "updatedReplicas": gateways.updated if gateways else 0,
        },
        "endpoint": f"ws://{gateway_workload(ring.name)}.{ring.namespace}.svc:{CLIENT_PORT}/socket",
        "conditions": [_dated(seen, kind, said) for kind, said in verdict.conditions.items()],
    }
    if verdict.operation:
        status["operation"] = _dated_operation(seen, verdict)
    if verdict.blocks:
        status["blockedBy"] = [{"predicate": block.predicate, "message": block.message} for block in verdict.blocks]
    return status


def _facts(seen: Observed, plan: Plan, refusals: tuple[Refusal, ...]) -> _Facts:
    deadline = timedelta(seconds=seen.ring.spec.update.progress_deadline_seconds)
    found = (_explained(seen, number, deadline) for number in sorted(seen.pods))
    there = seen.map_seen
    gateways = seen.deployment
    ring_map = map_of(seen)
    unready = tuple(n for n in range(plan.shards) if n not in seen.pods or not is_ready(seen.pods[n]))
    owners = set() if ring_map is None else {ordinal_of(found.owner) for found in ring_map.ranges}
    return _Facts(
        seen=seen,
        plan=plan,
        has_map=there is not None and there.map is not None,
        lost="" if there is None else _lost(seen, plan),
        unready=unready,
        unserved=tuple(number for number in unready if number in owners),
        troubles=tuple(trouble for trouble in found if trouble is not None),
        gateways=seen.ring.spec.gateway.replicas,
        gateways_ready=gateways.available if gateways else 0,
        gateways_rolling=gateways is not None
        # What this very step changes is under way already: nobody must read "settled" between shards and gateways.
        and (
            not gateways.settled
            or gateways.updated < gateways.replicas
            or gateways.pods > gateways.replicas  # one of before is still there
            or _changes_gateways(plan)
        ),
        refusals=refusals,
    )


def _changes_gateways(plan: Plan) -> bool:
    return any(isinstance(action, Apply) and action.child.resource == DEPLOYMENTS for action in plan.actions)


def _explained(seen: Observed, number: int, deadline: timedelta) -> Trouble | None:
    """A pod's trouble; what runs and does not get ready says itself what it waits for."""
    trouble = trouble_of(seen.pods[number], now=seen.now, deadline=deadline)
    if trouble is None or trouble.reason != "ProgressDeadlineExceeded" or number not in seen.words:
        return trouble
    return Trouble(trouble.reason, f"{trouble.message}; {word_of(seen, number)}")


def _lost(seen: Observed, plan: Plan) -> str:
    """By announcement, or by the word of a shard that found an empty volume and so announces nothing."""
    if volumes_lost(view_of(seen)):
        return plan.decision.sentence if plan.decision else "a volume is lost"
    said = said_by(seen, LOST_WORDS)
    return f"{said}; bring the old volume back, its slots stay with it" if said else ""


def _operation(facts: _Facts) -> tuple[str, int, int, str]:
    """What is under way: kind, done, total, what is waited for."""
    plan, before = facts.plan, facts.seen.ring.status.operation
    total = plan.shards
    waiting = f"shard-{facts.unready[0]}" if facts.unready else ""
    ready = total - len(facts.unready)
    if facts.seen.ring.deleting:
        return "", 0, 0, ""
    if not facts.has_map:
        return "BringUp", ready, total, waiting
    if plan.roll.outdated:
        return "RollingUpgrade", total - len(plan.roll.outdated), total, plan.roll.subject
    if _scales(facts):
        return "Scaling", *_moved(facts, waiting)
    # The last pod of an upgrade is as asked and not ready yet; after a bring-up likewise. Only the status remembers.
    if facts.unready and before is not None and before.kind in {"RollingUpgrade", "BringUp"}:
        return before.kind, ready, total, waiting
    if plan.moves or _left(facts):
        before_scaled = before is not None and before.kind == "Scaling"
        return "Scaling" if before_scaled else "Rebalancing", *_moved(facts, waiting)
    growing = [name for name in plan.growing if not any(refusal.storage for refusal in facts.refusals)]
    if growing:
        return "VolumeGrowth", total - len(growing), total, growing[0]
    return _gateway_operation(facts)


def _scales(facts: _Facts) -> bool:
    """Whether the ring has other shards than it is asked for, or pods that it does not need any more."""
    ring_map = map_of(facts.seen)
    members = set() if ring_map is None else {ordinal_of(member.name) for member in ring_map.members}
    live = facts.seen.stateful_set
    pods = {*facts.seen.pods, *range(live.replicas if live is not None else 0)}
    return members != set(range(facts.seen.ring.spec.replicas)) or any(number >= facts.plan.shards for number in pods)


def _left(facts: _Facts) -> int:
    """Slots that are not where they should be."""
    return facts.plan.decision.slots_left if facts.plan.decision is not None else 0


def _moved(facts: _Facts, waiting: str) -> tuple[int, int, str]:
    """Slots that are where they should be, of all."""
    slots = facts.seen.ring.spec.slots
    return slots - _left(facts), slots, waiting


def _not_forgotten(facts: _Facts) -> tuple[str, ...]:
    """Members that people want forgotten and that stay, each with why."""
    return () if facts.plan.decision is None else facts.plan.decision.not_forgotten


def _blocks(facts: _Facts, operation: str) -> tuple[Block, ...]:
    """What keeps the next step from being done."""
    kept = _moves_blocked(facts, operation)
    told = (Block("MayBeForgotten", text[:BLOCK_CHARS_MAX]) for text in _not_forgotten(facts))
    return (*kept, *told) if operation == "Scaling" else kept


def _moves_blocked(facts: _Facts, operation: str) -> tuple[Block, ...]:
    decision = facts.plan.decision
    if operation not in {"Scaling", "Rebalancing"} and not any(
        block.predicate == "SlotsHandedOver" for block in facts.plan.roll.blocks
    ):
        return facts.plan.roll.blocks
    if decision is None or decision.reason not in MOVES_WAIT:
        return facts.plan.roll.blocks
    return (*facts.plan.roll.blocks, Block(MOVES_WAIT[decision.reason], decision.sentence[:BLOCK_CHARS_MAX]))


def _gateway_operation(facts: _Facts) -> tuple[str, int, int, str]:
    """Until every gateway is there, what began them goes on: bring-up, or a rollout."""
    deployment, before = facts.seen.deployment, facts.seen.ring.status.operation
    workload = gateway_workload(facts.seen.ring.name)
    coming = deployment is None or facts.gateways_ready < facts.gateways
    if coming and before is not None and before.kind == "BringUp":
        return "BringUp", facts.plan.shards - len(facts.unready), facts.plan.shards, workload
    going_on = coming and before is not None and before.kind == "GatewayRollout"
    if deployment is not None and (facts.gateways_rolling or going_on):
        return "GatewayRollout", min(deployment.updated, facts.gateways_ready), deployment.replicas, workload
    return "", 0, 0, ""


def _stalled(facts: _Facts, operation: str) -> Said:
    if facts.seen.ring.deleting or facts.seen.ring.spec.paused:
        return Said("False", "NotStalled", "nothing is under way")
    if facts.plan.obstacle is not None:
        return Said("True", facts.plan.obstacle.reason, facts.plan.obstacle.message)
    refused = [refusal for refusal in facts.refusals if not refusal.storage]
    if refused:
        return Said("True", "ChangeRefused", f"{refused[0].action}: {refused[0].message}")
    if operation in {"BringUp", "RollingUpgrade", "Scaling", "Rebalancing"} and facts.troubles:
        rest = len(facts.troubles) - 1
        more = f" (and {rest} more)" if rest else ""
        return Said("True", facts.troubles[0].reason, facts.troubles[0].message + more)
    if facts.plan.decision is not None and facts.plan.decision.reason == "MoveStalled":
        return Said("True", "MovesStalled", facts.plan.decision.sentence)
    before = facts.seen.ring.status.operation
    missing = [number for number in range(facts.plan.shards) if number not in facts.seen.pods]
    if missing and before is not None and before.kind == operation and _older(facts.seen, before.since):
        text = f"{listed(tuple(missing))} has no pod; `kubectl describe statefulset` says what keeps it from being made"
        return Said("True", "ProgressDeadlineExceeded", text)
    if facts.seen.deployment is not None and facts.seen.deployment.stuck:
        return Said("True", "GatewaysStuck", facts.seen.deployment.stuck)
    return Said("False", "NotStalled", "nothing stands in the way")


def _older(seen: Observed, since: str) -> bool:
    """Whether something takes longer than it may."""
    begun = datetime.fromisoformat(since) if since else seen.now
    return (seen.now - begun).total_seconds() > seen.ring.spec.update.progress_deadline_seconds


def _ready(facts: _Facts) -> Said:
    if facts.seen.ring.deleting:
        return Said("False", "Deleting", "the ring is being deleted")
    if not facts.has_map:
        text = facts.plan.decision.sentence if facts.plan.decision else "the ring has no map yet"
        return Said("False", "NoRingMap", text)
    if facts.lost:
        return Said("False", "VolumeLost", facts.lost)
    if facts.unserved:
        text = f"{len(facts.unserved)} of {facts.plan.shards} shards not ready: {_why_unready(facts)}"
        return Said("False", "ShardsNotReady", text)
    if facts.gateways_ready == 0:
        return Said("False", "GatewaysNotReady", "no gateway is available")
    return Said(
        "True", "Serving", f"{facts.plan.shards - len(facts.unready)} shards and {facts.gateways_ready} gateways serve"
    )


def _progressing(facts: _Facts, operation: str, stalled: Said) -> Said:
    spec = facts.seen.ring.spec
    storage = next((refusal for refusal in facts.refusals if refusal.storage), None)
    if facts.seen.ring.deleting:
        return Said("False", "Deleting", "the ring is being deleted")
    if spec.paused:
        return Said("False", "Paused", "nothing is changed while spec.paused is true")
    if stalled.status == "True":
        return Said("False", "Stalled", stalled.message)
    if operation:
        return Said("True", operation, _progress_text(facts, operation))
    if storage is not None:
        text = f"volumes keep their size, new ones get {spec.storage.size}: {storage.message}"
        return Said("False", "StorageNotExpandable", text)
    if cordons_ignored(facts.seen):
        text = "spec.cordoned names every shard, so none of it counts: somebody must own the slots"
        return Said("False", "CordonsIgnored", text)
    if _not_forgotten(facts):
        return Said("False", "NotForgotten", "; ".join(_not_forgotten(facts)))
    return Said("False", "Settled", "everything is as asked")


def _progress_text(facts: _Facts, operation: str) -> str:
    rolling = facts.plan.roll
    total = facts.plan.shards
    if operation == "BringUp":
        return facts.plan.decision.sentence if facts.plan.decision else "making what the ring needs"
    if operation == "RollingUpgrade":
        done = total - len(rolling.outdated)
        what = f"{done} of {total} shards changed"
        if rolling.blocks:
            return f"{what}; waiting: {rolling.blocks[0].message}"
        return f"{what}; waiting for {rolling.subject or f'shard-{facts.unready[0]}'}"
    if operation in {"Scaling", "Rebalancing"}:
        return _moving_text(facts)
    if operation == "VolumeGrowth":
        return f"growing {facts.plan.growing[0]} to {facts.seen.ring.spec.storage.size}"
    return "changing the gateways"


def _moving_text(facts: _Facts) -> str:
    """From how many shards to how many, and how far the moves are."""
    ring_map, asked = map_of(facts.seen), facts.seen.ring.spec.replicas
    members = 0 if ring_map is None else len(ring_map.members)
    what = f"{members} of {asked} shards are members" if members < asked else f"{members} members, {asked} asked for"
    if members == asked:
        what = f"{asked} shards"
    decided = facts.plan.decision.sentence if facts.plan.decision else ""
    return f"{what}; {decided}"


def _degraded(facts: _Facts, operation: str, stalled: Said) -> Said:
    """Something that served does not, and nothing that was asked for explains it; the worst is said."""
    seen = facts.seen
    findings = [("VolumeLost", facts.lost), ("VolumeUnreadable", said_by(seen, UNREADABLE_WORDS))]
    if facts.has_map and not seen.ring.deleting:
        findings += [
            ("DiskFull", said_by(seen, frozenset({"DiskFull"}))),
            ("MapHeld", _map_held(facts)),
            ("ShardsNotReady", _shards_missed(facts, operation, stalled)),
            ("LogDamaged", said_by(seen, frozenset({"LogDamaged"}))),
            ("GatewaysNotReady", _gateways_missed(facts, operation)),
            *((word, said_by(seen, frozenset({word}))) for word in ARCHIVE_WORDS),
        ]
    for reason, text in findings:
        if text:
            return Said("True", reason, text)
    return Said("False", "AllWell", "everything that should serve does, or is being changed")


def _map_held(facts: _Facts) -> str:
    """Why the map cannot be used; what only waits for moves is no damage."""
    decision = facts.plan.decision
    held = decision is not None and decision.reason == "Held" and "cannot" not in decision.sentence
    return decision.sentence if decision is not None and held else ""


def _shards_missed(facts: _Facts, operation: str, stalled: Said) -> str:
    """Shards that are away beyond what is under way."""
    if operation == "Scaling":  # those that come or go own nothing
        return "" if not facts.unserved else f"shards do not serve: {_why_unready(facts)}"
    expected = facts.seen.ring.spec.update.max_unavailable if operation == "RollingUpgrade" else 0
    if operation == "BringUp":
        expected = facts.plan.shards
    if len(facts.unready) <= expected and not (facts.unready and stalled.status == "True"):
        return ""
    return f"{len(facts.unready)} of {facts.plan.shards} shards do not serve: {_why_unready(facts)}"


def _gateways_missed(facts: _Facts, operation: str) -> str:
    """Gateways that are away and that nobody awaits any moment; all of them at once are always missed."""
    if facts.gateways_ready >= facts.gateways or operation in {"BringUp", "GatewayRollout"}:
        return ""
    since = facts.seen.deployment.short_since if facts.seen.deployment is not None else None
    if facts.gateways_ready > 0 and since is not None and facts.seen.now - since <= GATEWAY_STARTS:
        return ""
    return f"{facts.gateways_ready} of {facts.gateways} gateways are available"


def _why_unready(facts: _Facts) -> str:
    """The container's last words, or the shard's own, or at least who it is."""
    if facts.troubles:
        return facts.troubles[0].message
    telling = next((number for number in facts.unready if number in facts.seen.words), None)
    if telling is None:
        return listed(facts.unready)
    rest = tuple(number for number in facts.unready if number != telling)
    return word_of(facts.seen, telling) + (f"; {listed(rest)}" if rest else "")


def _paused(facts: _Facts) -> Said:
    if facts.seen.ring.spec.paused:
        return Said("True", "PausedBySpec", "nothing is changed while spec.paused is true")
    return Said("False", "NotPaused", "the operator looks after the ring")


def _phase(facts: _Facts, conditions: dict[str, Said], operation: str) -> str:
    if facts.seen.ring.deleting:
        return "Deleting"
    for kind in ("Paused", "Stalled", "Degraded"):
        if conditions[kind].status == "True":
            return kind
    if operation == "BringUp":
        return "Pending"
    if operation or conditions["Ready"].status == "False":
        return "Progressing"
    return "Ready"


def _sentence(facts: _Facts, conditions: dict[str, Said], operation: str) -> str:
    """The one sentence: the worst first."""
    if facts.seen.ring.deleting:
        return "being deleted; nothing waits for a drain"
    if conditions["Paused"].status == "True":
        return f"paused; {conditions['Ready'].message}"
    for kind in ("Stalled", "Degraded"):
        if conditions[kind].status == "True":
            return f"{kind.lower()}: {conditions[kind].message}"
    progressing = conditions["Progressing"]
    if operation or progressing.reason != "Settled":
        return progressing.message
    ready = conditions["Ready"]
    return _decided(facts) if ready.status == "True" else ready.message


def _decided(facts: _Facts) -> str:
    return facts.plan.decision.sentence if facts.plan.decision else "nothing decided yet"


def _dated(seen: Observed, kind: str, said: Said) -> Object:
    """A condition with the time of its last change of status."""
    before = next((condition for condition in seen.ring.status.conditions if condition.type == kind), None)
    kept = before is not None and before.status == said.status
    return {
        "type": kind,
        "status": said.status,
        "observedGeneration": seen.ring.generation,
        "reason": said.reason,
        "message": said.message[:MESSAGE_CHARS_MAX],
        "lastTransitionTime": before.last_transition_time if kept and before is not None else timestamp(seen.now),
    }


def _dated_operation(seen: Observed, verdict: Verdict) -> Object:
    before = seen.ring.status.operation
    since = before.since if before is not None and before.kind == verdict.operation and before.since else None
    found: Object = {
        "kind": verdict.operation,
        "since": since or timestamp(seen.now),
        "done": verdict.done,
        "total": verdict.total,
    }
    if verdict.subject:
        found["subject"] = verdict.subject
    return found


def timestamp(moment: datetime) -> str:
    """A time as Kubernetes writes it."""
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
