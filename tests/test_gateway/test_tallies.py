"""Tallies and spreads against prometheus_client's own counters and histograms."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import generate_latest

from fleetlm_gateway.tallies import Spreads, Tallies

BOUNDS = (0.001, 0.01, 0.25, 1.0)
VALUES = st.one_of(st.sampled_from(BOUNDS), st.floats(0, 2), st.integers(0, 3))
EVENTS = st.lists(st.tuples(st.sampled_from(["append", "replay", 'odd "name"']), VALUES))


def shown(registry: CollectorRegistry) -> list[str]:
    """What a scraper sees, without the moments of creation."""
    return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]


@given(EVENTS)
def test_a_scraper_cannot_tell_them_from_the_librarys_own(events: list[tuple[str, float]]) -> None:
    """Same names, help, labels, buckets, counts and sums, whatever was counted (bounds themselves included)."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    tallies = Tallies("fleetlm_x", "text", ("event",), registry=ours)
    spreads = Spreads("fleetlm_x_seconds", "text", "event", bounds=BOUNDS, registry=ours)
    counter = Counter("fleetlm_x", "text", ("event",), registry=theirs)
    histogram = Histogram("fleetlm_x_seconds", "text", ("event",), buckets=BOUNDS, registry=theirs)
    for event, value in events:
        tallies.labels(event).inc()
        spreads.labels(event).observe(value)
        counter.labels(event).inc()
        histogram.labels(event).observe(value)
    assert shown(ours) == shown(theirs)


def test_a_tally_without_labels_is_shown_before_it_moves() -> None:
    """0 and then the sum of the amounts, as a counter of the library."""
    registry = CollectorRegistry()
    tally = Tallies("fleetlm_y", "text", registry=registry).labels()
    assert registry.get_sample_value("fleetlm_y_total") == 0
    tally.inc(5)
    tally.inc()
    assert registry.get_sample_value("fleetlm_y_total") == 6
