"""Who may connect, what ends a socket, limits, slow readers; over real sockets."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from fleetlm_common.limits import PAGE_BYTES_MAX
from fleetlm_gateway import wsframes
from fleetlm_gateway.websocket import FRAMES_PER_TURN_MAX
from tests.support.eventually import eventually
from tests.support.frontrig import WHO, Closed, FrontRig, PhxClient, front_rig, on_uvloop, ws_frame

POSTER = {"X-Participant-Id": "poster"}


async def post(rig: FrontRig, session: str, content: object) -> None:
    """Append by REST."""
    url = f"{rig.url}/v1/sessions/{session}/messages"
    async with rig.http.post(url, json={"content": content}, headers=POSTER) as answer:
        assert answer.status == 201, await answer.text()


@pytest.mark.parametrize(
    ("query", "headers", "status", "code", "field"),
    [
        ("participant_id=a", {}, 400, "INVALID", "vsn"),
        ("vsn=1.0.0&participant_id=a", {}, 400, "INVALID", "vsn"),
        ("vsn=3.0.0&participant_id=a", {}, 400, "INVALID", "vsn"),
        ("vsn=2.0.0", {}, 401, "UNAUTHENTICATED", "participant_id"),
        ("vsn=2.0.0&participant_id=", {}, 400, "INVALID", "participant_id"),
        ("vsn=2.0.0&participant_id=" + "x" * 129, {}, 400, "INVALID", "participant_id"),
        ("vsn=2.0.0&participant_id=%FF", {}, 400, "INVALID", "query"),
        ("vsn=2.0.0&participant_id=a&participant_id=b", {}, 400, "INVALID", "participant_id"),
        ("vsn=2.0.0&participant_id=a&participant_kind=robot", {}, 400, "INVALID", "participant_kind"),
        (WHO, {"Origin": "https://evil.example"}, 403, "FORBIDDEN", "origin"),
        (WHO, {"Origin": "null"}, 403, "FORBIDDEN", "origin"),
        (WHO, {"Upgrade": ""}, 426, "INVALID", "Upgrade"),
        (WHO, {"Upgrade": "h2c"}, 426, "INVALID", "Upgrade"),
        (WHO, {"Connection": "keep-alive"}, 426, "INVALID", "Upgrade"),
        (WHO, {"Sec_WebSocket_Version": "8"}, 400, "INVALID", "Sec-WebSocket-Version"),
        (WHO, {"Sec_WebSocket_Key": "short"}, 400, "INVALID", "Sec-WebSocket-Key"),
        (WHO, {"Sec_WebSocket_Key": "????????????????????????"}, 400, "INVALID", "Sec-WebSocket-Key"),
    ],
)
@on_uvloop
async def test_refused_upgrades(query: str, headers: dict[str, str], status: int, code: str, field: str) -> None:
    """Who may not connect is told why before the upgrade, as problem JSON that names the field."""
    async with front_rig() as rig:
        found, problem = await rig.refused(query, **headers)
        assert (found, problem["code"], problem["field"]) == (status, code, field)
        assert rig.value("sockets_refused_total", code=code) == (0 if field == "origin" else 1)


@pytest.mark.parametrize(
    "origin", ["http://gateway", "https://app.example", "HTTPS://APP.example", "http://localhost:3000"]
)
@on_uvloop
async def test_allowed_origins(origin: str) -> None:
    """Pages of the gateway's own host and of listed origins connect."""
    async with front_rig(origins="https://app.example, http://localhost:3000") as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        head = f"GET /socket/websocket?{WHO} HTTP/1.1\r\nHost: gateway\r\nOrigin: {origin}\r\n"
        head += "Upgrade: WebSocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        writer.write(f"{head}Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 101 ")
        assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in answer
        writer.transport.abort()


@on_uvloop
async def test_frames_behind_the_handshake_are_not_lost() -> None:
    """A client that sends without waiting for the 101, and one that upgrades on a used connection, are served."""
    async with front_rig() as rig:
        reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
        writer.write(b"GET /v1/limits HTTP/1.1\r\nHost: g\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")).split()[1])
        await reader.readexactly(size)
        upgrade = f"GET /socket/websocket?{WHO} HTTP/1.1\r\nHost: g\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        upgrade += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        writer.write(upgrade.encode() + ws_frame(b'[null,"1","phoenix","heartbeat",{}]'))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
        client = PhxClient(reader, writer)
        assert (await client.next())[1] == "1"
        await client.close()


