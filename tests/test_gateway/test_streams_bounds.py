"""Streams under pressure: slow sinks cost nobody anything, and everything that is kept has a bound."""

from __future__ import annotations

import asyncio
import random

import pytest

from fleetlm_common import rpc
from fleetlm_common.errors import TryAgain
from fleetlm_common.rpc import Kind
from fleetlm_gateway import pages, streams
from fleetlm_gateway.boundary import FromCursor, LiveOnly
from tests.support.fakeshard import (
    PAGE_MESSAGES_MAX,
    Hold,
)
from tests.support.fastloop import run_fast
from tests.support.gatewayrig import join, rig, stream_of, until

BUSY = TryAgain("busy", reason="overloaded", retry_after_ms=10)


def test_a_stalled_sink_slows_nobody_and_costs_nothing() -> None:
    """One sink that never takes anything beside a hundred that do: they get all, the tail stays small."""

    async def main() -> None:
        async with rig() as parts:
            stalled, place = await join(parts, LiveOnly())
            await until(lambda: stalled.caught_ups)
            stalled.full = True
            sinks = [(await join(parts, LiveOnly()))[0] for _ in range(100)]
            await until(lambda: all(sink.caught_ups for sink in sinks))
            for _ in range(100):
                parts.world.write("s", 20)
                await asyncio.sleep(0)
            await until(lambda: all(sink.cursor == 2000 for sink in sinks))
            assert stream_of(parts)._tail.messages <= streams.TAIL_IDLE_MESSAGES_MAX
            assert parts.boundary._streams.tail_bytes <= streams.TAIL_IDLE_BYTES_MAX
            assert parts.metric("readers_behind") == 1
            assert stalled.seqs == []
            stalled.full = False
            place.resume()
            await stalled.until(2000)
            assert stalled.seqs == list(range(1, 2001))
            assert len(stalled.caught_ups) == 1
            assert parts.metric("readers_behind") == 0

    run_fast(main())


def test_a_sink_that_fills_during_replay_goes_on_from_its_cursor() -> None:
    """Full at any moment, resumed at any later one: nothing is repeated and nothing is missing."""

    async def main() -> None:
        async with rig(seed=3) as parts:
            entropy = random.Random(3)
            parts.world.write("s", 4 * PAGE_MESSAGES_MAX)
            sink, place = await join(parts, FromCursor(0))
            for _ in range(60):
                sink.full = entropy.random() < 0.5
                parts.world.write("s", entropy.randrange(4))
                await asyncio.sleep(entropy.random() * 0.1)
                if not sink.full:
                    place.resume()
            sink.full = False
            place.resume()
            last = len(parts.world.logs["s"].messages)
            await sink.until(last)
            assert sink.seqs == list(range(1, last + 1))
            assert len(sink.caught_ups) == 1

    run_fast(main())


def test_the_tail_is_bounded_while_somebody_catches_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a page hangs, what is kept of the live stream stays within its bounds; the reader still gets through."""
    monkeypatch.setattr(streams, "TAIL_MESSAGES_MAX", 64)

    async def main() -> None:
        async with rig() as parts:
            parts.world.write("s", 10)
            live, _ = await join(parts, LiveOnly())
            await until(lambda: live.caught_ups)
            release = asyncio.Event()
            parts.shards[0].script(Kind.READ, Hold(release))
            behind, _ = await join(parts, FromCursor(0))
            for _ in range(50):
                parts.world.write("s", 10)
                await asyncio.sleep(0.02)
            await live.until(510)
            assert stream_of(parts)._tail.messages <= 64
            release.set()
            await until(lambda: behind.caught_ups)
            assert behind.seqs == list(range(1, 511))

    run_fast(main())


def test_all_tails_together_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the common budget sessions keep nothing; readers catch up by pages alone."""
    monkeypatch.setattr(streams, "TAIL_TOTAL_BYTES_MAX", 0)

    async def main() -> None:
        async with rig() as parts:
            sink, _ = await join(parts, LiveOnly())
            await until(lambda: sink.caught_ups)
            parts.world.write("s", 10)
            await sink.until(10)
            assert parts.boundary._streams.tail_bytes == 0
            other, _ = await join(parts, FromCursor(0))
            await until(lambda: other.caught_ups == [10])

    run_fast(main())


def test_pages_at_once_are_bounded_per_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that does not answer pages holds up its own readers only, and so many of them at once."""
    monkeypatch.setattr(pages, "PAGES_PER_SHARD_MAX", 3)

    async def main() -> None:
        async with rig(shards=2) as parts:
            slow = [parts.world.session_of("shard-0", number=number) for number in range(10)]
            healthy = parts.world.session_of("shard-1")
            for session in (*slow, healthy):
                parts.world.write(session, 3)
            release = asyncio.Event()
            parts.shards[0].script(Kind.READ, *[Hold(release)] * 10)
            sinks = [(await join(parts, FromCursor(0), session=session))[0] for session in slow]
            quick, _ = await join(parts, FromCursor(0), session=healthy)
            await until(lambda: quick.caught_ups)
            assert len(parts.shards[0].asked(rpc.Read)) == 3
            assert parts.boundary._streams.pages.active == 3
            release.set()
            await until(lambda: all(sink.caught_ups for sink in sinks))

    run_fast(main())
