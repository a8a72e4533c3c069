"""The admin API on the operations port: what this shard is and has, for `fleetlm ring` and for people.

    GET /admin/status → Status as JSON

Promise: true at the moment of the request, also while the shard boots (then most of it is missing).
Must not be done here: changing anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

if TYPE_CHECKING:
    from collections.abc import Callable

    from fleetlm_common.ops import Health
    from fleetlm_shard.shard import Shard


class Serving(msgspec.Struct, frozen=True):
    """What a shard that has booted holds. Sizes in bytes; `slots` as ranges `[first, last]`."""

    ring_uid: str
    volume_id: str
    term: int
    epoch: int
    standing: str
    slots: list[tuple[int, int]]
    connections: int
    subscriptions: int
    hot_sessions: int
    hot_bytes: int
    keys: int
    log_segments: int
    log_segment_bytes: int
    log_durable_pos: int
    log_trim_pos: int
    log_queued_records: int
    checkpoint_pos: int
    checkpoints: int
    damage: list[tuple[int, int, int]]
    strays: list[str]
    disk_free_bytes: int


class Status(msgspec.Struct, frozen=True):
    """The answer; `serving` is null until the log has been read."""

    name: str
    ready: bool
    reason: str
    message: str
    serving: Serving | None


def status_of(name: str, health: Health, shard: Shard | None) -> Status:
    """What the shard is now."""
    return Status(name, health.ok, health.reason, health.message, None if shard is None else _serving(shard))


def _serving(shard: Shard) -> Serving:
    stats = shard.log.stats
    return Serving(
        ring_uid=shard.credentials.ring_uid,
        volume_id=shard.credentials.volume_id,
        term=shard.credentials.term,
        epoch=shard.ownership.epoch,
        standing=shard.ownership.standing,
        slots=ranges_of(sorted(shard.ownership.serves)),
        connections=len(shard.server.connections),
        subscriptions=shard.subscriptions.count,
        hot_sessions=len(shard.memory.sessions),
        hot_bytes=shard.memory.sessions.bytes,
        keys=len(shard.memory.keys),
        log_segments=stats.segments,
        log_segment_bytes=stats.segment_bytes,
        log_durable_pos=stats.durable_pos,
        log_trim_pos=stats.trim_pos,
        log_queued_records=stats.queued_records,
        checkpoint_pos=stats.checkpoint_pos,
        checkpoints=stats.checkpoints,
        damage=[(each.from_pos, each.to_pos, each.lost_max) for each in stats.damage],
        strays=list(stats.strays),
        disk_free_bytes=stats.free_bytes,
    )


def ranges_of(numbers: list[int]) -> list[tuple[int, int]]:
    """Fold ascending numbers into ranges (first, last)."""
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] + 1 == number:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges


def routes(status: Callable[[], Status]) -> list[web.RouteDef]:
    """The admin API's routes."""

    async def get_status(_: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(status()), content_type="application/json")

    return [web.get("/admin/status", get_status)]
