"""Every metric of the controller, prefix `fleetlm_operator_`; docs/operations/metrics.md explains them.

Promise: each one moves in a scenario (a test scrapes them). No label grows with the ring.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge


class Metrics:
    """The controller's series.

    Args:
        registry: where they are shown.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self.observations = Counter(
            "fleetlm_operator_observations_total", "Looks at the control plane that succeeded.", registry=registry
        )
        self.unavailable = Counter(
            "fleetlm_operator_control_plane_unavailable_total", "Looks or changes that failed.", registry=registry
        )
        self.map_changes = Counter(
            "fleetlm_operator_map_changes_total", "Ring maps that this controller made.", registry=registry
        )
        self.map_conflicts = Counter(
            "fleetlm_operator_map_conflicts_total", "Maps that another controller made first.", registry=registry
        )
        self.map_steps = Counter(
            "fleetlm_operator_map_steps_total",
            "Steps in those maps: join, leave, begin, seal, commit, abort.",
            ["step"],
            registry=registry,
        )
        self.moves = Gauge("fleetlm_operator_moves", "Moves in flight.", registry=registry)
        self.slots_left = Gauge(
            "fleetlm_operator_slots_left", "Slots that are not where they should be.", registry=registry
        )
        self.map_epoch = Gauge(
            "fleetlm_operator_map_epoch", "Epoch of the ring map as last seen; 0 without one.", registry=registry
        )
        self.shards_wanted = Gauge(
            "fleetlm_operator_shards_wanted", "Shards that the spec asks for.", registry=registry
        )
        self.shards_announced = Gauge(
            "fleetlm_operator_shards_announced", "Shards that announced a volume.", registry=registry
        )
        self.shards_ready = Gauge(
            "fleetlm_operator_shards_ready", "Shards that call themselves ready.", registry=registry
        )
        self.volumes_lost = Gauge(
            "fleetlm_operator_volumes_lost", "Members that announce another volume than the map's.", registry=registry
        )
        self.held = Gauge("fleetlm_operator_held", "1 while something that was asked for is held.", registry=registry)
