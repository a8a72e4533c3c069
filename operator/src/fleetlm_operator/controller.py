"""The loop: observe everything, plan, at most one compare-and-swap, say one sentence.

Promise: level-triggered: a step uses a fresh look, and of the steps before only what may be forgotten (`memory.py`), so
that a missed event, a crash between any two lines or another controller at the same ring do no harm. A sentence is said
(log, status) when it is another one than before. Must not be done here: planning (`planning.py`), files (the control
plane).
"""

from __future__ import annotations

import asyncio
from typing import Final

from fleetlm_common.clock import Clock
from fleetlm_common.control import ControllerPlane, ControlPlaneUnavailable, MapConflict, View
from fleetlm_common.logs import Logger
from fleetlm_common.ops import Health
from fleetlm_operator.memory import NO_MEMORY
from fleetlm_operator.metrics import Metrics
from fleetlm_operator.planning import Decision, Reason, plan, volumes_lost

RESYNC_S: Final = 5.0
"""A step at least so often: what was missed, or failed, is done then."""
RETRY_S: Final = 0.5
"""Pause after the control plane did not answer or another controller was quicker."""
AGAIN_MARGIN_S: Final = 0.01
"""A deadline is looked at just after it has passed, not just before."""
STALLED_S: Final = 30.0
"""Without a finished step for so long the loop hangs (a step is a few file operations), and readiness says so."""

_WARNINGS: Final[frozenset[Reason]] = frozenset({"InvalidSpec", "VolumeLost", "Held", "MoveStalled"})


class Controller:
    """One of any number of controllers of a ring.

    Args:
        control: the ring's control plane.
        log: where sentences go besides the status.
        metrics: the series to move.
        clock: for readiness, and for how long a move takes.
    """

    def __init__(self, control: ControllerPlane, *, log: Logger, metrics: Metrics, clock: Clock) -> None:
        self._control = control
        self._log = log
        self._metrics = metrics
        self._clock = clock
        self._said: str | None = None
        self._reported: tuple[str, int] | None = None
        self._memory = NO_MEMORY
        self._again_s: float | None = None
        self._health = Health(ok=False, reason="Starting", message="has not seen the control plane yet")
        self._step_ended_s = clock.monotonic_s()

    def health(self) -> Health:
        """Whether the ring is looked after; how the ring is stands in the message."""
        idle_s = self._clock.monotonic_s() - self._step_ended_s
        if idle_s > STALLED_S:
            return Health(ok=False, reason="Stalled", message=f"no step ended for {idle_s:.0f} s")
        return self._health

    async def run(self) -> None:
        """Steps until cancelled. Cancel-safe: a change that was under way is either made or not, and seen next time."""
        changed = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch(changed))
            while True:
                changed.clear()
                settled = await self.step()
                pause_s = RETRY_S if not settled else RESYNC_S
                if settled and self._again_s is not None:
                    pause_s = min(RESYNC_S, self._again_s + AGAIN_MARGIN_S)
                try:
                    async with asyncio.timeout(pause_s):
                        await changed.wait()
                except TimeoutError:
                    continue

    async def _watch(self, changed: asyncio.Event) -> None:
        """An event is a hint that a look is worth while, nothing more."""
        async for _ in self._control.watch():
            changed.set()

    async def step(self) -> bool:
        """Observe, plan, act once, say it.

        Returns:
            False when the step should soon be done again.
        """
        try:
            settled = await self._observe_and_act()
        except ControlPlaneUnavailable as error:
            self._metrics.unavailable.inc()
            self._health = Health(ok=False, reason="ControlPlaneUnavailable", message=str(error))
            self._say("ControlPlaneUnavailable", f"the control plane does not answer: {error}", warn=True)
            settled = False
        self._step_ended_s = self._clock.monotonic_s()
        return settled

    async def _observe_and_act(self) -> bool:
        view = await self._control.read()
        decision = plan(view, self._memory, now_s=self._clock.monotonic_s())
        self._measure(view, decision)
        if decision.new_map is not None:
            expected = None if view.map is None else view.map.epoch
            try:
                await self._control.compare_and_swap(expected=expected, new=decision.new_map)
            except MapConflict as conflict:
                self._metrics.map_conflicts.inc()
                self._log.event("map_conflict", expected=conflict.expected, found=conflict.found)
                return False
            self._metrics.map_changes.inc()
            self._metrics.map_epoch.set(decision.new_map.epoch)
            for step in decision.steps:
                self._metrics.map_steps.labels(type(step).__name__.lower()).inc()
                self._log.event("step", epoch=decision.new_map.epoch, what=str(step))
        self._memory = decision.memory
        self._again_s = decision.again_s
        self._health = Health(ok=True, reason=decision.reason, message=decision.sentence)
        self._say(decision.reason, decision.sentence, warn=decision.reason in _WARNINGS)
        epoch = 0 if (newest := decision.new_map or view.map) is None else newest.epoch
        if self._reported != (decision.sentence, epoch):
            await self._control.report(decision.sentence, reason=decision.reason, epoch=epoch)
            self._reported = (decision.sentence, epoch)
        return True

    def _say(self, reason: str, sentence: str, *, warn: bool) -> None:
        """One log line for each new sentence."""
        if sentence != self._said:
            self._said = sentence
            self._log.event("ring", level="warning" if warn else "info", reason=reason, sentence=sentence)

    def _measure(self, view: View, decision: Decision) -> None:
        self._metrics.observations.inc()
        self._metrics.map_epoch.set(0 if view.map is None else view.map.epoch)
        self._metrics.shards_wanted.set(view.spec.shards)
        self._metrics.shards_announced.set(len(view.shards))
        self._metrics.shards_ready.set(sum(endpoint.ready for endpoint in view.shards.values()))
        self._metrics.volumes_lost.set(len(volumes_lost(view)))
        self._metrics.moves.set(0 if view.map is None else len(view.map.moves))
        self._metrics.slots_left.set(decision.slots_left)
        self._metrics.held.set(decision.reason in _WARNINGS)
