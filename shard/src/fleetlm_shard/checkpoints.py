"""Checkpoints: all sessions as of a position, as one table (docs/log.md, "Tables").

Promise: a checkpoint is believed only if every byte of it is right; the one before stays until a newer one is durable,
and one more, so that a damaged newest one costs time at boot and nothing else. Must not be done here: deciding when.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Final

import msgspec

from fleetlm_shard.log_types import CheckpointMeta, CheckpointRow, Damage, MoveFacts
from fleetlm_shard.records import Trimmed
from fleetlm_shard.segments import CheckpointId, TempNames, checkpoint_path, discard, publish
from fleetlm_shard.table import KIND_CHECKPOINT, Table, TableBuilder, TableDamaged, merge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from fleetlm_shard.disk import Disk

CHECKPOINTS_KEPT: Final = 2
"""The newest, and one to fall back to if its bytes rot."""

_RUN_ROWS: Final = 256
"""Rows sorted at once: one long sort would hold the interpreter, and with it the loop."""

_encode_row = msgspec.msgpack.Encoder().encode
_decode_row = msgspec.msgpack.Decoder(CheckpointRow).decode


class StoredMeta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A checkpoint's metadata in the file (JSON)."""

    pos: int
    keys_from_pos: int
    opened: dict[int, int]
    damage: list[tuple[int, int, int]]
    trim: Trimmed | None
    released: dict[int, int] = {}
    """Slot → position of its newest RELEASED."""
    facts: MoveFacts = MoveFacts()

    @property
    def replay_from_pos(self) -> int:
        """Where boot begins to read."""
        return min(self.pos, self.keys_from_pos)

    def damages(self) -> list[Damage]:
        """The damage known when the checkpoint was made."""
        return [Damage(*each) for each in self.damage]


class Checkpoint:
    """A durable checkpoint, open for reading."""

    def __init__(self, own_id: CheckpointId, table: Table) -> None:
        self.id = own_id
        self.table = table
        self.released: Mapping[int, int] = {}
        """Slot → position of its newest RELEASED, as whoever uses this knows it now."""
        self.stored = msgspec.json.decode(table.meta, type=StoredMeta)
        self.rows_pos = self.stored.pos
        """Every record below it is in the rows: `pos` after a boot, which reads on from there."""

    @property
    def meta(self) -> CheckpointMeta:
        """What the upper half wants to know."""
        stored = self.stored
        return CheckpointMeta(
            pos=stored.pos, keys_from_pos=stored.keys_from_pos, opened=stored.opened, facts=stored.facts
        )

    def row(self, session: str) -> CheckpointRow | None:
        """The row of a session (reads one block); None if its slot was released since."""
        value = self.table.get(session.encode())
        if value is None:
            return None
        row = _decode_row(value)
        return None if self.released and self._is_gone(row) else row

    def rows(self, after: str) -> Iterator[tuple[str, CheckpointRow]]:
        """Rows after a session id, in the order of UTF-8 bytes."""
        for key, value in self.table.items(after.encode()):
            row = _decode_row(value)
            if not (self.released and self._is_gone(row)):
                yield key.decode(), row

    def names(self, after: str) -> Iterator[str]:
        """Ids of the rows after a session id, also of those whose slots were released: cheap."""
        for key, _ in self.table.items(after.encode()):
            yield key.decode()

    def _is_gone(self, row: CheckpointRow) -> bool:
        return self.released.get(row.slot, -1) >= self.rows_pos

    def gone(self) -> Callable[[bytes], bool] | None:
        """Tells which of the table's values are of slots released since; None if none was."""
        slots = {slot for slot, pos in self.released.items() if pos >= self.rows_pos}
        return (lambda value: _decode_row(value).slot in slots) if slots else None


