"""The loop of each ring: observe → plan → act a little → say it in a sentence.

    hint (any event about the ring) ─┐
    resync ──────────────────────────┴→ step: one at a time for a ring, STEPS_MAX rings at once

Promise: level-triggered: a step uses a fresh look and nothing from the step before; a lost hint costs RESYNC_S, a crash
between two lines nothing. Must not be done here: deciding (`ringplan.py`), wording (`verdict.py`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from typing import Final

from fleetlm_common.clock import Clock
from fleetlm_common.kubeapi import ApiConflict, ApiError, ApiRefused, ApiUnavailable, KubeApi, Object
from fleetlm_common.kubenames import MANAGER, SHARD_RINGS
from fleetlm_common.logs import Logger
from fleetlm_common.ops import Health
from fleetlm_operator.kubemetrics import KubeMetrics
from fleetlm_operator.kubeworld import KubeWorld
from fleetlm_operator.memory import NO_MEMORY, Memory
from fleetlm_operator.observed import Observed
from fleetlm_operator.resources import EVENTS
from fleetlm_operator.ringplan import Action, Defaults, Grow, Plan, SwapMap, plan
from fleetlm_operator.ringspec import Ring
from fleetlm_operator.verdict import Refusal, Verdict, judge, status_object, timestamp

RESYNC_S: Final = 30.0
"""A look at each ring at least so often: what no event told is seen then (a Secret or a Role that was deleted)."""
UNSETTLED_S: Final = 3.0
"""While something is under way: deadlines pass without an event."""
AGAIN_S: Final = 0.2
"""After a change: what follows from it."""
AGAIN_GROWTH: Final = 1.3
"""Somebody who undoes each change of ours must not make us spin: such steps grow apart, to RESYNC_S."""
RETRY_S: Final = 2.0
"""After the API server did not answer, or somebody was quicker."""
AGAIN_MARGIN_S: Final = 0.01
"""A deadline is looked at just after it has passed, not just before."""
MOVING_S: Final = 0.05
"""While slots move: after a whole look what concerns them is looked at again at once."""
ORPHAN_S: Final = 0.5
"""Between two looks at moves whose ring is gone."""
FOLLOW_S: Final = 2.0
"""Longest time between two whole looks while slots move."""
STEP_S: Final = 60.0
"""Longest step: some thirty requests, each with a deadline of its own."""
STEPS_MAX: Final = 8
"""Rings that are looked after at the same moment."""
STUCK_S: Final = 180.0
"""A step that does not end for so long, or none of any ring: reconciling hangs, and liveness says so. A step ends after
STEP_S at the latest, also when the API server is away: that is no reason to begin anew."""


class Reconciler:
    """All rings of one operator that leads.

    Args:
        api: for events.
        world: what is observed and acted on.
        defaults: what the operator adds to specs.
        clock: for ages and liveness.
        now: the time, for names of events.
        log: where sentences go besides the status.
        metrics: the series to move.
    """

    def __init__(
        self,
        api: KubeApi,
        world: KubeWorld,
        *,
        defaults: Defaults,
        clock: Clock,
        now: Callable[[], datetime],
        log: Logger,
        metrics: KubeMetrics,
    ) -> None:
        self._api = api
        self._world = world
        self._defaults = defaults
        self._clock = clock
        self._now = now
        self._log = log
        self._metrics = metrics
        self._hints: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
        self._changed: dict[tuple[str, str], asyncio.Event] = {}
        self._phases: dict[tuple[str, str], str] = {}
        self._said: dict[tuple[str, str], str] = {}
        self._memories: dict[tuple[str, str], Memory] = {}
        self._limit = asyncio.Semaphore(STEPS_MAX)
        self._begun_s: dict[tuple[str, str], float] = {}
        self._step_ended_s = clock.monotonic_s()

    def hint(self, namespace: str, name: str) -> None:
        """Something happened that may concern this ring; one that is not known yet is looked for."""
        changed = self._changed.get((namespace, name))
        if changed is None:
            if not self._changed:  # without rings no step ended for long, and nobody missed one
                self._step_ended_s = self._clock.monotonic_s()
            self._changed[namespace, name] = asyncio.Event()
            self._hints.put_nowait((namespace, name))
        else:
            changed.set()

    def live(self) -> Health:
        """Whether steps end."""
        now_s = self._clock.monotonic_s()
        hanging = [key for key, begun_s in self._begun_s.items() if now_s - begun_s > STUCK_S]
        if hanging:
            return Health(ok=False, reason="Stuck", message=f"a step of {'/'.join(hanging[0])} does not end")
        idle_s = now_s - self._step_ended_s
        if self._changed and idle_s > STUCK_S:
            return Health(ok=False, reason="Stuck", message=f"no step ended for {idle_s:.0f} s")
        return Health(ok=True, reason="Alive")

    async def run(self) -> None:
        """Look after every ring that is hinted at, until cancelled.

        Cancel-safe: a change that was under way is made or not, and seen by whoever leads next.
        """
        self._step_ended_s = self._clock.monotonic_s()
        async with asyncio.TaskGroup() as tasks:
            while True:
                key = await self._hints.get()
                tasks.create_task(self._look_after(key), name="/".join(key))

    async def _look_after(self, key: tuple[str, str]) -> None:
        """Steps for one ring, until it is gone."""
        changed = self._changed[key]
        streak = 0
        while True:
            changed.clear()
            pause_s = await self._timed_step(key)
            if pause_s is None and changed.is_set():
                continue  # it was made in this very moment
            if pause_s is None:
                del self._changed[key]
                self._said.pop(key, None)
                self._memories.pop(key, None)
                self._show_phase(key, None)
                return
            streak = streak + 1 if pause_s == AGAIN_S else 0
            pause_s = min(RESYNC_S, pause_s * AGAIN_GROWTH**streak)
            try:
                async with asyncio.timeout(pause_s):
                    await changed.wait()
            except TimeoutError:
                continue

    async def _timed_step(self, key: tuple[str, str]) -> float | None:
        """A step whose failures become pauses."""
        async with self._limit:
            begun_s = self._begun_s[key] = self._clock.monotonic_s()
            outcome, pause_s = "unavailable", RETRY_S
            try:
                async with asyncio.timeout(STEP_S):
                    pause = await self._step(*key)
                if pause is None:
                    return None
                outcome, pause_s = "ok", pause
            except TimeoutError:
                self._complain(key, f"a step took more than {STEP_S:.0f} s")
            except ApiConflict as error:
                outcome = "conflict"
                self._complain(key, f"somebody was quicker: {error}")
            except ApiUnavailable as error:
                self._complain(key, f"the API server does not answer: {error}")
            except (ApiError, ValueError) as error:
                outcome, pause_s = "refused", RESYNC_S
                self._complain(key, f"cannot look after the ring: {error}")
            finally:
                del self._begun_s[key]
                self._step_ended_s = self._clock.monotonic_s()
                self._metrics.steps.labels(outcome).inc()
                self._metrics.step_seconds.observe(self._step_ended_s - begun_s)
            return pause_s

    async def _step(self, namespace: str, name: str) -> float | None:
        """Observe, plan, act, say; returns the longest pause before the next one, None when the ring is gone."""
        seen = await self._world.observe(namespace, name)
        if seen is None:
            return await self._end_moves(namespace, name)
        planned = self._plan(seen)
        acted, refusals = await self._act(seen.ring, planned)
        verdict = judge(seen, planned, refusals)
        self._say(seen.ring, verdict)
        await self._write_status(seen, planned, verdict)
        if await self._follow_moves(seen, planned):
            return MOVING_S
        if acted:
            return AGAIN_S
        pause_s = RESYNC_S if verdict.settled else UNSETTLED_S
        again_s = None if planned.decision is None else planned.decision.again_s
        return pause_s if again_s is None else min(pause_s, again_s + AGAIN_MARGIN_S)

    async def _end_moves(self, namespace: str, name: str) -> float | None:
        """The ring is gone, and with `deletionPolicy: Orphan` its shards are not: no writer must wait for ever."""
        seen = await self._world.observe_orphan(namespace, name)
        if seen is None:
            return None
        await self._act(seen.ring, self._plan(seen), only_map=True)
        return ORPHAN_S

    def _plan(self, seen: Observed) -> Plan:
        memory = self._memories.get((seen.ring.namespace, seen.ring.name), NO_MEMORY)
        return plan(seen, self._defaults, memory, now_s=self._clock.monotonic_s())

    async def _follow_moves(self, seen: Observed, planned: Plan) -> bool:
        """While slots move: writers wait for each of its steps, so only what changes then is looked at, for FOLLOW_S.

        Whatever else is to be done waits for the next whole look; so does a change of the spec.

        Returns:
            Whether there were moves.
        """
        key = (seen.ring.namespace, seen.ring.name)
        changed, until_s = self._changed[key], self._clock.monotonic_s() + FOLLOW_S
        followed = False
        while _moving(planned) and self._clock.monotonic_s() < until_s:
            followed = True
            again_s = planned.decision.again_s if planned.decision is not None else None
            with suppress(TimeoutError):
                async with asyncio.timeout(FOLLOW_S if again_s is None else min(FOLLOW_S, again_s + AGAIN_MARGIN_S)):
                    await changed.wait()
            changed.clear()
            seen = await self._world.observe_moves(seen)
            planned = self._plan(seen)
            await self._act(seen.ring, planned, only_map=True)
        return followed

    async def _act(self, ring: Ring, planned: Plan, *, only_map: bool = False) -> tuple[bool, tuple[Refusal, ...]]:
        """Carry out the plan; what the server refuses is told, and the rest goes on."""
        acted, refusals = False, list[Refusal]()
        for action in planned.actions:
            if only_map and not isinstance(action, SwapMap):
                continue
            kind = type(action).__name__
            try:
                changed = await self._world.act(ring, action)
            except ApiRefused as error:
                self._metrics.actions.labels(kind, "refused").inc()
                refusals.append(Refusal(action.why, str(error), storage=isinstance(action, Grow)))
                continue
            except ApiError:
                self._metrics.actions.labels(kind, "failed").inc()
                raise
            self._metrics.actions.labels(kind, "done" if changed else "unchanged").inc()
            if changed:
                acted = True
                self._tell(ring, action)
        if planned.decision is not None and not refusals:
            # What was decided is what was done: a swap that lost its race ended the step above.
            self._memories[ring.namespace, ring.name] = planned.decision.memory
        return acted, tuple(refusals)

    def _tell(self, ring: Ring, action: Action) -> None:
        self._log.event("did", ring=f"{ring.namespace}/{ring.name}", what=action.why)

    def _say(self, ring: Ring, verdict: Verdict) -> None:
        """One line for each new sentence."""
        key = (ring.namespace, ring.name)
        self._show_phase(key, verdict.phase)
        if self._said.get(key) != verdict.sentence:
            self._said[key] = verdict.sentence
            warn = verdict.phase in {"Stalled", "Degraded"}
            self._log.event(
                "ring",
                level="warning" if warn else "info",
                ring=f"{ring.namespace}/{ring.name}",
                phase=verdict.phase,
                sentence=verdict.sentence,
            )

    def _complain(self, key: tuple[str, str], sentence: str) -> None:
        if self._said.get(key) != sentence:
            self._said[key] = sentence
            self._log.event("step_failed", level="warning", ring="/".join(key), sentence=sentence)

    def _show_phase(self, key: tuple[str, str], phase: str | None) -> None:
        before = self._phases.pop(key, None)
        if phase is not None:
            self._phases[key] = phase
        counts = Counter(self._phases.values())
        for each in {before, phase} - {None}:
            self._metrics.rings.labels(each).set(counts[str(each)])

    async def _write_status(self, seen: Observed, planned: Plan, verdict: Verdict) -> None:
        """Write what changed, and one event if a condition did."""
        status = status_object(seen, planned, verdict)
        if status == seen.ring.status_object:
            return
        await self._world.write_status(seen.ring, status)
        self._metrics.status_writes.inc()
        before = {condition.type: (condition.status, condition.reason) for condition in seen.ring.status.conditions}
        for kind in ("Stalled", "Degraded", "Paused", "Progressing", "Ready"):
            said = verdict.conditions[kind]
            if before.get(kind) != (said.status, said.reason) and (before or said.status == "True"):
                bad = kind in {"Stalled", "Degraded"} and said.status == "True"
                await self._post(seen.ring, "Warning" if bad else "Normal", said.reason, said.message)
                return

    async def _post(self, ring: Ring, kind: str, reason: str, message: str) -> None:
        """An event; without it nothing is lost but a line in `kubectl describe`."""
        moment = self._now()
        body: Object = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{ring.name}.{int(moment.timestamp() * 1e6):x}", "namespace": ring.namespace},
            "involvedObject": {
                "apiVersion": SHARD_RINGS.api,
                "kind": SHARD_RINGS.kind,
                "name": ring.name,
                "namespace": ring.namespace,
                "uid": ring.uid,
            },
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": MANAGER},
            "reportingComponent": MANAGER,
            "firstTimestamp": timestamp(moment),
            "lastTimestamp": timestamp(moment),
            "count": 1,
        }
        try:
            await self._api.create(EVENTS, ring.namespace, body)
            self._metrics.events.labels(kind).inc()
        except ApiError as error:
            self._log.event("event_lost", level="warning", ring=f"{ring.namespace}/{ring.name}", error=str(error))


def _moving(planned: Plan) -> bool:
    """Whether moves are in flight, or begin now."""
    new_map = planned.decision.new_map if planned.decision is not None else None
    return bool(planned.moves) if new_map is None else bool(new_map.moves)
