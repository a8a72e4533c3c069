"""What the upper half learns from the log at boot: sessions since the last checkpoint, the key window, opened slots.

Place: runs in a thread, before anything serves; blocks. Promise: afterwards hot state and key window are what they were
when the log's last record became durable. Must not be done here: reading files (`recovery.py`), serving.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from fleetlm_shard.holdings import Holdings
from fleetlm_shard.keys import KnownKey
from fleetlm_shard.records import (
    CursorMoved,
    Imported,
    LostMessage,
    Message,
    SessionCreated,
    SessionImported,
    SlotsReleased,
    message_id,
)

if TYPE_CHECKING:
    from fleetlm_common.clock import Clock
    from fleetlm_shard.keys import KeyWindow
    from fleetlm_shard.records import Replayed
    from fleetlm_shard.recovery import LogBoot
    from fleetlm_shard.sessions import Sessions


STEP_COUNTED_S: Final = 10.0
"""Most that the time between two records adds to the age of keys: with a window of 15 minutes a clock can be set 88
times before a young key goes. An idle log's keys age slower for it; the bounds on their number hold all the same."""


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """What `rebuild` found, beside what it put into sessions and keys."""

    holdings: Holdings
    records: int


class LogTime:
    """Time as the log itself tells it, from 0 at the first record that was read: it cannot be set.

    Wall clocks are set, on the machine that wrote and on the one that reads. Were a key as old as they say, a step
    would forget keys whose retries are still on their way, and each retry would be a second message. So steps back
    count as nothing, long ones as `STEP_COUNTED_S`, and what passed since the last record as nothing: a key may be
    known for longer than the window, never for much less, and never too short for a retry (`KeyWindow.restored`).
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self._last_us: int | None = None

    def at(self, inserted_at_us: int) -> float:
        """The time of the next record."""
        if self._last_us is not None:
            self.now_s += min(max(0.0, (inserted_at_us - self._last_us) / 1e6), STEP_COUNTED_S)
        self._last_us = inserted_at_us
        return self.now_s


def rebuild(boot: LogBoot, *, sessions: Sessions, keys: KeyWindow, clock: Clock) -> Rebuilt:
    """Read the log's end into `sessions` and `keys`.

    Raises:
        LogUnreadable, OSError: as `LogBoot.replay`.
    """
    checkpoint = boot.checkpoint
    covered_pos = 0 if checkpoint is None else checkpoint.pos
    holdings = Holdings.of_checkpoint(checkpoint)
    log_time = LogTime()
    records = 0
    for pos, record in boot.replay():
        records += 1
        if isinstance(record, Message):
            _remember(record, pos, keys, log_time)
        if pos >= covered_pos:
            holdings.apply(record)
            _apply(record, pos, sessions=sessions)
    keys.restored(log_s=log_time.now_s, now_s=clock.monotonic_s())
    sessions.replayed()
    return Rebuilt(holdings, records)


def _remember(record: Message, pos: int, keys: KeyWindow, log_time: LogTime) -> None:
    """Take a message's key. What a move brought tells nothing about time here: it is as young as what stands before."""
    if not isinstance(record, Imported):
        at_s = log_time.at(record.inserted_at_us)
    elif record.windowed:
        at_s = log_time.now_s
    else:
        return
    known = KnownKey(record.seq, record.inserted_at_us, record.content_hash, message_id(record.json))
    keys.restore(record.session, record.key, known, pos=pos, at_s=at_s)


def _apply(record: Replayed, pos: int, *, sessions: Sessions) -> None:
    """Records of the log about itself (trims, damage) are the log's own business, those about slots `Holdings`'."""
    if isinstance(record, Message):
        sessions.replay_message(record.session, seq=record.seq, pos=pos, at_us=record.inserted_at_us)
    elif isinstance(record, LostMessage):
        sessions.replay_message(record.session, seq=record.seq, pos=pos, at_us=0)
    elif isinstance(record, SessionCreated):
        sessions.replay_created(record.session, pos=pos, at_us=record.inserted_at_us, metadata=record.metadata)
    elif isinstance(record, CursorMoved):
        sessions.replay_cursor(record.session, pos=pos, participant=record.participant, seq=record.seq)
    elif isinstance(record, SessionImported):
        sessions.replay_state(record.session, record, pos=pos)
    elif isinstance(record, SlotsReleased):
        sessions.release(record.slots)
