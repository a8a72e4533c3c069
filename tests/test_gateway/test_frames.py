"""WebSocket and Phoenix frames as bytes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlm_gateway import closing, phoenix, wsframes
from tests.support.frontrig import ws_frame


def read_all(reader: wsframes.Reader) -> list[tuple[int, bytes]]:
    found: list[tuple[int, bytes]] = []
    while (message := reader.next()) is not None:
        found.append(message)
    return found


@given(
    messages=st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=400)), max_size=5),
    mask=st.binary(min_size=4, max_size=4),
    cuts=st.lists(st.integers(1, 50), min_size=1, max_size=30),
)
def test_messages_survive_any_segmentation(messages: list[tuple[int, bytes]], mask: bytes, cuts: list[int]) -> None:
    """However TCP cuts the stream, the messages come out whole, in order, unmasked."""
    stream = b"".join(ws_frame(payload, first=0x80 | opcode, mask=mask) for opcode, payload in messages)
    reader = wsframes.Reader(frame_bytes_max=1000)
    found: list[tuple[int, bytes]] = []
    at = 0
    while at < len(stream):
        size = cuts[at % len(cuts)]
        reader.feed(stream[at : at + size])
        found += read_all(reader)
        at += size
    assert found == messages


def test_fragments_join_with_control_frames_between() -> None:
    """A message in fragments comes out once, after the ping that came in its middle."""
    reader = wsframes.Reader(frame_bytes_max=100)
    reader.feed(
        ws_frame(b"ab", first=0x01)
        + ws_frame(b"p", first=0x89)
        + ws_frame(b"", first=0x00)
        + ws_frame(b"c", first=0x80)
    )
    assert read_all(reader) == [(wsframes.PING, b"p"), (wsframes.TEXT, b"abc")]
    assert reader.frames == 4


@pytest.mark.parametrize(
    "frame",
    [
        b"\x81\x01x",  # not masked
        ws_frame(b"x", first=0xC1),  # reserved bit
        ws_frame(b"x", first=0x83),  # unknown opcode
        ws_frame(b"x", first=0x8B),  # unknown control opcode
        ws_frame(b"x", first=0x80),  # a fragment of nothing
        ws_frame(b"x", first=0x01) + ws_frame(b"y", first=0x81),  # a message within a message
        ws_frame(b"x", first=0x09),  # a fragmented ping
        ws_frame(b"x" * 126, first=0x89),  # a long ping
    ],
)
def test_breaches_of_the_protocol_raise(frame: bytes) -> None:
    """What RFC 6455 forbids to a client is a violation."""
    reader = wsframes.Reader(frame_bytes_max=1000)
    reader.feed(frame)
    with pytest.raises(wsframes.Violation):
        read_all(reader)


def test_oversize_is_known_from_the_header() -> None:
    """A message over the limit is refused before its payload arrives, also when it comes in fragments."""
    reader = wsframes.Reader(frame_bytes_max=100)
    reader.feed(b"\x81\xff" + (2**63).to_bytes(8, "big"))
    with pytest.raises(wsframes.Oversize):
        reader.next()
    reader = wsframes.Reader(frame_bytes_max=100)
    reader.feed(ws_frame(b"x" * 60, first=0x01) + ws_frame(b"x" * 41, first=0x80)[:6])
    with pytest.raises(wsframes.Oversize):
        read_all(reader)


@pytest.mark.parametrize("size", [0, 125, 126, 65535, 65536])
def test_heads_announce_their_size(size: int) -> None:
    """The three forms of a frame's length are used where they belong."""
    head = wsframes.text_head(size)
    assert head[0] == 0x81
    told = head[1] if head[1] < 126 else int.from_bytes(head[2:], "big")
    assert told == size
    assert len(head) == (2 if size < 126 else 4 if size < 65536 else 10)


def test_refs_go_back_as_they_came() -> None:
    """Strings, numbers and null are echoed byte by byte."""
    frame = phoenix.decode(b'[7, "a\\u0062", "session:x", "append", {"a": 1}]')
    assert (frame.join_ref, frame.ref, frame.payload) == (b"7", b'"a\\u0062"', b'{"a": 1}')
    reply = phoenix.reply_ok(frame.join_ref, frame.ref, phoenix.topic_text(frame.topic), b"{}")
    assert json.loads(reply) == [7, "ab", "session:x", "phx_reply", {"status": "ok", "response": {}}]


@pytest.mark.parametrize(
    "payload",
    [b'{"a":"\\ud800"}', b'{"a":NaN}', b"{", b"", b'{"a":1}}', b"[" * 100_000, b'{"a":"\x01"}'],
)
def test_unreadable_payload_still_says_whose_request_it_was(payload: bytes) -> None:
    """When only the payload is broken the request can be answered."""
    frame = phoenix.decode(b'["1","2","session:\\u00e9","append",' + payload + b"]")
    assert (frame.join_ref, frame.ref, frame.topic, frame.event) == (b'"1"', b'"2"', "session:é", "append")
    assert frame.payload is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        b"{}",
        b"[]",
        b'["1","2","t","e"]',
        b'["1","2",3,"e",{}]',
        b'["1","2","t",null,{}]',
        b'[{},"2","t","e",{}]',
        b'["1",true,"t","e",{}]',
        b'["1",[],"t","e",{}]',
        b'["1","2","\\ud800","e",{}]',
        b'["1","2","t","e",{"a":"\xff"}]',
        b'["1","' + b"2" * 200 + b'","t","e",{}]',
        b"null",
    ],
)
def test_what_is_no_frame_is_malformed(data: bytes) -> None:
    """Without a readable head nobody can be answered."""
    with pytest.raises(phoenix.Malformed):
        phoenix.decode(data)


@pytest.mark.parametrize("tail", [b"{}", b"{bad"])
@pytest.mark.parametrize(
    "ref", [b'"\\x"', b'"\\u12"', b'"\\ud800"', b'"a\nb"', b"01", b"1.5", b"1e5", b"true", b'"' + b"x" * 127 + b'"']
)
def test_a_ref_that_no_parser_takes_is_not_echoed(ref: bytes, tail: bytes) -> None:
    """Echoing it would make the server's own frame unreadable; long ones would make it large."""
    with pytest.raises(phoenix.Malformed):
        phoenix.decode(b"[null," + ref + b',"session:a","append",' + tail + b"]")


@given(st.binary(max_size=300) | st.text(max_size=300).map(str.encode))
def test_any_bytes_are_a_frame_or_malformed(data: bytes) -> None:
    """No bytes make the decoder raise anything else."""
    try:
        phoenix.decode(data)
    except phoenix.Malformed:
        return


def test_close_codes_say_whether_to_come_back() -> None:
    """Codes are unique, in their ranges, and fit a close frame with their reason."""
    assert (
        len({reason.code for reason in closing.ALL}) == len({reason.name for reason in closing.ALL}) == len(closing.ALL)
    )
    for reason in closing.ALL:
        assert 4000 <= reason.code <= 4999
        assert reason.reconnect == (reason.code < 4500)
        assert len(wsframes.close(reason.code, f"{reason.name}: {reason.message}")) <= 127
