"""Every metric of the gateway; the registry is an argument, labels are bounded (never a session id).

Promise: what is declared here moves in a running system (a test asserts it). `InnerMetrics` belong to the half that
talks to shards, the outer half's class stands beside it.
Must not be done here: measuring (that stands where things happen).
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_LATENCY_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class InnerMetrics:
    """Requests to shards, append lanes, links and streams.

    Args:
        registry: where they are registered; one set a registry.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"fleetlm_gateway_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"fleetlm_gateway_{name}", text, labels, registry=registry)

        self.requests = counter("shard_requests", "Requests to shards by kind and outcome", ("kind", "outcome"))
        self.request_seconds = Histogram(
            "fleetlm_gateway_shard_request_seconds",
            "From the beginning of a request to its answer, retries included",
            ("kind",),
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.retries = counter("shard_retries", "Further tries of requests, by kind", ("kind",))
        self.moved = counter("moved", "MOVED answers from shards")
        self.epoch = gauge("ring_epoch", "Epoch of the ring map in use")
        self.link_up = gauge("shard_link_up", "1 while the connection to the shard is ready", ("shard",))
        self.lanes = gauge("append_lanes", "Sessions with an append under way or waiting")
        self.lane_bytes = gauge("append_waiting_bytes", "Bytes of appends under way or waiting")
        self.appends = counter("appends", "Appends (one may be a batch of messages) by outcome", ("outcome",))
        self.append_requests = counter("append_requests", "APPEND requests answered; appends / this is the batching")
        self.streams = gauge("subscribed_sessions", "Sessions that this gateway is subscribed to")
        self.readers = gauge("readers", "Places of clients in sessions")
        self.readers_behind = gauge("readers_behind", "Readers that are catching up or whose sink is full")
        self.resubscriptions = counter("resubscriptions", "Subscriptions made again, by why", ("why",))
        self.catch_up_pages = counter(
            "catch_up_pages", "Pages read for readers that catch up, by outcome", ("outcome",)
        )
        self.tail_bytes = gauge("tail_buffer_bytes", "Bytes of recent messages kept for readers that catch up")
        self.pushes = counter("pushes", "PUSH frames taken from shards")
