"""Live messages: one subscription per session however many readers, and how each reader meets it without a hole.

Promise: each reader's sink gets a contiguous stream from its cursor (or a gap), whatever happens to connections, owners
and subscriptions; the same bytes object goes to all sinks; a reader whose sink is full costs nothing and slows nobody;
one that cannot get on is retried for as long as it is there. Memory: `TAIL_*` bounds here, pages in `pages.py`.
Must not be done here: JSON, sockets, the state of one reader (`readers.py`).

How a reader meets the stream: pages are read from its cursor until the tail of recent live messages reaches back to the
cursor; then, in one synchronous step, the rest is delivered out of the tail and the reader is live. Nothing is buffered
for it meanwhile, so nothing can overflow, and each page brings it nearer.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgspec

from fleetlm_common import rpc
from fleetlm_common.decoding import UNREADABLE
from fleetlm_common.errors import FleetError, Moved, Rejected, TryAgain
from fleetlm_common.ids import SessionId
from fleetlm_common.rpc import Kind
from fleetlm_gateway.exchanges import INFO, Retry, refusal_of
from fleetlm_gateway.pages import Pages
from fleetlm_gateway.readers import BEHIND, Reader, State
from fleetlm_gateway.router import Router
from fleetlm_gateway.shardlink import NoPath, ShardLink
from fleetlm_gateway.sinks import FromCursor, FromTail, Sink, Start
from fleetlm_gateway.tail import Chunk, Tail, cut, joined

STREAMS_MAX: Final = 262_144
"""Sessions that one gateway is subscribed to; some 2 KiB each."""
TAIL_MESSAGES_MAX: Final = 8_192
"""Kept of one session while a reader catches up: more than a session's traffic during one page read."""
TAIL_BYTES_MAX: Final = 4 * 1024 * 1024
"""The same in bytes; several pages, so that the reader of the last page finds what came since."""
TAIL_IDLE_MESSAGES_MAX: Final = 128
TAIL_IDLE_BYTES_MAX: Final = 16 * 1024
"""Kept while all readers are live: clients that reconnect after a moment meet the stream without a page read."""
TAIL_TOTAL_BYTES_MAX: Final = 128 * 1024 * 1024
"""Of all sessions together; past it a session keeps nothing, and readers catch up by pages alone."""
LINGER_S: Final = 2.0
"""A session that everybody left stays subscribed this long: reloads of a web page come back at once."""
SUBSCRIBE_TIMEOUT_S: Final = 10.0
"""A SUBSCRIBE without an answer is sent again."""
SETTLED_S: Final = 5.0
"""A subscription that stood this long was a success: the next failure starts the backoff anew."""
PAGE_RETRY_S: Final = 0.25
"""Before a page that failed is asked for again (the request itself has been retried until its deadline)."""

_PUSH: Final = Kind.PUSH
_LIVE: Final = State.LIVE
"""Asking an enum for a member takes 0.2 µs in Python 3.11; these are asked for with each push and each reader."""
_decode_subscribed = msgspec.msgpack.Decoder(rpc.Subscribed).decode
_decode_push = msgspec.msgpack.Decoder(rpc.Push).decode
_decode_push_read = msgspec.msgpack.Decoder(rpc.PushRead).decode
_decode_ended = msgspec.msgpack.Decoder(rpc.Ended).decode


