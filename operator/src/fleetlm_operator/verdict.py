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
from fleetlm_common.kubenames import CLIENT_PORT, gateway_workload, selector
from fleetlm_operator.observed import Observed, is_ready
from fleetlm_operator.planning import volumes_lost
from fleetlm_operator.ringplan import Plan, view_of
from fleetlm_operator.rolling import Block, Trouble, trouble_of

MESSAGE_CHARS_MAX: Final = 1000
"""Of a condition's message; the schema takes 1,024."""
BLOCKS_MAX: Final = 8
"""Predicates in the status; the schema takes as many."""

ReadyReason = Literal["Serving", "NoRingMap", "VolumeLost", "ShardsNotReady", "GatewaysNotReady", "Deleting"]
ProgressingReason = Literal[
    "Settled",
    "BringUp",
    "RollingUpgrade",
    "VolumeGrowth",
    "GatewayRollout",
    "ReplicasHeld",
    "StorageNotExpandable",
    "Stalled",
    "Paused",
    "Deleting",
]
DegradedReason = Literal["AllWell", "VolumeLost", "ShardsNotReady", "GatewaysNotReady", "MapHeld"]
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

    @property
    def settled(self) -> bool:
        """Nothing is under way that time alone would change."""
        return not self.operation and self.conditions["Stalled"].status == "False"


class _Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What the conditions are made of."""

    seen: Observed
    plan: Plan
    has_map: bool
    lost: tuple[str, ...]
    unready: tuple[int, ...]
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
        blocks=plan.roll.blocks[:BLOCKS_MAX],
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
    found = (trouble_of(pod, now=seen.now, deadline=deadline) for _, pod in sorted(seen.pods.items()))
    there = seen.map_seen
    gateways = seen.deployment
    return _Facts(
        seen=seen,
        plan=plan,
        has_map=there is not None and there.map is not None,
        lost=() if there is None else tuple(volumes_lost(view_of(seen))),
        unready=tuple(n for n in range(plan.shards) if n not in seen.pods or not is_ready(seen.pods[n])),
        troubles=tuple(trouble for trouble in found if trouble is not None),
        gateways=seen.ring.spec.gateway.replicas,
        gateways_ready=gateways.available if gateways else 0,
        gateways_rolling=gateways is not None and (not gateways.settled or gateways.updated < gateways.replicas),
        refusals=refusals,
    )


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
    # The last pod of an upgrade is as asked and not ready yet; after a bring-up likewise. Only the status remembers.
    if facts.unready and before is not None and before.kind in {"RollingUpgrade", "BringUp"}:
        return before.kind, ready, total, waiting
    growing = [name for name in plan.growing if not any(refusal.storage for refusal in facts.refusals)]
    if growing:
        return "VolumeGrowth", total - len(growing), total, growing[0]
    deployment = facts.seen.deployment
    if facts.gateways_rolling and deployment is not None:
        return "GatewayRollout", deployment.updated, deployment.replicas, ""
    if facts.gateways_ready == 0 and before is not None and before.kind == "BringUp":
        return "BringUp", ready, total, gateway_workload(facts.seen.ring.name)
    return "", 0, 0, ""


def _stalled(facts: _Facts, operation: str) -> Said:
    if facts.seen.ring.deleting or facts.seen.ring.spec.paused:
        return Said("False", "NotStalled", "nothing is under way")
    if facts.plan.obstacle is not None:
        return Said("True", facts.plan.obstacle.reason, facts.plan.obstacle.message)
    refused = [refusal for refusal in facts.refusals if not refusal.storage]
    if refused:
        return Said("True", "ChangeRefused", f"{refused[0].action}: {refused[0].message}")
    if operation in {"BringUp", "RollingUpgrade"} and facts.troubles:
        rest = len(facts.troubles) - 1
        more = f" (and {rest} more)" if rest else ""
        return Said("True", facts.troubles[0].reason, facts.troubles[0].message + more)
    before = facts.seen.ring.status.operation
    missing = [number for number in range(facts.plan.shards) if number not in facts.seen.pods]
    if missing and before is not None and before.kind == operation and _older(facts.seen, before.since):
        text = (
            f"{_numbers(tuple(missing))} has no pod; `kubectl describe statefulset` says what keeps it from being made"
        )
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
        return Said("False", "VolumeLost", _decided(facts))
    if facts.unready:
        return Said("False", "ShardsNotReady", f"{_numbers(facts.unready)} of {facts.plan.shards} shards not ready")
    if facts.gateways_ready == 0:
        return Said("False", "GatewaysNotReady", "no gateway is available")
    return Said("True", "Serving", f"{facts.plan.shards} shards and {facts.gateways_ready} gateways serve")


def _progressing(facts: _Facts, operation: str, stalled: Said) -> Said:
    spec = facts.seen.ring.spec
    held = facts.has_map and spec.replicas != facts.plan.shards
    storage = next((refusal for refusal in facts.refusals if refusal.storage), None)
    if facts.seen.ring.deleting:
        return Said("False", "Deleting", "the ring is being deleted")
    if spec.paused:
        return Said("False", "Paused", "nothing is changed while spec.paused is true")
    if stalled.status == "True":
        return Said("False", "Stalled", stalled.message)
    if operation:
        return Said("True", operation, _progress_text(facts, operation))
    if held:
        text = (
            f"spec.replicas is {spec.replicas}, the ring has {facts.plan.shards} shards; slots cannot move between "
            f"shards yet: set spec.replicas to {facts.plan.shards}"
        )
        return Said("False", "ReplicasHeld", text)
    if storage is not None:
        text = f"volumes keep their size, new ones get {spec.storage.size}: {storage.message}"
        return Said("False", "StorageNotExpandable", text)
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
    if operation == "VolumeGrowth":
        return f"growing {facts.plan.growing[0]} to {facts.seen.ring.spec.storage.size}"
    return "changing the gateways"


def _degraded(facts: _Facts, operation: str, stalled: Said) -> Said:
    """Something that served does not, and nothing that was asked for explains it."""
    decision = facts.plan.decision
    if facts.lost:
        return Said("True", "VolumeLost", _decided(facts))
    if facts.seen.ring.deleting or not facts.has_map:
        return Said("False", "AllWell", "nothing serves that could fail")
    if decision is not None and decision.reason == "Held" and "cannot" not in decision.sentence:
        return Said("True", "MapHeld", decision.sentence)
    expected = facts.seen.ring.spec.update.max_unavailable if operation == "RollingUpgrade" else 0
    if operation == "BringUp":
        expected = facts.plan.shards
    if len(facts.unready) > expected or (facts.unready and stalled.status == "True"):
        why = facts.troubles[0].message if facts.troubles else f"{_numbers(facts.unready)} not ready"
        return Said("True", "ShardsNotReady", f"{len(facts.unready)} of {facts.plan.shards} shards do not serve: {why}")
    if operation not in {"BringUp", "GatewayRollout"} and facts.gateways_ready < facts.gateways:
        text = f"{facts.gateways_ready} of {facts.gateways} gateways are available"
        return Said("True", "GatewaysNotReady", text)
    return Said("False", "AllWell", "everything that should serve does, or is being changed")


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


def _numbers(unready: tuple[int, ...]) -> str:
    named = ", ".join(f"shard-{number}" for number in unready[:4])
    return named if len(unready) <= 4 else f"{named} and {len(unready) - 4} more"


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
