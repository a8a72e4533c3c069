"""Subscriptions of gateways: each gets a session's new messages as they become durable, contiguous, the same bytes.

All subscriptions of a session stand at its `seq_durable`: one that starts earlier gets the difference at once (if it is
in memory) or starts there (the gateway replays the rest). So one encoded push serves them all.

Promise: pushes of a subscription are contiguous from `start_seq` + 1 until ENDED; a gateway that does not read has its
subscriptions ended (`overflow`) when `BUFFERED_BYTES_MAX` of it wait: memory stays bounded, nobody else waits for it.
Must not be done here: deciding what is durable; ownership.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol

from fleetlm_common import rpc
from fleetlm_common.errors import TryAgain
from fleetlm_common.rpc import Ended, Kind, Push, PushRead, Subscribed
from fleetlm_shard.replay import cursor_ahead
from fleetlm_shard.sessions import Session

BUFFERED_BYTES_MAX: Final = 16 * 1024 * 1024
"""Bytes that a gateway has not taken: a second of a very busy one; past it its streams end and it replays."""
PUSH_BYTES_MAX: Final = 1024 * 1024
"""Of one PUSH: a batch of one session may be larger and is sent as several."""
SUBSCRIPTIONS_MAX: Final = 200_000
"""Of one connection: a gateway has one a session that its sockets listen to."""


class Peer(Protocol):
    """A gateway's connection."""

    subscriptions: dict[int, Subscription]

    @property
    def buffered_bytes(self) -> int:
        """Bytes sent and not yet taken by the kernel."""
        ...

    def send(self, kind: int, ident: int, payload: bytes) -> None:
        """Queue a frame."""
        ...


class Subscription:
    """One gateway listens to one session."""

    __slots__ = ("ident", "peer", "session")

    def __init__(self, peer: Peer, ident: int, session: Session) -> None:
        self.peer = peer
        self.ident = ident
        self.session = session


class Subscriptions:
    """All subscriptions of this shard."""

    def __init__(self) -> None:
        self.count = 0
        self.pushed = 0
        self.pushed_messages = 0
        self.overflowed = 0

    def subscribe(self, peer: Peer, ident: int, *, session: Session, after: int | None) -> None:
        """Answer SUBSCRIBED, then push what lies between; a look must have been done after the request came in.

        Raises:
            Invalid: `cursor_ahead`.
            TryAgain: too many, or the gateway has too much unread.
        """
        last_seq = session.seq_durable
        start_seq = last_seq if after is None else after
        if start_seq > last_seq:
            raise cursor_ahead("after", start_seq, last_seq=last_seq)
        if len(peer.subscriptions) >= SUBSCRIPTIONS_MAX:
            raise TryAgain(f"a connection holds at most {SUBSCRIPTIONS_MAX} subscriptions", reason="overloaded")
        if peer.buffered_bytes > BUFFERED_BYTES_MAX:
            raise TryAgain("this gateway does not read fast enough", reason="overloaded")
        messages: list[bytes] = []
        if start_seq + 1 < session.ring_first_seq:
            start_seq = last_seq
        else:
            messages = session.ring_slice(start_seq + 1, last_seq - start_seq)
        subscription = Subscription(peer, ident, session)
        assert ident not in peer.subscriptions, "the server refused a second one"
        peer.subscriptions[ident] = subscription
        session.subscribers.append(subscription)
        self.count += 1
        peer.send(Kind.SUBSCRIBED, ident, rpc.encode(Subscribed(start_seq, last_seq)))
        for payload in _pushes(start_seq + 1, messages):
            peer.send(Kind.PUSH, ident, payload)

    def unsubscribe(self, peer: Peer, ident: int) -> None:
        """End a subscription without a word; harmless for one that has ended."""
        subscription = peer.subscriptions.pop(ident, None)
        if subscription is not None:
            subscription.session.subscribers.remove(subscription)
            self.count -= 1

    def drop(self, peer: Peer) -> None:
        """The connection is gone."""
        for ident in list(peer.subscriptions):
            self.unsubscribe(peer, ident)

    def publish(self, session: Session, messages: list[bytes]) -> None:
        """These messages became durable; the last one is the session's `seq_durable`."""
        subscribers = session.subscribers
        if not subscribers:
            return
        full: list[Peer] = []
        for payload in _pushes(session.seq_durable - len(messages) + 1, messages):
            for subscription in subscribers:
                subscription.peer.send(Kind.PUSH, subscription.ident, payload)
        self.pushed += len(subscribers)
        self.pushed_messages += len(messages)
        full = [each.peer for each in subscribers if each.peer.buffered_bytes > BUFFERED_BYTES_MAX]
        for peer in full:
            self._overflow(peer)

    def publish_read(self, session: Session, participant: str, seq: int) -> None:
        """A read cursor moved, durably."""
        if session.subscribers:
            payload = rpc.encode(PushRead(participant, seq))
            for subscription in session.subscribers:
                subscription.peer.send(Kind.PUSH_READ, subscription.ident, payload)

    def end(self, sessions: Iterator[Session], ended: Callable[[Session], Ended]) -> None:
        """End all subscriptions of these sessions, each after its last push, with a reason."""
        for session in sessions:
            for subscription in list(session.subscribers):
                self._end(subscription, rpc.encode(ended(session)))

    def _overflow(self, peer: Peer) -> None:
        payload = rpc.encode(Ended("overflow", "", 0))
        for subscription in list(peer.subscriptions.values()):
            self.overflowed += 1
            self._end(subscription, payload)

    def _end(self, subscription: Subscription, payload: bytes) -> None:
        self.unsubscribe(subscription.peer, subscription.ident)
        subscription.peer.send(Kind.ENDED, subscription.ident, payload)


def _pushes(first_seq: int, messages: list[bytes]) -> Iterator[bytes]:
    """PUSH payloads of at most `PUSH_BYTES_MAX` (a single message may be all of one)."""
    start = 0
    size_bytes = 0
    for index, json in enumerate(messages):
        if index > start and size_bytes + len(json) > PUSH_BYTES_MAX:
            yield _push(first_seq + start, messages[start:index])
            start, size_bytes = index, 0
        size_bytes += len(json) + 1
    if len(messages) > start:
        yield _push(first_seq + start, messages[start:])


def _push(first_seq: int, messages: list[bytes]) -> bytes:
    return rpc.encode(Push(first_seq, len(messages), b",".join(messages)))