class Streams:
    """All streams of a gateway.

    Args:
        router: finds owners.
    """

    def __init__(self, router: Router) -> None:
        self.router = router
        self.pages = Pages(router)
        self.tail_bytes = 0
        self.behind = 0
        self.readers = 0
        self._streams: dict[SessionId, Stream] = {}
        self._stopped = False
        metrics = router.metrics
        metrics.streams.set_function(lambda: len(self._streams))
        metrics.readers.set_function(lambda: self.readers)
        metrics.readers_behind.set_function(lambda: self.behind)
        metrics.tail_bytes.set_function(lambda: self.tail_bytes)
        router.on_better(self._reconsider)

    def __len__(self) -> int:
        """Sessions that are subscribed to."""
        return len(self._streams)

    async def subscribe(self, session: SessionId, *, start: Start, sink: Sink) -> Reader:
        """Open a place in a session; see `Boundary.subscribe`."""
        cursor = start.seq if isinstance(start, FromCursor) else None
        info = await self.router.request(INFO, session, lambda epoch: rpc.Info(epoch, session, cursor))
        # No waiting from here on: a caller that is cancelled leaves nothing behind.
        if self._stopped:
            raise TryAgain("this gateway is stopping", reason="draining")
        stream = self._streams.get(session)
        if stream is None:
            if len(self._streams) >= STREAMS_MAX:
                raise TryAgain("too many sessions are open in this gateway", reason="overloaded")
            stream = self._streams[session] = Stream(self, session, last_seq=info.last_seq)
        reader = Reader(stream, sink, info, cursor=_cursor(start, info))
        stream.join(reader)
        return reader

    def stop(self) -> None:
        """End every reader with `draining`."""
        self._stopped = True
        self.pages.stop()
        for stream in list(self._streams.values()):
            stream.end("draining")

    def forget(self, session: SessionId) -> None:
        """The stream is over."""
        del self._streams[session]

    def _reconsider(self) -> None:
        if not self._stopped:
            for stream in list(self._streams.values()):
                stream.reconsider()


def _cursor(start: Start, info: rpc.InfoOk) -> int:
    if isinstance(start, FromCursor):
        return start.seq
    if isinstance(start, FromTail):
        # The last messages that there are: what retention dropped before them is not missing from a tail.
        return max(info.last_seq - start.count, info.earliest_seq - 1, 0)
    return info.last_seq


