"""Which slots this shard may serve: the ring map as it was last seen, and what had to happen before acting on it.

A newer map is stored on the volume first; then slots that are gone fall silent, slots that it shows sealing take no
write any more, and slots that are new are opened by a record in the log; when that is durable they are served.

Promise: an epoch never goes back; a slot is served only while the newest map that this process knows names this shard,
with this volume, as its owner; one that a move brought only if the log holds that move's CONFIRMED; a sealed one is
written again only by a newer map that shows its move gone (docs/moves.md). A map that binds it to another volume means
that the data is lost (`VolumeLost`): nothing is served until a map says otherwise. Must not be done here: guessing who
is alive, answering requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Final, Literal

from fleetlm_common.control import ControlPlane, ControlPlaneUnavailable, ShardEndpoint, View
from fleetlm_common.errors import FleetError, Moved, TryAgain
from fleetlm_common.ids import Epoch, ShardName, Slot
from fleetlm_common.logs import Logger
from fleetlm_common.ring import RingMap, SlotRange
from fleetlm_common.rpc import Ended
from fleetlm_shard.held import Held, Name
from fleetlm_shard.holdings import Holdings
from fleetlm_shard.sessions import Session

REFRESH_TIMEOUT_S: Final = 2.0
"""For the live read before a refusal: well under a request's deadline, so that the gateway can still go elsewhere."""
ADOPT_TIMEOUT_S: Final = 1.0
"""For a map that is being acted on, before a request is told to come again."""

Standing = Literal["NotMember", "Member", "VolumeLost"]


