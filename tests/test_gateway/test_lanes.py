"""Append lanes: order over every retry, one answer each, one request in flight, bounds."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import msgspec
import pytest

from fleetlm_common import rpc
from fleetlm_common.errors import Conflict, FleetError, IdempotencyConflict, Invalid, TryAgain
from fleetlm_common.ids import SessionId
from fleetlm_common.limits import REQUEST_DEADLINE_S
from fleetlm_common.rpc import Kind
from fleetlm_gateway import lanes
from tests.support.fakeshard import (
    Answer,
    Drop,
    DropReply,
    FakeShard,
    Hold,
    Mute,
    MuteAfter,
    Partial,
    Redirect,
    Refuse,
    draft,
)
from tests.support.fastloop import run_fast
from tests.support.garbage import left_to_the_collector
from tests.support.gatewayrig import Rig, rig, until

S = SessionId("s")
BUSY = TryAgain("busy", reason="disk_full", retry_after_ms=10)


def keys_in_order(parts: Rig, session: str = "s") -> list[str]:
    return [key for key, _ in parts.world.logs[session].messages]


def requests(shard: FakeShard) -> list[list[str]]:
    """The keys of each APPEND that the shard got."""
    asked = [request for request in shard.received if isinstance(request, rpc.Append)]
    return [[found.key for entry in request.entries for found in entry.drafts] for request in asked]


class Answers:
    """Collects outcomes of appends and counts how often each was answered."""

    def __init__(self) -> None:
        self.outcomes: dict[str, list[list[rpc.Ack] | FleetError]] = {}

    def done(self, key: str) -> Callable[[list[rpc.Ack] | FleetError], None]:
        self.outcomes[key] = []
        return self.outcomes[key].append

    @property
    def complete(self) -> bool:
        return all(self.outcomes.values())

    def seq(self, key: str) -> int:
        (outcome,) = self.outcomes[key]
        assert not isinstance(outcome, FleetError), outcome
        return outcome[0].seq

    def error(self, key: str) -> FleetError:
        (outcome,) = self.outcomes[key]
        assert isinstance(outcome, FleetError), outcome
        return outcome


def submit(parts: Rig, answers: Answers, *keys: str, session: SessionId = S) -> None:
    for key in keys:
        parts.boundary.append_then(session, [draft(key)], done=answers.done(key))


def test_what_arrives_meanwhile_is_the_next_request() -> None:
    """One APPEND of a session is in flight at a time; those that came meanwhile go together, in order."""

    async def main() -> None:
        async with rig() as parts:
            shard, answers, release = parts.shards[0], Answers(), asyncio.Event()
            shard.script(Kind.APPEND, Hold(release))
            submit(parts, answers, "a", "b", "c", "d")
            await shard.until_asked(rpc.Append)
            await asyncio.sleep(1)
            assert requests(shard) == [["a"]]
            release.set()
            await until(lambda: answers.complete)
            assert requests(shard) == [["a"], ["b", "c", "d"]]
            assert [answers.seq(key) for key in "abcd"] == [1, 2, 3, 4]
            assert len(parts.boundary._lanes) == 0, "an idle lane vanishes"
            assert parts.boundary._lanes.size_bytes == 0

    run_fast(main())


def test_an_append_leaves_nothing_to_the_collector() -> None:
    """A cycle an append was a pause of 20 ms every second and a half at 5,000 appends a second."""

    async def main() -> None:
        async with rig() as parts:
            answers = Answers()
            with left_to_the_collector() as found:
                for number in range(20):
                    submit(parts, answers, f"k{number}", session=SessionId(f"s{number % 3}"))
                    await until(lambda: answers.complete)
            assert not found

    run_fast(main())


def test_sessions_do_not_wait_for_each_other() -> None:
    """A session whose append hangs does not hold up another one."""

    async def main() -> None:
        async with rig() as parts:
            release = asyncio.Event()
            parts.shards[0].script(Kind.APPEND, Hold(release))
            answers = Answers()
            submit(parts, answers, "a")
            await parts.shards[0].until_asked(rpc.Append)
            assert (await parts.boundary.append(SessionId("t"), [draft("b")]))[0].seq == 1
            release.set()
            await until(lambda: answers.complete)

    run_fast(main())


@pytest.mark.parametrize(
    "behaviour",
    [
        Refuse(BUSY),
        Drop(),
        DropReply(),
        Redirect("shard-0", 1),
        Partial(0, BUSY),
        Answer(Kind.APPENDED, rpc.encode(rpc.Appended([]))),
        Answer(Kind.APPENDED, rpc.encode(rpc.Appended([rpc.EntryResult([])]))),
        Answer(Kind.APPENDED, b"\xc1"),
        Answer(99, b""),
    ],
)
def test_order_survives_every_retry(behaviour: Refuse | Drop | DropReply | Redirect | Partial | Answer) -> None:
    """Whatever happens to a request, it is tried again before those behind it, with the same keys."""

    async def main() -> None:
        async with rig() as parts:
            answers = Answers()
            parts.shards[0].script(Kind.APPEND, behaviour, behaviour)
            submit(parts, answers, "a")
            await asyncio.sleep(0)
            submit(parts, answers, "b", "c")
            await until(lambda: answers.complete)
            assert keys_in_order(parts) == ["a", "b", "c"]
            assert [answers.seq(key) for key in "abc"] == [1, 2, 3]
            assert parts.metric("shard_retries_total", kind="APPEND") >= 2

    run_fast(main())


def test_entries_are_matched_one_by_one() -> None:
    """In one request: acked, refused for good and told TRY_AGAIN; only the last are sent again, in order."""

    async def main() -> None:
        async with rig() as parts:
            shard, answers, release = parts.shards[0], Answers(), asyncio.Event()
            parts.world.write("s")
            shard.script(Kind.APPEND, Hold(release), Partial(3, BUSY))
            submit(parts, answers, "first", "a")
            parts.boundary.append_then(S, [draft("b")], expected_seq=99, done=answers.done("b"))
            parts.boundary.append_then(S, [draft("other-1", "changed")], done=answers.done("c"))
            submit(parts, answers, "d", "e")
            await shard.until_asked(rpc.Append)
            release.set()
            await until(lambda: answers.complete)
            assert requests(shard) == [["first"], ["a", "b", "other-1", "d", "e"], ["d", "e"]]
            assert answers.seq("a") == 3
            error = answers.error("b")
            assert isinstance(error, Conflict)
            assert error.last_seq == 3
            assert isinstance(answers.error("c"), IdempotencyConflict)
            assert (answers.seq("d"), answers.seq("e")) == (4, 5)

    run_fast(main())


def test_who_is_answered_may_append_at_once() -> None:
    """An append made inside an answer goes behind those of the same request that have to be tried again."""

    async def main() -> None:
        async with rig() as parts:
            shard, answers, release = parts.shards[0], Answers(), asyncio.Event()
            shard.script(Kind.APPEND, Hold(release), Partial(1, BUSY))
            submit(parts, answers, "a")

            def chained(outcome: list[rpc.Ack] | FleetError) -> None:
                answers.outcomes["b"].append(outcome)
                submit(parts, answers, "d")

            answers.done("b")
            parts.boundary.append_then(S, [draft("b")], done=chained)
            submit(parts, answers, "c")
            await shard.until_asked(rpc.Append)
            release.set()
            await until(lambda: "d" in answers.outcomes and answers.complete)
            assert keys_in_order(parts) == ["a", "b", "c", "d"]

    run_fast(main())


def test_a_batch_is_one_entry() -> None:
    """All drafts of one append travel as one entry and come back as one answer."""

    async def main() -> None:
        async with rig() as parts:
            acks = await parts.boundary.append(S, [draft("a"), draft("b")], expected_seq=0)
            assert [ack.seq for ack in acks] == [1, 2]
            again = await parts.boundary.append(S, [draft("a"), draft("b")], expected_seq=0)
            assert [(ack.seq, ack.deduped) for ack in again] == [(1, True), (2, True)]

    run_fast(main())


def test_moved_mid_flight_keeps_the_order() -> None:
    """Appends that were with the old owner go to the new one first, in order, each answered once."""

    async def main() -> None:
        async with rig(shards=2) as parts:
            session = parts.world.session_of("shard-0")
            answers, release = Answers(), asyncio.Event()
            parts.shards[0].script(Kind.APPEND, Hold(release))
            submit(parts, answers, *"abcde", session=session)
            await parts.shards[0].until_asked(rpc.Append)
            parts.world.move(session, "shard-1")
            release.set()
            await until(lambda: answers.complete)
            assert keys_in_order(parts, session) == list("abcde")
            assert requests(parts.shards[1]) == [list("abcde")]

    run_fast(main())


def test_a_deadline_is_kept_and_not_restarted() -> None:
    """An append that is refused again and again is answered once, after the deadline, with the last reason."""

    async def main() -> None:
        async with rig() as parts:
            answers, loop = Answers(), asyncio.get_running_loop()
            parts.shards[0].script(Kind.APPEND, *[Refuse(BUSY)] * 1000)
            began_s = loop.time()
            submit(parts, answers, "a")
            await until(lambda: answers.complete)
            assert REQUEST_DEADLINE_S <= loop.time() - began_s < REQUEST_DEADLINE_S + 6
            assert answers.error("a").reason == "disk_full"
            assert isinstance(answers.error("a"), TryAgain)
            assert len(requests(parts.shards[0])) < 60
            assert len(parts.boundary._lanes) == 0
            assert parts.metric("appends_total", outcome="TRY_AGAIN") == 1

    run_fast(main())


def test_those_behind_an_expired_append_go_on_in_order() -> None:
    """An append of unknown outcome is answered at its deadline; those behind it are sent without it, in order."""

    async def main() -> None:
        async with rig() as parts:
            shard, answers = parts.shards[0], Answers()
            shard.script(Kind.APPEND, MuteAfter())
            submit(parts, answers, "a")
            await shard.until_asked(rpc.Append)
            await asyncio.sleep(REQUEST_DEADLINE_S / 2)
            submit(parts, answers, "b", "c")
            await until(lambda: answers.outcomes["a"])
            assert isinstance(answers.error("a"), TryAgain)
            await until(lambda: answers.complete)
            assert requests(shard) == [["a"], ["b", "c"]]
            assert (answers.seq("b"), answers.seq("c")) == (2, 3)
            assert (await parts.boundary.append(S, [draft("a")]))[0].seq == 1, "the same key finds the first outcome"

    run_fast(main())


def test_one_request_may_hold_expired_and_living_appends() -> None:
    """When the deadline of one append in a request passes, the others in it still get their own answers."""

    async def main() -> None:
        async with rig() as parts:
            shard, answers = parts.shards[0], Answers()
            first, second = asyncio.Event(), asyncio.Event()
            shard.script(Kind.APPEND, Hold(first), Hold(second))
            submit(parts, answers, "a", "b")
            await asyncio.sleep(REQUEST_DEADLINE_S / 2)
            submit(parts, answers, "c")
            first.set()
            await shard.until_asked(rpc.Append, 2)
            await until(lambda: answers.outcomes["b"])
            assert isinstance(answers.error("b"), TryAgain)
            second.set()
            await until(lambda: answers.complete)
            assert requests(shard) == [["a"], ["b", "c"]]
            assert answers.seq("c") == 3

    run_fast(main())


def test_a_late_answer_is_dropped() -> None:
    """The reply to a request whose appends have all been answered does not touch those behind them."""

    async def main() -> None:
        async with rig() as parts:
            shard, answers, release = parts.shards[0], Answers(), asyncio.Event()
            shard.script(Kind.APPEND, Hold(release))
            submit(parts, answers, "a")
            await until(lambda: answers.complete)
            hold_b = asyncio.Event()
            shard.script(Kind.APPEND, Hold(hold_b))
            submit(parts, answers, "b")
            await shard.until_asked(rpc.Append, 2)
            release.set()
            await until(lambda: keys_in_order(parts) == ["a"])
            await asyncio.sleep(0.5)
            assert not answers.outcomes["b"]
            hold_b.set()
            await until(lambda: answers.complete)
            assert answers.seq("b") == 2
            assert len(answers.outcomes["a"]) == 1

    run_fast(main())


def test_a_cancelled_caller_leaves_the_lane_in_order() -> None:
    """Who stops waiting does not withdraw the append, and nobody behind it is disturbed."""

    async def main() -> None:
        async with rig() as parts:
            release = asyncio.Event()
            parts.shards[0].script(Kind.APPEND, Hold(release))
            first = asyncio.create_task(parts.boundary.append(S, [draft("a")]))
            await parts.shards[0].until_asked(rpc.Append)
            second = asyncio.create_task(parts.boundary.append(S, [draft("b")]))
            first.cancel()
            release.set()
            assert (await second)[0].seq == 2

    run_fast(main())


def test_a_frame_that_is_refused_for_good_refuses_its_entries() -> None:
    """A `Rejected` for the whole request is the answer to each of its entries."""

    async def main() -> None:
        async with rig() as parts:
            parts.shards[0].script(Kind.APPEND, Refuse(Invalid("no", field="session")))
            with pytest.raises(Invalid) as refused:
                await parts.boundary.append(S, [draft("a")])
            assert refused.value.field == "session"
            assert (await parts.boundary.append(S, [draft("b")]))[0].seq == 1

    run_fast(main())


def test_one_request_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backlog goes out in requests of bounded size, each as large as allowed, and none is skipped."""
    monkeypatch.setattr(lanes, "REQUEST_MESSAGES_MAX", 4)

    async def main() -> None:
        async with rig() as parts:
            answers, release = Answers(), asyncio.Event()
            parts.shards[0].script(Kind.APPEND, Hold(release))
            keys = [f"k{number}" for number in range(10)]
            submit(parts, answers, *keys)
            release.set()
            await until(lambda: answers.complete)
            assert [len(found) for found in requests(parts.shards[0])] == [1, 4, 4, 1]
            assert keys_in_order(parts) == keys

    run_fast(main())


