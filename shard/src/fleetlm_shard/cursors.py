"""Logged writes that are no messages: read cursors, and the explicit creation of a session.

Promise: a cursor never goes back and never passes the session's last seq; answers are given only when what they say is
on disk and the term was looked at. A session is created once: the same metadata again is no error.
Must not be done here: ownership, frames.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from fleetlm_common.errors import Conflict, Invalid, TooLarge
from fleetlm_common.ids import checked_id
from fleetlm_common.limits import METADATA_BYTES_MAX
from fleetlm_shard.log_types import LogError
from fleetlm_shard.records import CursorMoved, SessionCreated
from fleetlm_shard.replay import cursor_ahead
from fleetlm_shard.samejson import same_value
from fleetlm_shard.sequencer import refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from fleetlm_common.clock import Clock
    from fleetlm_common.ids import Slot
    from fleetlm_shard.sessions import Session, Sessions
    from fleetlm_shard.subscriptions import Subscriptions
    from fleetlm_shard.writes import OnDurable, Writes

PARTICIPANTS_MAX: Final = 4096
"""Read cursors of one session: they are one row of a checkpoint and are held in memory together."""


class SessionWrites:
    """`mark_read` and `create`. A look must have been done after each request came in.

    Args:
        writes: the way into the log.
        sessions: hot state.
        subscriptions: told of cursors that moved.
        clock: for the time of creation.
        admits: raises TryAgain if this shard may not write the slot now (asked after each wait).
    """

    def __init__(
        self,
        *,
        writes: Writes,
        sessions: Sessions,
        subscriptions: Subscriptions,
        clock: Clock,
        admits: Callable[[Slot], None],
    ) -> None:
        self._writes = writes
        self._sessions = sessions
        self._subscriptions = subscriptions
        self._clock = clock
        self._admits = admits
        self.marked = 0
        self.created = 0

    async def mark_read(self, session_id: str, participant: str, seq: int) -> int:
        """Move a participant's cursor to `seq` unless it is there or beyond; returns where it is, durably.

        Raises:
            Invalid: `cursor_ahead`, or not an id.
            TooLarge: the session has `PARTICIPANTS_MAX` cursors already.
            TryAgain: the log refuses.
        """
        checked_id(participant, "participant_id")
        if seq < 0:
            raise Invalid("seq must not be negative", field="seq")
        session = self._sessions.get(session_id)
        if seq > session.seq_durable:
            raise cursor_ahead("seq", seq, last_seq=session.seq_durable)
        known = session.cursors_assigned.get(participant) or session.cursors.get(participant, 0)
        if seq > known:
            self._queue_cursor(session, participant, seq)
        await self._settled()
        return self._sessions.get(session_id).cursors.get(participant, 0)

    def _queue_cursor(self, session: Session, participant: str, seq: int) -> None:
        assigned = session.cursors_assigned
        if participant not in session.cursors and participant not in assigned:
            held = len(session.cursors.keys() | assigned.keys())
            if held >= PARTICIPANTS_MAX:
                raise TooLarge(
                    f"a session holds the read cursors of at most {PARTICIPANTS_MAX} participants",
                    field="participant_id",
                    limit=PARTICIPANTS_MAX,
                )

        def visible(pos: int) -> None:
            if assigned.get(participant) == seq:
                del assigned[participant]
            self._sessions.cursor_durable(session, pos=pos, participant=participant, seq=seq)
            self._subscriptions.publish_read(session, participant, seq)
            self.marked += 1

        self._queue(CursorMoved(session.slot, session.id, participant, seq), session, visible)
        assigned[participant] = seq

    async def create(self, session_id: str, metadata: bytes) -> bool:
        """Make the session; False if it exists with the same metadata.

        Raises:
            Conflict: it exists with other metadata.
            Invalid, TooLarge: the metadata is no JSON object, or too large.
            TryAgain: the log refuses.
        """
        _check_metadata(metadata)
        session = self._sessions.get(session_id)
        if not session.exists and session.pending:
            # Whoever writes to it now may be making it: wait and see.
            await self._settled()
            session = self._sessions.get(session_id)
        if session.exists:
            if not same_value(session.metadata, metadata):
                raise Conflict(
                    "the session exists with other metadata",
                    reason="session_exists",
                    field="metadata",
                    last_seq=session.seq_durable,
                )
            return False
        if session.pending:
            return await self.create(session_id, metadata)
        at_us = self._clock.now_us()

        def visible(pos: int) -> None:
            self._sessions.created_durable(session, pos=pos, at_us=at_us, metadata=metadata)
            self.created += 1

        self._queue(SessionCreated(session.slot, session.id, at_us, metadata), session, visible)
        await self._settled()
        return True

    def _queue(self, record: CursorMoved | SessionCreated, session: Session, visible: OnDurable) -> None:
        self._admits(session.slot)
        try:
            self._writes.other(record, session, visible)
        except LogError as error:
            raise refusal(error) from error

    async def _settled(self) -> None:
        try:
            await self._writes.all_settled()
        except LogError as error:
            raise refusal(error) from error


def _check_metadata(metadata: bytes) -> None:
    if len(metadata) > METADATA_BYTES_MAX:
        raise TooLarge("metadata is too large", field="metadata", limit=METADATA_BYTES_MAX)
    try:
        value: object = msgspec.json.decode(metadata)
    except msgspec.DecodeError as error:
        raise Invalid("metadata is not JSON", field="metadata") from error
    if not isinstance(value, dict):
        raise Invalid("metadata must be a JSON object", field="metadata")