@on_uvloop
async def test_offered_subprotocol_is_chosen() -> None:
    """A client that offers `phoenix` gets it; one that offers nothing gets nothing."""
    async with front_rig() as rig:
        url = f"{rig.url}/socket/websocket?{WHO}"
        async with rig.http.ws_connect(url, protocols=("base64url.bearer.phx.x", "phoenix")) as socket:
            assert socket.protocol == "phoenix"
        async with rig.http.ws_connect(url) as socket:
            assert socket.protocol is None


@on_uvloop
async def test_sockets_are_counted_and_bounded() -> None:
    """One socket too many is 429 with Retry-After; when one leaves there is room again."""
    async with front_rig(sockets=2) as rig:
        first = await rig.connect()
        await rig.connect()
        status, problem = await rig.refused(WHO)
        assert (status, problem["code"], problem["reason"]) == (429, "TRY_AGAIN", "overloaded")
        assert rig.value("sockets") == 2
        await first.close()
        await eventually(lambda: rig.value("sockets") == 1, "one has left")
        await (await rig.connect()).alive()


MALFORMED: list[tuple[bytes, int]] = [
    (ws_frame(b"hello"), 4500),
    (ws_frame(b""), 4500),
    (ws_frame(b'["1","2","t"]'), 4500),
    (ws_frame(b'{"topic":"t"}'), 4500),
    (ws_frame(b'["1","2","t","e",{"a":"\xff"}]'), 4500),
    (ws_frame(b"[" * 200_000), 4500),
    (ws_frame(b'["1","' + b"r" * 200 + b'","t","e",{}]'), 4500),
    (ws_frame(b'["1","2","session:s","append",{}]', first=0x82), 4502),
    (ws_frame(b"\x00\x01\x01\x01t", first=0x82), 4502),
    (b"\x81\x05hello", 4501),
    (b"\x81\x05hello" + b"x" * 3_000_000, 4501),
    (ws_frame(b"x", first=0xC1), 4501),
    (ws_frame(b"x", first=0x83), 4501),
    (ws_frame(b"x", first=0x80), 4501),
    (ws_frame(b"x", first=0x09), 4501),
    (b"GET / HTTP/1.1\r\n\r\n", 4501),
    (b"\x81\xff" + (1 << 62).to_bytes(8, "big"), 4503),
    (b"\x81\xff" + (262_145).to_bytes(8, "big"), 4503),
    (ws_frame(b"x" * 200_000, first=0x01) + ws_frame(b"x" * 70_000, first=0x80), 4503),
]


@pytest.mark.parametrize(("data", "code"), MALFORMED, ids=[f"{at}-{code}" for at, (_, code) in enumerate(MALFORMED)])
@on_uvloop
async def test_broken_frames_close_with_a_code(data: bytes, code: int) -> None:
    """What is no frame closes that socket with a documented code; its neighbour is not disturbed."""
    async with front_rig() as rig:
        neighbour, client = await rig.connect(), await rig.connect()
        await neighbour.join("session:s")
        client.raw(data)
        assert await client.close_code() == code
        await post(rig, "s", "still here")
        assert (await neighbour.next())[3] == "messages"
        await eventually(lambda: rig.value("sockets") == 1, "the broken one is gone")


@on_uvloop
async def test_unreadable_payload_is_answered_and_the_socket_lives() -> None:
    """A frame whose payload alone is broken gets INVALID on its ref."""
    async with front_rig() as rig:
        client = await rig.connect()
        await client.join("session:s")
        for payload in (b'{"content":"\\ud800"}', b'{"content":', b'{"content":%b}' % (b"[" * 50_000)):
            client.frame(b'["1","x","session:s","append",' + payload + b"]")
            frame = await client.next()
            assert (frame[1], frame[4]["response"]["code"]) == ("x", "INVALID")
        client.frame(b'["2","y","session:s","phx_join",{]')
        assert (await client.next())[4]["response"]["field"] == "payload"
        await client.alive()


