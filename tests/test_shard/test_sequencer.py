"""The append path: keys, expected_seq, batches, and that nothing is said before it is on disk."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from fleetlm_common import rpc
from fleetlm_common.errors import Conflict, Invalid, TooLarge, TryAgain
from fleetlm_common.limits import BATCH_MESSAGES_MAX
from fleetlm_common.rpc import Kind
from fleetlm_shard.log_types import LogStopped
from tests.support.garbage import left_to_the_collector
from tests.support.rpcclient import RpcClient, draft, fragment
from tests.support.shardrig import shard_rig
from tests.support.simdisk import SimVolume


async def test_seqs_begin_at_one_and_have_no_hole() -> None:
    """Appends get 1, 2, 3 … in the order in which they arrived, also within a batch and within one APPEND."""
    async with shard_rig() as rig, await rig.client() as client:
        assert [ack.seq for ack in await client.append("s", "a")] == [1]
        assert [ack.seq for ack in await client.append("s", "b", "c")] == [2, 3]
        results = await client.append_entries("s", rpc.Entry([draft("d")]), rpc.Entry([draft("e"), draft("f")]))
        assert [[ack.seq for ack in result.acks] for result in results] == [[4], [5, 6]]
        assert [message["content"] for message in await client.read_all("s")] == list("abcdef")
        assert [message["seq"] for message in await client.read_all("s")] == [1, 2, 3, 4, 5, 6]


async def test_an_append_leaves_nothing_to_the_collector() -> None:
    """Nor does a retry, a refusal, a push or a page: what is done with is freed at once."""
    async with shard_rig() as rig, await rig.client() as client:
        stream = await client.subscribe("s", after=0)
        with left_to_the_collector() as found:
            for number in range(20):
                await client.append("s", f"{number}", key=f"k{number}")
                await client.append("s", f"{number}", key=f"k{number}")
                with pytest.raises(Conflict):
                    await client.append("s", "late", expected_seq=0)
                await stream.next()
                await client.read_all("s")
        assert not found


async def test_a_message_is_what_the_contract_says() -> None:
    """The stored JSON has every field of a message; id and time are those of the ack."""
    async with shard_rig() as rig, await rig.client() as client:
        [ack] = await client.append('s "quoted" ü', "hello")
        [message] = await client.read_all('s "quoted" ü')
        assert message == {
            "id": ack.id,
            "session_id": 's "quoted" ü',
            "seq": 1,
            "sender_id": "alice",
            "sender_kind": "human",
            "kind": "message",
            "content": "hello",
            "metadata": {},
            "inserted_at": ack.inserted_at,
        }


async def test_not_durable_is_not_visible() -> None:
    """While the disk has not answered: no ack, page, last_seq, push, dedupe or conflict; then all of them."""
    async with shard_rig() as rig, await rig.client() as client, await rig.client() as other:
        await client.append("s", "one")
        stream = await other.subscribe("s", after=1)
        rig.writer.hold()
        first = _send_append(client, "s", rpc.Entry([draft("two")]))
        again = _send_append(other, "s", rpc.Entry([draft("two")]))
        conflict = _send_append(other, "s", rpc.Entry([draft("three")], expected_seq=1))
        reused = _send_append(other, "s", rpc.Entry([rpc.Draft("two", fragment("another"))]))
        page = other.send(Kind.READ, rpc.encode(rpc.Read(other.epoch, "s", 10, after=0)))
        info = other.send(Kind.INFO, rpc.encode(rpc.Info(other.epoch, "s")))
        await _heard(client)
        await _heard(other)
        session = rig.shard.memory.sessions.get("s")
        assert (session.seq_durable, session.seq_assigned, len(session.ring)) == (1, 2, 1)
        assert not any(each.done() for each in (first, again, conflict, reused, page, info))
        assert stream.frames.empty()
        rig.writer.release()
        assert _acks(await first) == [(2, False)]
        assert _acks(await again) == [(2, True)]
        assert _error(await conflict) == ("CONFLICT", 2)
        assert _error(await reused)[0] == "IDEMPOTENCY_CONFLICT"
        assert (await stream.next())[0] == 2


async def test_a_read_during_a_sync_shows_only_what_was_durable(volume: SimVolume) -> None:
    """What was appended but not synced is in no page, even when the page is answered after a look of its own."""
    async with shard_rig(volume) as rig, await rig.client() as client:
        await client.append("s", "one")
        session = rig.shard.memory.sessions.get("s")
        rig.writer.hold()
        pending = _send_append(client, "s", rpc.Entry([draft("two")]))
        await _heard(client)
        page = await rig.shard.replay.page(rpc.Read(1, "s", 10, after=0))
        assert (len(page.messages), page.last_seq, page.has_more) == (1, 1, False)
        with pytest.raises(Invalid) as refused:
            await rig.shard.replay.page(rpc.Read(1, "s", 10, after=2))
        assert (refused.value.reason, refused.value.last_seq) == ("cursor_ahead", 1)
        assert session.seq_assigned == 2
        rig.writer.release()
        await pending


async def test_the_same_key_with_the_same_content_gets_the_first_answer() -> None:
    """Seq, id and time are the first ones; nothing is appended; white space and the order of members do not matter."""
    async with shard_rig() as rig, await rig.client() as client:
        [first] = await client.append("s", "hello", key="k")
        rig.clock.advance(5.0)
        [again] = await client.append("s", "hello", key="k")
        assert (again.seq, again.id, again.inserted_at, again.deduped) == (1, first.id, first.inserted_at, True)
        shuffled = b'"sender_id":"alice", "metadata": {}, "content":"hello","kind" : "message","sender_kind":"human"'
        [result] = await client.append_entries("s", rpc.Entry([rpc.Draft("k", shuffled)]))
        assert [(ack.id, ack.deduped) for ack in result.acks] == [(first.id, True)]
        assert (await client.info("s")).last_seq == 1


@pytest.mark.parametrize(
    "other",
    [
        fragment("other"),
        fragment("hello", sender="bob"),
        fragment("hello", kind="event"),
        fragment("hello", metadata='{"a":1}'),
    ],
)
async def test_the_same_key_with_other_content_is_refused(other: bytes) -> None:
    """Content, kind, metadata and sender are the content; nothing is appended."""
    async with shard_rig() as rig, await rig.client() as client:
        await client.append("s", "hello", key="k")
        [result] = await client.append_entries("s", rpc.Entry([rpc.Draft("k", other)]))
        assert result.error is not None
        assert result.error.code == "IDEMPOTENCY_CONFLICT"
        assert (await client.info("s")).last_seq == 1


async def test_true_is_not_one() -> None:
    """JSON's `true` and `1` are different contents although Python finds them equal."""
    async with shard_rig() as rig, await rig.client() as client:
        for value, code in (("1", None), ("true", "IDEMPOTENCY_CONFLICT"), ("1.0", None)):
            text = f'"sender_id":"a","sender_kind":"human","kind":"x","content":{value},"metadata":{{}}'.encode()
            [result] = await client.append_entries("s", rpc.Entry([rpc.Draft("k", text)]))
            assert (result.error and result.error.code) == code


