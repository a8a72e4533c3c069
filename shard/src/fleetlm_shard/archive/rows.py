"""Records of the log as rows of the archive, pure.

Promise: what a transaction writes depends on the records alone, so that writing it again changes nothing. Must not be
done here: SQL (`store.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from fleetlm_shard.archive.errors import Diverged
from fleetlm_shard.records import CursorMoved, Message, SessionCreated, SessionImported

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from fleetlm_shard.records import Record


# The text before it is our own, and inside a JSON string no quote stands bare: the first match is the member itself.
# (Content may hold what no decoder takes, a lone surrogate for example; so the whole is not decoded.)
_SENDER: Final = re.compile(rb',"sender_id":("(?:[^"\\\\]|\\\\.)*")')
_decode_text = msgspec.json.Decoder(str).decode


@dataclass(slots=True)
class SessionRow:
    """What a batch says of one session; seqs are 0 and `metadata` None where it says nothing."""

    slot: int
    inserted_at_us: int
    first_seq: int = 0
    last_seq: int = 0
    active_at_us: int = 0
    metadata: bytes | None = None


@dataclass(slots=True)
class Rows:
    """One transaction: messages by (session, seq), sessions by id, participants by (participant, session)."""

    messages: dict[tuple[bytes, int], Message] = field(default_factory=dict[tuple[bytes, int], Message])
    sessions: dict[bytes, SessionRow] = field(default_factory=dict[bytes, SessionRow])
    sent: dict[tuple[bytes, bytes], int] = field(default_factory=dict[tuple[bytes, bytes], int])
    read: dict[tuple[bytes, bytes], int] = field(default_factory=dict[tuple[bytes, bytes], int])


def sender_of(message: Message) -> bytes:
    """Who wrote it, from its JSON."""
    found = _SENDER.search(message.json)
    assert found is not None, "the shard's own JSON begins with id, session, seq, time and sender"
    return _decode_text(found[1]).encode()


def rows_of(records: Iterable[tuple[int, Record]], *, without: Collection[int]) -> Rows:
    """The rows of records, without those of halted slots.

    Raises:
        Diverged: two different messages have one seq (in the log itself).
    """
    rows = Rows()
    for _, record in records:
        if isinstance(record, Message) and record.slot not in without:
            _add_message(rows, record)
        elif isinstance(record, SessionCreated) and record.slot not in without:
            row = _session(rows, record.session.encode(), record.slot, record.inserted_at_us)
            row.metadata = record.metadata
        elif isinstance(record, CursorMoved) and record.slot not in without:
            session = record.session.encode()
            _session(rows, session, record.slot, 0)
            place = (record.participant.encode(), session)
            rows.read[place] = max(record.seq, rows.read.get(place, 0))
        elif isinstance(record, SessionImported) and record.slot not in without:
            session = record.session.encode()
            row = _session(rows, session, record.slot, record.inserted_at_us)
            row.metadata = record.metadata
            for participant, seq in record.cursors.items():
                place = (participant.encode(), session)
                rows.read[place] = max(seq, rows.read.get(place, 0))
    return rows


def _session(rows: Rows, session: bytes, slot: int, at_us: int) -> SessionRow:
    row = rows.sessions.get(session)
    if row is None:
        row = rows.sessions[session] = SessionRow(slot, at_us, active_at_us=at_us)
    elif at_us and (not row.inserted_at_us or at_us < row.inserted_at_us):
        row.inserted_at_us = at_us
    row.active_at_us = max(row.active_at_us, at_us)
    return row


def _add_message(rows: Rows, message: Message) -> None:
    session, seq = message.session.encode(), message.seq
    before = rows.messages.setdefault((session, seq), message)
    if before is not message:
        if before.json != message.json:
            raise Diverged(slot=message.slot, session=session, seq=seq)
        return
    row = _session(rows, session, message.slot, message.inserted_at_us)
    row.first_seq = min(seq, row.first_seq or seq)
    row.last_seq = max(seq, row.last_seq)
    place = (sender_of(message), session)
    rows.sent[place] = max(seq, rows.sent.get(place, 0))
