"""Frames come out whole and in order, however the bytes arrive."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlm_common.wire import HEADER, PAYLOAD_BYTES_MAX, FrameConnection, FrameDecoder, ProtocolError, Turn

frame = st.tuples(st.integers(0, 255), st.integers(0, 2**64 - 1), st.binary(max_size=200))


def encoded(frames: list[tuple[int, int, bytes]]) -> bytes:
    """The bytes of frames."""
    return b"".join(HEADER.pack(len(payload), kind, ident) + payload for kind, ident, payload in frames)


@given(st.lists(frame, max_size=10), st.lists(st.integers(1, 50), min_size=1, max_size=50))
def test_any_cut_of_the_stream_gives_the_same_frames(frames: list[tuple[int, int, bytes]], cuts: list[int]) -> None:
    """One byte at a time or all at once: the same frames."""
    data, decoder, got = encoded(frames), FrameDecoder(), list[tuple[int, int, bytes]]()
    at = 0
    while at < len(data):
        step = cuts[at % len(cuts)]
        got += decoder.feed(data[at : at + step])
        at += step
    assert got == frames


def test_a_frame_that_announces_too_much_is_refused_before_it_arrives() -> None:
    """The limit is checked on the header: no memory is given to a hostile length."""
    with pytest.raises(ProtocolError, match=str(PAYLOAD_BYTES_MAX)):
        FrameDecoder().feed(HEADER.pack(PAYLOAD_BYTES_MAX + 1, 1, 1))


class Peer:
    """One side of a loopback connection, with what it got."""

    def __init__(self) -> None:
        self.frames: asyncio.Queue[tuple[int, int, bytes]] = asyncio.Queue()
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.made: asyncio.Future[FrameConnection] = asyncio.get_running_loop().create_future()

    def protocol(self) -> FrameConnection:
        """For `create_server` and `create_connection`."""
        return FrameConnection(
            on_frame=lambda kind, ident, payload: self.frames.put_nowait((kind, ident, payload)),
            on_lost=self.lost.set_result,
            on_made=self.made.set_result,
        )


async def test_both_directions_over_a_socket() -> None:
    """What one side sends in a tick the other gets, in order; closing sends what is queued first."""
    loop = asyncio.get_running_loop()
    server, client = Peer(), Peer()
    listening = await loop.create_server(server.protocol, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        _, near = await loop.create_connection(client.protocol, "127.0.0.1", port)
        far = await asyncio.wait_for(server.made, 5)
        for ident in range(100):
            near.send(10, ident, b"x" * ident)
        far.send(11, 7, b"back")
        assert await asyncio.wait_for(client.frames.get(), 5) == (11, 7, b"back")
        got = [await asyncio.wait_for(server.frames.get(), 5) for _ in range(100)]
        assert got == [(10, ident, b"x" * ident) for ident in range(100)]
        near.send(12, 1, b"last words")
        near.close()
        assert await asyncio.wait_for(server.frames.get(), 5) == (12, 1, b"last words")
        assert await asyncio.wait_for(server.lost, 5) is None
        await asyncio.wait_for(client.lost, 5)
        assert near.closed
        near.send(12, 2, b"into the void")
        assert near.buffered_bytes == 0


async def test_a_peer_that_speaks_garbage_is_dropped() -> None:
    """A stream that is not frames closes that connection at once."""
    loop = asyncio.get_running_loop()
    server = Peer()
    listening = await loop.create_server(server.protocol, "127.0.0.1", 0)
    async with listening:
        port = listening.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(1), 5)
        writer.close()
        await asyncio.wait_for(server.lost, 5)
        assert server.frames.empty()


async def test_connections_that_share_a_turn_do_not_share_their_faults() -> None:
    """What one connection's handler raises ends that connection, is told, and costs the others nothing."""
    loop, turn = asyncio.get_running_loop(), Turn()
    told: list[object] = []
    loop.set_exception_handler(lambda _, context: told.append(context["exception"]))
    fault, got = RuntimeError("of the first"), list[int]()

    def broken(kind: int, ident: int, payload: bytes) -> None:
        raise fault

    first = FrameConnection(on_frame=broken, on_lost=lambda _: None, turn=turn)
    second = FrameConnection(on_frame=lambda _, ident, __: got.append(ident), on_lost=lambda _: None, turn=turn)
    for connection in (first, second):
        connection.data_received(encoded([(1, 7, b"")])[:5])
        connection.data_received(encoded([(1, 7, b"")])[5:] + encoded([(1, 8, b"")]))
    await asyncio.sleep(0)
    assert (first.closed, second.closed) == (True, False)
    assert (told, got) == ([fault], [7, 8])