async def test_keys_belong_to_their_session() -> None:
    """The same key in another session is another key."""
    async with shard_rig() as rig, await rig.client() as client:
        await client.append("s", "one", key="k")
        assert [(ack.seq, ack.deduped) for ack in await client.append("t", "two", key="k")] == [(1, False)]


async def test_a_dedupe_hit_wins_over_expected_seq() -> None:
    """A retry of an append that succeeded is answered, although the session has moved on since."""
    async with shard_rig() as rig, await rig.client() as client:
        await client.append("s", "one", expected_seq=0)
        await client.append("s", "two", expected_seq=1)
        [again] = await client.append("s", "one", expected_seq=0)
        assert (again.seq, again.deduped) == (1, True)
        with pytest.raises(Conflict) as refused:
            await client.append("s", "three", expected_seq=1)
        assert refused.value.last_seq == 2
        [again] = await client.append("s", "two", expected_seq=7)
        assert (again.seq, again.deduped) == (2, True)


async def test_an_entry_is_all_or_nothing() -> None:
    """One refused message refuses its whole entry; the entries beside it stand."""
    async with shard_rig() as rig, await rig.client() as client:
        await client.append("s", "one", key="k")
        results = await client.append_entries(
            "s",
            rpc.Entry([draft("two"), rpc.Draft("k", fragment("other")), draft("three")]),
            rpc.Entry([draft("four")]),
        )
        assert results[0].error is not None
        assert (results[0].acks, results[0].error.code) == ([], "IDEMPOTENCY_CONFLICT")
        assert [ack.seq for ack in results[1].acks] == [2]
        assert [message["content"] for message in await client.read_all("s")] == ["one", "four"]


async def test_an_entry_with_old_and_new_keys_appends_the_new_ones() -> None:
    """Known keys are answered `deduped`, the rest is appended, in the order of the entry."""
    async with shard_rig() as rig, await rig.client() as client:
        await client.append("s", "one", "two")
        acks = await client.append("s", "one", "new", "two", "newer")
        assert [(ack.seq, ack.deduped) for ack in acks] == [(1, True), (3, False), (2, True), (4, False)]


async def test_a_duplicate_within_one_append_joins_the_first() -> None:
    """The same key in a later entry of the same APPEND is answered with the first one's seq."""
    async with shard_rig() as rig, await rig.client() as client:
        results = await client.append_entries("s", rpc.Entry([draft("one")]), rpc.Entry([draft("one")]))
        assert [(ack.seq, ack.deduped) for result in results for ack in result.acks] == [(1, False), (1, True)]


async def test_after_a_try_again_every_later_entry_gets_one() -> None:
    """Order survives: what a client sent second is not appended when the first could not be."""
    async with shard_rig(keys_max=2, keys_hard_max=2) as rig, await rig.client() as client:
        results = await client.append_entries(
            "s",
            rpc.Entry([draft("one")]),
            rpc.Entry([draft("two"), draft("three")]),
            rpc.Entry([draft("four")]),
            rpc.Entry([draft("one")]),
        )
        assert [result.error and (result.error.code, result.error.reason) for result in results] == [
            None,
            ("TRY_AGAIN", "overloaded"),
            ("TRY_AGAIN", "overloaded"),
            ("TRY_AGAIN", "overloaded"),
        ]
        assert (await client.info("s")).last_seq == 1


