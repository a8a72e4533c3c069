"""The RPC server: who may talk, what malformed frames get, and one answer to each request."""

from __future__ import annotations

import asyncio
import dataclasses

import msgspec
import pytest

from fleetlm_common import rpc
from fleetlm_common.errors import Conflict, FleetError, Invalid, Moved, TooLarge, TryAgain, Unauthenticated
from fleetlm_common.ids import ShardName
from fleetlm_common.rpc import Kind
from fleetlm_common.wire import HEADER
from fleetlm_shard.server import PAGES_MAX
from tests.support.eventually import eventually
from tests.support.rpcclient import RpcClient, draft, refused
from tests.support.shardrig import NAME, SLOTS, shard_rig


@pytest.mark.parametrize(
    ("change", "error", "field"),
    [
        ({"credential": b"wrong"}, Unauthenticated, "credential"),
        ({"protocol": 99}, Invalid, "protocol"),
        ({"ring_uid": "another"}, Invalid, "ring_uid"),
        ({"shard": "shard-9"}, Invalid, "shard"),
        ({"volume_id": "another"}, Invalid, "volume_id"),
    ],
)
async def test_a_wrong_hello_is_refused_and_shown_out(
    change: dict[str, object], error: type[FleetError], field: str
) -> None:
    """The refusal names the field, then the connection ends; nothing else was said."""
    async with shard_rig() as rig:
        client = await RpcClient.open("127.0.0.1", rig.port)
        hello = msgspec.structs.replace(rig.hello(), **change)
        kind, payload = await client.request(Kind.HELLO, rpc.encode(hello))
        answer = refused(kind, payload)
        assert isinstance(answer, error)
        assert answer.body().field == field
        await asyncio.wait_for(client.lost.wait(), 5)


@pytest.mark.parametrize("kind", [Kind.APPEND, Kind.READ, Kind.PING, Kind.SUBSCRIBE, 0, 255])
async def test_nothing_is_answered_before_hello(kind: int) -> None:
    """Whoever does not begin with HELLO gets UNAUTHENTICATED and the end."""
    async with shard_rig() as rig:
        client = await RpcClient.open("127.0.0.1", rig.port)
        got, payload = await client.request(kind, rpc.encode(rpc.Read(1, "s", 10, after=0)))
        assert isinstance(refused(got, payload), Unauthenticated)
        await asyncio.wait_for(client.lost.wait(), 5)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x91",
        b"not msgpack",
        rpc.encode(rpc.Goaway("x")),
        msgspec.msgpack.encode([1, 5, []]),
        msgspec.msgpack.encode([1, "s", [[["k"]]]]),
        msgspec.msgpack.encode({"epoch": 1}),
        b"\x99\x01\xa2\xff\xfe" + b"\x90" * 7,
        b"\x9b" + b"\x01" * 10 + b"\x91" * 100_000,
        msgspec.msgpack.encode([1, "s", "x" * 100]),
    ],
)
@pytest.mark.parametrize(
    "kind", [Kind.APPEND, Kind.READ, Kind.INFO, Kind.SUBSCRIBE, Kind.MARK_READ, Kind.CREATE, Kind.LIST]
)
async def test_a_malformed_payload_is_invalid_and_disturbs_nobody(kind: Kind, payload: bytes) -> None:
    """Each broken request is answered once with INVALID; the connection and its neighbours go on."""
    async with shard_rig() as rig, await rig.client() as client, await rig.client() as other:
        got, answer = await client.request(kind, payload)
        assert isinstance(refused(got, answer), Invalid)
        assert [ack.seq for ack in await client.append("s", "fine")] == [1]
        assert [ack.seq for ack in await other.append("s", "too")] == [2]
        assert rig.shard.server.in_flight == 0


@pytest.mark.parametrize("kind", [0, 2, 11, 20, 99, 255])
async def test_kinds_that_a_shard_does_not_take(kind: int) -> None:
    """An unknown kind is answered, so that nobody waits for ever."""
    async with shard_rig() as rig, await rig.client() as client:
        got, answer = await client.request(kind, b"")
        assert isinstance(refused(got, answer), Invalid)
        assert (await client.request(Kind.PING, b""))[0] == Kind.PONG


