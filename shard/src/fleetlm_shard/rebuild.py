"""What the upper half learns from the log at boot: sessions since the last checkpoint, the key window, opened slots.

Place: runs in a thread, before anything serves; blocks. Promise: afterwards hot state and key window are what they were
when the log's last record became durable. Must not be done here: reading files (`recovery.py`), serving.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fleetlm_common.ids import Epoch, Slot
from fleetlm_shard.keys import KnownKey
from fleetlm_shard.records import CursorMoved, LostMessage, Message, SessionCreated, SlotsOpened, message_id

if TYPE_CHECKING:
    from fleetlm_common.clock import Clock
    from fleetlm_shard.keys import KeyWindow
    from fleetlm_shard.records import Replayed
    from fleetlm_shard.recovery import LogBoot
    from fleetlm_shard.sessions import Sessions


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What `rebuild` found, beside what it put into sessions and keys."""

    opened: dict[Slot, Epoch]
    records: int


def rebuild(boot: LogBoot, *, sessions: Sessions, keys: KeyWindow, clock: Clock) -> Rebuilt:
    """Read the log's end into `sessions` and `keys`.

    Raises:
        LogUnreadable, OSError: as `LogBoot.replay`.
    """
    checkpoint = boot.checkpoint
    covered_pos = 0 if checkpoint is None else checkpoint.pos
    opened = {} if checkpoint is None else {Slot(slot): Epoch(epoch) for slot, epoch in checkpoint.opened.items()}
    now_s, now_us = clock.monotonic_s(), clock.now_us()
    records = 0
    for pos, record in boot.replay():
        records += 1
        if isinstance(record, Message):
            known = KnownKey(record.seq, record.inserted_at_us, record.content_hash, message_id(record.json))
            age_s = (now_us - record.inserted_at_us) / 1e6
            keys.restore(record.session, record.key, known, pos=pos, age_s=age_s, now_s=now_s)
        if pos >= covered_pos:
            _apply(record, pos, sessions=sessions, opened=opened)
    sessions.replayed()
    return Rebuilt(opened, records)


def _apply(record: Replayed, pos: int, *, sessions: Sessions, opened: dict[Slot, Epoch]) -> None:
    """Records of the log about itself (trims, damage) are the log's own business."""
    if isinstance(record, Message):
        sessions.replay_message(record.session, seq=record.seq, pos=pos, at_us=record.inserted_at_us)
    elif isinstance(record, LostMessage):
        sessions.replay_message(record.session, seq=record.seq, pos=pos, at_us=0)
    elif isinstance(record, SessionCreated):
        sessions.replay_created(record.session, pos=pos, at_us=record.inserted_at_us, metadata=record.metadata)
    elif isinstance(record, CursorMoved):
        sessions.replay_cursor(record.session, pos=pos, participant=record.participant, seq=record.seq)
    elif isinstance(record, SlotsOpened):
        opened.update((Slot(slot), Epoch(record.epoch)) for slot in record.slots)
