"""The control plane as shards, gateways and controllers see it: one small interface, over files and over Kubernetes.

Promise: the ring map changes only by compare-and-swap on its epoch; `watch` never shows an epoch lower than one it has
shown; when the control plane is away nothing raises in a watcher: the last good copy stays, only changes wait.
Must not be done here: planning, or deciding who is alive (nobody decides that; see design §6).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Literal, Protocol

import msgspec

from fleetlm_common.ids import Epoch, ShardName, Slot, Term
from fleetlm_common.ring import RingMap


class ControlPlaneUnavailable(Exception):
    """The control plane did not answer; the last good copy stays in use."""


class MapConflict(Exception):
    """Somebody else changed the map first; read again and decide anew."""

    def __init__(self, *, expected: Epoch | None, found: Epoch | None) -> None:
        super().__init__(f"expected epoch {expected}, found {found}")
        self.expected = expected
        self.found = found


class Pin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """People want slots `first` to `last` (inclusive) on `shard`, for as long as the pin is there."""

    first: Slot
    last: Slot
    shard: ShardName


class Forgotten(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """People say that `shard` is dead for good, as long as it is bound to this volume (forgetting.py)."""

    shard: ShardName
    volume_id: str


class RingSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What people asked for: the ring's name for life, its slots (fixed for life), how many shards, and exceptions.

    Slots of a `cordoned` shard go to others while it is; it stays a member. A pin whose shard is cordoned or leaves
    means nothing; of two pins for a slot the later one counts. `given_up` are ids of volumes that will not come back:
    a shard that was bound to one is bound to the volume that it has now, and begins with what the archive has.
    `forgotten` are members that will never speak again: one that is not asked for, owns nothing and does not answer is
    left out of the map, and its volume does not join again.
    Shards `in_place` are about to be asked to end, and come back at once: they wait for nobody to take their slots.
    """

    uid: str
    slots: int
    shards: int
    cordoned: tuple[ShardName, ...] = ()
    pins: tuple[Pin, ...] = ()
    given_up: tuple[str, ...] = ()
    forgotten: tuple[Forgotten, ...] = ()
    in_place: tuple[ShardName, ...] = ()


class MoveProgress(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far a move has come, said by its target (docs/moves.md); counts for the move of this id only.

    `Copying`: not there yet. `Ready`: so little is missing that the source may seal. `Confirmed`: all of it is here,
    durably, and so is the record that says so. `Failed`: the target gave this move up (`reason`).
    """

    id: str
    state: Literal["Copying", "Ready", "Confirmed", "Failed"]
    done: int = 0
    """Sessions that were brought over; grows while there is progress."""
    total: int = 0
    """Sessions of the slots, as far as the source has named them."""
    behind: int = 0
    """Sessions named by the source that are not here yet, or not in their newest state."""
    reason: str = ""
    """A stable word: why it failed (`disk_full`, `mismatch`), or does not get on (`unreachable`, `disk_full`)."""
    message: str = ""
    """The same in words, for people."""


def shard_names(spec: RingSpec) -> list[ShardName]:
    """The shards that were asked for, in the ring's order."""
    return [ShardName(f"shard-{ordinal}") for ordinal in range(spec.shards)]


class ShardEndpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a shard is and which volume it holds; said by the shard itself after it took its volume."""

    name: ShardName
    volume_id: str
    term: Term
    host: str
    port: int
    ops_url: str
    ready: bool = False
    moves: tuple[MoveProgress, ...] = ()
    """Of each move that this shard's map shows with it as the target."""
    epoch: Epoch = Epoch(0)
    """Of the newest map that this process has acted on: what that takes away is silent, what it gives is opened."""
    serves: int = -1
    """Slots that this process serves or has a queue for, by that map; -1: it does not say (an older build)."""


def replaces(new: ShardEndpoint, old: ShardEndpoint) -> bool:
    """Whether an announcement takes the place of another of that shard.

    A later term of a volume replaces an earlier one, never the other way round. Terms of two volumes say nothing about
    each other: the one that speaks now is heard (the map says whether it is the right one).
    """
    return new.volume_id != old.volume_id or new.term >= old.term


class View(msgspec.Struct, frozen=True):
    """One consistent look: the ring map is None until a controller made the first."""

    spec: RingSpec
    map: RingMap | None
    shards: Mapping[ShardName, ShardEndpoint]
    avoided: tuple[ShardName, ...] = ()
    """Shards that stand where nothing new should go (a cordoned node): they keep their slots and get no others, not
    even by a pin. Nobody asks for this: controllers that can see it. It counts while another shard may get slots."""
    alive: tuple[ShardName, ...] = ()
    """Shards that are seen to run whatever they announce (on Kubernetes: their pod is Ready), by controllers that can
    see it. Nothing moves because of it; such a shard is not forgotten."""


class ControlPlane(Protocol):
    """What components ask of the control plane."""

    async def read(self) -> View:
        """A live read (on Kubernetes a quorum read).

        Raises:
            ControlPlaneUnavailable: nobody answered.
        """
        ...

    def watch(self) -> AsyncIterator[View]:
        """The view now, then each newer one; ends only by cancellation. Cancel-safe."""
        ...

    async def announce(self, endpoint: ShardEndpoint) -> None:
        """Say where this shard is; what stands there gives way as `replaces` says.

        Raises:
            ControlPlaneUnavailable: nobody answered; the caller tries again.
        """
        ...

    async def compare_and_swap(self, *, expected: Epoch | None, new: RingMap) -> None:
        """Replace the map if its epoch is still `expected` (None: there is no map yet); `new.epoch` is one more.

        Raises:
            MapConflict: it is not.
            ControlPlaneUnavailable: the outcome is unknown; read again.
        """
        ...

    @property
    def trouble(self) -> str | None:
        """Why a watcher's last look failed, for people who ask why there is no map yet; None when it went well."""
        ...

    async def close(self) -> None:
        """Give back connections; nothing else may be called any more."""
        ...


class ControllerPlane(ControlPlane, Protocol):
    """What a controller without an operator around it needs besides (the operator writes a status of its own)."""

    async def report(self, sentence: str, *, reason: str = "", epoch: int = 0) -> None:
        """Leave the controller's sentence where people look (status), with its stable reason and the map's epoch."""
        ...
