"""Counters and a histogram for what happens once a message: plain numbers, shown to prometheus when it asks.

`prometheus_client` takes a lock at each `inc` and walks the buckets at each `observe`, which adds up when each message
does several of both (docs/perf/optimisations.md). These belong to the event loop, and a scrape runs there too.

Promise: the series look to a scraper as prometheus_client's own do, but for `_created`. Must not be done here: being
called from other threads.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prometheus_client import CollectorRegistry


class Tally:
    """A number that only grows."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0

    def inc(self, amount: int = 1) -> None:
        """Count."""
        self.value += amount


class Spread:
    """How values are spread over buckets with these upper bounds (each inclusive, ascending)."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def add_to(self, family: HistogramMetricFamily, labels: Sequence[str]) -> None:
        """Show it as one series of the family."""
        names = [*map(str, map(float, self._bounds)), "+Inf"]
        family.add_metric(labels, list(zip(names, accumulate(self._counts), strict=True)), self._sum)


class Tallies(Collector):
    """Counters of one name, a number for each value of its labels.

    Args:
        name: without `_total`.
        text: what it counts.
        labels: names of its labels.
        registry: where it is registered.
    """

    def __init__(self, name: str, text: str, labels: Sequence[str] = (), *, registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._labels = tuple(labels)
        self._tallies: dict[tuple[str, ...], Tally] = {}
        registry.register(self)

    def labels(self, *values: str) -> Tally:
        """The number for these values, from 0."""
        assert len(values) == len(self._labels), "a value for each label"
        return self._tallies.setdefault(values, Tally())

    def collect(self) -> Iterable[CounterMetricFamily]:
        """For the registry."""
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for values, tally in self._tallies.items():
            family.add_metric(values, tally.value)
        return [family]


class Spreads(Collector):
    """Histograms of one name, one for each value of its label.

    Args:
        name: with its unit.
        text: what it measures.
        label: name of the label.
        bounds: of the buckets, without infinity.
        registry: where it is registered.
    """

    def __init__(
        self, name: str, text: str, label: str, *, bounds: Sequence[float], registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._text = text
        self._label = label
        self._bounds = tuple(bounds)
        self._spreads: dict[str, Spread] = {}
        registry.register(self)

    def labels(self, value: str) -> Spread:
        """The histogram for this value, empty at first."""
        return self._spreads.setdefault(value, Spread(self._bounds))

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """For the registry."""
        family = HistogramMetricFamily(self._name, self._text, labels=(self._label,))
        for value, spread in self._spreads.items():
            spread.add_to(family, (value,))
        return [family]