async def test_a_frame_that_announces_too_much_ends_the_connection_only() -> None:
    """A hostile length is not waited for."""
    async with shard_rig() as rig, await rig.client() as good:
        client = await rig.client()
        assert client.wire._transport is not None
        client.wire._transport.write(HEADER.pack(2**32 - 1, Kind.APPEND, 1))
        await asyncio.wait_for(client.lost.wait(), 5)
        assert [ack.seq for ack in await good.append("s", "fine")] == [1]


async def test_connections_are_bounded() -> None:
    """One too many is closed at once; the others do not notice."""
    async with shard_rig(connections_max=2) as rig, await rig.client() as one, await rig.client():
        third = await RpcClient.open("127.0.0.1", rig.port)
        await asyncio.wait_for(third.lost.wait(), 5)
        assert [ack.seq for ack in await one.append("s", "fine")] == [1]


async def test_requests_in_flight_are_bounded() -> None:
    """Past the bound the answer is TRY_AGAIN overloaded, and every request has exactly one answer."""
    async with shard_rig(requests_max=10) as rig, await rig.client() as client:
        await client.append("s", "first")
        rig.writer.hold()
        sent = [
            client.send(Kind.APPEND, rpc.encode(rpc.Append(1, "s", [rpc.Entry([draft(str(number))])])))
            for number in range(15)
        ]
        await asyncio.wait_for(asyncio.gather(*sent[10:]), 5)
        for each in sent[10:]:
            error = refused(*each.result())
            assert (error.code, error.reason) == ("TRY_AGAIN", "overloaded")
        rig.writer.release()
        assert {(await each)[0] for each in sent[:10]} == {Kind.APPENDED}
        assert client.other == []


async def test_a_draining_shard_says_so_and_finishes_what_is_in_flight() -> None:
    """GOAWAY and ENDED draining go out, new requests hear TRY_AGAIN draining, those in flight are answered."""
    async with shard_rig() as rig, await rig.client() as client:
        await client.append("s", "one")
        stream = await client.subscribe("s")
        rig.writer.hold()
        pending = client.send(Kind.APPEND, rpc.encode(rpc.Append(1, "s", [rpc.Entry([draft("two")])])))
        assert (await client.request(Kind.PING, b""))[0] == Kind.PONG
        rig.shard.drain()
        await asyncio.wait_for(client.goaway.wait(), 5)
        assert (await stream.frame())[0] == Kind.ENDED
        with pytest.raises(TryAgain) as late:
            await client.append("s", "three")
        assert late.value.reason == "draining"
        with pytest.raises(TryAgain):
            await client.info("s")
        rig.writer.release()
        assert (await pending)[0] == Kind.APPENDED


async def test_foreign_slots_are_moved_and_newer_gateways_make_us_look() -> None:
    """MOVED names owner and epoch; a request whose gateway knows a newer map makes the shard read it first."""
    async with shard_rig() as rig, await rig.client() as client:
        ring = await rig.own([ShardName("shard-1")] * SLOTS)
        await eventually(lambda: rig.shard.ownership.epoch == ring.epoch, "the map is taken")
        for ask in (client.append("s", "one"), client.read("s", after=0), client.subscribe("s")):
            with pytest.raises(Moved) as moved:
                await ask
            assert (moved.value.owner, moved.value.epoch) == ("shard-1", ring.epoch)
        back = await rig.own([NAME] * SLOTS)
        client.epoch = back.epoch
        assert [ack.seq for ack in await client.append("s", "one")] == [1]


async def test_a_request_of_a_newer_gateway_reads_the_map_before_it_is_refused() -> None:
    """The shard's own watch has not shown the map yet: the request itself makes it look."""
    async with shard_rig() as rig, await rig.client() as client:
        await rig.own([ShardName("shard-1")] * SLOTS)
        await eventually(lambda: not rig.shard.ownership.serves, "the slots are gone")
        reads = 0
        read = rig.control.read

        async def counted() -> object:
            nonlocal reads
            reads += 1
            return await read()

        rig.control.read = counted  # type: ignore[method-assign,assignment]
        client.epoch = rig.shard.ownership.epoch
        with pytest.raises(Moved):
            await client.append("s", "one")
        assert reads == 0
        client.epoch += 1
        with pytest.raises(Moved):
            await client.append("s", "one")
        assert reads == 1


