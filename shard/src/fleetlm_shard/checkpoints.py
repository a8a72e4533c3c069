"""Checkpoints: all sessions as of a position, as one table (docs/log.md, "Tables").

Promise: a checkpoint is believed only if every byte of it is right; the one before stays until a newer one is durable,
and one more, so that a damaged newest one costs time at boot and nothing else. Must not be done here: deciding when.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Final

import msgspec

from fleetlm_shard.log_types import CheckpointMeta, CheckpointRow, Damage
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
        self.stored = msgspec.json.decode(table.meta, type=StoredMeta)

    @property
    def meta(self) -> CheckpointMeta:
        """What the upper half wants to know."""
        return CheckpointMeta(pos=self.stored.pos, keys_from_pos=self.stored.keys_from_pos, opened=self.stored.opened)

    def row(self, session: str) -> CheckpointRow | None:
        """The row of a session (reads one block)."""
        value = self.table.get(session.encode())
        return None if value is None else _decode_row(value)

    def rows(self, after: str) -> Iterator[tuple[str, CheckpointRow]]:
        """Rows after a session id, in the order of UTF-8 bytes."""
        for key, value in self.table.items(after.encode()):
            yield key.decode(), _decode_row(value)


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
    pause: Callable[[], None],
) -> Checkpoint:
    """Write the old rows with the changed ones put over them; durable when it returns.

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
        for _ in merge(builder, old.table if old else None, heapq.merge(*runs)):
            pause()
        builder.finish(msgspec.json.encode(stored))
        file.sync()
    except (OSError, TableDamaged):
        discard(disk, file, temp)
        raise
    publish(disk, temp, checkpoint_path(own_id))
    file.close()
    return load_checkpoint(disk, own_id)
