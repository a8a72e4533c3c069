"""The gateway's inner half against real shard processes: every operation, and kills under load."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from fleetlm_common import rpc
from fleetlm_common.errors import Conflict, IdempotencyConflict, Invalid, TryAgain
from fleetlm_common.ids import SessionId
from fleetlm_common.logs import NullLogger
from fleetlm_gateway.boundary import Boundary, FromCursor, FromTail, LiveOnly
from fleetlm_gateway.metrics import InnerMetrics
from tests.support.gatewayrig import Recorder, until
from tests.support.shardset import CREDENTIAL, Shards, shards

S = SessionId("a session")


def draft(key: str, content: str = "hello") -> rpc.Draft:
    """A draft as the outer half makes them."""
    encoded = msgspec.json.encode(content)
    return rpc.Draft(
        key, b'"sender_id":"alice","sender_kind":"human","kind":"text","content":%b,"metadata":{}' % encoded
    )


@asynccontextmanager
async def gateway(folder: Path, *, count: int) -> AsyncGenerator[tuple[Shards, Boundary], None]:
    """Shards and a boundary that reaches all of them."""
    async with shards(folder, count) as running:
        boundary = Boundary(
            gateway="gateway-0",
            credential=CREDENTIAL,
            control=running.control(),
            entropy=random.Random(1),
            log=NullLogger(),
            metrics=InnerMetrics(CollectorRegistry()),
        )
        await boundary.start()
        try:
            await until(lambda: boundary.ready().ok and not boundary.ready().message)
            yield running, boundary
        except TimeoutError:
            raise AssertionError(f"{boundary.ready()}\n{running.printed()}") from None
        finally:
            await boundary.stop()


async def until_cursor(sink: Recorder, seq: int) -> None:
    await until(lambda: sink.cursor == seq and sink.caught_ups)


async def append_surely(boundary: Boundary, session: SessionId, key: str) -> int:
    """As a client does: the same key until there is an answer other than TRY_AGAIN."""
    while True:
        try:
            return (await boundary.append(session, [draft(key, key)]))[0].seq
        except TryAgain:
            continue


async def test_every_operation(tmp_path: Path) -> None:
    """Append, dedupe, conflict, read, join, mark, create and list, as clients see them."""
    async with gateway(tmp_path, count=2) as (_, boundary):
        assert not (await boundary.info(S)).exists
        live = Recorder(0)
        place = await boundary.subscribe(S, start=LiveOnly(), sink=live)
        place.begin()
        acks = await boundary.append(S, [draft("a"), draft("b")], expected_seq=0)
        assert [(ack.seq, ack.deduped) for ack in acks] == [(1, False), (2, False)]
        again = await boundary.append(S, [draft("a"), draft("b")], expected_seq=0)
        assert [(ack.seq, ack.id, ack.deduped) for ack in again] == [(ack.seq, ack.id, True) for ack in acks]
        with pytest.raises(IdempotencyConflict):
            await boundary.append(S, [draft("a", "other")])
        with pytest.raises(Conflict) as conflict:
            await boundary.append(S, [draft("c")], expected_seq=1)
        assert conflict.value.last_seq == 2
        page = await boundary.read(S, after=0, limit=10)
        assert (page.first_seq, len(page.messages), page.has_more) == (1, 2, False)
        assert msgspec.json.decode(page.messages[0])["content"] == "hello"
        tail = await boundary.read(S, tail=1, limit=10)
        assert (tail.first_seq, len(tail.messages), tail.has_more) == (2, 1, True)
        with pytest.raises(Invalid) as ahead:
            await boundary.subscribe(S, start=FromCursor(9), sink=Recorder())
        assert (ahead.value.reason, ahead.value.last_seq) == ("cursor_ahead", 2)
        await until_cursor(live, 2)
        assert await boundary.mark_read(S, "alice", 2) == 2
        assert await boundary.mark_read(S, "alice", 1) == 2
        assert (await boundary.create(SessionId("b"), b'{"x":1}')).created
        assert not (await boundary.create(SessionId("b"), b'{"x":1}')).created
        assert [name for name, _ in await boundary.sessions(after="", limit=10)] == ["a session", "b"]
        assert live.reads[-1:] == [("alice", 2)]


async def test_replay_meets_live_under_traffic(tmp_path: Path) -> None:
    """Readers join anywhere while appends go on; each gets one contiguous stream."""
    async with gateway(tmp_path, count=1) as (_, boundary):
        for number in range(200):
            await boundary.append(S, [draft(f"{number}-{part}") for part in range(10)])
        sinks: list[Recorder] = []
        for number in range(200):
            await boundary.append(S, [draft(f"live-{number}")])
            if number % 10 == 0:
                start = FromCursor(number * 10) if number % 20 else FromTail(number)
                sinks.append(Recorder(start.seq if isinstance(start, FromCursor) else None))
                place = await boundary.subscribe(S, start=start, sink=sinks[-1])
                place.begin()
        for sink in sinks:
            await until_cursor(sink, 2200)
            assert sink.seqs == list(range(sink.seqs[0], 2201))


@pytest.mark.parametrize("seed", [1])
async def test_kills_under_load(tmp_path: Path, seed: int) -> None:
    """SIGKILLs under load: every append gets its one place, logs are in order, readers' streams are whole."""
    entropy = random.Random(seed)
    async with gateway(tmp_path, count=2) as (running, boundary):
        sessions = [SessionId(f"session-{number}") for number in range(8)]
        sinks = {session: [Recorder(0) for _ in range(3)] for session in sessions}
        for session, places in sinks.items():
            for sink in places:
                (await boundary.subscribe(session, start=FromCursor(0), sink=sink)).begin()
        acked: dict[SessionId, dict[str, int]] = {session: {} for session in sessions}
        stop = asyncio.Event()

        async def write(session: SessionId) -> None:
            number = 0
            while not stop.is_set():
                key = f"{session}-{number}"
                acked[session][key] = await append_surely(boundary, session, key)
                number += 1

        async with asyncio.TaskGroup() as writers:
            for session in sessions:
                writers.create_task(write(session))
            for _ in range(6):
                await asyncio.sleep(entropy.uniform(0.2, 0.8))
                name = entropy.choice(running.names)
                await running.kill(name)
                await running.start(name)
            await asyncio.sleep(0.5)
            stop.set()
        for session in sessions:
            count = len(acked[session])
            assert count > 0
            assert list(acked[session].values()) == list(range(1, count + 1)), running.printed()
            for sink in sinks[session]:
                await until_cursor(sink, count)
                assert sink.seqs == list(range(1, count + 1))


async def test_a_frozen_shard_is_left_and_found_again(tmp_path: Path) -> None:
    """SIGSTOP of a shard is noticed; an append that met it succeeds within its one deadline when the shard goes on."""
    async with gateway(tmp_path, count=1) as (running, boundary):
        assert await append_surely(boundary, S, "a") == 1
        running.signal("shard-0", signal.SIGSTOP)
        appending = asyncio.create_task(boundary.append(S, [draft("b", "b")]))
        await until(lambda: not boundary.ready().ok)
        assert boundary.ready().reason == "NoShardReachable"
        running.signal("shard-0", signal.SIGCONT)
        assert [ack.seq for ack in await appending] == [2]
        assert (await boundary.info(S)).last_seq == 2
