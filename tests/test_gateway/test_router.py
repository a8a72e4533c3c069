"""Routing: one deadline, retries, MOVED, maps that only go forward."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import msgspec
import pytest

from fleetlm_common import rpc
from fleetlm_common.control import ShardEndpoint, View
from fleetlm_common.errors import Invalid, Moved, TryAgain
from fleetlm_common.ids import SessionId, Term
from fleetlm_common.limits import REQUEST_DEADLINE_S
from fleetlm_common.rpc import Kind
from fleetlm_gateway import exchanges, shardlink
from fleetlm_gateway.exchanges import MOVED_AT_ONCE_MAX, Retry
from tests.support.fakeshard import Answer, Drop, DropReply, FakeShard, Mute, Redirect, Refuse, World, draft
from tests.support.fastloop import run_fast
from tests.support.gatewayrig import rig, until
from tests.support.memorycontrol import MemoryControlPlane

S = SessionId("s")
BUSY = TryAgain("busy", reason="overloaded", retry_after_ms=10)


class DeafControlPlane(MemoryControlPlane):
    """Answers reads, but its watchers see only what was there when they began."""

    async def watch(self) -> AsyncIterator[View]:
        """See `ControlPlane.watch`."""
        yield self.view
        await asyncio.Event().wait()


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_refusals_and_lost_connections_are_retried() -> None:
    """TRY_AGAIN, a connection lost before and after the work, and garbage: the caller sees only the value."""

    async def main() -> None:
        async with rig() as parts:
            shard = parts.shards[0]
            parts.world.write("s", 3)
            shard.script(Kind.INFO, Refuse(BUSY), Drop(), DropReply(), Answer(Kind.INFO_OK, b"\xc1"), Answer(99, b""))
            assert (await parts.boundary.info(S)).last_seq == 3
            assert len(shard.asked(rpc.Info)) == 6
            assert parts.metric("shard_retries_total", kind="INFO") >= 5
            assert parts.metric("shard_requests_total", kind="INFO", outcome="ok") == 1

    run_fast(main())


def test_a_rejection_passes_through_at_once() -> None:
    """What was refused for good is not retried, and carries its fields."""

    async def main() -> None:
        async with rig() as parts:
            parts.world.write("s", 3)
            with pytest.raises(Invalid) as refused:
                await parts.boundary.info(S, cursor=9)
            assert (refused.value.reason, refused.value.last_seq) == ("cursor_ahead", 3)
            assert len(parts.shards[0].asked(rpc.Info)) == 1

    run_fast(main())


@pytest.mark.parametrize(
    ("behaviour", "reason"), [(Refuse(BUSY), "overloaded"), (Mute(), "unavailable"), (Drop(), "unavailable")]
)
def test_one_deadline_is_never_restarted(behaviour: Refuse | Mute | Drop, reason: str) -> None:
    """Whatever happens at each try, the answer comes when the one deadline passes, with the last reason."""

    async def main() -> None:
        async with rig() as parts:
            parts.shards[0].script(Kind.INFO, *[behaviour] * 1000)
            began_s = now_s()
            with pytest.raises(TryAgain) as refused:
                await parts.boundary.info(S)
            assert REQUEST_DEADLINE_S - 0.1 <= now_s() - began_s <= REQUEST_DEADLINE_S + 6
            assert refused.value.reason == reason
            assert parts.metric("shard_requests_total", kind="INFO", outcome="TRY_AGAIN") == 1

    run_fast(main())


def test_retries_back_off() -> None:
    """Ten seconds of refusals cost some tens of requests, not thousands."""

    async def main() -> None:
        async with rig() as parts:
            parts.shards[0].script(Kind.INFO, *[Refuse(BUSY)] * 1000)
            with pytest.raises(TryAgain):
                await parts.boundary.info(S)
            assert 10 < len(parts.shards[0].asked(rpc.Info)) < 60

    run_fast(main())


def test_moved_is_used_at_once() -> None:
    """MOVED names the owner: the next try goes there without waiting and without a map, at the epoch it named."""

    async def main() -> None:
        async with rig(shards=2) as parts:
            session = parts.world.session_of("shard-0")
            parts.world.write(session, 2)
            parts.control.away = True
            parts.world.move(session, "shard-1")
            began_s = now_s()
            assert (await parts.boundary.info(session)).last_seq == 2
            assert now_s() - began_s < REQUEST_DEADLINE_S / 2
            asked = parts.shards[1].asked(rpc.Info)
            assert [request.epoch for request in asked if isinstance(request, rpc.Info)] == [2]
            assert parts.metric("moved_total") == 1
            await parts.boundary.info(session)
            assert len(parts.shards[0].asked(rpc.Info)) == 1, "the word of MOVED is remembered"

    run_fast(main())


def test_moved_makes_the_gateway_read_the_map() -> None:
    """A gateway that learns of a newer epoch asks the control plane for the map."""

    async def main() -> None:
        async with rig(shards=2, control_kind=DeafControlPlane) as parts:
            session = parts.world.session_of("shard-0")
            parts.world.move(session, "shard-1")
            await parts.publish_maps()
            await parts.boundary.info(session)
            await until(lambda: parts.boundary.epoch == 2)
            assert parts.metric("ring_epoch") == 2

    run_fast(main())


def test_moved_in_circles_ends_at_the_deadline() -> None:
    """Shards that point at each other cost a bounded number of tries and end as TRY_AGAIN `moving`."""

    async def main() -> None:
        async with rig(shards=2) as parts:
            session = parts.world.session_of("shard-0")
            for number, shard in enumerate(parts.shards):
                other = parts.world.names[1 - number]
                shard.script(Kind.INFO, *[Redirect(other, epoch) for epoch in range(2 + number, 4000, 2)])
            began_s = now_s()
            with pytest.raises(TryAgain) as refused:
                await parts.boundary.info(session)
            assert refused.value.reason == "moving"
            assert now_s() - began_s <= REQUEST_DEADLINE_S + 6
            assert sum(len(shard.asked(rpc.Info)) for shard in parts.shards) < 100

    run_fast(main())


def test_an_older_word_does_not_change_the_route() -> None:
    """A shard that is behind and says MOVED at an old epoch is asked again; the newer map stays in use."""

    async def main() -> None:
        async with rig(shards=2) as parts:
            session = parts.world.session_of("shard-0")
            parts.shards[0].script(Kind.INFO, Redirect("shard-1", 1))
            await parts.boundary.info(session)
            assert len(parts.shards[0].asked(rpc.Info)) == 2
            assert not parts.shards[1].asked(rpc.Info)

    run_fast(main())


def test_an_epoch_never_goes_back() -> None:
    """A view with an older map or an elder's address changes nothing."""

    async def main() -> None:
        async with rig(shards=2) as parts:
            session = parts.world.session_of("shard-0")
            old = parts.control.view
            parts.world.move(session, "shard-1")
            await parts.publish_maps()
            await until(lambda: parts.boundary.epoch == 2)
            younger = FakeShard(parts.world, parts.world.names[0], term=2)
            await younger.start()
            await parts.announce(younger)
            await until(lambda: younger.hellos)
            parts.boundary._router._accept(old)
            assert parts.boundary.epoch == 2
            await parts.boundary.info(session)
            assert len(parts.shards[1].asked(rpc.Info)) == 1
            await parts.until_all_links()
            assert len(younger.hellos) == 1

    run_fast(main())


