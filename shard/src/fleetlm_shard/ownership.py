"""Which slots this shard may serve: the ring map as it was last seen, and what had to happen before acting on it.

A newer map is stored on the volume first; then slots that are gone fall silent, and slots that are new are opened by a
record in the log; only when that record is durable are they served.

Promise: an epoch never goes back; a slot is served only while the newest map that this process knows names this shard,
with this volume, as its owner. A map that binds it to another volume means that the data is lost (`VolumeLost`):
nothing is served until a map says otherwise. Must not be done here: guessing who is alive, answering requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import Final, Literal

from fleetlm_common.control import ControlPlane, ControlPlaneUnavailable
from fleetlm_common.errors import FleetError, Moved, TryAgain
from fleetlm_common.ids import Epoch, ShardName, Slot
from fleetlm_common.logs import Logger
from fleetlm_common.ring import RingMap, SlotRange
from fleetlm_common.rpc import Ended
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
        log: Logger,
    ) -> None:
        self._shard = shard
        self._volume_id = volume_id
        self._control = control
        self._store_map = store_map
        self._open_slots = open_slots
        self._on_released = on_released
        self._log = log
        self._adopting = asyncio.Lock()
        self._refreshing: asyncio.Task[None] | None = None
        self._owners: list[SlotRange] = []
        self.map: RingMap | None = None
        self.standing: Standing = "NotMember"
        self.serves: frozenset[Slot] = frozenset()
        """Slots that may be read and written now."""
        self.opened: dict[Slot, Epoch] = {}
        """Slots with a durable record that this shard opened them, and the epoch at which it got them."""

    @property
    def epoch(self) -> Epoch:
        """Of the newest map; 0 before the first."""
        return Epoch(0) if self.map is None else self.map.epoch

    @property
    def opening(self) -> bool:
        """Slots of the newest map are not served yet."""
        return self.map is not None and self.serves != self.map.slots_of(self._shard).keys()

    def owner_of(self, slot: Slot) -> SlotRange | None:
        """Who owns the slot by the newest map."""
        return self._owners[slot] if self._owners else None

    def admit(self, slot: Slot) -> None:
        """Return if the slot is served now.

        Raises:
            TryAgain: it is not; the caller that may wait asks `refusal` for the reason.
        """
        if slot not in self.serves:
            raise TryAgain(f"slot {slot} is not served here now", reason="moving")

    async def settle(self, slot: Slot, *, epoch: int) -> None:
        """Return if the slot is served here after all, when a gateway whose map has `epoch` thinks so.

        Raises:
            Moved: somebody else owns it.
            TryAgain: this shard does not serve it yet, or for good.
        """
        if epoch > self.epoch:
            await self._refresh()
        if slot not in self.serves and self._adopting.locked():
            # A map is being acted on: its slots are opened within one batch, unless the disk is full.
            with suppress(TimeoutError):
                async with asyncio.timeout(ADOPT_TIMEOUT_S), self._adopting:
                    pass
        if slot not in self.serves:
            raise self.refusal(slot)

    def refusal(self, slot: Slot) -> FleetError:
        """Why the slot is not served here."""
        if self.standing == "VolumeLost":
            return TryAgain(f"{self._shard} has lost its volume", reason="unavailable", retry_after_ms=5000)
        owner = self.owner_of(slot)
        if owner is None:
            return TryAgain(f"{self._shard} knows no ring map yet", reason="unavailable")
        if owner.owner != self._shard:
            return Moved(owner=owner.owner, epoch=self.epoch)
        return TryAgain(f"{self._shard} is opening slot {slot}", reason="moving", retry_after_ms=50)

    def ended(self, session: Session) -> Ended:
        """Where the subscriptions of a session that fell silent here go on."""
        owner = self.owner_of(session.slot)
        if owner is None or owner.owner == self._shard:
            return Ended("draining", "", self.epoch)
        return Ended("moved", owner.owner, self.epoch)

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
        if view.map is not None:
            await self.adopt(view.map)

    async def watch(self) -> None:
        """Follow the ring map; ends by cancellation, or by an error of the volume or the log."""
        async for view in self._control.watch():
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
                self._fall_silent(self.serves)
                return
            self._fall_silent(self.serves - mine.keys())
            fresh = {slot: epoch for slot, epoch in mine.items() if self.opened.get(slot) != epoch}
            self.serves |= mine.keys() - fresh.keys()
            if fresh:
                await self._open_slots(fresh)
                self.opened.update(fresh)
                self.serves = frozenset(mine)
            self._log.event("map.adopted", epoch=ring.epoch, slots=len(mine), opened=len(fresh))

    def _is_ours(self, ring: RingMap) -> bool:
        lost = lost_volume(ring, self._shard, self._volume_id)
        if lost is not None:
            self.standing = "VolumeLost"
            self._log.event("volume.lost", level="error", why=lost)
            return False
        self.standing = "NotMember" if ring.member(self._shard) is None else "Member"
        return True

    def _fall_silent(self, slots: Iterable[Slot]) -> None:
        gone = set(slots)
        if gone:
            self.serves -= gone
            self._on_released(gone)


def lost_volume(ring: RingMap, shard: ShardName, volume_id: str) -> str | None:
    """Words for a person if the map binds `shard` to another volume than `volume_id`."""
    member = ring.member(shard)
    if member is None or member.volume_id == volume_id:
        return None
    return (
        f"the ring map (epoch {ring.epoch}) binds {shard} to volume {member.volume_id}, this one is {volume_id}: "
        "attach the right one; the data of its slots is on it"
    )