@on_uvloop
async def test_fuzzed_frames_never_disturb_anybody() -> None:
    """Thousands of mutated frames (seeded): each socket is answered or closed with a code; a neighbour works on."""
    chance = random.Random(20261124)
    seeds = [
        b'["1","1","session:s","phx_join",{"cursor":0}]',
        b'["1","2","session:s","append",{"content":{"a":[1,2.5,"x\\u00e9"]},"kind":"k","metadata":{}}]',
        b'["1","3","session:s","append",{"messages":[{"content":1},{"content":null,"idempotency_key":"k"}]}]',
        b'["1","4","session:s","replay",{"after":0,"limit":5}]',
        b'["1","5","session:s","mark_read",{"seq":0}]',
        b'["1","6","session:s","phx_leave",{}]',
        b'[null,"7","phoenix","heartbeat",{}]',
    ]
    async with front_rig(frames_burst=1_000_000) as rig:
        neighbour = await rig.connect()
        await neighbour.join("session:other")
        closed: dict[int | None, int] = {}
        client = await rig.connect()
        for round_ in range(4000):
            client.raw(_mutated(chance, seeds))
            if round_ % 20 == 0:
                # A full frame that any survivor answers: what was cut short before swallows it, so a close is fine too.
                client.raw(ws_frame(b'[null,"alive","phoenix","heartbeat",{}]'))
                code = await _answer_or_close(client)
                if code is not _ALIVE:
                    closed[code] = closed.get(code, 0) + 1
                    await client.close()
                    client = await rig.connect()
        assert None not in closed, closed
        assert set(closed) <= {1000, 4500, 4501, 4502, 4503}, closed
        await post(rig, "other", "still here")
        assert (await neighbour.next())[3] == "messages"
        assert rig.value("sockets_closed_total", reason="internal") == 0


_ALIVE = -1


async def _answer_or_close(client: PhxClient) -> int | None:
    """`_ALIVE`, or the close code; a socket that waits for the rest of a cut frame counts as alive."""
    try:
        while True:
            if (await client.next(deadline_s=0.5))[1] == "alive":
                return _ALIVE
    except TimeoutError:
        client.writer.transport.abort()
        return 1000
    except Closed as end:
        return end.code


def _mutated(chance: random.Random, seeds: list[bytes]) -> bytes:
    text = bytearray(chance.choice(seeds))
    for _ in range(chance.choice((0, 0, 1, 1, 3))):
        at = chance.randrange(len(text))
        kind = chance.randrange(4)
        if kind == 0:
            text[at] = chance.randrange(256)
        elif kind == 1:
            del text[at : at + chance.randrange(1, 9)]
        elif kind == 2:
            text[at:at] = chance.choice((b'"', b"{", b"]", b"\\u", b"\xff", b"null", b"1e999", b"\\ud800"))
        else:
            text[at:at] = text[chance.randrange(len(text)) :]
        text = text or bytearray(b"[")
    frame = bytearray(ws_frame(bytes(text), mask=chance.randbytes(4)))
    if chance.random() < 0.03:
        frame[chance.randrange(min(len(frame), 6))] ^= 1 << chance.randrange(8)
    if chance.random() < 0.1:
        return ws_frame(bytes(text[:5]), first=0x01) + ws_frame(bytes(text[5:]), first=0x80)
    return bytes(frame)


async def test_a_fault_of_ours_closes_the_socket_to_come_back() -> None:
    """A bug behind a request leaves nobody waiting: the socket is closed with a reconnect code, others live."""
    faults: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(str(context["exception"])))
    async with front_rig() as rig:
        neighbour, client = await rig.connect(), await rig.connect()
        await client.join("session:s")
        rig.boundary.refusal = RuntimeError("boom")  # type: ignore[assignment]
        client.push("1", "2", "session:s", "mark_read", {"seq": 0})
        assert await client.close_code() == 4004
        rig.boundary.refusal = None
        await neighbour.alive()
        assert faults == ["boom"]


@on_uvloop
async def test_a_flood_of_one_socket_is_handled_in_turns() -> None:
    """Frames that arrive at once are handled a hundred or so at a time, so that others have their turn."""
    async with front_rig() as rig:
        client = await rig.connect()
        await client.join("session:s")
        (socket,) = rig.front.hub.sockets()
        before = rig.value("frames_received_total")
        frames = [b'["1","%d","session:s","replay",{"after":"wrong"}]' % at for at in range(1000)]
        # As the transport would hand them over: more in one piece than loopback delivers.
        socket.data_received(b"".join(map(ws_frame, frames)))
        assert rig.value("frames_received_total") - before == FRAMES_PER_TURN_MAX
        assert [(await client.next())[1] for _ in range(1000)] == [str(at) for at in range(1000)]
        await client.alive()


