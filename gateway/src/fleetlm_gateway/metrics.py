"""Every metric of the gateway; the registry is an argument, labels are bounded (never a session id).

Promise: what is declared here moves in a running system (a test asserts it). `InnerMetrics` belong to the half that
talks to shards, the outer half's class stands beside it.
Must not be done here: measuring (that stands where things happen).
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from fleetlm_gateway.tallies import Spread, Spreads, Tallies, Tally

_LATENCY_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class InnerMetrics:
    """Requests to shards, append lanes, links and streams.

    Args:
        registry: where they are registered; one set a registry.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"fleetlm_gateway_{name}", text, labels, registry=registry)

        def tallies(name: str, text: str, labels: tuple[str, ...] = ()) -> Tallies:
            return Tallies(f"fleetlm_gateway_{name}", text, labels, registry=registry)

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
        self.appends = tallies("appends", "Appends (one may be a batch of messages) by outcome", ("outcome",))
        self.append_requests = tallies(
            "append_requests", "APPEND requests answered; appends / this is the batching"
        ).labels()
        self.streams = gauge("subscribed_sessions", "Sessions that this gateway is subscribed to")
        self.readers = gauge("readers", "Places of clients in sessions")
        self.readers_behind = gauge("readers_behind", "Readers that are catching up or whose sink is full")
        self.resubscriptions = counter("resubscriptions", "Subscriptions made again, by why", ("why",))
        self.catch_up_pages = counter(
            "catch_up_pages", "Pages read for readers that catch up, by outcome", ("outcome",)
        )
        self.tail_bytes = gauge("tail_buffer_bytes", "Bytes of recent messages kept for readers that catch up")
        self.pushes = tallies("pushes", "PUSH frames taken from shards").labels()


class OuterMetrics:
    """Sockets, channels, requests of clients, REST.

    Args:
        registry: where they are registered; one set a registry.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"fleetlm_gateway_{name}", text, labels, registry=registry)

        def tallies(name: str, text: str, labels: tuple[str, ...] = ()) -> Tallies:
            return Tallies(f"fleetlm_gateway_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"fleetlm_gateway_{name}", text, registry=registry)

        self.sockets = gauge("sockets", "Open WebSockets")
        self.sockets_opened = counter("sockets_opened", "WebSockets accepted")
        self.sockets_refused = counter("sockets_refused", "WebSockets refused before the upgrade, by code", ("code",))
        self.sockets_closed = counter("sockets_closed", "WebSockets that ended, by close reason", ("reason",))
        self.sockets_full = gauge("sockets_full", "WebSockets whose write buffer is full")
        self.topics = gauge("topics", "Joined topics")
        self.frames = tallies("frames_received", "WebSocket frames received").labels()
        self.bytes_received = tallies("received_bytes", "Bytes received over WebSockets").labels()
        self.bytes_sent = tallies("sent_bytes", "Bytes sent over WebSockets").labels()
        self.delivered = tallies("messages_delivered", "Messages pushed to joined topics").labels()
        self.gaps = counter("gaps", "Gaps pushed to joined topics")
        self.hints_dropped = counter("read_hints_dropped", "Read cursors not pushed because the socket was full")
        self.rate_limited = counter("rate_limited_frames", "Frames refused by the rate limit")
        self.draining = gauge("draining", "1 while this gateway is leaving")
        self._requests = tallies(
            "client_requests", "Requests over WebSockets by event and outcome", ("event", "outcome")
        )
        self._request_seconds = Spreads(
            "fleetlm_gateway_client_request_seconds",
            "From a frame's arrival to its answer, by event",
            "event",
            bounds=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.http_requests = counter("http_requests", "REST requests by route and status", ("route", "status"))
        self._children: dict[tuple[str, str], Tally] = {}
        self._seconds: dict[str, Spread] = {}

    def answered(self, event: str, outcome: str, seconds: float) -> None:
        """Count a request's answer; `labels` costs more than the rest of it, so children are kept."""
        child = self._children.get((event, outcome))
        if child is None:
            child = self._children[event, outcome] = self._requests.labels(event, outcome)
            self._seconds[event] = self._request_seconds.labels(event)
        child.inc()
        self._seconds[event].observe(seconds)
