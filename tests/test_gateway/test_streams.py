"""Streams: contiguous for every reader, whatever happens to subscriptions; slow sinks cost nobody anything."""

from __future__ import annotations

import asyncio
import random

import pytest

from fleetlm_common import rpc
from fleetlm_common.errors import Invalid, TryAgain
from fleetlm_common.ids import SessionId
from fleetlm_common.rpc import Kind
from fleetlm_gateway import streams
from fleetlm_gateway.boundary import FromCursor, FromTail, LiveOnly, Start, Subscription
from tests.support.fakeshard import (
    PAGE_MESSAGES_MAX,
    Answer,
    Drop,
    DropReply,
    Mute,
    Redirect,
    Refuse,
    draft,
)
from tests.support.fastloop import run_fast
from tests.support.gatewayrig import Recorder, Rig, S, join, rig, until, until_subscribed

BUSY = TryAgain("busy", reason="overloaded", retry_after_ms=10)


@pytest.mark.parametrize("start", [FromCursor(0), FromCursor(3), FromCursor(10), FromTail(4), FromTail(99), LiveOnly()])
def test_replay_then_live_is_contiguous(start: Start) -> None:
    """From each start: the replay, `caught_up` exactly once, then what comes; nothing twice, nothing missing."""

    async def main() -> None:
        async with rig() as parts:
            parts.world.write("s", 10)
            sink, _ = await join(parts, start)
            await until(lambda: sink.caught_ups)
            parts.world.write("s", 2)
            await sink.until(12)
            firsts: dict[Start, int] = {FromCursor(0): 1, FromCursor(3): 4, FromTail(4): 7, FromTail(99): 1}
            first = firsts.get(start, 11)
            assert sink.seqs == list(range(first, 13))
            assert sink.caught_ups == [10]

    run_fast(main())


def test_nothing_is_delivered_before_begin() -> None:
    """The join's reply goes first: until `begin` the sink hears nothing, and then nothing is missing."""

    async def main() -> None:
        async with rig() as parts:
            parts.world.write("s", 3)
            sink, place = await join(parts, LiveOnly(), begin=False)
            await until_subscribed(parts)
            parts.world.write("s", 2)
            await parts.boundary.mark_read(S, "alice", 1)
            await asyncio.sleep(1)
            assert sink.order == []
            assert place.info.last_seq == 3
            place.begin()
            await sink.until(5)
            assert sink.seqs == [4, 5]

    run_fast(main())


def test_an_empty_session_is_caught_up() -> None:
    """Joining a session that has no messages is caught up at 0, then gets the first message."""

    async def main() -> None:
        async with rig() as parts:
            sink, _ = await join(parts, FromCursor(0))
            await until(lambda: sink.caught_ups == [0])
            await parts.boundary.append(S, [draft("a")])
            await sink.until(1)

    run_fast(main())


def test_caught_up_means_all_that_the_join_spoke_of() -> None:
    """`caught_up` waits for the `last_seq` of the join's reply, also when pushes lag behind that."""

    async def main() -> None:
        async with rig() as parts:
            parts.world.write("s", 2)
            first, _ = await join(parts, LiveOnly())
            await until(lambda: first.caught_ups)
            shard = parts.shards[0]
            # The log is ahead of its pushes for a moment.
            for key in ("a", "b"):
                parts.world.append("s", rpc.Entry([draft(key)]))
            second, _ = await join(parts, FromCursor(2))
            third, _ = await join(parts, LiveOnly())
            await asyncio.sleep(0.5)
            assert second.caught_ups == []
            shard.publish("s")
            await second.until(4)
            assert second.caught_ups == [4]
            assert third.caught_ups == [4]
            assert third.seqs == []
            parts.world.write("s")
            await third.until(5)
            assert third.seqs == [5]

    run_fast(main())


def test_a_cursor_beyond_the_log_is_refused() -> None:
    """The join fails with the facts and leaves nothing behind."""

    async def main() -> None:
        async with rig() as parts:
            with pytest.raises(Invalid) as refused:
                await join(parts, FromCursor(7))
            assert (refused.value.reason, refused.value.last_seq) == ("cursor_ahead", 0)
            assert len(parts.boundary._streams) == 0

    run_fast(main())


def test_one_subscription_however_many_readers() -> None:
    """Readers of one session share one SUBSCRIBE and the very same bytes."""

    async def main() -> None:
        async with rig() as parts:
            sinks = [(await join(parts, LiveOnly()))[0] for _ in range(20)]
            await until(lambda: all(sink.caught_ups for sink in sinks))
            parts.world.write("s")
            await until(lambda: all(sink.seqs == [1] for sink in sinks))
            assert len(parts.shards[0].asked(rpc.Subscribe)) == 1
            assert len({id(sink.bodies[0]) for sink in sinks}) == 1

    run_fast(main())


