"""From a session to the connection of its owner, and one request with one deadline over whatever happens meanwhile.

Promise: the ring map in use never goes back; a MOVED is used at once and asks for a newer map; a request is answered
within `REQUEST_DEADLINE_S` of its beginning, retries included: by the owner's reply, by its `Rejected` at once, or by a
`TryAgain` that gives the last reason.
Must not be done here: order of appends (`lanes.py`), streams (`streams.py`), bytes (`shardlink.py`).
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from fleetlm_common import rpc
from fleetlm_common.control import ControlPlane, ControlPlaneUnavailable, View
from fleetlm_common.errors import FleetError, Moved, TryAgain
from fleetlm_common.ids import SessionId
from fleetlm_common.limits import REQUEST_DEADLINE_S
from fleetlm_common.logs import Logger
from fleetlm_common.ops import Health
from fleetlm_common.ring import RingMap
from fleetlm_common.slots import slot_of
from fleetlm_gateway.exchanges import Exchange, Retry, refusal_of
from fleetlm_gateway.metrics import InnerMetrics
from fleetlm_gateway.shardlink import Connect, Identity, NoPath, ShardLink, Target

R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Route:
    """The link to a slot's owner, and the epoch at which this gateway believes that."""

    link: ShardLink
    epoch: int


class Router:
    """Knows the ring map and owns the links.

    Args:
        identity: this gateway, for handshakes.
        control: where the map comes from.
        connect: makes connections.
        entropy: for jitter.
        log: for events.
        metrics: for what happens.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        control: ControlPlane,
        connect: Connect,
        entropy: random.Random,
        log: Logger,
        metrics: InnerMetrics,
    ) -> None:
        self.entropy = entropy
        self.metrics = metrics
        self._identity = identity
        self._control = control
        self._connect = connect
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._ring_uid = ""
        self._map: RingMap | None = None
        self._links: dict[str, ShardLink] = {}
        self._terms: dict[str, int] = {}
        """By volume."""
        self._routes: list[Route] = []
        self._moved: dict[int, tuple[str, int]] = {}
        self._better: list[Callable[[], None]] = []
        self._pausing: dict[asyncio.Future[None], None] = {}  # in order: the simulator repeats itself
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def epoch(self) -> int:
        """The epoch of the map in use; 0 before the first."""
        return 0 if self._map is None else self._map.epoch

    def start(self) -> None:
        """Watch the map; needs a running loop."""
        self._watching = self._spawn(self._watch())

    async def stop(self) -> None:
        """Close every link; requests that wait end with `TryAgain draining`."""
        self._stopped = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(link.close() for link in self._links.values()))
        self._tell_better()

    def ready(self) -> Health:
        """Whether any session can be served, and why not."""
        if self._watching is None or self._watching.done():
            return Health(ok=False, reason="NotWatching", message="the ring map is not being watched")
        if self._map is None:
            why = self._control.trouble
            told = "" if why is None else f": {why}"
            return Health(ok=False, reason="NoRingMap", message=f"no ring map has been seen yet{told}")
        down = sorted(link.shard for link in self._links.values() if not link.ready)
        told = "; ".join(f"{shard}: {self._links[shard].why}" for shard in down)
        if len(down) == len(self._links):
            return Health(ok=False, reason="NoShardReachable", message=told or "the ring map has no members")
        return Health(ok=True, reason="Ready", message=told)

    def on_better(self, call: Callable[[], None]) -> None:
        """Have `call` called whenever a link became ready or the map changed: what had no path may have one."""
        self._better.append(call)

    def route(self, session: SessionId) -> Route:
        """Where requests about `session` go.

        Raises:
            NoPath: no map has been seen yet.
            TryAgain: this gateway stops.
        """
        if not self._routes or self._stopped:
            if self._stopped:
                raise TryAgain("this gateway is stopping", reason="draining")
            raise NoPath("no ring map has been seen yet")
        return self._routes[slot_of(session, len(self._routes))]

    def moved(self, session: SessionId, *, owner: str, epoch: int) -> bool:
        """A shard said MOVED.

        Returns:
            Whether that was news: the route has changed. A word that is older than our map is none.
        """
        self.metrics.moved.inc()
        if self._map is None:
            return False
        if epoch > self._map.epoch:
            self.refresh()
        slot = slot_of(session, len(self._routes))
        if epoch <= self._routes[slot].epoch:
            return False
        self._moved[slot] = (owner, epoch)
        self._routes[slot] = Route(self._link(owner), epoch)
        return True

    def refresh(self) -> None:
        """Read the map now; one read at a time."""
        if not self._stopped and (self._refreshing is None or self._refreshing.done()):
            self._refreshing = self._spawn(self._read())

    async def request(self, exchange: Exchange[R], session: SessionId, payload: Callable[[int], msgspec.Struct]) -> R:
        """Ask the owner of `session`.

        Args:
            exchange: what is asked.
            session: whose owner.
            payload: makes the request for an epoch.

        Raises:
            FleetError: `TryAgain` when the deadline passed, `Rejected` as the owner said.
        """

        def attempt() -> tuple[ShardLink, bytes]:
            route = self.route(session)
            return route.link, rpc.encode(payload(route.epoch))

        def moved(error: Moved) -> bool:
            return self.moved(session, owner=error.owner, epoch=error.epoch)

        return await self._within_deadline(exchange, attempt, moved, deadline_s=self._loop.time() + REQUEST_DEADLINE_S)

    async def request_shard(self, exchange: Exchange[R], shard: str, encoded: bytes, *, deadline_s: float) -> R:
        """Ask one shard, whatever it owns.

        Raises:
            FleetError: as `request`.
        """
        return await self._within_deadline(
            exchange, lambda: (self._link(shard), encoded), lambda _: False, deadline_s=deadline_s
        )

    async def request_any(self, exchange: Exchange[R], payload: msgspec.Struct) -> R:
        """Ask whichever shard answers: what they all know. One that does not is followed by another.

        Raises:
            FleetError: as `request`.
        """
        encoded = rpc.encode(payload)
        turns = itertools.count(self.entropy.randrange(1 << 16))

        def attempt() -> tuple[ShardLink, bytes]:
            ready = [link for _, link in sorted(self._links.items()) if link.ready]
            if not ready:
                raise NoPath("no shard can be reached")
            return ready[next(turns) % len(ready)], encoded

        deadline_s = self._loop.time() + REQUEST_DEADLINE_S
        return await self._within_deadline(exchange, attempt, lambda _: False, deadline_s=deadline_s)

    @property
    def members(self) -> list[str]:
        """Every shard of the ring.

        Raises:
            NoPath: no map has been seen yet.
        """
        if self._map is None:
            raise NoPath("no ring map has been seen yet")
        return [member.name for member in self._map.members]

    def owner(self, session: SessionId) -> str:
        """The name of the shard that `route` leads to.

        Raises:
            TryAgain: as `route`.
        """
        return self.route(session).link.shard

    async def _within_deadline(
        self,
        exchange: Exchange[R],
        attempt: Callable[[], tuple[ShardLink, bytes]],
        moved: Callable[[Moved], bool],
        *,
        deadline_s: float,
    ) -> R:
        """Try until it works, is rejected, or the one deadline passes."""
        retry = Retry(self.entropy)
        began_s = self._loop.time()
        outcome = "ok"
        try:
            async with asyncio.timeout_at(deadline_s):
                while True:
                    try:
                        link, encoded = attempt()
                        return await self._once(exchange, link, encoded)
                    except (TryAgain, Moved) as error:
                        if self._stopped:
                            raise TryAgain("this gateway is stopping", reason="draining") from error
                        news = isinstance(error, Moved) and moved(error)
                        await self._pause(retry.failed(error, news=news), wakes=isinstance(error, NoPath))
                        self.metrics.retries.labels(exchange.kind.name).inc()
        except TimeoutError:
            outcome = "TRY_AGAIN"
            raise retry.gave_up() from None
        except FleetError as error:
            outcome = error.code
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            self.metrics.requests.labels(exchange.kind.name, outcome).inc()
            self.metrics.request_seconds.labels(exchange.kind.name).observe(self._loop.time() - began_s)

    async def _once(self, exchange: Exchange[R], link: ShardLink, encoded: bytes) -> R:
        answered: asyncio.Future[R | FleetError] = self._loop.create_future()

        def on_reply(kind: int, payload: bytes) -> None:
            # Read here and not by the waiter: what cannot be read must end the connection, and be answered once.
            reply = exchange.decode(payload) if kind == exchange.reply else refusal_of(kind, payload)
            if not answered.done():
                answered.set_result(reply)

        ident = link.call(exchange.kind, encoded, on_reply)
        try:
            reply = await answered
        finally:
            link.forget(ident)
        if isinstance(reply, FleetError):
            raise reply
        return reply

    async def _pause(self, delay_s: float, *, wakes: bool) -> None:
        """Wait; with `wakes` only until a path may have appeared."""
        if not wakes:
            await asyncio.sleep(delay_s)
            return
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._pausing[waiter] = None
        try:
            async with asyncio.timeout(delay_s):
                await waiter
        except TimeoutError:
            return
        finally:
            self._pausing.pop(waiter, None)

    def _tell_better(self) -> None:
        for waiter in self._pausing:
            if not waiter.done():
                waiter.set_result(None)
        for call in self._better:
            call()

    async def _watch(self) -> None:
        async for view in self._control.watch():
            self._accept(view)

    async def _read(self) -> None:
        try:
            self._accept(await self._control.read())
        except ControlPlaneUnavailable:
            # The watch shows it when the control plane is back; MOVED has told us what we need most.
            return

    def _accept(self, view: View) -> None:
        """Take a view: a map only forward, endpoints only of the same or a younger life."""
        if self._ring_uid and view.spec.uid != self._ring_uid:
            self._log.event("router.foreign_ring", level="error", ours=self._ring_uid, theirs=view.spec.uid)
            return
        self._ring_uid = view.spec.uid
        new = view.map
        changed = new is not None and new.epoch > self.epoch
        if new is not None and changed:
            self._map = new
        if self._map is None:
            return
        self._aim(view, self._map)
        if changed:
            self._log.event("router.map", epoch=self._map.epoch, shards=len(self._map.members))
            self._rebuild(self._map)
            self._drop_links(member.name for member in self._map.members)
            self._tell_better()

    def _aim(self, view: View, ring: RingMap) -> None:
        for member in ring.members:
            link = self._link(member.name)
            place = view.shards.get(member.name)
            # Terms of two volumes say nothing about each other, and only the map's volume is served from.
            if place is None or place.volume_id != member.volume_id:
                continue
            if place.term < self._terms.get(member.volume_id, 0):
                continue
            self._terms[member.volume_id] = place.term
            link.aim(Target(place.host, place.port, ring.uid, member.volume_id, place.term))
            if place.ready:
                link.hurry()

    def _rebuild(self, ring: RingMap) -> None:
        """The table of routes: the map's, and what MOVED said that is newer than the map."""
        self.metrics.epoch.set(ring.epoch)
        self._moved = {slot: told for slot, told in self._moved.items() if told[1] > ring.epoch}
        by_owner = {member.name: Route(self._link(member.name), ring.epoch) for member in ring.members}
        self._routes = [by_owner[found.owner] for found in ring.owners()]
        for slot, (owner, epoch) in self._moved.items():
            self._routes[slot] = Route(self._link(owner), epoch)

    def _drop_links(self, members: Iterable[str]) -> None:
        wanted = {*members, *(owner for owner, _ in self._moved.values())}
        for shard in sorted(set(self._links) - wanted):
            self._log.event("router.member_gone", shard=shard)
            self.metrics.link_up.remove(shard)
            self._spawn(self._links.pop(shard).close())

    def _link(self, shard: str) -> ShardLink:
        link = self._links.get(shard)
        if link is None:
            gauge = self.metrics.link_up.labels(shard)
            gauge.set(0)

            def on_state(ready: bool) -> None:
                gauge.set(int(ready))
                if ready:
                    self._tell_better()

            link = self._links[shard] = ShardLink(
                shard,
                identity=self._identity,
                epoch=lambda: self.epoch,
                connect=self._connect,
                entropy=self.entropy,
                log=self._log,
                on_state=on_state,
                on_epoch=self._on_epoch,
            )
        return link

    def _on_epoch(self, epoch: int) -> None:
        if epoch > self.epoch:
            self.refresh()

    def _spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)
        return task
