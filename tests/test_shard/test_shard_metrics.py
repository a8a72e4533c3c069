"""Every documented metric of the shard moves in a scenario, and every metric is documented."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from fleetlm_common import rpc
from fleetlm_common.errors import FleetError
from fleetlm_common.ids import ShardName
from fleetlm_common.rpc import Kind
from fleetlm_shard.config import ShardConfig
from fleetlm_shard.metrics import COUNTERS, GAUGES, PREFIX, Histograms, ShardCollector
from fleetlm_shard.shard import Shard
from tests.support.eventually import eventually
from tests.support.movesrig import moves_rig, session_in
from tests.support.rpcclient import RpcClient, draft, fragment
from tests.support.shardrig import NAME, SLOTS, Rig, RigClock, shard_rig
from tests.support.simdisk import SimVolume

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations" / "metrics.md"
STILL = {
    "fleetlm_shard_failed_requests_total": "a mistake of the shard's own (test_server.py makes one)",
    "fleetlm_shard_overflowed_subscriptions_total": "16 MiB unread (test_subscriptions.py)",
    "fleetlm_shard_log_background_failures_total": "a disk that fails (test_log_files.py)",
    "fleetlm_shard_checkpoint_failures_total": "a disk that fails (test_log_files.py)",
    "fleetlm_shard_log_damaged_ranges": "damage (test_log_damage.py)",
    "fleetlm_shard_log_compacted_segments_total": "minutes after a move (test_compaction.py)",
    "fleetlm_shard_log_compacted_bytes_total": "minutes after a move (test_compaction.py)",
    "fleetlm_shard_log_stray_files": "an elder's late files (test_log_files.py)",
    **{
        f"fleetlm_shard_{name}": "an archive (tests/integration/test_archive.py)"
        for name in (
            "archived_messages_total",
            "archive_batches_total",
            "archive_duplicates_total",
            "archive_failures_total",
            "archive_quarantined_total",
            "archive_damaged_ranges_total",
            "archive_reads_total",
            "archive_read_failures_total",
            "archiver_starts_total",
            "archiving",
            "archive_lag_bytes",
            "archive_lag_messages",
            "archive_lag_seconds",
            "archive_halted_slots",
        )
    },
    "fleetlm_shard_held_writes_refused_total": "five seconds of waiting (test_moves.py)",
    "fleetlm_shard_moves_failed_total": "a target that gives up (test_moves_faults.py)",
    "fleetlm_shard_moves_mismatched_total": "a source that forgets (test_moves_faults.py)",
    "fleetlm_shard_log_marks_total": "an idle second, waited for below",
}
"""What needs a fault that other tests make; named so that nothing is left out in silence."""


def documented() -> set[str]:
    """Names in the shard's section of the document."""
    section = DOCUMENT.read_text().split("## Shard", 1)[1].split("\n## ", 1)[0]
    return set(re.findall(r"`(fleetlm_shard_[a-z_]+)`", section))


def declared() -> set[str]:
    """Names that the code declares."""
    registry = CollectorRegistry()
    Histograms(registry)
    histograms = {metric.name for metric in registry.collect()}
    counters = {f"{PREFIX}{name}_total" for name, _, _ in COUNTERS}
    return {f"{PREFIX}ready", *histograms, *counters, *(f"{PREFIX}{name}" for name, _, _ in GAUGES)}


def test_what_stands_still_moves_elsewhere() -> None:
    """Every file that is said to move a series exists."""
    root = Path(__file__).parents[2]
    for why in STILL.values():
        for name in re.findall(r"[a-z_/]+\.py", why):
            assert (root / name).exists() or (Path(__file__).parent / name).exists(), name


def test_the_document_lists_what_is_declared() -> None:
    """Neither a metric that nobody explains nor an explanation of nothing."""
    assert documented() == declared()


