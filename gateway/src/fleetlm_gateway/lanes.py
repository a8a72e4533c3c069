"""Appends: one lane per session, one APPEND request of a lane in flight at a time, what arrives meanwhile is the next.

Promise: the appends of one session reach its owner in the order of `submit`, over every retry, lost connection and
change of owner; each is answered exactly once; an append waits at most `REQUEST_DEADLINE_S` in all. What waits is
bounded per lane and in total.
Must not be done here: a task per append (this is the hot path), keys (each draft has one), finding the owner.

The rule for an append whose deadline passes. It is answered TRY_AGAIN, its outcome is unknown: its request may lie in a
buffer on the way and be carried out later. It is never sent again from here, and those behind it do not wait for it:
they go out in the next request. So it may end up after them in the log, or not at all; whoever was told "unknown" knows
that its place is open until the same key has been acknowledged. Nothing is doubled: a client's retry carries the same
key, and the owner joins or dedupes it. Those behind it keep their order among themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

import msgspec

from fleetlm_common import rpc
from fleetlm_common.errors import FleetError, Moved, TryAgain, from_body
from fleetlm_common.ids import SessionId
from fleetlm_common.limits import REQUEST_DEADLINE_S
from fleetlm_common.rpc import Kind
from fleetlm_gateway.exchanges import Retry, refusal_of
from fleetlm_gateway.router import Router
from fleetlm_gateway.shardlink import NoPath, ShardLink

LANES_MAX: Final = 65_536
"""Sessions with an append on its way; about 1 KiB each without the messages."""
LANE_ENTRIES_MAX: Final = 4_096
"""Appends waiting in one lane: one second of a stall at 4,000 a second in one session."""
LANE_BYTES_MAX: Final = 8 * 1024 * 1024
"""Bytes waiting in one lane: one session must not take the whole budget."""
TOTAL_BYTES_MAX: Final = 128 * 1024 * 1024
"""Bytes waiting in all lanes: a gateway's memory while its shards are away."""
REQUEST_MESSAGES_MAX: Final = 1_000
"""Messages of one APPEND beyond its first entry: a fair share of a shard's log batch."""
REQUEST_BYTES_MAX: Final = 1024 * 1024
"""Bytes of one APPEND beyond its first entry: far below a frame's maximum."""
DRAFT_OVERHEAD_BYTES: Final = 200
"""What a waiting draft costs beside its fragment; keeps tiny messages from escaping the bounds."""
SWEEP_EVERY_S: Final = 0.1
"""How late a passed deadline may be noticed; a timer per append would cost more than the append."""

Done = Callable[[list[rpc.Ack] | FleetError], None]
"""Takes the acks, one a draft, or the refusal; once. Must not raise."""

_APPEND: Final = Kind.APPEND
_APPENDED: Final = Kind.APPENDED
"""Asking an enum for a member takes 0.2 µs in Python 3.11; these are asked for with each request."""
_decode_appended = msgspec.msgpack.Decoder(rpc.Appended).decode


class _Entry(msgspec.Struct):
    """One append on its way. `done` is None once it is answered."""

    entry: rpc.Entry
    size_bytes: int
    deadline_s: float
    done: Done | None


class _Lane:
    """One session's appends: those in the request under way, then those that wait, oldest first."""

    __slots__ = (
        "answering",
        "ident",
        "in_flight",
        "link",
        "retry",
        "session",
        "size_bytes",
        "timer",
        "waiting",
        "wakes",
    )

    def __init__(self, session: SessionId) -> None:
        self.session = session
        self.waiting: list[_Entry] = []
        self.in_flight: list[_Entry] = []
        self.link: ShardLink | None = None
        self.ident = 0
        self.size_bytes = 0
        self.timer: asyncio.TimerHandle | None = None
        self.wakes = False
        self.answering = False
        self.retry: Retry | None = None


