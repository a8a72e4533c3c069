"""Shards for the gateway's tests: the real protocol over real TCP, an honest log in memory, and scripted misbehaviour.

Promise: unless scripted, a fake shard does what a shard does: one order a session, keys deduped, all or nothing,
contiguous pushes, MOVED for what it does not own. Several shards share one `World`, so that ownership can change hands.
Must not be used for anything about durability.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from fleetlm_common import rpc
from fleetlm_common.errors import Conflict, FleetError, IdempotencyConflict, Invalid, TryAgain
from fleetlm_common.ids import Epoch, SessionId, ShardName
from fleetlm_common.ring import Member, RingMap, SlotRange, ranges_from
from fleetlm_common.rpc import Kind
from fleetlm_common.slots import slot_of
from fleetlm_common.wire import FrameConnection

RING_UID = "ring-of-tests"
PAGE_MESSAGES_MAX = 50


@dataclass(frozen=True)
class Refuse:
    """Answer an error, do nothing."""

    error: FleetError


@dataclass(frozen=True)
class Redirect:
    """Answer MOVED."""

    owner: str
    epoch: int


@dataclass(frozen=True)
class Drop:
    """Take the request, do nothing, cut the connection."""


@dataclass(frozen=True)
class DropReply:
    """Do it, then cut the connection instead of answering."""


@dataclass(frozen=True)
class Mute:
    """Do nothing and never answer."""


@dataclass(frozen=True)
class MuteAfter:
    """Do it and never answer."""


@dataclass(frozen=True)
class Hold:
    """Do it and answer when the event is set."""

    until: asyncio.Event


@dataclass(frozen=True)
class Partial:
    """Of an APPEND: take the first entries, refuse the others."""

    taken: int
    error: FleetError


@dataclass(frozen=True)
class Answer:
    """Answer with this frame, whatever was asked."""

    kind: int
    payload: bytes


Behaviour = Refuse | Redirect | Drop | DropReply | Mute | MuteAfter | Hold | Partial | Answer


@dataclass
class Log:
    """One session's truth."""

    messages: list[tuple[str, bytes]] = field(default_factory=list[tuple[str, bytes]])
    seqs: dict[str, int] = field(default_factory=dict[str, int])
    earliest: int = 1
    metadata: bytes | None = None
    cursors: dict[str, int] = field(default_factory=dict[str, int])

    def json(self, seq: int) -> bytes:
        """A message as clients see it."""
        key, fragment = self.messages[seq - 1]
        return b'{"seq":%d,"key":"%b",%b}' % (seq, key.encode(), fragment)


