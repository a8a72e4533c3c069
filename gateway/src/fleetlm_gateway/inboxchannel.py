"""A joined inbox of one socket: the participant's newest sessions, then each one that changes.

    reply of the join, `sessions` (a page) ─► `session` (one entry), …     after what could not be told: `sessions` anew

Promise: the join's reply precedes its pushes; an entry is never followed by an older one of the same session; a client
that does not read gets no entries, and a fresh page when it reads again. Must not be done here: what is in an inbox
(the shards), looking for changes (`inboxes.py`), whose inbox may be joined (`websocket.py`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from fleetlm_common.errors import FleetError, Invalid
from fleetlm_gateway import payloads, phoenix
from fleetlm_gateway.channel import malformed_payload, superseded
from fleetlm_gateway.jsontext import encode

if TYPE_CHECKING:
    from fleetlm_common.rpc import InboxEntry, InboxPage
    from fleetlm_gateway.channel import Request
    from fleetlm_gateway.websocket import Socket


RETRY_S: Final = 1.0
"""After a page that could not be read."""
HELD_MAX: Final = 1000
"""Entries that wait for a page; past it the page is read once more instead."""


class InboxChannel:
    """An `InboxSink`, and a channel as `websocket.py` knows them.

    Args:
        socket: whose it is.
        join: the request that makes it; `join_ref` of everything that follows.
        limit: sessions of a page.
    """

    __slots__ = (
        "_again",
        "_held",
        "_join",
        "_joined",
        "_limit",
        "_reading",
        "_seqs",
        "_socket",
        "_stale",
        "join_ref",
        "text",
    )

    def __init__(self, socket: Socket, *, join: Request, limit: int) -> None:
        self._socket = socket
        self._join: Request | None = join
        self._limit = limit
        self.text = join.topic
        self.join_ref = join.join_ref
        self._joined = False
        self._reading: asyncio.Task[None] | None = None
        self._again = False
        """What is being read may be too old already."""
        self._held: dict[str, InboxEntry] = {}
        """Changes that were told while a page is being read."""
        self._seqs: dict[str, tuple[int, int]] = {}
        """Last seq and last read seq of each session of the newest page: what is older is not told."""
        self._stale = False
        """The client has missed something: it gets a page as soon as it reads, and no entries before."""

    def open(self) -> None:
        """Begin to join."""
        self._reading = self._socket.spawn(self._open())

    async def _open(self) -> None:
        socket, inboxes = self._socket, self._socket.hub.inboxes
        participant = socket.principal.id
        try:
            await inboxes.register(participant, self)
            page = await socket.hub.boundary.inbox(participant, after=None, limit=self._limit)
        except FleetError as error:
            inboxes.unregister(participant, self)
            socket.forget(self)
            self._refuse(error)
            return
        join, self._join, self._joined = self._join, None, True
        assert join is not None
        socket.answer_ok(join, b'{"participant_id":%b}' % encode(participant))
        socket.hub.metrics.topics.inc()
        self._show(page)
        if socket.hub.draining:
            self.announce_drain(socket.hub.retry_after_ms)
        self._reading = None
        if self._again:
            self._renew()

    def close(self) -> None:
        """Hear of no more changes; harmless when repeated."""
        self._socket.hub.inboxes.unregister(self._socket.principal.id, self)
        if self._joined:
            self._joined = False
            self._socket.hub.metrics.topics.dec()
        self._refuse(superseded())
        if self._reading is not None:
            self._reading.cancel()

    def _refuse(self, error: FleetError) -> None:
        join, self._join = self._join, None
        if join is not None:
            self._socket.answer_error(join, error)

    def handle(self, request: Request, payload: bytes | None) -> None:
        """Refuse a request: an inbox is asked nothing."""
        error = Invalid("an inbox topic knows no events", reason="unknown_event", field="event")
        self._socket.answer_error(request, error if payload is not None else malformed_payload())

    # -- the sink

    def changed(self, entry: InboxEntry, /) -> None:
        """Push it, unless the client has something newer, or does not read."""
        out = self._socket.out
        if self._reading is not None:
            self._held[entry.session] = entry
            if len(self._held) > HELD_MAX:
                self._held.clear()
                self._again = True
        elif not self._stale and out.is_full():
            self._stale = True
            out.starve(self)
        elif not self._stale:
            self._tell(entry)

    def lost(self) -> None:
        """Push a page."""
        if self._reading is None:
            self._renew()
        else:
            self._again = True

    def resume(self) -> None:
        """There is room again."""
        if self._stale and self._reading is None:
            self._renew()

    def announce_drain(self, retry_after_ms: int) -> None:
        """Push that this gateway is leaving."""
        if self._joined:
            self._push(b"draining", b'{"retry_after_ms":%d}' % retry_after_ms)

    def _renew(self) -> None:
        self._stale = False
        self._reading = self._socket.spawn(self._read())

    async def _read(self) -> None:
        socket, self._again = self._socket, True
        while self._again:
            await socket.out.room()
            self._again = False
            try:
                page = await socket.hub.boundary.inbox(socket.principal.id, after=None, limit=self._limit)
            except FleetError:
                self._again = True
                await asyncio.sleep(RETRY_S)
                continue
            self._show(page)
        self._reading = None

    def _show(self, page: InboxPage) -> None:
        self._push(b"sessions", encode(payloads.inbox_body(page)))
        self._seqs = {entry.session: (entry.last_seq, entry.last_read_seq) for entry in page.entries}
        held, self._held = self._held, {}
        for entry in held.values():
            self._tell(entry)

    def _tell(self, entry: InboxEntry) -> None:
        known = self._seqs.get(entry.session)
        if known is None or entry.last_seq > known[0] or entry.last_read_seq > known[1]:
            self._push(b"session", encode(payloads.inbox_entry(entry)))

    def _push(self, event: bytes, payload: bytes) -> None:
        self._socket.out.send(phoenix.push(self.join_ref, self.text, event, payload))
