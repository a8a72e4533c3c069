"""What a shard answers about sessions, apart from appends: each request after ownership and a look at the term.

Promise: an answer was true after the request came in, of a shard that owned the slot and held the newest term then.
Must not be done here: frames, connections (`server.py`), the parts' own rules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fleetlm_common.clock import iso_utc
from fleetlm_common.errors import Invalid
from fleetlm_common.ids import SessionId, checked_id
from fleetlm_common.limits import PAGE_BYTES_MAX, SEQ_MAX
from fleetlm_common.rpc import Create, Created, Info, InfoOk, List, Listed, Marked, MarkRead, Page, Read
from fleetlm_shard.replay import cursor_ahead
from fleetlm_shard.sessions import NO_METADATA

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from fleetlm_common.ids import Slot
    from fleetlm_shard.cursors import SessionWrites
    from fleetlm_shard.ownership import Ownership
    from fleetlm_shard.replay import Replay
    from fleetlm_shard.sessions import Session, Sessions

LIST_LIMIT_MAX: Final = 1000
"""Sessions of one LIST page; fewer come when their metadata is long."""


class Service:
    """Requests about sessions.

    Args:
        ownership: which slots are served.
        slot_of: the slot of a session id in this ring.
        look: resolves after a look at the term that began after the call.
        sessions: hot state.
        replay: messages.
        writes: read cursors and creation.
        names: ids of durable sessions of this shard after a given one, ascending by their UTF-8 bytes.
    """

    def __init__(
        self,
        *,
        ownership: Ownership,
        slot_of: Callable[[SessionId], Slot],
        look: Callable[[], Awaitable[None]],
        sessions: Sessions,
        replay: Replay,
        writes: SessionWrites,
        names: Callable[[str, int], Awaitable[list[str]]],
    ) -> None:
        self._ownership = ownership
        self._slot_of = slot_of
        self._look = look
        self._sessions = sessions
        self._replay = replay
        self._writes = writes
        self._names = names

    async def enter_write(self, session_id: str, epoch: int, name: tuple[str, ...], size_bytes: int) -> Session:
        """The session, if it is this shard's to write to; a write to a sealed slot waits.

        Raises:
            Invalid: no session can have this id.
            Moved, TryAgain: not served here.
            LogError: the log has stopped.
        """
        slot = self._slot_of(SessionId(checked_id(session_id, "session_id")))
        while True:
            await self._ownership.settle_write(slot, epoch=epoch, name=(session_id, name), size_bytes=size_bytes)
            await self._look()
            if slot in self._ownership.serves:
                return self._sessions.get(session_id)

    async def enter(self, session_id: str, epoch: int) -> Session:
        """The session, if it is this shard's to show.

        Raises:
            Invalid: no session can have this id.
            Moved, TryAgain: not served here.
            LogError: the log has stopped.
        """
        slot = self._slot_of(SessionId(checked_id(session_id, "session_id")))
        await self._ownership.settle(slot, epoch=epoch)
        await self._look()
        # The map may have changed while we looked.
        self._ownership.admit_read(slot)
        return self._sessions.get(session_id)

    async def read(self, request: Read) -> Page:
        """Messages of a session."""
        await self.enter(request.session, request.epoch)
        return await self._replay.page(request)

    async def info(self, request: Info) -> InfoOk:
        """A session as it is."""
        session = await self.enter(request.session, request.epoch)
        if request.cursor is not None and request.cursor > session.seq_durable:
            raise cursor_ahead("cursor", request.cursor, last_seq=session.seq_durable)
        return await self._info(request.session)

    async def mark_read(self, request: MarkRead) -> Marked:
        """Move a read cursor."""
        name = ("mark_read", request.participant, str(request.seq))
        await self.enter_write(request.session, request.epoch, name, len(request.participant))
        if request.seq > SEQ_MAX:
            raise Invalid(f"seq must be at most {SEQ_MAX}", field="seq", limit=SEQ_MAX)
        return Marked(await self._writes.mark_read(request.session, request.participant, request.seq))

    async def create(self, request: Create) -> Created:
        """Make a session."""
        name = ("create", str(request.metadata, errors="replace"))
        await self.enter_write(request.session, request.epoch, name, len(request.metadata))
        created = await self._writes.create(request.session, request.metadata)
        return Created(created, await self._info(request.session))

    async def list_sessions(self, request: List) -> Listed:
        """Sessions whose slots are served here, in the order of their ids; an empty page is the end."""
        if not 1 <= request.limit <= LIST_LIMIT_MAX:
            raise Invalid(f"limit must be 1 to {LIST_LIMIT_MAX}", field="limit", limit=LIST_LIMIT_MAX)
        await self._look()
        listed: list[tuple[str, InfoOk]] = []
        size_bytes = 0
        after = request.after
        while len(listed) < request.limit and size_bytes < PAGE_BYTES_MAX:
            names = await self._names(after, request.limit - len(listed))
            if not names:
                break
            after = names[-1]
            for name in names:
                if self._slot_of(SessionId(name)) in self._ownership.readable and size_bytes < PAGE_BYTES_MAX:
                    info = await self._info(name)
                    size_bytes += len(info.metadata)
                    listed.append((name, info))
        return Listed(listed)

    async def _info(self, session_id: str) -> InfoOk:
        earliest_seq = await self._replay.earliest_seq(session_id)
        session = self._sessions.get(session_id)
        return InfoOk(
            exists=session.exists,
            last_seq=session.seq_durable,
            earliest_seq=min(earliest_seq, session.seq_durable + 1),
            inserted_at=iso_utc(session.inserted_at_us) if session.exists else "",
            metadata=session.metadata if session.exists else NO_METADATA,
            epoch=self._ownership.epoch,
        )
