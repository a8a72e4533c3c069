"""The archive and retention beside moves: the rules of docs/archive.md, as a model on top of `moves.py`.

Every process has an archiver; what is archived is shown by that. It reads the log up to what is durable and was looked
at, whoever owns the slot by now, and writes a transaction: messages by seq, compared with what is there, and the
position of its volume. Retention drops what the database said to be archived of this volume, as soon as it may; an
elder may still do so. A move brings what the source can read; what it trimmed is a hole at the target, which knows the
seq. What is trimmed has left the key window, so no retry of it arrives.

    S1 seen is in the durable log of the owner, or in the archive         AR the archive has only what was seen, by seq
    D  two messages for one seq in the archive (the product halts there)  stuck: what was seen cannot be archived

Promise: `ArchiveRules()` are the product's rules; every field that is changed is a mistake, but for
`position_fenced` and `compared`, which are second locks. Must not be done here: compaction (it takes only what
retention might take), volumes that are lost for good, rows that PostgreSQL refuses.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tests.model.checker import Step
from tests.model.moves import (
    HOLE,
    KEYLESS,
    SERVING,
    Archive,
    Entry,
    Moves,
    Process,
    Rules,
    Scope,
    State,
    Volume,
    messages,
    plain,
    replaced,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveRules(Rules):
    """The rules of the archive; each default is the product's."""

    archive_looked: bool = True
    """Only what is durable and was looked at is archived."""
    archive_imports: bool = True
    """All of the log is archived, also what its shard does not own (yet, or any more)."""
    position_with_rows: bool = True
    """The position moves in the transaction that it is true for."""
    position_own: bool = True
    """A position belongs to a volume, and says nothing about another one's log."""
    position_fenced: bool = True
    """The position moves by compare-and-swap, and for the newest term only."""
    trim_archived: bool = True
    """Retention drops only what the database said to be archived."""
    holes_travel: bool = True
    """What the source trimmed keeps its seqs at the target."""
    compared: bool = True
    """A message that stands in the archive is compared, never written a second time."""