class Lanes:
    """The lanes of one gateway.

    Args:
        router: finds owners; lanes wake when it says that there may be a path.
    """

    def __init__(self, router: Router) -> None:
        self._router = router
        self._loop = asyncio.get_running_loop()
        self._lanes: dict[SessionId, _Lane] = {}
        self._size_bytes = 0
        self._sweeper: asyncio.TimerHandle | None = None
        self._stopped = False
        metrics = router.metrics
        metrics.lanes.set_function(lambda: len(self._lanes))
        metrics.lane_bytes.set_function(lambda: self._size_bytes)
        self._count = metrics.appends.labels
        self._count_acked = metrics.appends.labels("ok").inc
        self._count_request = metrics.append_requests.inc
        self._count_retry = metrics.retries.labels(Kind.APPEND.name).inc
        router.on_better(self._wake)

    def __len__(self) -> int:
        """Sessions with an append on its way."""
        return len(self._lanes)

    @property
    def size_bytes(self) -> int:
        """Bytes of all appends on their way."""
        return self._size_bytes

    def submit(self, session: SessionId, drafts: list[rpc.Draft], *, expected_seq: int | None, done: Done) -> None:
        """Take an append; `done` is called once, before this returns when a bound refuses it."""
        size_bytes = DRAFT_OVERHEAD_BYTES * len(drafts)
        for draft in drafts:
            size_bytes += len(draft.fragment)
        lane = self._lanes.get(session)
        if refusal := self._refusal(lane, size_bytes):
            self._count(refusal.code).inc()
            done(refusal)
            return
        if lane is None:
            lane = self._lanes[session] = _Lane(session)
        now_s = self._loop.time()
        lane.waiting.append(_Entry(rpc.Entry(drafts, expected_seq), size_bytes, now_s + REQUEST_DEADLINE_S, done))
        lane.size_bytes += size_bytes
        self._size_bytes += size_bytes
        if self._sweeper is None:
            self._sweeper = self._loop.call_later(SWEEP_EVERY_S, self._sweep)
        if not lane.in_flight and lane.timer is None and not lane.answering:
            self._pump(lane)

    def stop(self) -> None:
        """Answer everything TRY_AGAIN `draining` (the outcome is unknown) and take nothing more."""
        self._stopped = True
        refusal = TryAgain("this gateway is stopping; the outcome is unknown", reason="draining")
        for lane in list(self._lanes.values()):
            lane.answering = True
            if lane.link is not None:
                lane.link.forget(lane.ident)
            for entry in (*lane.in_flight, *lane.waiting):
                self._answer(lane, entry, refusal)
            lane.in_flight, lane.waiting = [], []
            self._settle(lane)
        if self._sweeper is not None:
            self._sweeper.cancel()

    def _refusal(self, lane: _Lane | None, size_bytes: int) -> TryAgain | None:
        if self._stopped:
            return TryAgain("this gateway is stopping", reason="draining")
        if self._size_bytes + size_bytes > TOTAL_BYTES_MAX:
            return TryAgain("too much is waiting in this gateway", reason="overloaded")
        if lane is None:
            if len(self._lanes) >= LANES_MAX:
                return TryAgain("too many sessions are being written to in this gateway", reason="overloaded")
        elif len(lane.waiting) >= LANE_ENTRIES_MAX or lane.size_bytes + size_bytes > LANE_BYTES_MAX:
            return TryAgain("too many appends are waiting in this session", reason="overloaded")
        return None

    def _pump(self, lane: _Lane) -> None:
        """Send the next request; the lane has something that waits and nothing in flight."""
        lane.timer = None
        batch = _cut(lane)
        try:
            route = self._router.route(lane.session)
            entries = [entry.entry for entry in batch]
            payload = rpc.encode(rpc.Append(route.epoch, lane.session, entries))
            # Not kept in the lane: a cycle for each append, and the collector would stop everything for all of them.
            lane.ident = route.link.call(_APPEND, payload, partial(self._on_reply, lane))
        except TryAgain as error:
            self._again(lane, batch, error)
            return
        lane.link = route.link
        lane.in_flight = batch

    def _on_reply(self, lane: _Lane, kind: int, payload: bytes) -> None:
        # Nothing of the lane is touched before the payload has been read: what cannot be read comes back as LOST.
        reply = _decode_appended(payload) if kind == _APPENDED else refusal_of(kind, payload)
        batch = lane.in_flight
        if isinstance(reply, rpc.Appended):
            _check(batch, reply)
            lane.in_flight, lane.link = [], None
            self._take(lane, batch, reply)
            return
        lane.in_flight, lane.link = [], None
        if isinstance(reply, Moved):
            news = self._router.moved(lane.session, owner=reply.owner, epoch=reply.epoch)
            self._again(lane, batch, reply, news=news)
        elif isinstance(reply, TryAgain):
            self._again(lane, batch, reply)
        else:
            lane.answering = True
            for entry in batch:
                self._answer(lane, entry, reply)
            self._settle(lane)

    def _take(self, lane: _Lane, batch: list[_Entry], reply: rpc.Appended) -> None:
        """Each entry its result; those that were told TRY_AGAIN go back to the front, in order."""
        refused: list[_Entry] = []
        refusal: TryAgain | None = None
        acked = 0
        # Whoever is answered may submit at once: that must wait behind what goes back to the front.
        lane.answering = True
        for entry, result in zip(batch, reply.results, strict=True):
            if result.error is None:
                acked += 1
                self._answer(lane, entry, result.acks)
                continue
            error = from_body(result.error)
            if isinstance(error, TryAgain):
                refused.append(entry)
                refusal = refusal or error
            else:
                self._answer(lane, entry, error)
        self._count_request()
        if acked:
            self._count_acked(acked)
            if lane.retry is not None:
                lane.retry.reset()
        if refusal is not None:
            lane.answering = False
            self._again(lane, refused, refusal)
        else:
            self._settle(lane)

    def _answer(self, lane: _Lane, entry: _Entry, outcome: list[rpc.Ack] | FleetError) -> None:
        done = entry.done
        if done is None:
            return
        entry.done = None
        lane.size_bytes -= entry.size_bytes
        self._size_bytes -= entry.size_bytes
        if isinstance(outcome, FleetError):
            self._count(outcome.code).inc()
        done(outcome)

    def _settle(self, lane: _Lane) -> None:
        """Nothing is in flight: send what waits, or let the lane vanish."""
        lane.answering = False
        if not lane.waiting:
            if lane.timer is not None:
                lane.timer.cancel()
            del self._lanes[lane.session]
        elif lane.timer is None:
            self._pump(lane)

    def _again(self, lane: _Lane, batch: list[_Entry], error: TryAgain | Moved, *, news: bool = False) -> None:
        """Put `batch` back to the front and try later, with whatever has come behind it by then."""
        lane.waiting[:0] = [entry for entry in batch if entry.done is not None]
        if not lane.waiting:
            self._settle(lane)
            return
        if lane.retry is None:
            lane.retry = Retry(self._router.entropy)
        self._count_retry()
        delay_s = lane.retry.failed(error, news=news)
        lane.wakes = isinstance(error, NoPath)
        # Also a delay of 0 goes through the loop: a refusal must not recurse into the next try.
        lane.timer = self._loop.call_later(delay_s, self._pump, lane)

    def _wake(self) -> None:
        for lane in list(self._lanes.values()):
            if lane.timer is not None and lane.wakes:
                lane.timer.cancel()
                self._pump(lane)

    def _sweep(self) -> None:
        now_s = self._loop.time()
        for lane in list(self._lanes.values()):
            oldest = lane.in_flight[0] if lane.in_flight else lane.waiting[0]
            if oldest.deadline_s <= now_s:
                self._expire(lane, now_s)
        self._sweeper = self._loop.call_later(SWEEP_EVERY_S, self._sweep) if self._lanes else None

    def _expire(self, lane: _Lane, now_s: float) -> None:
        """Answer those whose deadline has passed; a request of which nobody waits any more holds up nobody."""
        refusal = (lane.retry or Retry(self._router.entropy)).gave_up()
        lane.answering = True
        for entry in (*lane.in_flight, *lane.waiting):
            if entry.deadline_s > now_s:
                break
            self._answer(lane, entry, refusal)
        lane.answering = False
        lane.waiting = [entry for entry in lane.waiting if entry.done is not None]
        if any(entry.done is not None for entry in lane.in_flight):
            return
        if lane.link is not None:
            lane.link.forget(lane.ident)
        lane.in_flight, lane.link = [], None
        self._settle(lane)


def _cut(lane: _Lane) -> list[_Entry]:
    """Take the next request's entries from the front: at least one, then as long as the bounds hold."""
    waiting = lane.waiting
    if len(waiting) == 1:
        lane.waiting = []
        return waiting
    messages = size_bytes = count = 0
    for entry in waiting:
        messages += len(entry.entry.drafts)
        size_bytes += entry.size_bytes
        if count and (messages > REQUEST_MESSAGES_MAX or size_bytes > REQUEST_BYTES_MAX):
            break
        count += 1
    batch = waiting[:count]
    lane.waiting = waiting[count:]
    return batch


def _check(batch: list[_Entry], reply: rpc.Appended) -> None:
    """Raise what ends the connection if the shard's answer does not fit the question."""
    results = reply.results
    if len(results) != len(batch):
        raise msgspec.ValidationError(f"{len(results)} results for {len(batch)} entries")
    for entry, result in zip(batch, results, strict=True):
        if result.error is None and len(result.acks) != len(entry.entry.drafts):
            raise msgspec.ValidationError(f"{len(result.acks)} acks for {len(entry.entry.drafts)} drafts")