def test_traffic_goes_on_without_the_control_plane() -> None:
    """The last good copy stays in use while the control plane is away, also when a connection is lost meanwhile."""

    async def main() -> None:
        async with rig() as parts:
            parts.control.away = True
            parts.shards[0].cut()
            assert (await parts.boundary.append(S, [draft("a")]))[0].seq == 1

    run_fast(main())


def test_a_shard_that_comes_back_is_used_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that waits for a connection goes out when it is there, not when its backoff ends."""
    monkeypatch.setattr(exchanges, "BACKOFF_MAX_S", 1000.0)

    async def main() -> None:
        async with rig() as parts:
            shard = parts.shards[0]
            await shard.stop()
            await until(lambda: not parts.boundary.ready().ok)
            asking = asyncio.create_task(parts.boundary.info(S))
            # By now the request's own backoff reaches beyond its deadline.
            await asyncio.sleep(7)
            assert not asking.done()
            await shard.start()
            await parts.announce(shard)
            assert (await asking).last_seq == 0

    run_fast(main())


def test_readiness_says_why_not() -> None:
    """No map, nobody reachable, and one shard away are told apart."""

    async def main() -> None:
        async with rig(shards=2) as parts:
            assert parts.boundary.ready().ok
            assert parts.metric("shard_link_up", shard="shard-1") == 1
            await parts.shards[1].stop()
            await until(lambda: "shard-1" in parts.boundary.ready().message)
            assert parts.boundary.ready().ok
            assert parts.metric("shard_link_up", shard="shard-1") == 0
            await parts.shards[0].stop()
            await until(lambda: not parts.boundary.ready().ok)
            assert parts.boundary.ready().reason == "NoShardReachable"

    run_fast(main())


@pytest.mark.parametrize("list_max", [1, 3, 1000])
@pytest.mark.parametrize("limit", [1, 4, 1000])
def test_the_list_of_sessions_is_merged_in_order(list_max: int, limit: int) -> None:
    """Pages are in the order of the ids' bytes, without holes or repeats, however short a shard's own pages are."""

    async def main() -> None:
        async with rig(shards=3) as parts:
            parts.shards[1].list_max = list_max
            names = [f"n{number}" for number in range(25)] + ["ä", "z", "日本"]
            for name in names:
                parts.world.write(name)
            found: list[str] = []
            while page := await parts.boundary.sessions(after=found[-1] if found else "", limit=limit):
                assert len(page) <= limit
                found += [name for name, _ in page]
            assert found == sorted(names, key=str.encode)

    run_fast(main())


def test_a_list_with_a_shard_away_is_refused() -> None:
    """A list that lacks a shard's sessions would look whole: TRY_AGAIN instead."""

    async def main() -> None:
        async with rig(shards=2) as parts:
            await parts.shards[1].stop()
            with pytest.raises(TryAgain):
                await parts.boundary.sessions(after="", limit=10)

    run_fast(main())