class Archived(Moves):
    """The model; see the module.

    Args:
        scope: how much happens.
        rules: the product's, or with a mistake.
    """

    def __init__(self, scope: Scope, rules: ArchiveRules) -> None:
        super().__init__(scope, rules)
        self._archiving = rules

    def start(self) -> State:
        """Nothing is archived."""
        return super().start()._replace(archive=Archive((), ((0, 0),) * self._scope.shards))

    # Properties

    def broken(self, state: State) -> str | None:
        """AR, and those of `Moves`."""
        seen = plain(state.seen)
        rows = state.archive.rows
        if any(row not in (HOLE, *seen[seq : seq + 1]) for seq, row in enumerate(rows)):
            return "AR"
        return super().broken(state)

    def _kept(self, state: State, volume: Volume, seen: tuple[int, ...]) -> bool:
        """Each message that was seen can be read in the log or in the archive."""
        log = plain(messages(_readable(volume.log[: volume.synced], volume.trimmed)))
        rows = state.archive.rows
        return len(log) >= len(seen) and all(
            (log[seq] or (rows[seq] if seq < len(rows) else HOLE)) == key for seq, key in enumerate(seen)
        )

    def goal(self, state: State) -> bool:
        """All that was seen is archived, too."""
        return state.archive.rows == plain(state.seen) and super().goal(state)

    # Steps of moves that are others with an archive

    def _arriving(self, state: State) -> Iterable[int]:
        trimmed = {
            entry % KEYLESS
            for shard in state.shards
            for entry in shard.volume.log[: shard.volume.trimmed]
            if isinstance(entry, int)
        }
        return (key for key in super()._arriving(state) if key not in trimmed)

    def _told(self, volume: Volume, source: Process) -> tuple[int, ...]:
        told = messages(_readable(source.log[: source.shown], volume.trimmed))
        return told if self._archiving.holes_travel else tuple(key for key in told if key != HOLE)

    def _total(self, volume: Volume, source: Process) -> int:
        return len(self._told(volume, source))

    # The archiver

    def steps(self, state: State) -> Iterator[Step[State]]:
        """Those of moves, then every archiver and every shard's retention."""
        yield from super().steps(state)
        for at, shard in enumerate(state.shards):
            for index, process in enumerate(shard.processes):
                if process.stage == SERVING:
                    yield from self._archives(state, at, index)
                    yield from self._trims(state, at, index)

    def _archives(self, state: State, at: int, index: int) -> Iterator[Step[State]]:
        process = state.shards[at].processes[index]
        term, pos = state.archive.positions[at]
        if process.owed >= 0:
            owing = process._replace(owed=-1)
            yield self._transaction(state, at, index, owing, process.owed, f"archives up to {pos}, late")
        elif not self._stepwise:
            yield from self._transacts(state, at, index, pos)
        elif process.placed < 0:
            if process.term >= term and _has_messages(process.log[: process.shown]):
                yield self._place(state, at, index, process, pos, "reads its position")
        elif (term, pos) == (process.term, process.placed) or not self._archiving.position_fenced:
            yield from self._transacts(state, at, index, process.placed)

    def _transacts(self, state: State, at: int, index: int, begin: int) -> Iterator[Step[State]]:
        process = state.shards[at].processes[index]
        end = process.shown if self._archiving.archive_looked else process.synced
        if not _has_messages(process.log[begin:end]):
            return
        if self._archiving.position_with_rows:
            moved = self._place(state, at, index, process, end, "").state
            after = moved.shards[at].processes[index]
            yield self._transaction(moved, at, index, after, begin, f"archives up to {end}")
        else:
            yield self._place(state, at, index, process._replace(owed=begin), end, f"moves its position to {end}")

    def _place(self, state: State, at: int, index: int, process: Process, pos: int, what: str) -> Step[State]:  # noqa: PLR0917  where, who, what
        """The position; a volume with one process at a time has it in the database only."""
        positions = replaced(state.archive.positions, at, (process.term if self._stepwise else 0, pos))
        after = state._replace(archive=state.archive._replace(positions=positions))
        placed = process._replace(placed=pos) if self._stepwise else process
        return self._put(after, at, index, placed, after.shards[at].volume, what)

    def _transaction(self, state: State, at: int, index: int, process: Process, begin: int, what: str) -> Step[State]:  # noqa: PLR0917  where, who, what
        """Write the log from `begin` up to the position: whatever is in the archive was shown by that."""
        rows = self._rows(state, at, process, begin)
        label = f"{at}: {what}"
        if rows is None:
            return Step(label, state, broken="D")
        seen = (*state.seen, *rows[len(state.seen) :])
        written = state._replace(archive=state.archive._replace(rows=rows), seen=seen)
        return self._put(written, at, index, process, written.shards[at].volume, what)

    def _rows(self, state: State, at: int, process: Process, begin: int) -> tuple[int, ...] | None:
        """The archive's messages with those of a piece of the log; None if another message stands there."""
        rows = list(state.archive.rows)
        if not self._archiving.archive_imports and not self._owns(state, at, process):
            return state.archive.rows
        _, end = state.archive.positions[at]
        begin = max(begin, state.shards[at].volume.trimmed)
        for pos, (seq, key) in enumerate(_seqs(process.log)):
            if begin <= pos < end and key != HOLE:
                rows.extend([HOLE] * (seq + 1 - len(rows)))
                if rows[seq] not in (HOLE, key) and self._archiving.compared:
                    return None
                rows[seq] = key
        return tuple(rows)

    def _trims(self, state: State, at: int, index: int) -> Iterator[Step[State]]:
        shard = state.shards[at]
        process, volume = shard.processes[index], shard.volume
        _, pos = state.archive.positions[at]
        floor = max(process.placed, 0) if self._stepwise else pos
        if not self._archiving.position_own:
            floor = max(pos for _, pos in state.archive.positions)
        if not self._archiving.trim_archived:
            floor = len(process.log)
        floor = min(floor, process.shown)
        if _has_messages(volume.log[volume.trimmed : floor]):
            yield self._put(state, at, index, process, volume._replace(trimmed=floor), f"trims below {floor}")


def _has_messages(log: tuple[Entry, ...]) -> bool:
    return any(isinstance(entry, int) for entry in log)


def _readable(log: tuple[Entry, ...], trimmed: int) -> tuple[Entry, ...]:
    """The log with holes where messages were trimmed."""
    return (*(HOLE if isinstance(entry, int) else entry for entry in log[:trimmed]), *log[trimmed:])


def _seqs(log: tuple[Entry, ...]) -> Iterator[tuple[int, int]]:
    """Of each entry, its seq (from 0) and its message; a mark has `HOLE`."""
    seq = 0
    for entry in log:
        if isinstance(entry, int):
            yield seq, entry % KEYLESS
            seq += 1
        else:
            seq = 0 if entry.kind == "Released" else seq
            yield seq, HOLE
