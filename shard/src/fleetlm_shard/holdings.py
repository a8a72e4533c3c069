"""What the log says about slots: opened, released, copied by moves, confirmed (docs/moves.md).

Promise: a pure fold over the log's records; applied once at boot and then with each record that becomes durable, it
says the same. Applying a record again changes nothing that later records do not set right. Must not be done here: maps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fleetlm_common.ids import Epoch, Slot
from fleetlm_shard.log_types import MoveFacts
from fleetlm_shard.records import Imported, MoveConfirmed, SessionImported, SlotsOpened, SlotsReleased, SlotsSealed

if TYPE_CHECKING:
    from fleetlm_shard.log_types import CheckpointMeta
    from fleetlm_shard.records import Replayed


@dataclass(slots=True)
class Holdings:
    """The slots of one log.

    Attributes:
        opened: slots that this shard opened, and the epoch at which it got each.
        copied: slots of which the log holds what was imported.
        confirmed: slot → id of the move whose CONFIRMED stands in the log.
        epoch: of the newest map that a SEALED or CONFIRMED names: no older one may be acted on again.
    """

    opened: dict[Slot, Epoch] = field(default_factory=dict[Slot, Epoch])
    copied: set[Slot] = field(default_factory=set[Slot])
    confirmed: dict[Slot, str] = field(default_factory=dict[Slot, str])
    epoch: int = 0

    @classmethod
    def of_checkpoint(cls, meta: CheckpointMeta | None) -> Holdings:
        """As a checkpoint knew them."""
        if meta is None:
            return cls()
        return cls(
            opened={Slot(slot): Epoch(epoch) for slot, epoch in meta.opened.items()},
            copied={Slot(slot) for slot in meta.facts.copied},
            confirmed={Slot(slot): move for slot, move in meta.facts.confirmed.items()},
            epoch=meta.facts.epoch,
        )

    def facts(self) -> MoveFacts:
        """For a checkpoint, beside `opened`."""
        confirmed = {int(slot): move for slot, move in self.confirmed.items()}
        return MoveFacts(tuple(sorted(self.copied)), confirmed, self.epoch)

    def apply(self, record: Replayed) -> None:
        """Take in a record of the log; those of sessions say nothing here, unless a move brought them."""
        if isinstance(record, Imported | SessionImported):
            self.copied.add(Slot(record.slot))
        elif isinstance(record, SlotsOpened):
            self.opened.update((Slot(slot), Epoch(record.epoch)) for slot in record.slots)
        elif isinstance(record, SlotsSealed):
            self.epoch = max(self.epoch, record.epoch)
        elif isinstance(record, MoveConfirmed):
            self.epoch = max(self.epoch, record.epoch)
            self.confirmed.update((Slot(slot), record.move) for slot in record.slots)
        elif isinstance(record, SlotsReleased):
            for slot in map(Slot, record.slots):
                self.opened.pop(slot, None)
                self.confirmed.pop(slot, None)
                self.copied.discard(slot)

    @property
    def held(self) -> set[Slot]:
        """Slots of which this log may hold anything."""
        return self.copied | self.opened.keys()