class Ownership:
    """The slots of one shard. Belongs to the loop.

    Args:
        shard: this shard's name.
        volume_id: of the volume that this process holds.
        control: where the map comes from.
        store_map: makes a map the newest stored one, durably, before it is acted on.
        open_slots: writes the record that these slots are opened at the epoch; returns when it is durable.
        on_released: told of slots that are not ours any more, after they fell silent.
        on_map: told of each map before its slots are opened; what it seals takes no write any more.
        news: called when all that a map asks for is done.
        holdings: what the log says about slots.
        log: for events.
    """

    def __init__(
        self,
        *,
        shard: ShardName,
        volume_id: str,
        control: ControlPlane,
        store_map: Callable[[RingMap], Awaitable[None]],
        open_slots: Callable[[dict[Slot, Epoch]], Awaitable[None]],
        on_released: Callable[[set[Slot]], None],
        on_map: Callable[[RingMap], None],
        news: Callable[[], None],
        holdings: Holdings,
        log: Logger,
    ) -> None:
        self.shard = self._shard = shard
        self._volume_id = volume_id
        self._control = control
        self._store_map = store_map
        self._open_slots = open_slots
        self._on_released = on_released
        self._on_map = on_map
        self._news = news
        self._holdings = holdings
        self._log = log
        self._adopting = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None
        self._owners: list[SlotRange] = []
        self.map: RingMap | None = None
        self.standing: Standing = "NotMember"
        self.serves: frozenset[Slot] = frozenset()
        """Slots that may be read and written now."""
        self.sealed: dict[Slot, str] = {}
        """Slots of ours that may only be read, and the move that wants them."""
        self.unconfirmed: dict[Slot, str] = {}
        """Slots that the map gives us by a move whose CONFIRMED is not in our log: never served."""
        self.held = Held()
        """Writes to sealed slots."""
        self.acted_epoch = Epoch(0)
        """Of the newest map whose consequences are all done."""
        self.shards: Mapping[ShardName, ShardEndpoint] = {}
        """Where the others are, as far as was seen."""
        self.in_place = False
        """This shard is about to be replaced and comes back at once: nobody takes its slots meanwhile."""

    @property
    def epoch(self) -> Epoch:
        """Of the newest map; 0 before the first."""
        return Epoch(0) if self.map is None else self.map.epoch

    @property
    def opening(self) -> int:
        """How many slots of the newest map are not served yet."""
        if self.map is None or self.standing == "VolumeLost":
            return 0
        return len(self.map.slots_of(self._shard)) - len(self.readable)

    @property
    def readable(self) -> frozenset[Slot]:
        """Slots that may be read now."""
        return self.serves | self.sealed.keys()

    @property
    def holds(self) -> int:
        """Slots that are served here, or have a queue."""
        return len(self.readable | self.held.slots)

    @property
    def leaving(self) -> bool:
        """Moves away from here are in flight."""
        return self.map is not None and any(move.source == self._shard for move in self.map.moves)

    @property
    def has_others(self) -> bool:
        """There are shards that could take slots."""
        return self.map is not None and len(self.map.members) > 1

    def owner_of(self, slot: Slot) -> SlotRange | None:
        """Who owns the slot by the newest map."""
        return self._owners[slot] if self._owners else None

    def admit_read(self, slot: Slot) -> None:
        """Return if the slot may be read now.

        Raises:
            TryAgain: it may not.
        """
        if slot not in self.sealed:
            self.admit(slot)

    def admit(self, slot: Slot) -> None:
        """Return if the slot may be written now.

        Raises:
            TryAgain: it is not; the caller that may wait asks `refusal` for the reason.
        """
        if slot not in self.serves:
            raise TryAgain(f"slot {slot} is not served here now", reason="moving")

    async def settle(self, slot: Slot, *, epoch: int) -> None:
        """Return if the slot may be read here after all, when a gateway whose map has `epoch` thinks so.

        Raises:
            Moved: somebody else owns it.
            TryAgain: this shard does not serve it yet, or for good.
        """
        await self.refresh(epoch)
        if slot not in self.serves and slot not in self.sealed and self._adopting.locked():
            # A map is being acted on: its slots are opened within one batch, unless not a byte is left.
            with suppress(TimeoutError):
                async with asyncio.timeout(ADOPT_TIMEOUT_S), self._adopting:
                    pass
        if slot not in self.serves and slot not in self.sealed:
            raise self.refusal(slot)

    async def settle_write(self, slot: Slot, *, epoch: int, name: Name, size_bytes: int) -> None:
        """Return if the slot may be written now; a write to a sealed slot waits for the end of the seal.

        Args:
            slot: the slot.
            epoch: of the gateway's map.
            name: what makes a retry the same request.
            size_bytes: of the request.

        Raises:
            Moved: somebody else owns it.
            TryAgain: this shard does not serve it, or has as many waiting as it can hold.
        """
        await self.settle(slot, epoch=epoch)
        while slot not in self.serves:
            if slot not in self.sealed:
                raise self.refusal(slot)
            await self.held.wait(slot, name, size_bytes)

    def refusal(self, slot: Slot) -> FleetError:
        """Why the slot is not served here."""
        if self.standing == "VolumeLost":
            return TryAgain(f"{self._shard} has lost its volume", reason="unavailable", retry_after_ms=5000)
        owner = self.owner_of(slot)
        if owner is None:
            return TryAgain(f"{self._shard} knows no ring map yet", reason="unavailable")
        if owner.owner != self._shard:
            return Moved(owner=owner.owner, epoch=self.epoch)
        if slot in self.unconfirmed:
            words = f"{self._shard} does not hold what move {self.unconfirmed[slot]} brought"
            return TryAgain(words, reason="unavailable", retry_after_ms=5000)
        return TryAgain(f"{self._shard} is opening slot {slot}", reason="moving", retry_after_ms=50)

    def ended(self, session: Session) -> Ended:
        """Where the subscriptions of a session that fell silent here go on."""
        owner = self.owner_of(session.slot)
        if owner is None or owner.owner == self._shard:
            return Ended("draining", "", self.epoch)
        return Ended("moved", owner.owner, self.epoch)

    async def refresh(self, epoch: int) -> None:
        """Read the map if somebody has seen a newer one.

        Raises:
            TryAgain: it could not be taken.
        """
        if epoch > self.epoch:
            await self._refresh()

    async def _refresh(self) -> None:
        """One live read for all who ask meanwhile; a control plane that is away changes nothing."""
        if self._refreshing is None:
            self._refreshing = asyncio.get_running_loop().create_task(self._read_live(), name="map refresh")
        task = self._refreshing
        await asyncio.wait({task})
        error = task.exception()
        if error is not None:
            # `watch` meets the same error and ends the process with it.
            raise TryAgain(f"{self._shard} cannot take the newer ring map", reason="unavailable") from error

    async def _read_live(self) -> None:
        try:
            async with asyncio.timeout(REFRESH_TIMEOUT_S):
                view = await self._control.read()
        except (ControlPlaneUnavailable, TimeoutError) as error:
            self._log.event("map.refresh_failed", level="warning", error=str(error) or "timeout")
            return
        finally:
            self._refreshing = None
        await self._seen(view)

    async def watch(self) -> None:
        """Follow the ring map; ends by cancellation, or by an error of the volume or the log."""
        async for view in self._control.watch():
            await self._seen(view)

    async def _seen(self, view: View) -> None:
        self.shards = view.shards
        self.in_place = self._shard in view.spec.in_place
        if view.map is not None:
            await self.adopt(view.map)

    async def adopt(self, ring: RingMap) -> None:
        """Act on a map; one that is not newer changes nothing. Must not be cancelled, except at the process's end.

        Raises:
            VolumeError, LogError: the process must end.
        """
        async with self._adopting:
            if ring.epoch <= self.epoch:
                return
            await self._store_map(ring)
            mine = ring.slots_of(self._shard)
            self.map, self._owners = ring, ring.owners()
            if not self._is_ours(ring):
                self.serves, self.sealed, gone = frozenset(), {}, self.readable
                self._fall_silent(gone)
                return
            fresh = self._take(ring, mine)
            # First what this map ends and seals: opening may have to wait for the disk.
            self._on_map(ring)
            if fresh:
                await self._open_slots(fresh)
                self._holdings.opened.update(fresh)
                self.serves |= fresh.keys() - self.sealed.keys()
            self.acted_epoch = ring.epoch
            self._news()
            self._log.event("map.adopted", epoch=ring.epoch, slots=len(mine), opened=len(fresh))

    async def act_again(self) -> None:
        """Open what the log holds by now of what the newest map gives. Must not be cancelled, as `adopt`.

        Raises:
            VolumeError, LogError: the process must end.
        """
        async with self._adopting:
            assert self.map is not None, "there was a map to act on"
            fresh = self._take(self.map, self.map.slots_of(self._shard))
            if fresh:
                await self._open_slots(fresh)
                self._holdings.opened.update(fresh)
                self.serves |= fresh.keys() - self.sealed.keys()
            self._news()

    def _take(self, ring: RingMap, mine: dict[Slot, Epoch]) -> dict[Slot, Epoch]:
        """Change at once what may be read and written; returns the slots that must be opened before they are."""
        opened, confirmed = self._holdings.opened, self._holdings.confirmed
        fresh = {slot: epoch for slot, epoch in mine.items() if opened.get(slot) != epoch}
        via = {slot: self._owners[slot].via for slot in fresh}
        self.unconfirmed = {slot: move for slot, move in via.items() if move and confirmed.get(slot) != move}
        sealing = {
            slot: move.id
            for move in ring.moves
            if move.source == self._shard and move.state == "Sealing"
            for slot in move.slots
            if slot in mine and slot not in self.unconfirmed
        }
        # Not those either that are ours by another epoch than the one we serve them by: what we hold may be old.
        gone = self.readable - (mine.keys() - fresh.keys())
        unsealed = self.sealed.keys() - sealing.keys()
        self.sealed = sealing
        self.serves = frozenset(mine.keys() - fresh.keys() - sealing.keys())
        # Who waits for what is gone is told so first: those of the unsealed who are left go on.
        self._fall_silent(gone)
        self.held.go_on(unsealed)
        for slot in self.unconfirmed:
            del fresh[slot]
        return fresh

    def _is_ours(self, ring: RingMap) -> bool:
        lost = lost_volume(ring, self._shard, self._volume_id)
        if lost is not None:
            self.standing = "VolumeLost"
            self._log.event("volume.lost", level="error", why=lost)
            return False
        self.standing = "NotMember" if ring.member(self._shard) is None else "Member"
        return True

    def _fall_silent(self, gone: frozenset[Slot]) -> None:
        """Who waits for these slots is told where to go, in order; who listens to them, after the last push."""
        if gone:
            self.held.refuse(sorted(gone), self.refusal)
            self._on_released(set(gone))


def lost_volume(ring: RingMap, shard: ShardName, volume_id: str) -> str | None:
    """Words for a person if the map binds `shard` to another volume than `volume_id`."""
    member = ring.member(shard)
    if member is None or member.volume_id == volume_id:
        return None
    return (
        f"the ring map (epoch {ring.epoch}) binds {shard} to volume {member.volume_id}, this one is {volume_id}: "
        "attach the right one; the data of its slots is on it"
    )