# -- limits


@on_uvloop
async def test_topics_are_bounded() -> None:
    """One topic too many is TRY_AGAIN overloaded; joining one of them again, or after a leave, is not one too many."""
    async with front_rig(topics_per_socket=2) as rig:
        client = await rig.connect()
        await client.join("session:a", join_ref="a")
        await client.join("session:b", join_ref="b")
        reply = await client.request("session:c", "phx_join", {}, join_ref="c")
        assert (reply.response["code"], reply.response["reason"]) == ("TRY_AGAIN", "overloaded")
        await client.join("session:b", join_ref="b2")
        await client.request("session:a", "phx_leave", {}, join_ref="a")
        await client.join("session:c", join_ref="c2")
        assert rig.value("topics") == 2


@on_uvloop
async def test_requests_under_way_are_bounded_in_number_and_bytes() -> None:
    """More requests than may be under way are refused on their refs with TRY_AGAIN; the others are served."""
    async with front_rig(requests_per_socket=5, request_bytes_per_socket=300_000) as rig:
        client = await rig.connect()
        await client.join("session:s")
        rig.boundary.gate.clear()
        for at in range(8):
            client.push("1", f"n{at}", "session:s", "append", {"content": at})
        refused = [await client.next() for _ in range(3)]
        assert [frame[1] for frame in refused] == ["n5", "n6", "n7"]
        assert {frame[4]["response"]["reason"] for frame in refused} == {"overloaded"}
        rig.boundary.gate.set()
        while (await client.next())[1] != "n4":
            pass
        rig.boundary.gate.clear()
        big = "x" * 60_000
        for at in range(5):
            client.push("1", f"b{at}", "session:s", "append", {"messages": [{"content": big}] * 2})
        refused = [frame for frame in [await client.next() for _ in range(4)] if frame[3] == "phx_reply"]
        assert {frame[4]["response"]["reason"] for frame in refused} == {"overloaded"}
        rig.boundary.gate.set()
        await client.alive()


@on_uvloop
async def test_pages_under_way_are_bounded() -> None:
    """Replays of one socket run a few at a time, and all are answered."""
    async with front_rig() as rig:
        client = await rig.connect()
        for at in range(20):
            await client.join(f"session:{at}", join_ref=f"j{at}")
        rig.boundary.gate.clear()
        for at in range(20):
            client.push(f"j{at}", f"p{at}", f"session:{at}", "replay", {"after": 0})
        await client.alive()
        rig.boundary.gate.set()
        assert {(await client.next())[1] for _ in range(20)} == {f"p{at}" for at in range(20)}
        assert rig.boundary.reads_at_once == 4


@on_uvloop
async def test_frames_a_second_are_bounded() -> None:
    """Above the rate requests are refused with a time; who goes on is closed to come back later; others are served."""
    async with front_rig(frames_per_second=50, frames_burst=20) as rig:
        neighbour, client = await rig.connect(), await rig.connect()
        for at in range(30):
            client.push(None, str(at), "phoenix", "heartbeat", {})
        replies = [await client.next() for _ in range(30)]
        refused = [frame[4]["response"] for frame in replies if frame[4]["status"] == "error"]
        assert 5 <= len(refused) <= 10
        assert {found["reason"] for found in refused} == {"overloaded"}
        assert all(0 < found["retry_after_ms"] <= 1000 for found in refused)
        await neighbour.alive()
        for _ in range(100):
            client.frame(b"", first=0x8A)
        assert await client.close_code() == 4003
        await neighbour.alive()
        assert rig.value("rate_limited_frames_total") == len(refused)


@on_uvloop
async def test_silent_sockets_are_closed() -> None:
    """Who sends nothing for heartbeat_timeout_ms is closed with a reconnect code; who beats is not."""
    async with front_rig(heartbeat_timeout_ms=400) as rig:
        silent, beating = await rig.connect(), await rig.connect()
        closing = asyncio.create_task(silent.close_code())
        while not closing.done():
            await beating.alive()
            await asyncio.sleep(0.05)
        assert closing.result() == 4001
        await beating.alive()


