"""The tail of recent live messages: contiguous, cut where asked, trimmed to its bounds."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlm_gateway.tail import Chunk, Tail, cut, joined


def chunk(first_seq: int, count: int) -> Chunk:
    return joined(first_seq, [b'{"seq":%d,"text":"a, b] } \\"c"}' % seq for seq in range(first_seq, first_seq + count)])


def seqs(chunks: list[Chunk]) -> list[int]:
    return [
        message["seq"]
        for each in chunks
        for message in msgspec.json.decode(b"[%b]" % each.body, type=list[dict[str, int | str]])
        if isinstance(message["seq"], int)
    ]


@given(
    start=st.integers(0, 5),
    counts=st.lists(st.integers(1, 6), max_size=8),
    messages=st.integers(0, 20),
    size_bytes=st.integers(0, 600),
)
def test_what_is_kept_is_contiguous_and_newest(start: int, counts: list[int], messages: int, size_bytes: int) -> None:
    """After any history: both bounds hold, what is kept ends at the last seq, and counts are true."""
    tail = Tail(start)
    for count in counts:
        tail.add(chunk(tail.last_seq + 1, count))
        tail.trim(messages=messages, size_bytes=size_bytes)
    kept = tail.after(tail.first_seq - 1)
    assert seqs(kept) == list(range(tail.first_seq, tail.last_seq + 1))
    assert tail.messages == len(seqs(kept)) <= messages
    assert tail.size_bytes == sum(len(each.body) for each in kept) <= size_bytes
    assert tail.last_seq == start + sum(counts)


@given(first=st.integers(1, 9), count=st.integers(1, 9), data=st.data())
def test_a_cut_keeps_the_rest(first: int, count: int, data: st.DataObject) -> None:
    """What comes after a seq within a chunk is what a cut leaves, byte for byte."""
    whole = chunk(first, count)
    after = data.draw(st.integers(first, whole.last_seq))
    assert cut(whole, after) == chunk(after + 1, whole.last_seq - after)


@pytest.mark.parametrize("body", [b"", b"{}", b'{"seq":1},', b"{},{},{}"])
def test_a_push_that_is_not_what_it_says_is_not_cut(body: bytes) -> None:
    """Another number of messages, or no JSON, raises instead of being passed on."""
    with pytest.raises(msgspec.MsgspecError):
        cut(Chunk(1, 2, body), 1)


def test_a_restart_keeps_nothing() -> None:
    """After a jump the tail begins anew behind it."""
    tail = Tail(0)
    tail.add(chunk(1, 3))
    tail.restart(10)
    assert (tail.first_seq, tail.last_seq, tail.size_bytes, tail.after(10)) == (11, 10, 0, [])
