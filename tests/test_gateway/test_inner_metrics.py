"""Every metric of the inner half moves in a scenario: none is declared and forgotten."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry

from fleetlm_common import rpc
from fleetlm_common.errors import TryAgain
from fleetlm_common.ids import SessionId
from fleetlm_common.rpc import Kind
from fleetlm_gateway.boundary import FromCursor
from tests.support.fakeshard import Hold, Refuse, draft
from tests.support.fastloop import run_fast
from tests.support.gatewayrig import Recorder, rig, until


def moved(registry: CollectorRegistry) -> set[str]:
    """Names of metrics of which some sample is not zero."""
    return {
        metric.name
        for metric in registry.collect()
        for sample in metric.samples
        if sample.value and not sample.name.endswith("_created")
    }


def test_every_metric_moves() -> None:
    """One conversation with a refusal, a move, a lost connection and a slow reader moves each series."""

    async def main() -> None:
        async with rig(shards=2) as parts:
            session = parts.world.session_of("shard-0")
            seen: set[str] = set()
            release = asyncio.Event()
            parts.shards[0].script(
                Kind.APPEND, Refuse(TryAgain("x", reason="overloaded", retry_after_ms=1)), Hold(release)
            )
            appending = asyncio.create_task(parts.boundary.append(session, [draft("a")]))
            await parts.shards[0].until_asked(rpc.Append, 2)
            seen |= moved(parts.registry)
            release.set()
            await appending
            sink = Recorder(0)
            place = await parts.boundary.subscribe(session, start=FromCursor(0), sink=sink)
            place.begin()
            await until(lambda: sink.caught_ups)
            parts.world.write(session, 2)
            await sink.until(3)
            sink.full = True
            parts.world.write(session)
            await until(lambda: parts.metric("readers_behind"))
            seen |= moved(parts.registry)
            parts.world.move(session, "shard-1")
            await until(lambda: parts.metric("resubscriptions_total", why="moved"))
            await parts.boundary.info(SessionId(session))
            seen |= moved(parts.registry)
            declared = {metric.name for metric in parts.registry.collect()}
            assert declared - seen == set()

    run_fast(main())
