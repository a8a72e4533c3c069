"""Every metric of the shard; labels are bounded (never a session id).

Counters and gauges are plain numbers in the parts, read when somebody scrapes: the append path does not pay for them.
Promise: what stands in `COUNTERS`, `GAUGES` and `Histograms` is all there is (docs/operations/metrics.md lists it), and
moves in a running system (a test asserts it). Must not be done here: measuring (that stands where things happen).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fleetlm_shard.archive.worker import Report

if TYPE_CHECKING:
    from fleetlm_shard.shard import Shard

PREFIX: Final = "fleetlm_shard_"
_SECONDS: Final = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_COUNTS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)

Number = Callable[["Shard"], float]


def _archive(shard: Shard) -> Report:
    """How the archive stands; of a shard without one nothing ever moves."""
    return _NO_ARCHIVE if shard.archiver is None else shard.archiver.report


def _lag_s(shard: Shard) -> float:
    return 0.0 if shard.archiver is None else shard.archiver.lag_s


_NO_ARCHIVE: Final = Report()

COUNTERS: Final[tuple[tuple[str, str, Number], ...]] = (
    ("appended_messages", "Messages taken into the log", lambda s: s.sequencer.appended),
    ("deduped_messages", "Messages answered from the idempotency window", lambda s: s.sequencer.deduped),
    ("expected_seq_conflicts", "Appends refused because of expected_seq", lambda s: s.sequencer.conflicts),
    (
        "idempotency_conflicts",
        "Appends refused because their key was used for other content",
        lambda s: s.sequencer.idempotency_conflicts,
    ),
    ("cursors_moved", "Read cursors that moved", lambda s: s.session_writes.marked),
    ("sessions_created", "Sessions created explicitly", lambda s: s.session_writes.created),
    ("refused_requests", "Requests answered with a refusal", lambda s: s.server.refused),
    ("failed_requests", "Requests that failed because of a mistake of the shard's own", lambda s: s.server.failed),
    ("pages", "Replay pages", lambda s: s.replay.pages),
    ("pages_cold", "Replay pages read from the disk", lambda s: s.replay.pages_cold),
    ("gaps", "Replay pages with a gap", lambda s: s.replay.gaps),
    ("pushes", "PUSH frames sent to gateways", lambda s: s.subscriptions.pushed),
    ("pushed_messages", "Messages published to at least one gateway", lambda s: s.subscriptions.pushed_messages),
    (
        "overflowed_subscriptions",
        "Subscriptions ended because their gateway did not read",
        lambda s: s.subscriptions.overflowed,
    ),
    ("hot_hits", "Sessions asked for that were in memory", lambda s: s.memory.sessions.hits),
    ("hot_misses", "Sessions asked for that had to be loaded", lambda s: s.memory.sessions.misses),
    ("hot_evicted", "Sessions that left memory", lambda s: s.memory.sessions.evicted),
    ("log_batches", "Batches written", lambda s: s.log.stats.batches),
    ("log_records", "Records written", lambda s: s.log.stats.appended_records),
    ("log_bytes", "Bytes of batches written", lambda s: s.log.stats.appended_bytes),
    ("log_rounds", "Rounds of the writer; each ends with a look at the term", lambda s: s.log.stats.rounds),
    ("log_marks", "Marks written by an idle log", lambda s: s.log.stats.marks),
    ("log_rotations", "Segments begun", lambda s: s.log.stats.rotations),
    ("log_reads", "Pages read back", lambda s: s.log.stats.reads),
    ("log_trimmed_segments", "Segments dropped by retention", lambda s: s.log.stats.trimmed_segments),
    (
        "log_compacted_segments",
        "Segments written anew without what had moved away",
        lambda s: s.log.stats.compacted_segments,
    ),
    ("log_compacted_bytes", "Bytes that the volume got back by it", lambda s: s.log.stats.compacted_bytes),
    ("log_background_failures", "Housekeeping of the log that failed", lambda s: s.log.stats.background_failures),
    ("moves_sealed", "Moves away for which this shard sealed itself", lambda s: s.moves.exporter.seals),
    ("moves_confirmed", "Moves to here that were confirmed", lambda s: s.moves.confirmed),
    ("moves_failed", "Moves to here that were given up", lambda s: s.moves.failed),
    ("moves_mismatched", "Times that a move's end did not agree with its source", lambda s: s.moves.mismatches),
    ("exported_messages", "Messages told to targets of moves", lambda s: s.moves.exporter.exported_messages),
    ("exported_bytes", "The same in bytes", lambda s: s.moves.exporter.exported_bytes),
    ("imported_messages", "Messages brought over by moves", lambda s: s.moves.imported_messages),
    ("imported_bytes", "The same in bytes", lambda s: s.moves.imported_bytes),
    ("held_writes", "Writes that had to wait because their slot was sealed", lambda s: s.ownership.held.held),
    (
        "held_writes_refused",
        "Writes refused because too many waited, or for too long",
        lambda s: s.ownership.held.refused,
    ),
    ("slots_released", "Copies of slots dropped after they had moved away", lambda s: s.moves.released_slots),
    ("checkpoints", "Checkpoints written", lambda s: s.log.stats.checkpoints),
    ("checkpoint_failures", "Checkpoints that failed", lambda s: s.log.stats.checkpoint_failures),
    ("archived_messages", "Messages written to the archive", lambda s: _archive(s).messages),
    ("archive_batches", "Transactions of the archive", lambda s: _archive(s).batches),
    ("archive_duplicates", "Messages that the archive had already", lambda s: _archive(s).duplicates),
    ("archive_failures", "Times that the database went away or refused", lambda s: _archive(s).failures),
    ("archive_quarantined", "Records that PostgreSQL refused", lambda s: _archive(s).quarantined),
    ("archive_damaged_ranges", "Ranges of the log that could not be archived", lambda s: _archive(s).damaged),
    ("archive_reads", "Pages of replays read from the archive", lambda s: s.cold.archive_reads),
    ("archive_read_failures", "Such pages that the database did not give", lambda s: s.cold.archive_failures),
    ("archiver_starts", "Starts of the archiver's process", lambda s: s.archiver.starts if s.archiver else 0),
)
"""(name without prefix and `_total`, help, where it is)."""

GAUGES: Final[tuple[tuple[str, str, Number], ...]] = (
    ("term", "Term of this boot on its volume", lambda s: s.credentials.term),
    ("ring_epoch", "Epoch of the ring map in use", lambda s: s.ownership.epoch),
    ("slots_served", "Slots that are served", lambda s: len(s.ownership.serves)),
    (
        "slots_sealed",
        "Slots that are only read because a move of them is about to end",
        lambda s: len(s.ownership.sealed),
    ),
    ("moves_away", "Moves in flight with this shard as source", lambda s: len(s.moves.exporter.trackers)),
    ("moves_here", "Moves in flight with this shard as target", lambda s: len(s.moves.progress)),
    ("held_writes_waiting", "Writes that wait for the end of a seal", lambda s: s.ownership.held.count),
    ("connections", "Gateways connected", lambda s: len(s.server.connections)),
    ("requests_in_flight", "Requests without an answer", lambda s: s.server.in_flight),
    ("subscriptions", "Subscriptions of gateways", lambda s: s.subscriptions.count),
    ("hot_sessions", "Sessions in memory", lambda s: len(s.memory.sessions)),
    ("hot_bytes", "Memory of sessions and their newest messages", lambda s: s.memory.sessions.bytes),
    (
        "changed_sessions",
        "Sessions that changed since the last checkpoint",
        lambda s: s.memory.sessions.changed_count,
    ),
    ("keys", "Keys in the idempotency window", lambda s: len(s.memory.keys)),
    ("log_segments", "Segments of the log", lambda s: s.log.stats.segments),
    ("log_segment_bytes", "Size of the log's segments", lambda s: s.log.stats.segment_bytes),
    ("log_queued_records", "Records that wait for the disk", lambda s: s.log.stats.queued_records),
    ("log_queued_bytes", "Bytes that wait for the disk", lambda s: s.log.stats.queued_bytes),
    ("log_durable_position_bytes", "End of what is durable", lambda s: s.log.durable_pos),
    (
        "log_unchecked_bytes",
        "Log since the last checkpoint: what a boot would read",
        lambda s: s.log.durable_pos - s.log.stats.checkpoint_pos,
    ),
    ("log_damaged_ranges", "Ranges of the log that are unreadable", lambda s: len(s.log.damage)),
    ("log_stray_files", "Files of the log's folder that are not part of it", lambda s: len(s.log.stats.strays)),
    ("disk_free_bytes", "Free space on the volume, as of the last round", lambda s: s.log.stats.free_bytes),
    ("archiving", "1 while the archive takes what it is given", lambda s: _archive(s).state == "Archiving"),
    ("archive_lag_bytes", "Log that is durable and not archived", lambda s: s.archiver.lag_bytes if s.archiver else 0),
    (
        "archive_lag_messages",
        "Messages that are durable and not archived",
        lambda s: s.archiver.lag_messages if s.archiver else 0,
    ),
    ("archive_lag_seconds", "Age of the oldest message in the archive's transaction under way", _lag_s),
    ("archive_halted_slots", "Slots with another message in the archive", lambda s: len(_archive(s).halted)),
)
"""(name without prefix, help, where it is)."""


class Histograms:
    """What is measured once a batch.

    Args:
        registry: where they are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, text, buckets=buckets, registry=registry)

        self.sync_seconds = histogram("log_sync_seconds", "Each sync of the log", _SECONDS)
        self.batch_records = histogram("batch_records", "Records that became durable together", _COUNTS)
        self.answer_seconds = histogram(
            "answer_seconds", "From queueing to the answer: the longest-waiting request of each batch", _SECONDS
        )

    def measured(self, records: int, seconds: float) -> None:
        """A batch became durable; its longest-waiting request took that long."""
        self.batch_records.observe(records)
        self.answer_seconds.observe(seconds)


class ShardCollector(Collector):
    """The numbers of a shard as of the scrape.

    Args:
        shard: the shard, None while it boots.
        ready: whether it says that it is ready.
    """

    def __init__(self, *, shard: Callable[[], Shard | None], ready: Callable[[], bool]) -> None:
        self._shard = shard
        self._ready = ready

    def describe(self) -> Iterable[Metric]:
        """Names without values, so that registering does not ask a shard that is still booting."""
        yield GaugeMetricFamily(PREFIX + "ready", _READY)
        for name, text, _ in COUNTERS:
            yield CounterMetricFamily(PREFIX + name, text)
        for name, text, _ in GAUGES:
            yield GaugeMetricFamily(PREFIX + name, text)

    def collect(self) -> Iterator[Metric]:
        """All of it; only readiness while the shard boots."""
        yield GaugeMetricFamily(PREFIX + "ready", _READY, value=float(self._ready()))
        shard = self._shard()
        if shard is None:
            return
        for name, text, number in COUNTERS:
            yield CounterMetricFamily(PREFIX + name, text, value=number(shard))
        for name, text, number in GAUGES:
            yield GaugeMetricFamily(PREFIX + name, text, value=number(shard))


_READY: Final = "1 while the shard says that it is ready"