async def test_a_full_window_of_young_keys_refuses_instead_of_forgetting() -> None:
    """Keys that may still be retried are never evicted: `overloaded` until they are old enough."""
    async with shard_rig(keys_max=2, keys_hard_max=3) as rig, await rig.client() as client:
        for text in ("one", "two", "three"):
            await client.append("s", text)
        with pytest.raises(TryAgain) as refused:
            await client.append("s", "four")
        assert refused.value.reason == "overloaded"
        [again] = await client.append("s", "one")
        assert again.deduped
        rig.clock.advance(20.0)
        rig.shard.memory.keys.evict(rig.clock.monotonic_s())
        assert [ack.seq for ack in await client.append("s", "four")] == [4]


@pytest.mark.parametrize(
    ("drafts", "field"),
    [
        ([], "messages"),
        ([draft(str(number)) for number in range(BATCH_MESSAGES_MAX + 1)], "messages"),
        ([draft("a"), rpc.Draft("a", fragment("b"))], "idempotency_key"),
        ([rpc.Draft("", fragment("a"))], "idempotency_key"),
        ([rpc.Draft("k" * 129, fragment("a"))], "idempotency_key"),
        ([rpc.Draft("ü" * 65, fragment("a"))], "idempotency_key"),
        ([rpc.Draft("k", b'"content":1')], "fragment"),
    ],
)
async def test_malformed_entries_are_refused_by_name(drafts: list[rpc.Draft], field: str) -> None:
    """INVALID names the field; nothing is appended and the next append works."""
    async with shard_rig() as rig, await rig.client() as client:
        [result] = await client.append_entries("s", rpc.Entry(drafts))
        assert result.error is not None
        assert (result.error.code, result.error.field) == ("INVALID", field)
        assert [ack.seq for ack in await client.append("s", "fine")] == [1]


async def test_what_is_too_large_is_refused() -> None:
    """A message beyond the limit, and a batch that no group commit holds, answer TOO_LARGE."""
    async with shard_rig() as rig, await rig.client() as client:
        with pytest.raises(TooLarge):
            await client.append("s", "x" * 80_000)
        with pytest.raises(TooLarge):
            await client.append("s", *(f"{number}" + "x" * 60_000 for number in range(20)), key=None)
        assert not (await client.info("s")).exists


@pytest.mark.parametrize("session", ["", "x" * 129, "ü" * 65])
async def test_session_ids_are_checked(session: str) -> None:
    """An id that no record can hold is INVALID and names the field."""
    async with shard_rig() as rig, await rig.client() as client:
        with pytest.raises(Invalid) as refused:
            await client.append(session, "a")
        assert refused.value.field == "session_id"
        with pytest.raises(Invalid):
            await client.info(session)


async def test_a_stopped_log_fails_every_waiter_and_takes_nothing_more(volume: SimVolume) -> None:
    """After the first failed write each request that waits hears TRY_AGAIN, and so does each later one."""
    async with shard_rig(volume) as rig, await rig.client() as client:
        await client.append("s", "one")

        def broken(_: object) -> None:
            raise OSError(5, "the disk is gone")

        rig.writer.hold()
        pending = _send_append(client, "s", rpc.Entry([draft("two")]))
        await _heard(client)
        volume.hooks.append(broken)
        rig.writer.release()
        assert _error(await pending)[0] == "TRY_AGAIN"
        assert len(rig.stopped) == 1
        with pytest.raises(TryAgain):
            await client.append("s", "three")
        with pytest.raises(TryAgain):
            await client.info("s")
        # A process that was asked to end just before waits for what is queued only now (simulator, seed 222998).
        with pytest.raises(LogStopped):
            async with asyncio.timeout(5):
                await rig.shard.close(checkpoint=True)
        volume.hooks.clear()


@pytest.fixture
def volume() -> SimVolume:
    return SimVolume()


def _send_append(client: RpcClient, session: str, entry: rpc.Entry) -> asyncio.Future[tuple[int, bytes]]:
    return client.send(Kind.APPEND, rpc.encode(rpc.Append(client.epoch, session, [entry])))


async def _heard(client: RpcClient) -> None:
    """Return when the shard has taken everything that this client has sent."""
    assert (await client.request(Kind.PING, b""))[0] == Kind.PONG


def _result(answer: tuple[int, bytes]) -> rpc.EntryResult:
    kind, payload = answer
    assert kind == Kind.APPENDED
    [result] = msgspec.msgpack.decode(payload, type=rpc.Appended).results
    return result


def _acks(answer: tuple[int, bytes]) -> list[tuple[int, bool]]:
    return [(ack.seq, ack.deduped) for ack in _result(answer).acks]


def _error(answer: tuple[int, bytes]) -> tuple[str, int | None]:
    error = _result(answer).error
    assert error is not None
    return error.code, error.last_seq