async def test_create_is_idempotent_and_refuses_other_metadata() -> None:
    """201, then 200 with the same content in any spelling, then CONFLICT; a session made by an append has `{}`."""
    async with shard_rig() as rig, await rig.client() as client:
        created = await client.create("s", b'{"a":1,"b":[true]}')
        assert (created.created, created.info.exists, created.info.last_seq) == (True, True, 0)
        assert (await client.create("s", b'{"b":[true], "a":1}')).created is False
        with pytest.raises(Conflict) as other:
            await client.create("s", b'{"a":2}')
        assert other.value.reason == "session_exists"
        await client.append("t", "one")
        assert (await client.create("t")).created is False
        for metadata, error in ((b"[]", Invalid), (b"{", Invalid), (b'{"a":"' + b"x" * 9000 + b'"}', TooLarge)):
            with pytest.raises(error):
                await client.create("u", metadata)
        info = await client.info("s")
        assert (info.metadata, info.exists) == (b'{"a":1,"b":[true]}', True)
        assert not (await client.info("u")).exists


async def test_concurrent_creations_agree() -> None:
    """Of several at once one makes the session; those with other metadata are refused, none hangs."""
    async with shard_rig() as rig, await rig.client() as client:
        rig.writer.hold()
        asks = [asyncio.create_task(client.create("s", text)) for text in (b'{"a":1}', b'{"a":1}', b'{"a":2}')]
        await eventually(lambda: rig.writer.waiting > 0, "a round waits")
        rig.writer.release()
        results = await asyncio.gather(*asks, return_exceptions=True)
        assert [each.created for each in results if isinstance(each, rpc.Created)] == [True, False]
        assert [type(each) for each in results if isinstance(each, BaseException)] == [Conflict]


async def test_list_pages_through_every_session_in_order() -> None:
    """Ids ascend by their bytes, over what a checkpoint holds and what changed since; an empty page is the end."""
    async with shard_rig() as rig, await rig.client() as client:
        names = [f"s-{number:03}" for number in range(30)] + ["ü", "Z", "a"]
        for name in names[:20]:
            await client.append(name, "x")
        assert await rig.shard.upkeep.checkpoint()
        for name in names[10:]:
            await client.append(name, "y")
        listed: list[str] = []
        after = ""
        while True:
            page = await client.ask(Kind.LIST, rpc.List(after, 7), rpc.Listed)
            if not page.sessions:
                break
            listed += [name for name, _ in page.sessions]
            after = listed[-1]
        assert listed == sorted(names, key=str.encode)
        for limit in (0, 1001):
            with pytest.raises(Invalid):
                await client.ask(Kind.LIST, rpc.List("", limit), rpc.Listed)


async def test_an_error_inside_still_answers_the_request() -> None:
    """A mistake of the shard's own becomes TRY_AGAIN, is counted, and leaves nothing in flight."""
    async with shard_rig() as rig, await rig.client() as client:

        async def broken(_: rpc.Read) -> rpc.Page:
            raise RuntimeError("a mistake")

        handlers = rig.shard.server.handlers
        handlers[Kind.READ] = dataclasses.replace(handlers[Kind.READ], serve=broken)
        with pytest.raises(TryAgain):
            await client.read("s", after=0)
        assert (rig.shard.server.failed, rig.shard.server.in_flight) == (1, 0)


async def test_a_mistake_between_disk_and_answer_ends_the_shard() -> None:
    """Whoever waits is told, the process is told to end, nothing is taken any more: only a restart knows the truth."""
    async with shard_rig() as rig, await rig.client() as client:

        def broken(records: object) -> None:
            raise RuntimeError("a mistake")

        told: list[dict[str, object]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: told.append(context))
        rig.shard.writes.on_durable = broken  # type: ignore[method-assign]
        with pytest.raises(TryAgain):
            await client.append("s", "k")
        assert [str(error) for error in rig.stopped] == ["a mistake"]
        with pytest.raises(TryAgain):
            await client.append("s", "k2")


async def test_marks_do_not_wait_behind_pages() -> None:
    """As many pages as may be read at once are stuck: a read cursor is stored all the same."""
    async with shard_rig() as rig, await rig.client() as client:
        await client.append("s", "k")
        held = [await rig.shard.server.paging.acquire() for _ in range(PAGES_MAX)]
        assert held
        async with asyncio.timeout(5):
            assert await client.mark_read("s", "alice", 1) == 1