def test_readers_at_one_place_share_a_page() -> None:
    """Many sockets that come back to the same cursor cost one read a page, not one each."""

    async def main() -> None:
        async with rig() as parts:
            parts.world.write("s", 3 * PAGE_MESSAGES_MAX)
            places = [await join(parts, FromCursor(5), begin=False) for _ in range(50)]
            for _, place in places:
                place.begin()
            await until(lambda: all(sink.caught_ups for sink, _ in places))
            assert len(parts.shards[0].asked(rpc.Read)) == 3
            assert parts.metric("catch_up_pages_total", outcome="ok") == 3

    run_fast(main())


@pytest.mark.parametrize("start_at_last", [False, True])
@pytest.mark.parametrize("trouble", ["cut", "overflow", "draining", "hole", "moved", "map", "restart"])
def test_contiguous_over_trouble(trouble: str, start_at_last: bool) -> None:
    """Lost links, overflow, holes, moves, restarts: each reader's stream goes on without hole or repeat."""

    async def main() -> None:
        async with rig(shards=2) as parts:
            session = parts.world.session_of("shard-0")
            shard = parts.shards[0]
            parts.world.write(session, 4)
            sinks = [(await join(parts, FromCursor(cursor), session=session))[0] for cursor in (0, 2, 4)]
            await until(lambda: all(sink.caught_ups for sink in sinks))
            for other in parts.shards:
                other.start_at_last = start_at_last
            last = 4
            for _ in range(4):
                await cause(parts, trouble, session)
                parts.world.write(session, 3)
                last += 3
                await until(lambda: all(sink.cursor == last for sink in sinks))  # noqa: B023  awaited here
            assert sinks[0].seqs == list(range(1, last + 1))
            assert all(len(sink.caught_ups) == 1 for sink in sinks)
            assert shard.peers or trouble != "cut"

    run_fast(main())


async def cause(parts: Rig, trouble: str, session: SessionId) -> None:
    """One piece of trouble for the session's subscription."""
    owner = next(shard for shard in parts.shards if shard.name == parts.world.owner(session).owner)
    match trouble:
        case "cut":
            owner.cut()
        case "overflow" | "draining":
            owner.end_subscriptions(trouble)
        case "hole":
            owner.skip_pushes = 2
        case "moved" | "map":
            other = next(shard for shard in parts.shards if shard is not owner)
            if trouble == "map":
                # The old owner does not say that it was released; the map does.
                for peer in owner.peers:
                    peer.subscriptions.clear()
            parts.world.move(session, other.name)
            if trouble == "map":
                await parts.publish_maps()
        case _:
            await owner.stop()
            await owner.start()


@pytest.mark.parametrize(
    "behaviour", [Refuse(BUSY), Drop(), DropReply(), Mute(), Redirect("shard-0", 1), Answer(99, b"")]
)
@pytest.mark.parametrize("kind", [Kind.SUBSCRIBE, Kind.READ])
def test_a_reader_never_goes_silent(
    kind: Kind, behaviour: Refuse | Drop | DropReply | Mute | Redirect | Answer
) -> None:
    """Whatever subscribing or reading meets, it is tried again until it works; `caught_up` comes once."""

    async def main() -> None:
        async with rig() as parts:
            parts.world.write("s", 6)
            parts.shards[0].script(kind, behaviour, behaviour, behaviour)
            sink, _ = await join(parts, FromCursor(1))
            await until(lambda: sink.caught_ups == [6])
            parts.world.write("s")
            await sink.until(7)
            assert sink.seqs == list(range(2, 8))

    run_fast(main())


def test_refused_subscriptions_back_off() -> None:
    """Ten seconds of refused SUBSCRIBEs cost some tens of frames, and the reader is served when they end."""

    async def main() -> None:
        async with rig() as parts:
            shard = parts.shards[0]
            shard.script(Kind.SUBSCRIBE, *[Refuse(BUSY)] * 1000)
            sink, _ = await join(parts, LiveOnly())
            await asyncio.sleep(10)
            assert 10 < len(shard.asked(rpc.Subscribe)) < 60
            shard.behave()
            parts.world.write("s")
            await sink.until(1)

    run_fast(main())


def test_a_ring_that_lost_messages_is_not_papered_over() -> None:
    """When the owner holds less than readers have seen, they are closed with `cursor_ahead`."""

    async def main() -> None:
        async with rig() as parts:
            parts.world.write("s", 6)
            sink, _ = await join(parts, FromCursor(0))
            await sink.until(6)
            parts.world.logs["s"].messages.pop()
            parts.shards[0].cut()
            await until(lambda: sink.ended == ["cursor_ahead"])
            assert len(parts.boundary._streams) == 0

    run_fast(main())


