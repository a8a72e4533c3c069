"""Every metric of the Kubernetes operator, prefix `fleetlm_operator_`; docs/operations/metrics.md explains them.

Promise: each one moves in a scenario (a test scrapes them). No label grows with the number of rings.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram


class KubeMetrics:
    """The operator's series.

    Args:
        registry: where they are shown.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.leader = Gauge("fleetlm_operator_leader", "1 while this operator leads.", registry=registry)
        self.leaderships = Counter(
            "fleetlm_operator_leaderships_total", "Times that this operator began to lead.", registry=registry
        )
        self.rings = Gauge("fleetlm_operator_rings", "Rings by phase.", ["phase"], registry=registry)
        self.steps = Counter(
            "fleetlm_operator_steps_total", "Steps: observe, plan, act, say.", ["outcome"], registry=registry
        )
        self.step_seconds = Histogram("fleetlm_operator_step_seconds", "How long a step took.", registry=registry)
        self.actions = Counter(
            "fleetlm_operator_actions_total",
            "Changes that were made, by kind.",
            ["action", "outcome"],
            registry=registry,
        )
        self.status_writes = Counter("fleetlm_operator_status_writes_total", "Statuses written.", registry=registry)
        self.events = Counter("fleetlm_operator_events_total", "Kubernetes events made.", ["type"], registry=registry)
        self.watch_restarts = Counter(
            "fleetlm_operator_watch_restarts_total",
            "Times that the watching part ended and began anew.",
            registry=registry,
        )
