"""The one door between the outer half of the gateway (WebSocket, REST) and the inner half (shards).

Promise: both doors to clients use exactly these operations. Each answers once: with a value or with a `FleetError`;
one deadline (`REQUEST_DEADLINE_S`) bounds each, retries included. A `TryAgain` leaves the outcome unknown: the same
keys make a retry safe. A `Subscription` is contiguous from where it started, or says a `Gap`; it never goes silent.
Must not be done here: parsing what clients send, making keys, limits of clients, authentication (the outer half),
how shards are reached (`router.py`, `shardlink.py`), how order is kept (`lanes.py`), how streams run (`streams.py`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

from fleetlm_common import rpc
from fleetlm_common.control import ControlPlane
from fleetlm_common.errors import FleetError
from fleetlm_common.ids import SessionId
from fleetlm_common.logs import Logger
from fleetlm_common.ops import Health
from fleetlm_gateway import listing
from fleetlm_gateway.exchanges import CHANGES, CREATE, ENTRIES, INBOX, INFO, MARK_READ, PARTICIPATED, READ
from fleetlm_gateway.lanes import Lanes
from fleetlm_gateway.metrics import InnerMetrics
from fleetlm_gateway.router import Router
from fleetlm_gateway.shardlink import Connect, Identity, connect_tcp
from fleetlm_gateway.sinks import FromCursor, FromTail, LiveOnly, Sink, Start, Subscription
from fleetlm_gateway.streams import Streams

__all__ = ["AppendDone", "Boundary", "FromCursor", "FromTail", "LiveOnly", "Sink", "Start", "Subscription"]

AppendDone = Callable[[list[rpc.Ack] | FleetError], None]
"""Called once with the acks (one a draft, in order) or with the refusal. Must not raise."""


class Boundary:
    """What the outer half may ask. To be made in a running loop.

    Args:
        gateway: this gateway's name.
        credential: the secret that shards ask for.
        control: where the ring map comes from.
        entropy: for jitter.
        log: for events.
        metrics: for what happens.
        connect: makes connections to shards.
    """

    def __init__(
        self,
        *,
        gateway: str,
        credential: bytes,
        control: ControlPlane,
        entropy: random.Random,
        log: Logger,
        metrics: InnerMetrics,
        connect: Connect = connect_tcp,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._router = Router(
            identity=Identity(gateway, credential),
            control=control,
            connect=connect,
            entropy=entropy,
            log=log,
            metrics=metrics,
        )
        self._lanes = Lanes(self._router)
        self._streams = Streams(self._router)

    @property
    def epoch(self) -> int:
        """The epoch of the newest ring map known; 0 before the first."""
        return self._router.epoch

    def ready(self) -> Health:
        """Whether requests can be served, with the reason when not.

        Reasons: `NotWatching`, `NoRingMap`, `NoShardReachable`; `Ready` names shards that are away in its message.
        """
        return self._router.ready()

    async def start(self) -> None:
        """Begin to watch the ring map and to connect; returns at once, `ready` says when it is done."""
        self._router.start()

    async def stop(self) -> None:
        """Answer what waits with TRY_AGAIN `draining`, close subscriptions and connections."""
        self._streams.stop()
        self._lanes.stop()
        await self._router.stop()

    async def append(
        self, session: SessionId, drafts: list[rpc.Draft], *, expected_seq: int | None = None
    ) -> list[rpc.Ack]:
        """Append all drafts or none, in the order of the calls for one session.

        Cancelling the caller does not withdraw the append.

        Raises:
            FleetError: `TryAgain` (outcome unknown) or a `Rejected` (was not and will not be appended).
        """
        answered: asyncio.Future[list[rpc.Ack]] = self._loop.create_future()

        def done(outcome: list[rpc.Ack] | FleetError) -> None:
            if answered.done():
                return
            if isinstance(outcome, FleetError):
                answered.set_exception(outcome)
            else:
                answered.set_result(outcome)

        self._lanes.submit(session, drafts, expected_seq=expected_seq, done=done)
        return await answered

    def append_then(
        self, session: SessionId, drafts: list[rpc.Draft], *, expected_seq: int | None = None, done: AppendDone
    ) -> None:
        """`append` without a task: `done` is called once, maybe before this returns (a refusal at the door)."""
        self._lanes.submit(session, drafts, expected_seq=expected_seq, done=done)

    async def read(
        self,
        session: SessionId,
        *,
        after: int | None = None,
        before: int | None = None,
        tail: int | None = None,
        limit: int,
    ) -> rpc.Page:
        """One page; exactly one of `after`, `before` and `tail` is given.

        Raises:
            FleetError: `TryAgain`, or `Invalid` with reason `cursor_ahead` and `last_seq`.
        """

        def ask(epoch: int) -> rpc.Read:
            return rpc.Read(epoch, session, limit, after=after, before=before, tail=tail)

        return await self._router.request(READ, session, ask)

    async def info(self, session: SessionId, *, cursor: int | None = None) -> rpc.InfoOk:
        """A session as it is; `exists` is False for one that was never written to.

        Raises:
            FleetError: `TryAgain`, or `Invalid` with reason `cursor_ahead` and `last_seq`.
        """
        return await self._router.request(INFO, session, lambda epoch: rpc.Info(epoch, session, cursor))

    async def mark_read(self, session: SessionId, participant: str, seq: int) -> int:
        """Set a read cursor; returns where it is now (it never goes back).

        Raises:
            FleetError: `TryAgain`, or `Invalid` with reason `cursor_ahead` and `last_seq`.
        """
        marked = await self._router.request(
            MARK_READ, session, lambda epoch: rpc.MarkRead(epoch, session, participant, seq)
        )
        return marked.last_read_seq

    async def create(self, session: SessionId, metadata: bytes) -> rpc.Created:
        """Make a session; `metadata` is an encoded JSON object.

        Raises:
            FleetError: `TryAgain`, or `Conflict` when it exists with other metadata.
        """
        return await self._router.request(CREATE, session, lambda epoch: rpc.Create(epoch, session, metadata))

    async def sessions(self, *, after: str, limit: int) -> list[tuple[str, rpc.InfoOk]]:
        """Up to `limit` sessions of the whole ring after id `after` ("" from the first), by the bytes of their ids.

        Raises:
            TryAgain: a shard did not answer (a list with a hole would look like a whole one).
        """
        return await listing.merged(self._router, after=after, limit=limit)

    async def sessions_of(
        self, participant: str, *, after: str, limit: int
    ) -> tuple[list[tuple[str, rpc.InfoOk]], bool]:
        """Up to `limit` sessions that a participant wrote to or marked read, after id `after`; whether there are more.

        Which they are the archive says, how they are their owners.

        Raises:
            FleetError: `TryAgain`, or `NotFound` with reason `no_archive`.
        """
        # One more than is shown: only that proves that there is more.
        found = await self._router.request_any(PARTICIPATED, rpc.Participated(participant, after, limit + 1))
        names = found.sessions[:limit]
        tasks = [asyncio.ensure_future(self.info(SessionId(name))) for name in names]
        try:
            infos = await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # the first refusal is the answer
                task.cancel()
        shown = [(name, info) for name, info in zip(names, infos, strict=True) if info.exists]
        return shown, len(found.sessions) > limit

    async def inbox(self, participant: str, *, after: rpc.InboxPlace | None, limit: int) -> rpc.InboxPage:
        """A page of a participant's sessions as the archive has them, newest activity first.

        Raises:
            FleetError: as `sessions_of`.
        """
        return await self._router.request_any(INBOX, rpc.Inbox(participant, after, limit))

    async def changes(self, participants: list[str], since: rpc.ChangesPlace) -> rpc.Changed:
        """Which sessions of these participants changed in the archive since a place.

        Raises:
            FleetError: as `sessions_of`.
        """
        return await self._router.request_any(CHANGES, rpc.Changes(participants, since))

    async def entries(self, pairs: list[tuple[str, str]]) -> list[tuple[str, rpc.InboxEntry]]:
        """What inboxes show of these pairs of participant and session.

        Raises:
            FleetError: as `sessions_of`.
        """
        return (await self._router.request_any(ENTRIES, rpc.Entries(pairs))).entries

    async def subscribe(self, session: SessionId, *, start: Start, sink: Sink) -> Subscription:
        """Open a place in a session. Cancel-safe: nothing stays behind.

        Raises:
            FleetError: `TryAgain`, or `Invalid` with reason `cursor_ahead` and `last_seq`.
        """
        return await self._streams.subscribe(session, start=start, sink=sink)