class KeptCheckpoints:
    """The newest checkpoint and the one to fall back to; owned by the running log.

    Args:
        newest: what boot found, if there is one.
        listed: all that boot found.
    """

    def __init__(self, newest: Checkpoint | None, listed: Sequence[CheckpointId]) -> None:
        self._kept = [newest] if newest else []
        self._older = [own for own in listed if newest and own < newest.id]

    @property
    def newest(self) -> Checkpoint | None:
        """What is read from."""
        return self._kept[-1] if self._kept else None

    def add(self, made: Checkpoint) -> list[CheckpointId]:
        """A newer one is durable; returns those that may go now."""
        self._kept.append(made)
        doomed = [] if len(self._kept) < CHECKPOINTS_KEPT else self._older
        if doomed:
            self._older = []
        while len(self._kept) > CHECKPOINTS_KEPT:
            oldest = self._kept.pop(0)
            oldest.table.close()
            doomed = [*doomed, oldest.id]
        return doomed

    def limit_pos(self) -> int:
        """No boot reads what lies below, whichever of them it begins with; 0 before there are two."""
        return min(each.stored.replay_from_pos for each in self._kept) if self._are_enough else 0

    def released(self) -> dict[int, int]:
        """Slot → position of the newest RELEASED that each of them knows; empty before there are two."""
        slots = {slot for each in self._kept for slot in each.stored.released} if self._are_enough else set[int]()
        return {slot: min(each.stored.released.get(slot, 0) for each in self._kept) for slot in slots}

    @property
    def _are_enough(self) -> bool:
        return len(self._kept) == CHECKPOINTS_KEPT

    def close(self) -> None:
        """Close their files."""
        for each in self._kept:
            each.table.close()


def load_checkpoint(disk: Disk, own_id: CheckpointId) -> Checkpoint:
    """Open a checkpoint and check every byte of it.

    Raises:
        TableDamaged: a byte is wrong.
        FileNotFoundError: it has gone (an elder's late clean-up): list the folder again.
    """
    file = disk.open(checkpoint_path(own_id))
    try:
        table = Table(file, KIND_CHECKPOINT)
        for number in range(table.blocks):
            table.block(number)
        return Checkpoint(own_id, table)
    except TableDamaged:
        file.close()
        raise
    except msgspec.MsgspecError as error:
        file.close()
        raise TableDamaged("the metadata is not a checkpoint's") from error


def newest_checkpoint(disk: Disk, ids: Sequence[CheckpointId]) -> tuple[Checkpoint | None, list[CheckpointId]]:
    """The newest whole checkpoint, and the damaged ones that are newer."""
    damaged: list[CheckpointId] = []
    for own_id in reversed(ids):
        try:
            return load_checkpoint(disk, own_id), damaged
        except TableDamaged:
            damaged.append(own_id)
    return None, damaged


def write_checkpoint(
    disk: Disk,
    temps: TempNames,
    own_id: CheckpointId,
    *,
    old: Checkpoint | None,
    changed: Mapping[str, CheckpointRow],
    stored: StoredMeta,
    gone: Callable[[bytes], bool] | None,
    pause: Callable[[], None],
) -> Checkpoint:
    """Write the old rows with the changed ones put over them; durable when it returns.

    `gone` tells which old rows are left out.

    Runs in a background thread, in slices with pauses; `changed` must not be changed meanwhile.
    """
    runs: list[list[tuple[bytes, bytes]]] = []
    names = list(changed)
    for start in range(0, len(names), _RUN_ROWS):
        runs.append(sorted((name.encode(), _encode_row(changed[name])) for name in names[start : start + _RUN_ROWS]))
        pause()
    temp = temps.next()
    file = disk.create(temp)
    try:
        builder = TableBuilder(file, KIND_CHECKPOINT)
        for _ in merge(builder, old.table if old else None, heapq.merge(*runs), gone):
            pause()
        builder.finish(msgspec.json.encode(stored))
        file.sync()
    except (OSError, TableDamaged):
        discard(disk, file, temp)
        raise
    publish(disk, temp, checkpoint_path(own_id))
    file.close()
    return load_checkpoint(disk, own_id)