@on_uvloop
async def test_peer_that_never_answers_our_close_is_dropped() -> None:
    """After our close frame the connection ends within the linger, also when the client goes on sending."""
    async with front_rig() as rig:
        client = await rig.connect()
        client.raw(ws_frame(b"", first=0x82))
        with pytest.raises(Closed) as closed:
            await client.next()
        assert closed.value.code == 4502
        client.frame(b'[null,"1","phoenix","heartbeat",{}]')
        await eventually(lambda: rig.value("sockets") == 0, "dropped", timeout_s=5)


# -- slow readers


@on_uvloop
async def test_a_reader_that_never_reads_beside_a_hundred_that_do() -> None:
    """The hundred get everything, soon; the one costs bounded memory, is full, and is closed when that lasts."""
    async with front_rig(stall_ms=1500, write_buffer_bytes=262_144) as rig:
        readers = [await rig.connect() for _ in range(100)]
        await asyncio.gather(*(reader.join("session:s") for reader in readers))
        stuck = await rig.connect()
        await stuck.join("session:s")
        stuck.writer.transport.pause_reading()  # type: ignore[attr-defined]
        body, count = "x" * 60_000, 150
        counting = [asyncio.create_task(_count(reader, count)) for reader in readers]
        waited_bytes: list[int] = []
        for _ in range(count):
            await post(rig, "s", body)
            waited_bytes += [one.out.waiting_bytes() for one in rig.front.hub.sockets() if one.out.full]
        await asyncio.gather(*counting)
        assert waited_bytes
        assert max(waited_bytes) < 2 * 262_144
        await eventually(lambda: rig.value("sockets_closed_total", reason="slow_reader") == 1, "the one is closed")
        assert rig.value("sockets_full") == 0
        assert rig.value("sockets") == 100


async def _count(client: PhxClient, count: int) -> None:
    expected = 1
    while expected <= count:
        frame = await client.next(deadline_s=60)
        if frame[3] == "messages":
            for message in frame[4]["messages"]:
                assert message["seq"] == expected
                expected += 1


@on_uvloop
async def test_a_slow_reader_that_comes_back_misses_nothing() -> None:
    """Deliveries refused while the socket was full are replayed from the cursor: contiguous, once each."""
    async with front_rig(write_buffer_bytes=262_144) as rig:
        client = await rig.connect()
        await client.join("session:s")
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        # As much as kernel buffers on both sides and the client's own take, and more.
        count = 400
        for _ in range(count):
            await post(rig, "s", "x" * 60_000)
        (place,) = rig.boundary.session("s").places
        assert place.refusals > 0
        assert rig.value("sockets_full") == 1
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        await _count(client, count)
        await client.alive()
        assert rig.value("sockets_full") == 0


@on_uvloop
async def test_a_long_replay_is_not_poured_into_memory() -> None:
    """A replay of many megabytes waits for the client page by page, within one turn of the loop too."""
    async with front_rig(write_buffer_bytes=262_144) as rig:
        for _ in range(300):
            await post(rig, "s", "x" * 60_000)
        client = await rig.connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.push("1", "1", "session:s", "phx_join", {"cursor": 0})
        await eventually(lambda: rig.value("sockets_full") == 1, "full")
        (socket,) = rig.front.hub.sockets()
        assert socket.out.waiting_bytes() < 262_144 + 2 * PAGE_BYTES_MAX
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        await _count(client, 300)


@on_uvloop
async def test_read_cursors_are_not_pushed_to_a_full_socket() -> None:
    """They are hints: dropped and counted while the socket is full, so that they cannot fill it further."""
    async with front_rig(write_buffer_bytes=262_144) as rig:
        client = await rig.connect()
        await client.join("session:s")
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        while rig.value("sockets_full") == 0:
            await post(rig, "s", "x" * 60_000)
        url = f"{rig.url}/v1/sessions/s/read"
        async with rig.http.put(url, json={"seq": 1}, headers=POSTER) as answer:
            assert answer.status == 200
        assert rig.value("read_hints_dropped_total") == 1


