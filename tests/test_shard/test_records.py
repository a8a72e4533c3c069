"""Bodies of records, and the JSON of a message."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlm_common.clock import iso_utc
from fleetlm_shard.records import (
    VOID_TAIL,
    CursorMoved,
    Damaged,
    Imported,
    InsertedAt,
    Message,
    MoveConfirmed,
    Record,
    RecordType,
    SessionCreated,
    SessionImported,
    SlotsOpened,
    SlotsReleased,
    SlotsSealed,
    Trimmed,
    UnknownRecord,
    Void,
    content_hash,
    decode,
    encode,
    message_id,
    message_inserted_at_us,
    message_json,
    message_place,
)

numbers = st.integers(0, 2**53 - 1)
slots = st.integers(0, 1023)
ids = st.text(min_size=1, max_size=32).filter(lambda text: 1 <= len(text.encode(errors="ignore")) <= 128)
clean = ids.filter(lambda text: text.isprintable() or text.encode("utf-8", "ignore").decode() == text)

some_records = st.one_of(
    st.builds(
        Message,
        slot=slots,
        session=clean,
        seq=numbers,
        inserted_at_us=numbers,
        key=clean,
        content_hash=st.binary(min_size=16, max_size=16),
        json=st.binary(max_size=300),
    ),
    st.builds(SessionCreated, slot=slots, session=clean, inserted_at_us=numbers, metadata=st.binary(max_size=99)),
    st.builds(CursorMoved, slot=slots, session=clean, participant=clean, seq=numbers),
    st.builds(SlotsOpened, epoch=numbers, slots=st.lists(slots, max_size=20)),
    st.builds(Trimmed, term=numbers, number=numbers, below_pos=numbers),
    st.builds(Damaged, from_pos=numbers, to_pos=numbers, lost_max=numbers),
)


@given(some_records)
def test_every_record_comes_back_as_it_was(record: Record) -> None:
    """`decode` is the inverse of `encode`."""
    tail = encode(record)
    assert decode(tail[0], int.from_bytes(tail[2:4], "little"), tail[8:]) == record
    if isinstance(record, Message):
        session, seq, json_at = message_place(tail[8:])
        assert (session.decode(), seq) == (record.session, record.seq)
        assert tail[8 + json_at :] == record.json
        assert message_inserted_at_us(tail[8:]) == record.inserted_at_us


def test_an_unknown_type_is_said() -> None:
    """A newer version's record is not damage."""
    with pytest.raises(UnknownRecord, match="99"):
        decode(99, 0, b"")


def test_the_json_of_a_message_is_what_clients_expect() -> None:
    """Members, order and values; the id is sliced out, never built again."""
    fragment = b'"sender_id":"al","sender_kind":"human","kind":"text","content":{"a":[1]},"metadata":{}'
    made = message_json(
        id_text="0190c1c2-0000-7000-8000-000000000000",
        session_json=json.dumps('s"é').encode(),
        seq=7,
        inserted_at=InsertedAt().text(1_795_475_336_123_456),
        fragment=fragment,
    )
    assert json.loads(made) == {
        "id": "0190c1c2-0000-7000-8000-000000000000",
        "session_id": 's"é',
        "seq": 7,
        "inserted_at": "2026-11-23T23:08:56.123456Z",
        "sender_id": "al",
        "sender_kind": "human",
        "kind": "text",
        "content": {"a": [1]},
        "metadata": {},
    }
    assert message_id(made) == "0190c1c2-0000-7000-8000-000000000000"


@given(st.lists(st.integers(0, 4_102_444_800_000_000), min_size=1, max_size=5))
def test_times_are_written_like_everywhere_else(times: list[int]) -> None:
    """The remembered second changes nothing: the text is `iso_utc`'s."""
    stamp = InsertedAt()
    for at_us in times:
        assert stamp.text(at_us).decode() == iso_utc(at_us)


def test_content_hash_is_of_16_bytes_and_tells_contents_apart() -> None:
    """Equal bytes, equal hash."""
    assert content_hash(b"a") == content_hash(b"a") != content_hash(b"b")
    assert len(content_hash(b"")) == 16


GOLDEN: dict[str, Record] = {
    "MESSAGE": Message(3, "größe", 7, 1_795_475_336_000_000, "k-7", bytes(range(16)), b'{"id":"x"}'),
    "SESSION": SessionCreated(3, "größe", 1_795_475_336_000_000, b'{"topic":"gold"}'),
    "CURSOR": CursorMoved(3, "größe", "bob", 7),
    "OPENED": SlotsOpened(5, [1, 2, 3]),
    "RELEASED": SlotsReleased([1, 2]),
    "IMPORTED": Imported(3, "größe", 7, 1_795_475_336_000_000, "k-7", bytes(range(16)), b'{"id":"x"}', True),
    "TRIMMED": Trimmed(2, 3, 4096),
    "DAMAGE": Damaged(4096, 8192, 3),
    "IMPORTED_KEYLESS": Imported(3, "größe", 7, 1_795_475_336_000_000, "k-7", bytes(range(16)), b'{"id":"x"}', False),
    "STATE": SessionImported(3, "größe", 7, 2, 1_795_475_336_000_000, b'{"topic":"gold"}', {"bob": 5}),
    "SEALED": SlotsSealed("5.1", 6, [1, 2]),
    "CONFIRMED": MoveConfirmed("5.1", 7, [1, 2]),
}


def test_golden_vectors() -> None:
    """Each kind of record keeps its bytes: volumes outlive versions. A change is a new type."""
    vectors = json.loads((Path(__file__).parents[1] / "golden" / "records-v1.json").read_text())
    assert vectors.keys() == GOLDEN.keys() | {"VOID"} == {kind.name for kind in RecordType} - {"BATCH"}
    void = bytes.fromhex(vectors["VOID"])
    assert void == VOID_TAIL
    assert decode(void[0], 0, bytes(100)) == Void()
    for name, record in GOLDEN.items():
        written = bytes.fromhex(vectors[name])
        assert encode(record) == written, name
        kind, slot = written[0], int.from_bytes(written[2:4], "little")
        assert kind == RecordType[name]
        assert decode(kind, slot, written[8:]) == record