def test_mark_read_and_create_reach_the_owner() -> None:
    """The small requests go to the owner and bring back its answer."""

    async def main() -> None:
        async with rig(shards=2) as parts:
            session = parts.world.session_of("shard-1")
            created = await parts.boundary.create(session, b'{"a":1}')
            assert (created.created, created.info.metadata) == (True, b'{"a":1}')
            parts.world.write(session, 3)
            assert await parts.boundary.mark_read(session, "alice", 3) == 3
            assert await parts.boundary.mark_read(session, "alice", 1) == 3

    run_fast(main())


def test_stop_answers_what_waits() -> None:
    """Requests and appends that wait when the gateway stops are answered `draining`, promptly."""

    async def main() -> None:
        async with rig() as parts:
            parts.shards[0].script(Kind.INFO, Mute())
            parts.shards[0].script(Kind.APPEND, Mute())
            asking = asyncio.create_task(parts.boundary.info(S))
            appending = asyncio.create_task(parts.boundary.append(S, [draft("a")]))
            await parts.shards[0].until_asked(rpc.Info)
            await parts.boundary.stop()
            for task in (asking, appending):
                with pytest.raises(TryAgain) as refused:
                    await task
                assert refused.value.reason == "draining"
            with pytest.raises(TryAgain):
                await parts.boundary.append(S, [draft("b")])

    run_fast(main())


def test_the_fake_speaks_for_its_world() -> None:
    """The test double itself refuses what it does not own (else the tests above would show nothing)."""
    world = World(2)
    assert world.owner(world.session_of("shard-1")).owner == "shard-1"
    assert msgspec.structs.fields(rpc.Info)[0].name == "epoch"


def test_a_shard_that_says_it_is_ready_is_knocked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link whose backoff has grown long connects as soon as the shard announces that it serves."""

    async def main() -> None:
        async with rig() as parts:
            shard = parts.shards[0]
            for bound in ("BACKOFF_MIN_S", "BACKOFF_MAX_S"):
                monkeypatch.setattr(shardlink, bound, 10_000.0)
            await shard.stop()
            place = ShardEndpoint(shard.name, "volume-shard-0", Term(2), "127.0.0.1", shard.port, "")
            await parts.control.announce(place)
            shard.term = 2
            link = parts.boundary._router.route(S).link
            await until(lambda: "Connect call failed" in link.why)
            await shard.start()
            await parts.announce(shard)
            await parts.until_all_links()

    run_fast(main())


def test_backoff_grows_within_bounds() -> None:
    """Waits grow to the ceiling with jitter; news in a MOVED waits for nothing, but not without end."""
    retry = Retry(random.Random(1))
    waits = [retry.failed(TryAgain("x", reason="unavailable", retry_after_ms=0)) for _ in range(20)]
    assert waits[0] <= 2 * exchanges.BACKOFF_MIN_S
    assert all(exchanges.BACKOFF_MAX_S / 2 <= wait <= exchanges.BACKOFF_MAX_S for wait in waits[8:])
    retry.reset()
    moved = [retry.failed(Moved(owner="b", epoch=2), news=True) for _ in range(MOVED_AT_ONCE_MAX + 1)]
    assert moved[:-1] == [0.0] * MOVED_AT_ONCE_MAX
    assert moved[-1] > 0
    assert retry.failed(TryAgain("x", reason="moving", retry_after_ms=60_000)) <= exchanges.BACKOFF_MAX_S
    assert retry.gave_up().reason == "moving"