class Stream:
    """One session's subscription, its tail and its readers.

    Args:
        streams: whose it is.
        session: the session.
        last_seq: where it begins; nothing before it is in the tail.
    """

    def __init__(self, streams: Streams, session: SessionId, *, last_seq: int) -> None:
        self.session = session
        self._streams = streams
        self._router = streams.router
        self._loop = asyncio.get_running_loop()
        self._tail = Tail(last_seq)
        self._readers: dict[Reader, None] = {}
        self._catching_up = 0
        self._live: tuple[Reader, ...] | None = None
        self._pages: dict[int, list[Reader]] = {}
        self._link: ShardLink | None = None
        self._ident = 0
        self._subscribed = False
        self._subscribed_at_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._wakes = False
        self._retry = Retry(self._router.entropy)
        self._linger: asyncio.TimerHandle | None = None
        self._over = False

    # Readers

    def join(self, reader: Reader) -> None:
        """A reader is there (delivery starts later)."""
        self._readers[reader] = None
        self._streams.readers += 1
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        if self._link is None and self._timer is None:
            self._subscribe()

    def leave(self, reader: Reader) -> None:
        """A reader has gone."""
        if reader not in self._readers:
            return
        del self._readers[reader]
        self._streams.readers -= 1
        if not self._readers and not self._over:
            self._linger = self._loop.call_later(LINGER_S, self.end, "idle")

    def changed(self, reader: Reader, before: State) -> None:
        """A reader's state changed: keep count."""
        after = reader.state
        self._live = None
        self._catching_up += (after is State.CATCHING_UP) - (before is State.CATCHING_UP)
        self._streams.behind += (after in BEHIND) - (before in BEHIND)

    def advance(self, reader: Reader) -> None:
        """Bring a reader that catches up further: out of the tail if that reaches back to it, else by a page."""
        if reader.state is not State.CATCHING_UP or reader.awaits_page or self._over:
            return
        if self._subscribed and reader.cursor + 1 >= self._tail.first_seq:
            self._meet(reader)
        elif reader.cursor < self._tail.last_seq:
            self._want_page(reader)
        # Else it has all that is known; SUBSCRIBED brings it on.

    def _meet(self, reader: Reader) -> None:
        """The rest out of the tail, and live: one step, nothing may wait in between."""
        try:
            for chunk in self._tail.after(reader.cursor):
                if not reader.take(chunk):
                    return
        except UNREADABLE:
            # A push that is not what it says cannot be cut; pages hold the same messages one by one.
            self._restart_tail(self._tail.last_seq)
            self._want_page(reader)
            return
        reader.to(State.LIVE)
        reader.met_live()

    def end(self, reason: str) -> None:
        """End the stream and all its readers."""
        if self._over:
            return
        self._over = True
        self._unsubscribe()
        for handle in (self._timer, self._linger):
            if handle is not None:
                handle.cancel()
        self._restart_tail(self._tail.last_seq)
        self._streams.forget(self.session)
        for reader in list(self._readers):
            reader.end(reason)

    # Pages

    def _want_page(self, reader: Reader) -> None:
        reader.awaits_page = True
        waiting = self._pages.get(reader.cursor)
        if waiting is not None:
            # A thousand sockets that come back to the same place cost one read.
            waiting.append(reader)
            return
        self._pages[reader.cursor] = [reader]
        self._streams.pages.want(self, reader.cursor)

    def wanted(self, after: int) -> bool:
        """Whether anybody still waits for the page after `after`."""
        if self._over or all(reader.state is State.CLOSED for reader in self._pages.get(after, ())):
            self._pages.pop(after, None)
            return False
        return True

    def arrived(self, after: int, page: rpc.Page) -> None:
        """A page is here: to all that wait for it, then on."""
        waiting = self._served(after)
        gap = page.gap
        at = after if gap is None else gap.next_seq - 1
        broken = (
            at < after
            or (gap is not None and gap.from_seq != after + 1)
            or (page.messages and page.first_seq != at + 1)
        )
        if broken or (gap is None and not page.messages):
            # A page that does not follow the cursor is not passed on; one that is empty although more was pushed
            # comes from a read that began earlier. Both: once more, a little later.
            self._router.metrics.catch_up_pages.labels("broken" if broken else "empty").inc()
            self._later(waiting)
            return
        chunk = joined(page.first_seq, page.messages)
        for reader in waiting:
            if reader.state is not State.CATCHING_UP:
                continue
            if gap is not None:
                reader.skip(gap)
            if not chunk.count or reader.take(chunk):
                self.advance(reader)

    def failed(self, after: int, error: FleetError) -> None:
        """No page: try again, unless the owner refused for good."""
        waiting = self._served(after)
        if isinstance(error, Rejected):
            for reader in waiting:
                reader.end(error.reason)
        else:
            self._later(waiting)

    def _served(self, after: int) -> list[Reader]:
        """Those who waited for the page after `after`; they may ask again."""
        waiting = self._pages.pop(after, [])
        for reader in waiting:
            reader.awaits_page = False
        return waiting

    def _later(self, waiting: list[Reader]) -> None:
        def again() -> None:
            for reader in waiting:
                self.advance(reader)

        if waiting and not self._over:
            self._loop.call_later(self._router.entropy.uniform(PAGE_RETRY_S / 2, PAGE_RETRY_S), again)

    # The subscription

    def reconsider(self) -> None:
        """A link or the map changed: subscribe where there was no path, and at the owner if that is another now."""
        if self._timer is not None and self._wakes and self._link is None:
            self._timer.cancel()
            self._subscribe()
        elif self._link is not None and self._router.route(self.session).link is not self._link:
            # What the old owner would still push, the new one has: nothing is missed by leaving first.
            self._resubscribe(TryAgain("the owner changed", reason="moving", retry_after_ms=0), why="map")

    def _subscribe(self) -> None:
        self._timer = None
        try:
            route = self._router.route(self.session)
            request = rpc.Subscribe(route.epoch, self.session, self._tail.last_seq)
            self._ident = route.link.subscribe(rpc.encode(request), self._on_frame)
        except TryAgain as error:
            self._subscribe_later(error)
            return
        self._link = route.link
        unanswered = TryAgain("no answer to SUBSCRIBE", reason="unavailable", retry_after_ms=0)
        self._wakes = False
        self._timer = self._loop.call_later(SUBSCRIBE_TIMEOUT_S, self._resubscribe, unanswered, "timeout")

    def _subscribe_later(self, error: TryAgain | Moved, *, news: bool = False) -> None:
        if not self._readers:
            self.end("idle")
            return
        self._wakes = isinstance(error, NoPath)
        self._timer = self._loop.call_later(self._retry.failed(error, news=news), self._subscribe)

    def _unsubscribe(self) -> None:
        if self._link is not None:
            self._link.unsubscribe(self._ident)
        self._link, self._subscribed = None, False

    def _resubscribe(self, error: TryAgain | Moved, why: str, *, news: bool = False) -> None:
        """The subscription is no good any more: another one, from the last seq that this stream has."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._subscribed and self._loop.time() - self._subscribed_at_s >= SETTLED_S:
            self._retry.reset()
        self._unsubscribe()
        self._router.metrics.resubscriptions.labels(why).inc()
        self._subscribe_later(error, news=news)

    def _on_frame(self, kind: int, payload: bytes) -> None:
        if self._over:
            return
        if kind == _PUSH:
            self._on_push(_decode_push(payload))
        elif kind == Kind.PUSH_READ:
            push = _decode_push_read(payload)
            for reader in list(self._readers):
                reader.hint(push)
        elif kind == Kind.SUBSCRIBED:
            self._on_subscribed(_decode_subscribed(payload))
        elif kind == Kind.ENDED:
            self._on_ended(_decode_ended(payload))
        else:
            error = refusal_of(kind, payload)
            if isinstance(error, Moved):
                self._on_moved(error)
            elif isinstance(error, TryAgain):
                self._resubscribe(error, "lost" if isinstance(error, NoPath) else error.reason)
            else:
                # For example `cursor_ahead`: this ring does not hold what its readers have seen. Never papered over.
                self.end(error.reason)

    def _on_subscribed(self, reply: rpc.Subscribed) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._subscribed = True
        self._subscribed_at_s = self._loop.time()
        if reply.start_seq > self._tail.last_seq:
            # What lies between is replayed by those who need it.
            self._restart_tail(reply.start_seq)
            for reader in self._live_readers():
                if reader.cursor < reply.start_seq:
                    reader.to(State.CATCHING_UP)
        for reader in list(self._readers):
            self.advance(reader)

    def _on_ended(self, ended: rpc.Ended) -> None:
        if ended.reason == "moved":
            self._on_moved(Moved(owner=ended.owner, epoch=ended.epoch))
            return
        self._resubscribe(TryAgain(f"ended: {ended.reason}", reason="unavailable", retry_after_ms=0), ended.reason)

    def _on_moved(self, moved: Moved) -> None:
        news = self._router.moved(self.session, owner=moved.owner, epoch=moved.epoch)
        self._resubscribe(moved, "moved", news=news)

    def _on_push(self, push: rpc.Push) -> None:
        tail = self._tail
        chunk = Chunk(push.first_seq, push.count, push.body)
        if push.count < 1 or chunk.last_seq <= tail.last_seq:
            return
        if push.first_seq > tail.last_seq + 1:
            self._resubscribe(TryAgain("a hole in the pushes", reason="unavailable", retry_after_ms=0), "hole")
            return
        if push.first_seq <= tail.last_seq:
            chunk = cut(chunk, tail.last_seq)
        self._router.metrics.pushes.inc()
        tail.add(chunk)
        self._streams.tail_bytes += len(chunk.body)
        for reader in self._live_readers():
            # One reader's sink may close another's: its state is looked at when it is its turn.
            if reader.state is _LIVE:
                reader.take(chunk)
        self._trim()

    def _live_readers(self) -> tuple[Reader, ...]:
        if self._live is None:
            self._live = tuple(reader for reader in self._readers if reader.state is State.LIVE)
        return self._live

    # The tail

    def _restart_tail(self, last_seq: int) -> None:
        self._streams.tail_bytes -= self._tail.size_bytes
        self._tail.restart(last_seq)

    def _trim(self) -> None:
        """Keep much while somebody catches up, little else; less when all streams together keep too much."""
        tail, streams = self._tail, self._streams
        before = tail.size_bytes
        crowded = streams.tail_bytes > TAIL_TOTAL_BYTES_MAX
        if self._catching_up and not crowded:
            tail.trim(messages=TAIL_MESSAGES_MAX, size_bytes=TAIL_BYTES_MAX)
        elif self._catching_up or not crowded:
            tail.trim(messages=TAIL_IDLE_MESSAGES_MAX, size_bytes=TAIL_IDLE_BYTES_MAX)
        else:
            tail.trim(messages=0, size_bytes=0)
        streams.tail_bytes += tail.size_bytes - before