def test_a_gap_is_passed_on() -> None:
    """Messages that retention dropped are said as a gap, and delivery goes on behind it."""

    async def main() -> None:
        async with rig() as parts:
            parts.world.write("s", 8)
            parts.world.logs["s"].earliest = 5
            sink, _ = await join(parts, FromCursor(1))
            await until(lambda: sink.caught_ups == [8])
            assert [(gap.from_seq, gap.next_seq) for gap in sink.gaps] == [(2, 5)]
            assert sink.seqs == [5, 6, 7, 8]
            assert sink.order == ["gap", "messages", "caught_up"]
            tail, _ = await join(parts, FromTail(100))
            await until(lambda: tail.caught_ups == [8])
            assert (tail.seqs, tail.gaps) == ([5, 6, 7, 8], [])

    run_fast(main())


def test_a_page_that_does_not_follow_is_not_delivered() -> None:
    """A page with a silent hole, or an empty one although there is more, is read again, never passed on."""

    async def main() -> None:
        async with rig() as parts:
            parts.world.write("s", 5)
            log = parts.world.logs["s"]
            hole = rpc.Page(3, [log.json(3)], has_more=False, last_seq=5, earliest_seq=1)
            empty = rpc.Page(2, [], has_more=False, last_seq=1, earliest_seq=1)
            parts.shards[0].script(Kind.READ, Answer(Kind.PAGE, rpc.encode(hole)), Answer(Kind.PAGE, rpc.encode(empty)))
            sink, _ = await join(parts, FromCursor(1))
            await until(lambda: sink.caught_ups == [5])
            assert sink.seqs == [2, 3, 4, 5]

    run_fast(main())


def test_pages_that_bring_nothing_are_not_asked_for_in_a_rush() -> None:
    """A shard that shows nothing new, although more was pushed, is asked again a little later each time."""

    async def main() -> None:
        async with rig() as parts:
            parts.world.write("s", 5)
            empty = rpc.Page(2, [], has_more=False, last_seq=1, earliest_seq=1)
            parts.shards[0].script(Kind.READ, *[Answer(Kind.PAGE, rpc.encode(empty))] * 8)
            began_s = asyncio.get_running_loop().time()
            sink, _ = await join(parts, FromCursor(1))
            await until(lambda: sink.caught_ups == [5])
            assert asyncio.get_running_loop().time() - began_s >= 8 * streams.PAGE_RETRY_S / 2

    run_fast(main())


def test_catching_up_under_constant_traffic() -> None:
    """A reader far behind meets a stream that never pauses; its messages are contiguous all the way."""

    async def main() -> None:
        async with rig() as parts:
            parts.world.write("s", 20 * PAGE_MESSAGES_MAX)
            live, _ = await join(parts, LiveOnly())
            await until(lambda: live.caught_ups)
            done = asyncio.Event()

            async def traffic() -> None:
                while not done.is_set():
                    parts.world.write("s", 5)
                    await asyncio.sleep(0.01)

            writing = asyncio.create_task(traffic())
            behind, _ = await join(parts, FromCursor(0))
            await until(lambda: behind.caught_ups)
            done.set()
            await writing
            last = len(parts.world.logs["s"].messages)
            await behind.until(last)
            assert behind.seqs == list(range(1, last + 1))

    run_fast(main())


def test_closing_says_nothing_more_and_ends_the_subscription() -> None:
    """After `close` the sink hears nothing; when everybody has left, the shard is told a little later."""

    async def main() -> None:
        async with rig() as parts:
            sink, place = await join(parts, LiveOnly())
            await until(lambda: sink.caught_ups)
            place.close()
            place.close()
            parts.world.write("s")
            await until(lambda: parts.shards[0].unsubscribed == 1)
            assert sink.seqs == []
            assert len(parts.boundary._streams) == 0
            assert parts.metric("readers") == 0

    run_fast(main())


def test_coming_back_soon_meets_the_same_subscription() -> None:
    """A reader that returns while the stream lingers needs neither a SUBSCRIBE nor a page."""

    async def main() -> None:
        async with rig() as parts:
            sink, place = await join(parts, LiveOnly())
            await until(lambda: sink.caught_ups)
            parts.world.write("s", 3)
            await sink.until(3)
            place.close()
            parts.world.write("s", 2)
            await asyncio.sleep(streams.LINGER_S / 2)
            again, _ = await join(parts, FromCursor(3))
            await until(lambda: again.caught_ups == [5])
            await asyncio.sleep(streams.LINGER_S)
            assert len(parts.shards[0].asked(rpc.Subscribe)) == 1
            assert not parts.shards[0].asked(rpc.Read)
            assert not again.ended

    run_fast(main())