@pytest.mark.parametrize(
    ("bound", "value"),
    [("LANE_ENTRIES_MAX", 2), ("LANE_BYTES_MAX", 700), ("TOTAL_BYTES_MAX", 700), ("LANES_MAX", 1)],
)
def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch, bound: str, value: int) -> None:
    """Past each bound the answer is `overloaded` at once; what was taken before is not disturbed."""
    monkeypatch.setattr(lanes, bound, value)

    async def main() -> None:
        async with rig() as parts:
            answers = Answers()
            parts.shards[0].script(Kind.APPEND, Mute())
            submit(parts, answers, "a", "b", "c", "d")
            other = SessionId("other")
            submit(parts, answers, "e", "f", session=other)
            refused = [key for key, got in answers.outcomes.items() if got]
            assert refused, f"{bound} was never reached"
            assert all(answers.error(key).reason == "overloaded" for key in refused)
            await parts.boundary.stop()
            assert answers.complete
            assert parts.boundary._lanes.size_bytes == 0

    run_fast(main())


@pytest.mark.parametrize("seed", range(6))
def test_random_trouble_keeps_order_and_answers_once(seed: int) -> None:
    """Under random refusals, lost connections, partial batches and moves: order per session, one answer, no doubles."""

    async def main() -> None:
        async with rig(shards=2, seed=seed) as parts:
            entropy, answers = random.Random(seed), Answers()
            for shard in parts.shards:
                shard.chaos = random.Random(seed + 1)
            sessions = [SessionId(f"s{number}") for number in range(6)]
            sent: dict[str, list[str]] = {session: [] for session in sessions}
            for step in range(150):
                session = entropy.choice(sessions)
                key = f"{session}-{step}"
                sent[session].append(key)
                submit(parts, answers, key, session=session)
                if step % 40 == 20:
                    parts.world.move(session, entropy.choice(parts.world.names))
                if step % 50 == 10:
                    entropy.choice(parts.shards).cut()
                await asyncio.sleep(entropy.random() * 0.2)
            for shard in parts.shards:
                shard.chaos = None
            await until(lambda: answers.complete)
            assert all(len(got) == 1 for got in answers.outcomes.values())
            for session in sessions:
                acked = [key for key in sent[session] if not isinstance(answers.outcomes[key][0], FleetError)]
                assert keys_in_order(parts, session) == sent[session], "order of the log is the order of the calls"
                assert [answers.seq(key) for key in acked] == sorted(answers.seq(key) for key in acked)
            assert len(parts.boundary._lanes) == 0

    run_fast(main())


def test_the_wire_holds_what_was_asked() -> None:
    """A request's payload is what the protocol says (a guard for the tests above)."""
    append = rpc.Append(3, "s", [rpc.Entry([draft("a")], 7)])
    assert msgspec.msgpack.decode(rpc.encode(append), type=rpc.Append) == append
