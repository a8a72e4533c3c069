"""Frames, batches, headers and the scan, as pure functions."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetlm_shard.framing import (
    BATCH_FRAME_BYTES,
    FORMAT,
    HEADER_BYTES,
    Batch,
    Hole,
    PrevSegment,
    SegmentHeader,
    UnknownFormat,
    batch_frame,
    decode_header,
    encode_header,
    frame_start,
    reseeded,
    scan,
)
from fleetlm_shard.records import Message, decode, encode
from tests.support.logkit import message

SEED = 0xC0FFEE
BASE = 1_000_000

HEADER = SegmentHeader(
    ring_uid="ring-1",
    shard="shard-0",
    term=3,
    number=7,
    base_pos=BASE,
    size=64 * 1024 * 1024,
    filled_pos=BASE,
    prev=PrevSegment(3, 6, BASE),
    seed=SEED,
)

Batches = list[list[Message]]


def build(batches: Batches, *, seed: int = SEED, lagging: bool = False) -> tuple[bytes, list[int]]:
    """The bytes of these batches, and where each ends; `lagging`: written without knowing of any sync."""
    out = b""
    ends: list[int] = []
    for batch in batches:
        tails = [encode(each) for each in batch]
        frames = b"".join(frame_start(tail, seed) + tail for tail in tails)
        pos = BASE + len(out)
        synced_pos = BASE if lagging else pos
        out += batch_frame(pos=pos, synced_pos=synced_pos, frames=len(tails), frames_bytes=len(frames), seed=seed)
        out += frames
        ends.append(BASE + len(out))
    return out, ends


def pieces_of(data: bytes, *, proven_pos: int = BASE, seed: int = SEED) -> list[Batch | Hole]:
    """All pieces of a scan."""
    return list(scan(data, start_pos=BASE, seed=seed, proven_pos=proven_pos))


def messages_of(data: bytes, pieces: list[Batch | Hole]) -> list[Message]:
    """The messages in them."""
    found = [decode(kind, slot, data[start:stop]) for each in pieces for _, kind, slot, start, stop in each.frames]
    return [each for each in found if isinstance(each, Message)]


some_messages = st.builds(message, st.just("s"), st.integers(1, 2**53), text=st.text("ab", max_size=60))
some_batches = st.lists(st.lists(some_messages, max_size=4), min_size=1, max_size=5)


@given(some_batches, st.data())
@settings(max_examples=200, deadline=None)
def test_any_prefix_of_the_bytes_recovers_a_prefix_of_the_batches(batches: Batches, data: st.DataObject) -> None:
    """Whole batches before the cut come out, in order; what is cut is a torn tail; zeros after it change nothing."""
    content, ends = build(batches)
    cut = data.draw(st.integers(0, len(content)))
    for padded in (content[:cut], content[:cut] + bytes(500)):
        pieces = pieces_of(padded)
        whole = [end for end in ends if end <= BASE + cut]
        # What was cut may have been zeros anyway (the last byte of a checksum, for one).
        assert [each.end_pos for each in pieces][: len(whole)] == whole
        assert len(pieces) <= len(whole) + 1
        assert messages_of(padded, pieces)[: sum(map(len, batches[: len(whole)]))] == [
            each for batch in batches[: len(whole)] for each in batch
        ]
        assert all(isinstance(each, Batch) for each in pieces)


@given(some_batches, st.data())
@settings(max_examples=200, deadline=None)
def test_any_damage_below_what_is_proven_costs_only_what_it_touches(batches: Batches, data: st.DataObject) -> None:
    """Bytes overwritten before the last batch: every frame that was not touched comes out, the rest is said."""
    content, _ = build([*batches, [message("end", 1)], []])
    last_start = len(build([*batches, [message("end", 1)]])[0])
    start = data.draw(st.integers(0, last_start - 1))
    size = data.draw(st.integers(1, min(80, last_start - start)))
    noise = data.draw(st.binary(min_size=size, max_size=size))
    damaged = content[:start] + noise + content[start + size :]
    pieces = pieces_of(damaged)
    assert pieces[-1].end_pos == BASE + len(content)
    got = messages_of(damaged, pieces)
    truth = [each for batch in [*batches, [message("end", 1)]] for each in batch]
    touched = _touched([*batches, [message("end", 1)]], start, start + size)
    for each, is_touched in zip(truth, touched, strict=True):
        if not is_touched:
            assert each in got
    assert all(each in truth for each in got)
    lost = len(truth) - len(got)
    assert lost <= sum(each.lost_max for each in pieces if isinstance(each, Hole))


def _touched(batches: Batches, start: int, stop: int) -> list[bool]:
    touched: list[bool] = []
    at = 0
    for batch in batches:
        at += BATCH_FRAME_BYTES
        for each in batch:
            size = 8 + len(encode(each))
            touched.append(at < stop and start < at + size)
            at += size
    return touched


@given(st.binary(max_size=3000), st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_noise_is_never_a_batch(noise: bytes, seed: int) -> None:
    """Random bytes give nothing, whatever they are, and the scan ends."""
    assert pieces_of(noise, seed=seed) == []
    holes = pieces_of(noise, seed=seed, proven_pos=BASE + len(noise))
    assert all(isinstance(each, Hole) and not each.frames for each in holes)


def test_frames_of_an_earlier_life_do_not_pass() -> None:
    """The same bytes under another seed are nothing."""
    content, _ = build([[message("s", 1)]])
    assert len(pieces_of(content)) == 1
    assert pieces_of(content, seed=SEED ^ 1) == []


def test_a_batch_that_stands_elsewhere_does_not_pass() -> None:
    """A BATCH frame names its position: moved bytes are not believed."""
    content, _ = build([[message("s", 1)], [message("s", 2)]])
    first_end = build([[message("s", 1)]])[1][0] - BASE
    assert pieces_of(content[first_end:]) == []


def test_an_unproven_later_batch_does_not_make_damage() -> None:
    """Without fsync a torn batch may be followed by a whole one: the log ends at the tear, nothing is called damage."""
    content, ends = build([[message("s", 1)], [message("s", 2)], [message("s", 3)]], lagging=True)
    at = ends[0] - BASE + 60
    torn = content[:at] + bytes(20) + content[at + 20 :]
    assert [each.end_pos for each in pieces_of(torn)] == ends[:1]
    proven = pieces_of(torn, proven_pos=ends[1])
    assert [type(each) for each in proven] == [Batch, Hole, Batch]


def test_the_loss_is_exact_when_the_batch_frame_is_whole() -> None:
    """Of ten records one is damaged: nine are used, one is counted as lost."""
    batch = [message("s", seq) for seq in range(1, 11)]
    content, _ = build([batch, []])
    at = BATCH_FRAME_BYTES + 3 * (8 + len(encode(batch[0]))) + 50
    damaged = content[:at] + b"\xff\xff" + content[at + 2 :]
    hole, mark = pieces_of(damaged)
    assert isinstance(hole, Hole)
    assert (len(hole.frames), hole.lost_max) == (9, 1)
    assert isinstance(mark, Batch)


def test_a_reseeded_batch_is_the_same_batch() -> None:
    """What boot copies into the new segment reads there as it read before."""
    content, _ = build([[message("s", 1)], [message("s", 2), message("t", 1)]])
    pieces = [each for each in pieces_of(content) if isinstance(each, Batch)]
    copied = b"".join(reseeded(content, each, start_pos=BASE, seed=99) for each in pieces)
    again = pieces_of(copied, seed=99)
    assert again == pieces
    assert messages_of(copied, again) == messages_of(content, list(pieces))


def test_a_header_survives_the_loss_of_either_copy() -> None:
    """Any flipped byte leaves one whole copy; both damaged give None, never a wrong header."""
    block = encode_header(HEADER)
    assert len(block) == HEADER_BYTES
    assert decode_header(block) == (HEADER, 2)
    for at in range(0, HEADER_BYTES, 7):
        flipped = bytearray(block)
        flipped[at] ^= 1
        assert decode_header(bytes(flipped)) == (HEADER, 1)
    flipped = bytearray(block)
    flipped[20] ^= 1
    flipped[HEADER_BYTES // 2 + 20] ^= 1
    assert decode_header(bytes(flipped)) == (None, 0)
    assert decode_header(b"") == (None, 0)
    assert decode_header(bytes(HEADER_BYTES)) == (None, 0)


def test_a_header_of_another_format_is_said() -> None:
    """A whole header of a later version is no damage."""
    from crc32c import crc32c

    half = bytearray(encode_header(HEADER)[: HEADER_BYTES // 2])
    half[7] = FORMAT + 1
    half[-4:] = crc32c(half[:-4]).to_bytes(4, "little")
    with pytest.raises(UnknownFormat, match="format 2"):
        decode_header(bytes(half) + bytes(HEADER_BYTES // 2))


def test_salvage_of_a_large_ruin_is_bounded() -> None:
    """A megabyte of bytes that all look like frames ends in time."""
    noise = random.Random(5).randbytes(8) + b"\x02\x00\x00\x00\x00\x00\x00\x00"
    ruin = noise * 60_000
    pieces = pieces_of(ruin, proven_pos=BASE + len(ruin))
    assert [each.end_pos for each in pieces] == [BASE + len(ruin)]