class World:
    """What all shards agree on: who owns what, and every log."""

    def __init__(self, shards: int, *, slots: int = 8) -> None:
        self.names = [ShardName(f"shard-{number}") for number in range(shards)]
        self.logs: defaultdict[str, Log] = defaultdict(Log)
        self.shards: list[FakeShard] = []
        owners = [(self.names[slot * shards // slots], Epoch(1)) for slot in range(slots)]
        self.maps = [self._map(owners, 1)]

    @property
    def ring(self) -> RingMap:
        """The truth about ownership."""
        return self.maps[-1]

    def owner(self, session: str) -> SlotRange:
        """Who owns it."""
        return self.ring.owner_of(slot_of(SessionId(session), self.ring.slots))

    def session_of(self, shard: str, *, number: int = 0) -> SessionId:
        """Some session that `shard` owns."""
        found = (name for count in range(10_000) if self.owner(name := f"s{count}").owner == shard)
        for _ in range(number):
            next(found)
        return SessionId(next(found))

    def move(self, session: str, to: str) -> None:
        """Hand the session's slot over: the old owner ends subscriptions with MOVED after its last push."""
        epoch = Epoch(self.ring.epoch + 1)
        slot = slot_of(SessionId(session), self.ring.slots)
        owners = [(found.owner, found.epoch) for found in self.ring.owners()]
        owners[slot] = (ShardName(to), epoch)
        self.maps.append(self._map(owners, epoch))
        for shard in self.shards:
            shard.release(slot)

    def append(self, session: str, entry: rpc.Entry) -> rpc.EntryResult:
        """All of the entry or nothing."""
        log = self.logs[session]
        known = [log.seqs.get(draft.key) for draft in entry.drafts]
        for seq, draft in zip(known, entry.drafts, strict=True):
            if seq is not None and log.messages[seq - 1][1] != draft.fragment:
                return rpc.EntryResult([], IdempotencyConflict("other content").body())
        if None in known and entry.expected_seq not in (None, len(log.messages)):
            return rpc.EntryResult([], Conflict("not that", last_seq=len(log.messages)).body())
        acks: list[rpc.Ack] = []
        for seq, draft in zip(known, entry.drafts, strict=True):
            if seq is None:
                log.messages.append((draft.key, draft.fragment))
                log.seqs[draft.key] = len(log.messages)
            at = log.seqs[draft.key]
            acks.append(rpc.Ack(at, f"id-{at}", "2026-01-01T00:00:00.000000Z", deduped=seq is not None))
        return rpc.EntryResult(acks)

    def publish(self, session: str) -> None:
        """Push what is new."""
        for shard in self.shards:
            shard.publish(session)

    def write(self, session: str, count: int = 1) -> None:
        """Another gateway's appends."""
        log = self.logs[session]
        for _ in range(count):
            key = f"other-{len(log.messages) + 1}"
            self.append(session, rpc.Entry([draft(key)]))
        self.publish(session)

    def _map(self, owners: list[tuple[ShardName, Epoch]], epoch: int) -> RingMap:
        members = tuple(Member(name, f"volume-{name}") for name in self.names)
        return RingMap(RING_UID, len(owners), Epoch(epoch), members, ranges_from(owners))


def draft(key: str, text: str = "x") -> rpc.Draft:
    """A draft as the outer half makes them."""
    return rpc.Draft(key, b'"content":"%b"' % text.encode())


@dataclass
class _Subscription:
    session: str
    next_seq: int


class _Peer:
    """One connection at the shard."""

    def __init__(self, shard: FakeShard) -> None:
        self.wire = FrameConnection(on_frame=self._on_frame, on_lost=lambda _: shard.peers.discard(self))
        self.shard = shard
        self.subscriptions: dict[int, _Subscription] = {}
        shard.peers.add(self)

    def _on_frame(self, kind: int, ident: int, payload: bytes) -> None:
        if not self.shard.frozen:
            self.shard.take(self, Kind(kind), ident, payload)


_PAYLOADS: dict[Kind, type[msgspec.Struct]] = {
    Kind.HELLO: rpc.Hello,
    Kind.APPEND: rpc.Append,
    Kind.READ: rpc.Read,
    Kind.INFO: rpc.Info,
    Kind.SUBSCRIBE: rpc.Subscribe,
    Kind.MARK_READ: rpc.MarkRead,
    Kind.CREATE: rpc.Create,
    Kind.LIST: rpc.List,
}


class FakeShard:
    """One shard of a `World`.

    Attributes:
        received: every request, in order.
        frozen: nothing is answered, not even PING, while the connection stands (a frozen process).
        start_at_last: subscriptions begin at the session's last seq, whatever was asked for.
        skip_pushes: so many next messages are left out of pushes (a hole).
        hangs_up: after each WELCOME the connection is closed.
        list_max: pages of LIST are at most so long, whatever was asked for.
        chaos: misbehaves at random, with this.
    """

    def __init__(self, world: World, name: ShardName, *, term: int = 1) -> None:
        self.world = world
        self.name = name
        self.term = term
        self.port = 0
        self.received: list[msgspec.Struct] = []
        self.hellos: list[rpc.Hello] = []
        self.peers: set[_Peer] = set()
        self.frozen = False
        self.start_at_last = False
        self.skip_pushes = 0
        self.list_max = 1000
        self.hangs_up = False
        self.refuse_hello: FleetError | None = None
        self.chaos: random.Random | None = None
        self.unsubscribed = 0
        self._scripts: defaultdict[Kind, deque[Behaviour]] = defaultdict(deque)
        self._server: asyncio.Server | None = None
        self._seen = asyncio.Event()
        world.shards.append(self)

    async def start(self) -> None:
        """Listen; a restart keeps the port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Peer(self).wire, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Like a SIGKILL: connections end, nobody listens."""
        if self._server is not None:
            self._server.close()
            self.cut()
            await self._server.wait_closed()

    def cut(self) -> None:
        """End every connection."""
        for peer in list(self.peers):
            peer.wire.abort()

    def script(self, kind: Kind, *behaviours: Behaviour) -> None:
        """What the next requests of a kind meet, one each; then the shard behaves again."""
        self._scripts[kind].extend(behaviours)

    def behave(self) -> None:
        """Forget every script."""
        self._scripts.clear()

    def asked(self, kind: type[msgspec.Struct]) -> list[msgspec.Struct]:
        """The requests of that type so far."""
        return [request for request in self.received if isinstance(request, kind)]

    async def until_asked(self, kind: type[msgspec.Struct], count: int = 1) -> None:
        """Wait until so many requests of a type have come."""
        while len(self.asked(kind)) < count:
            self._seen.clear()
            async with asyncio.timeout(100):
                await self._seen.wait()

    def publish(self, session: str) -> None:
        """Push to this shard's subscribers what is new."""
        for peer in list(self.peers):
            for ident, subscription in peer.subscriptions.items():
                if subscription.session == session:
                    self._push(peer, ident, subscription)

    def end_subscriptions(self, reason: str) -> None:
        """ENDED to everybody."""
        for peer in list(self.peers):
            self._end(peer, lambda _: True, rpc.Ended(reason, "", 0))

    def release(self, slot: int) -> None:
        """End the subscriptions of a slot that is not owned any more."""
        ring = self.world.ring
        owner = ring.owners()[slot].owner
        if owner != self.name:
            ended = rpc.Ended("moved", owner, ring.epoch)
            for peer in list(self.peers):
                self._end(peer, lambda session: slot_of(SessionId(session), ring.slots) == slot, ended)

    def goaway(self) -> None:
        """Say that it is leaving."""
        for peer in list(self.peers):
            peer.wire.send(Kind.GOAWAY, 0, rpc.encode(rpc.Goaway("test")))

    def take(self, peer: _Peer, kind: Kind, ident: int, payload: bytes) -> None:
        """One frame from the gateway."""
        if kind == Kind.PING:
            peer.wire.send(Kind.PONG, ident, b"")
        elif kind == Kind.UNSUBSCRIBE:
            self.unsubscribed += 1
            peer.subscriptions.pop(ident, None)
        else:
            request = msgspec.msgpack.decode(payload, type=_PAYLOADS[kind])
            if isinstance(request, rpc.Hello):
                self._hello(peer, request)
                return
            self.received.append(request)
            self._seen.set()
            script = self._scripts[kind]
            behaviour = script.popleft() if script else self._chaotic(kind)
            self._behave(peer, kind, ident, request, behaviour)

    def _hello(self, peer: _Peer, hello: rpc.Hello) -> None:
        self.hellos.append(hello)
        if self.refuse_hello is not None:
            peer.wire.send(Kind.ERROR, 0, rpc.encode(self.refuse_hello.body()))
            peer.wire.close()
        else:
            welcome = rpc.Welcome(rpc.PROTOCOL, self.name, self.term, self.world.ring.epoch)
            peer.wire.send(Kind.WELCOME, 0, rpc.encode(welcome))
            if self.hangs_up:
                peer.wire.close()

    def _chaotic(self, kind: Kind) -> Behaviour | None:
        if self.chaos is None or self.chaos.random() > 0.25:
            return None
        error = TryAgain("chaos", reason="moving", retry_after_ms=1)
        choices: list[Behaviour] = [Refuse(error), Drop(), DropReply(), Redirect("shard-0", 1)]
        if kind == Kind.APPEND:
            choices += [Partial(self.chaos.randrange(3), error)] * 3
        return self.chaos.choice(choices)

    def _behave(
        self, peer: _Peer, kind: Kind, ident: int, request: msgspec.Struct, behaviour: Behaviour | None
    ) -> None:
        match behaviour:
            case Refuse(error):
                peer.wire.send(Kind.ERROR, ident, rpc.encode(error.body()))
            case Redirect(owner, epoch):
                peer.wire.send(Kind.MOVED, ident, rpc.encode(rpc.MovedBody(owner, epoch)))
            case Answer(answer, payload):
                peer.wire.send(answer, ident, payload)
            case Mute() | MuteAfter() | Drop() | DropReply():
                self._keep_quiet(peer, ident, request, behaviour)
            case Hold(until):
                waiter = asyncio.ensure_future(until.wait())
                waiter.add_done_callback(lambda _: self._behave(peer, kind, ident, request, None))
            case Partial(taken, error):
                assert isinstance(request, rpc.Append)
                self._reply(peer, ident, *self._append(request, taken=taken, refusal=error))
            case None:
                self._reply(peer, ident, *self._serve(request, peer, ident))

    def _keep_quiet(
        self, peer: _Peer, ident: int, request: msgspec.Struct, behaviour: Mute | MuteAfter | Drop | DropReply
    ) -> None:
        if isinstance(behaviour, (MuteAfter, DropReply)):
            self._serve(request, peer, ident)
        if isinstance(behaviour, (Drop, DropReply)):
            peer.wire.abort()

    def _reply(self, peer: _Peer, ident: int, kind: Kind, payload: msgspec.Struct) -> None:
        peer.wire.send(kind, ident, rpc.encode(payload))
        if isinstance(payload, rpc.Subscribed):
            self._push(peer, ident, peer.subscriptions[ident])

    def _serve(self, request: msgspec.Struct, peer: _Peer, ident: int) -> tuple[Kind, msgspec.Struct]:
        session = getattr(request, "session", None)
        if session is not None and self.world.owner(session).owner != self.name:
            return Kind.MOVED, rpc.MovedBody(self.world.owner(session).owner, self.world.ring.epoch)
        try:
            return self._done(request, peer, ident)
        except FleetError as error:
            return Kind.ERROR, error.body()

    def _done(self, request: msgspec.Struct, peer: _Peer, ident: int) -> tuple[Kind, msgspec.Struct]:
        match request:
            case rpc.Append():
                return self._append(request)
            case rpc.Read():
                return Kind.PAGE, self._read(request)
            case rpc.Info(_, session, cursor):
                _check_cursor(cursor, len(self.world.logs[session].messages))
                return Kind.INFO_OK, self._info(session)
            case rpc.Subscribe(_, session, after):
                return self._subscribe(peer, ident, session, after)
            case rpc.MarkRead(_, session, participant, seq):
                log = self.world.logs[session]
                _check_cursor(seq, len(log.messages))
                log.cursors[participant] = max(seq, log.cursors.get(participant, 0))
                return Kind.MARKED, rpc.Marked(log.cursors[participant])
            case rpc.Create(_, session, metadata):
                log = self.world.logs[session]
                created, log.metadata = log.metadata is None, log.metadata or metadata
                return Kind.CREATED, rpc.Created(created, self._info(session))
            case rpc.List(after, limit):
                mine = sorted((name for name in self.world.logs if self._owns(name)), key=str.encode)
                names = [name for name in mine if name.encode() > after.encode()][: min(limit, self.list_max)]
                return Kind.LISTED, rpc.Listed([(name, self._info(name)) for name in names])
            case _:
                raise AssertionError(request)

    def _owns(self, session: str) -> bool:
        return self.world.owner(session).owner == self.name

    def _append(
        self, request: rpc.Append, *, taken: int | None = None, refusal: FleetError | None = None
    ) -> tuple[Kind, msgspec.Struct]:
        if self.world.owner(request.session).owner != self.name:
            return Kind.MOVED, rpc.MovedBody(self.world.owner(request.session).owner, self.world.ring.epoch)
        results = [self.world.append(request.session, entry) for entry in request.entries[:taken]]
        if refusal is not None:
            results += [rpc.EntryResult([], refusal.body()) for _ in request.entries[len(results) :]]
        asyncio.get_running_loop().call_soon(self.world.publish, request.session)
        return Kind.APPENDED, rpc.Appended(results)

    def _info(self, session: str) -> rpc.InfoOk:
        log = self.world.logs[session]
        exists = bool(log.messages) or log.metadata is not None
        return rpc.InfoOk(exists, len(log.messages), log.earliest, "", log.metadata or b"{}", self.world.ring.epoch)

    def _read(self, request: rpc.Read) -> rpc.Page:
        log = self.world.logs[request.session]
        last = len(log.messages)
        limit = min(request.limit, PAGE_MESSAGES_MAX)
        assert request.after is not None, "the fake pages forward only"
        _check_cursor(request.after, last)
        gap, first = None, request.after + 1
        if first < log.earliest:
            gap = rpc.Gap("retention", first, log.earliest, log.earliest, last)
            first = log.earliest
        seqs = range(first, min(last, first + limit - 1) + 1)
        return rpc.Page(first, [log.json(seq) for seq in seqs], first + len(seqs) <= last, last, log.earliest, gap)

    def _subscribe(self, peer: _Peer, ident: int, session: str, after: int | None) -> tuple[Kind, msgspec.Struct]:
        last = len(self.world.logs[session].messages)
        _check_cursor(after, last)
        start = last if after is None or self.start_at_last else after
        peer.subscriptions[ident] = _Subscription(session, start + 1)
        return Kind.SUBSCRIBED, rpc.Subscribed(start, last)

    def _push(self, peer: _Peer, ident: int, subscription: _Subscription) -> None:
        log = self.world.logs[subscription.session]
        while self.skip_pushes and subscription.next_seq <= len(log.messages):
            self.skip_pushes -= 1
            subscription.next_seq += 1
        seqs = range(subscription.next_seq, len(log.messages) + 1)
        if seqs:
            push = rpc.Push(seqs[0], len(seqs), b",".join(log.json(seq) for seq in seqs))
            peer.wire.send(Kind.PUSH, ident, rpc.encode(push))
            subscription.next_seq = seqs[-1] + 1

    def _end(self, peer: _Peer, which: Callable[[str], bool], ended: rpc.Ended) -> None:
        for ident, subscription in list(peer.subscriptions.items()):
            if which(subscription.session):
                self._push(peer, ident, subscription)
                peer.wire.send(Kind.ENDED, ident, rpc.encode(ended))
                del peer.subscriptions[ident]


def _check_cursor(cursor: int | None, last_seq: int) -> None:
    if cursor is not None and cursor > last_seq:
        raise Invalid("ahead", reason="cursor_ahead", field="cursor", last_seq=last_seq)