def test_a_sink_may_close_others_while_it_is_told() -> None:
    """A delivery that closes subscriptions, its own too, disturbs nobody else."""

    async def main() -> None:
        async with rig() as parts:
            made: list[tuple[Recorder, Subscription]] = []

            class Closer(Recorder):
                def deliver(self, first_seq: int, count: int, body: bytes, /) -> bool:
                    for place in (own, made[0][1], made[4][1]):
                        place.close()
                    return super().deliver(first_seq, count, body)

            closer = Closer()
            own = await parts.boundary.subscribe(S, start=LiveOnly(), sink=closer)
            own.begin()
            made += [await join(parts, LiveOnly()) for _ in range(5)]
            await until(lambda: all(sink.caught_ups for sink, _ in made))
            parts.world.write("s")
            await until(lambda: closer.seqs)
            parts.world.write("s")
            await until(lambda: all(sink.seqs == [1, 2] for sink, _ in made[1:4]))
            assert closer.seqs == [1]
            assert made[0][0].seqs == made[4][0].seqs == []

    run_fast(main())


def test_read_cursors_are_passed_on() -> None:
    """A PUSH_READ reaches every reader."""

    async def main() -> None:
        async with rig() as parts:
            sink, _ = await join(parts, LiveOnly())
            await until(lambda: sink.caught_ups)
            for peer in parts.shards[0].peers:
                for ident in peer.subscriptions:
                    peer.wire.send(Kind.PUSH_READ, ident, rpc.encode(rpc.PushRead("alice", 4)))
            await until(lambda: sink.reads == [("alice", 4)])

    run_fast(main())


def test_overlapping_pushes_are_cut() -> None:
    """A push of what readers have is dropped; one that begins with it is delivered from what they do not have."""

    async def main() -> None:
        async with rig() as parts:
            parts.world.write("s", 3)
            sink, _ = await join(parts, FromCursor(0))
            await until(lambda: sink.caught_ups)
            (peer,) = parts.shards[0].peers
            (subscription,) = peer.subscriptions.values()
            subscription.next_seq = 2
            parts.world.publish("s")
            subscription.next_seq = 2
            parts.world.write("s", 2)
            await sink.until(5)
            assert sink.seqs == [1, 2, 3, 4, 5]

    run_fast(main())


def test_stopping_closes_readers() -> None:
    """When the gateway stops each reader is told `draining`."""

    async def main() -> None:
        async with rig() as parts:
            sink, _ = await join(parts, LiveOnly())
            await parts.boundary.stop()
            assert sink.ended == ["draining"]
            with pytest.raises(TryAgain):
                await join(parts, LiveOnly())

    run_fast(main())


def fill_some(made: list[tuple[Recorder, Subscription]], entropy: random.Random, *, share: float) -> None:
    """Fill a share of the sinks; the others have room again."""
    for sink, place in made:
        sink.full = entropy.random() < share
        if not sink.full:
            place.resume()


@pytest.mark.parametrize("seed", range(8))
def test_random_trouble_keeps_streams_contiguous(seed: int) -> None:
    """Readers that come, stall and go, under moves, cuts, holes and refusals: each stream is whole, each caught up."""

    async def main() -> None:
        async with rig(shards=2, seed=seed) as parts:
            entropy = random.Random(seed)
            session = parts.world.session_of("shard-0")
            for shard in parts.shards:
                shard.chaos = random.Random(seed)
            made: list[tuple[Recorder, Subscription]] = []
            troubles = ["cut", "overflow", "hole", "moved", "map"]
            for _ in range(80):
                parts.world.write(session, entropy.randrange(6))
                if entropy.random() < 0.2:
                    last = len(parts.world.logs[session].messages)
                    made.append(await join(parts, FromCursor(entropy.randrange(last + 1)), session=session))
                if entropy.random() < 0.2:
                    await cause(parts, entropy.choice(troubles), session)
                for shard in parts.shards:
                    shard.start_at_last = entropy.random() < 0.5
                fill_some(made, entropy, share=0.2)
                await asyncio.sleep(entropy.random() * 0.3)
            for shard in parts.shards:
                shard.chaos = None
                shard.skip_pushes = 0
            fill_some(made, entropy, share=0)
            parts.world.write(session)
            last = len(parts.world.logs[session].messages)
            await until(lambda: all(sink.cursor == last for sink, _ in made))
            await until(lambda: all(len(sink.caught_ups) == 1 for sink, _ in made))
            assert made

    run_fast(main())