@on_uvloop
async def test_who_sends_without_reading_is_stopped() -> None:
    """A client that asks for pages and reads none is not read from any more, and its answers stay bounded."""
    async with front_rig(write_buffer_bytes=262_144, stall_ms=60_000) as rig:
        for _ in range(15):
            await post(rig, "s", "x" * 60_000)
        client = await rig.connect()
        await client.join("session:s")
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for at in range(200):
            client.push("1", str(at), "session:s", "replay", {"after": 0})
        await eventually(lambda: rig.value("sockets_full") == 1, "full")
        (socket,) = rig.front.hub.sockets()
        assert socket.out.waiting_bytes() < 262_144 + 2_000_000
        received_bytes = rig.value("received_bytes_total")
        flood = ws_frame(b'["1","x","session:s","append",{"content":"%b"}]' % (b"x" * 60_000), mask=bytes(4))
        client.raw(flood * 200)
        neighbour = await rig.connect()
        for _ in range(50):
            await neighbour.alive()
        assert rig.value("received_bytes_total") - received_bytes < 1_000_000
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        seen: set[Any] = set()
        while len(seen) < 200:
            seen.add((await client.next())[1])


# -- drain


@on_uvloop
async def test_drain_tells_each_topic_once_answers_and_spreads_the_closes() -> None:
    """`draining` once per joined topic; what is under way is answered; sockets close with 4000 over the window."""
    async with front_rig(drain_window_ms=600) as rig:
        clients = [await rig.connect() for _ in range(20)]
        for client in clients:
            await client.join("session:a", join_ref="1")
            await client.join("session:b", join_ref="2")
        rig.boundary.gate.clear()
        clients[0].push("1", "late", "session:a", "append", {"content": "in flight"})
        await clients[0].alive()
        draining = asyncio.create_task(rig.front.drain())
        loop = asyncio.get_running_loop()
        started_s = loop.time()

        async def leave(client: PhxClient) -> tuple[list[str], int | None, float, list[str]]:
            told: list[str] = []
            answered: list[str] = []
            try:
                while True:
                    frame = await client.next()
                    if frame[3] == "draining":
                        assert frame[4] == {"retry_after_ms": 600}
                        told.append(frame[2])
                    elif frame[3] == "phx_reply":
                        assert frame[4]["status"] == "ok"
                        answered.append(frame[1])
            except Closed as closed:
                at_s = loop.time() - started_s
                client.frame(b"\x0f\xa0", first=0x88)
                return told, closed.code, at_s, answered

        loop.call_later(0.8, rig.boundary.gate.set)
        ends = await asyncio.gather(*map(leave, clients))
        await draining
        assert all(sorted(told) == ["session:a", "session:b"] for told, *_ in ends)
        assert {code for _, code, *_ in ends} == {4000}
        times = sorted(at_s for _, _, at_s, _ in ends[1:])
        assert times[-1] < 2
        assert len({int(at_s * 10) for at_s in times}) >= 4
        assert ends[0][3] == ["late"]
        assert ends[0][2] >= 0.75
        assert rig.value("draining") == 1


@on_uvloop
async def test_nothing_new_while_draining() -> None:
    """Joins, sockets and REST requests are TRY_AGAIN draining with a time; a socket that still lives is served."""
    async with front_rig(drain_window_ms=1500) as rig:
        client = await rig.connect()
        await client.join("session:a")
        kept = [await rig.connect() for _ in range(3)]
        draining = asyncio.create_task(rig.front.drain())
        assert (await client.next())[3] == "draining"
        reply = await client.request("session:b", "phx_join", {}, join_ref="9")
        assert (reply.response["reason"], reply.response["retry_after_ms"]) == ("draining", 1500)
        assert (await client.request("session:a", "append", {"content": 1})).status == "ok"
        status, problem = await rig.refused(WHO)
        assert (status, problem["code"], problem["reason"]) == (503, "TRY_AGAIN", "draining")
        async with rig.http.get(f"{rig.url}/v1/sessions") as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "2")
            assert answer.headers["Connection"] == "close"
        for one in (client, *kept):
            assert await one.close_code() == 4000
        await draining


def test_close_frame_carries_code_and_name() -> None:
    """A client reads from the frame why it was closed."""
    frame = wsframes.close(4002, "slow_reader: x")
    assert frame == b"\x88\x10\x0f\xa2slow_reader: x"