async def test_every_documented_metric_moves() -> None:
    """A scenario of everything that a shard does; each series is scraped and must differ from zero at some moment."""
    volume, clock = SimVolume(), RigClock()
    seen: dict[str, float] = {}
    async with shard_rig(volume, clock=clock, retention_bytes=1, keys_window_s=15.0, hot_bytes_max=1024 * 1024) as rig:
        registry = CollectorRegistry()
        histograms = Histograms(registry)
        registry.register(ShardCollector(shard=lambda: rig.shard, ready=lambda: rig.shard.health().ok))
        rig.batches.append(histograms.measured)
        rig.syncs.append(histograms.sync_seconds.observe)

        def scrape() -> None:
            _scrape(registry, seen)

        async with await rig.client() as client:
            await _live(rig, client, scrape)
        scrape()
    await _moves(seen)
    moved = {name.removesuffix("_count") for name, value in seen.items() if value > 0}
    assert moved >= {f"{PREFIX}batch_records", f"{PREFIX}log_sync_seconds"}
    assert documented() - moved - set(STILL) == set()


async def _moves(seen: dict[str, float]) -> None:
    """A move, scraped at both ends, and the copy that it leaves is dropped."""
    async with moves_rig(clean_after_s=0.0) as ring, await ring[0].client() as client:

        def scrape() -> None:
            for number in (0, 1):
                registry = CollectorRegistry()
                registry.register(ShardCollector(shard=partial(_shard_of, ring[number]), ready=lambda: True))
                _scrape(registry, seen)

        session = session_in(3)
        await client.append(session, "before")
        move = await ring.begin([3], 0, 1)
        await ring.says(move, "Ready")
        await ring.seal(move)
        waiting = client.send(Kind.APPEND, rpc.encode(rpc.Append(1, session, [rpc.Entry([draft("waits")])])))
        await client.info(session)
        await ring.says(move, "Confirmed")
        scrape()
        await ring.commit(move)
        await waiting
        ring[0].shard.moves.clean()
        await eventually(lambda: ring[0].shard.moves.released_slots > 0, "the copy at the source is dropped")
        scrape()


def _shard_of(rig: Rig) -> Shard:
    return rig.shard


def _scrape(registry: CollectorRegistry, seen: dict[str, float]) -> None:
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            seen[sample.name] = max(seen.get(sample.name, 0.0), sample.value)


async def _live(rig: Rig, client: RpcClient, scrape: Callable[[], None]) -> None:
    await client.create("made", b'{"a":1}')
    stream = await client.subscribe("s")
    await client.append("s", "one")
    await client.append("s", "one")
    await client.append_entries("s", rpc.Entry([rpc.Draft("one", fragment("other"))]), rpc.Entry([draft("x")], 0))
    await client.mark_read("s", "bob", 1)
    await stream.next()
    rig.writer.hold()
    pending = client.send(Kind.APPEND, rpc.encode(rpc.Append(1, "s", [rpc.Entry([draft("two")])])))
    await client.request(Kind.PING, b"")
    scrape()
    rig.writer.release()
    await pending
    for number in range(200):
        await client.append(f"bulk-{number % 30}", f"{number} " + "x" * 50_000)
    await eventually(lambda: rig.shard.log.stats.rotations > 0, "a second segment")
    scrape()
    rig.clock.advance(100.0)
    for _ in range(100):
        rig.shard.memory.keys.evict(rig.clock.monotonic_s())
    for _ in range(2):
        await rig.shard.upkeep.checkpoint()
    await rig.shard.upkeep.retain()
    for number in range(600):
        await client.info(f"other-{number}")
        rig.shard.memory.sessions.evict()
    await client.read("bulk-1", after=0)
    await rig.own([ShardName("shard-1")] * SLOTS)
    with contextlib.suppress(FleetError):
        await client.append("s", "three")
    await rig.own([NAME] * SLOTS)


def test_the_document_lists_every_variable_with_its_default() -> None:
    """Configuration that nobody can look up does not exist."""
    text = (DOCUMENT.parent / "configuration.md").read_text()
    section = text.split("## Shard", 1)[1].split("\n## ", 1)[0]
    rows = dict(re.findall(r"^\| `FLEETLM_SHARD_([A-Z_]+)` \| `?([^`|]*?)`? \|", section, re.MULTILINE))
    fields = {field.name.upper(): field for field in msgspec.structs.fields(ShardConfig)}
    assert set(rows) == set(fields)
    for name, field in fields.items():
        default = "required" if field.required else str(field.default) or "empty"
        assert rows[name] == default, name
