"""The connection to one shard: handshake, silence, leaving, bounds."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from fleetlm_common import rpc
from fleetlm_common.errors import TryAgain, Unauthenticated
from fleetlm_common.ids import SessionId
from fleetlm_common.logs import NullLogger
from fleetlm_common.rpc import Kind
from fleetlm_common.wire import FrameConnection
from fleetlm_gateway import shardlink
from fleetlm_gateway.shardlink import LOST, Identity, NoPath, ShardLink, Target, connect_tcp
from tests.support.fakeshard import RING_UID, FakeShard, Hold, Mute, World, draft
from tests.support.fastloop import run_fast
from tests.support.gatewayrig import rig, until


def make_link(*, connect: shardlink.Connect = connect_tcp) -> ShardLink:
    return ShardLink(
        "shard-0",
        identity=Identity("gateway-0", b"secret"),
        epoch=lambda: 7,
        connect=connect,
        entropy=random.Random(1),
        log=NullLogger(),
        on_state=lambda _: None,
        on_epoch=lambda _: None,
    )


def aimed_at(shard: FakeShard) -> Target:
    return Target("127.0.0.1", shard.port, RING_UID, "volume-shard-0", shard.term)


def info(session: str) -> bytes:
    return rpc.encode(rpc.Info(1, session))


def test_hello_names_ring_volume_and_credential() -> None:
    """The handshake says which ring, shard and volume are meant, and brings the credential and the epoch."""

    async def main() -> None:
        world = World(1)
        shard = FakeShard(world, world.names[0])
        await shard.start()
        link = make_link()
        link.aim(aimed_at(shard))
        await until(lambda: link.ready)
        expected = rpc.Hello(rpc.PROTOCOL, RING_UID, "shard-0", "volume-shard-0", "gateway-0", b"secret", 7)
        assert shard.hellos == [expected]
        await link.close()
        await shard.stop()

    run_fast(main())


def test_a_secret_is_not_in_the_repr() -> None:
    """Reprs end up in logs; the credential must not."""
    assert "secret" not in repr(Identity("gateway-0", b"secret"))


def test_a_refused_handshake_is_told_and_tried_again() -> None:
    """A shard that refuses is no path, its reason can be read, and the link keeps trying."""

    async def main() -> None:
        world = World(1)
        shard = FakeShard(world, world.names[0])
        shard.refuse_hello = Unauthenticated("wrong credential")
        await shard.start()
        link = make_link()
        link.aim(aimed_at(shard))
        await until(lambda: "wrong credential" in link.why)
        with pytest.raises(NoPath, match="wrong credential"):
            link.call(Kind.INFO, info("s"), lambda _, __: None)
        shard.refuse_hello = None
        await until(lambda: link.ready)
        await link.close()
        await shard.stop()

    run_fast(main())


def test_an_elder_term_is_not_spoken_to() -> None:
    """A container with a lower term than one that was seen is fenced; the link refuses its handshake."""

    async def main() -> None:
        world = World(1)
        shard = FakeShard(world, world.names[0], term=4)
        await shard.start()
        link = make_link()
        link.aim(Target("127.0.0.1", shard.port, RING_UID, "volume-shard-0", 5))
        await until(lambda: "younger" in link.why)
        assert not link.ready
        shard.term = 5
        await until(lambda: link.ready)
        await link.close()
        await shard.stop()

    run_fast(main())


def test_on_another_volume_terms_begin_anew() -> None:
    """A shard that left, was given an empty volume and joined again is spoken to, whatever term it had before."""

    async def main() -> None:
        world = World(1)
        elder, younger = FakeShard(world, world.names[0], term=2), FakeShard(world, world.names[0], term=1)
        await elder.start()
        await younger.start()
        link = make_link()
        link.aim(aimed_at(elder))
        await until(lambda: link.ready)
        link.aim(Target("127.0.0.1", younger.port, RING_UID, "volume-new", 1))
        await until(lambda: bool(younger.hellos) and link.ready)
        link.aim(Target("127.0.0.1", elder.port, RING_UID, "volume-new", 0))
        elder.term = 0
        await until(lambda: "younger" in link.why)
        await link.close()
        await elder.stop()
        await younger.stop()

    run_fast(main())


def test_a_lost_connection_answers_what_was_in_flight() -> None:
    """Each request is answered exactly once with LOST when the connection ends, and the link comes back."""

    async def main() -> None:
        async with rig() as parts:
            shard = parts.shards[0]
            link = parts.boundary._router.route(SessionId("s")).link
            answers: list[int] = []
            shard.script(Kind.INFO, Mute(), Mute())
            for _ in range(2):
                link.call(Kind.INFO, info("s"), lambda kind, _: answers.append(kind))
            await shard.until_asked(rpc.Info, 2)
            shard.cut()
            await until(lambda: len(answers) == 2)
            assert answers == [LOST, LOST]
            await parts.until_all_links()
            assert (await parts.boundary.info(SessionId("s"))).last_seq == 0

    run_fast(main())


def test_one_broken_callback_costs_nobody_else_the_answer() -> None:
    """A mistake in what waits for one answer is reported; the other requests of the lost connection hear LOST."""

    async def main() -> None:
        async with rig() as parts:
            shard = parts.shards[0]
            link = parts.boundary._router.route(SessionId("s")).link
            answers: list[int] = []
            told: list[str] = []
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: told.append(str(context["exception"])))
            shard.script(Kind.INFO, Mute(), Mute())

            def broken(kind: int, payload: bytes) -> None:
                raise RuntimeError(f"a mistake with {kind}")

            link.call(Kind.INFO, info("s"), broken)
            link.call(Kind.INFO, info("s"), lambda kind, _: answers.append(kind))
            await shard.until_asked(rpc.Info, 2)
            shard.cut()
            await until(lambda: len(answers) == 1)
            assert (answers, told) == ([LOST], [f"a mistake with {LOST}"])

    run_fast(main())


def test_a_silent_shard_counts_as_gone() -> None:
    """A connection that stands but says nothing (frozen process, lost node) is given up, and requests get LOST."""

    async def main() -> None:
        async with rig() as parts:
            shard = parts.shards[0]
            link = parts.boundary._router.route(SessionId("s")).link
            answers: list[int] = []
            shard.frozen = True
            link.call(Kind.INFO, info("s"), lambda kind, _: answers.append(kind))
            began_s = asyncio.get_running_loop().time()
            await until(lambda: answers)
            assert asyncio.get_running_loop().time() - began_s < 4 * shardlink.SILENT_TICKS_MAX
            assert answers == [LOST]
            shard.frozen = False
            await parts.until_all_links()

    run_fast(main())


def test_an_idle_shard_that_answers_pings_stays() -> None:
    """Silence about requests is not silence of the connection."""

    async def main() -> None:
        async with rig() as parts:
            await asyncio.sleep(3 * shardlink.SILENT_TICKS_MAX)
            assert len(parts.shards[0].hellos) == 1

    run_fast(main())


def test_a_frozen_link_is_left_for_a_younger_life() -> None:
    """A shard that came back at another place with a higher term is connected to at once, the old place given up."""

    async def main() -> None:
        async with rig() as parts:
            elder = parts.shards[0]
            elder.frozen = True
            younger = FakeShard(parts.world, elder.name, term=2)
            await younger.start()
            await parts.announce(younger)
            began_s = asyncio.get_running_loop().time()
            acks = await parts.boundary.append(SessionId("s"), [draft("a")])
            assert asyncio.get_running_loop().time() - began_s < shardlink.SILENT_TICKS_MAX - 1, (
                "no silence was waited for"
            )
            assert [ack.seq for ack in acks] == [1]
            assert not elder.asked(rpc.Append)

    run_fast(main())


def test_a_shard_that_hangs_up_is_not_knocked_at_in_a_rush() -> None:
    """A shard that accepts and closes at once is no success: the backoff grows as if it had refused."""

    async def main() -> None:
        async with rig() as parts:
            shard = parts.shards[0]
            shard.hangs_up = True
            shard.cut()
            await asyncio.sleep(10)
            assert 5 < len(shard.hellos) < 30
            shard.hangs_up = False
            await parts.until_all_links()

    run_fast(main())


def test_a_place_that_does_not_answer_is_left_for_a_new_one() -> None:
    """A connection attempt that hangs (a lost node) is given up as soon as the shard says that it is elsewhere."""

    async def main() -> None:
        world = World(1)
        shard = FakeShard(world, world.names[0])
        await shard.start()
        hangs = asyncio.Event()

        async def connect(factory: Callable[[], FrameConnection], host: str, port: int) -> FrameConnection:
            if port == 1:
                hangs.set()
                await asyncio.Event().wait()
            return await connect_tcp(factory, host, port)

        link = make_link(connect=connect)
        link.aim(Target("127.0.0.1", 1, RING_UID, "volume-shard-0", 1))
        await hangs.wait()
        began_s = asyncio.get_running_loop().time()
        link.aim(aimed_at(shard))
        await until(lambda: link.ready)
        assert asyncio.get_running_loop().time() - began_s < shardlink.CONNECT_TIMEOUT_S * 0.8
        await link.close()
        await shard.stop()

    run_fast(main())


def test_goaway_finishes_what_is_in_flight_and_sends_nothing_new() -> None:
    """After GOAWAY replies still come, new requests are not sent on that connection, and a new one is made."""

    async def main() -> None:
        async with rig() as parts:
            shard = parts.shards[0]
            link = parts.boundary._router.route(SessionId("s")).link
            release = asyncio.Event()
            shard.script(Kind.INFO, Hold(release))
            answers: list[int] = []
            link.call(Kind.INFO, info("s"), lambda kind, _: answers.append(kind))
            await shard.until_asked(rpc.Info)
            shard.goaway()
            await until(lambda: not link.ready)
            with pytest.raises(TryAgain) as refused:
                link.call(Kind.INFO, info("s"), lambda _, __: None)
            assert refused.value.reason == "draining"
            release.set()
            await until(lambda: answers)
            assert answers == [Kind.INFO_OK]
            await until(lambda: len(shard.hellos) == 2)
            await parts.until_all_links()

    run_fast(main())


def test_requests_in_flight_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the bound the answer is `overloaded`, at once."""
    monkeypatch.setattr(shardlink, "IN_FLIGHT_MAX", 3)

    async def main() -> None:
        async with rig() as parts:
            parts.shards[0].script(Kind.INFO, Mute(), Mute(), Mute())
            link = parts.boundary._router.route(SessionId("s")).link
            idents = [link.call(Kind.INFO, info("s"), lambda _, __: None) for _ in range(3)]
            with pytest.raises(TryAgain) as refused:
                link.call(Kind.INFO, info("s"), lambda _, __: None)
            assert refused.value.reason == "overloaded"
            link.forget(idents[0])
            link.call(Kind.INFO, info("s"), lambda _, __: None)

    run_fast(main())


def test_unread_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that does not read fills its own bound, not this process."""
    monkeypatch.setattr(shardlink, "BUFFERED_BYTES_MAX", 100_000)

    async def main() -> None:
        async with rig() as parts:
            link = parts.boundary._router.route(SessionId("s")).link
            parts.shards[0].script(Kind.INFO, *[Mute()] * 200)
            for _ in range(90):
                link.call(Kind.INFO, info("s" * 1000), lambda _, __: None)
            with pytest.raises(TryAgain) as refused:
                link.call(Kind.INFO, info("s" * 20_000), lambda _, __: None)
            assert refused.value.reason == "overloaded"

    run_fast(main())
