"""One slot, its moves, its volumes: the rules of docs/moves.md and of the fence, as an explicit-state model.

The network and the gateways are the worst possible: every append may arrive at any shard, at any time, any number of
times. A record is *shown* (acknowledged, published, copied out) from the step on that lets its shard show it; `seen` is
everything ever shown. A crash keeps any part of what was not synced. A frozen process is one that takes no step.

    S1 seen is a prefix of the durable log of the owner   S3 one seq for a key        S4 one process can acknowledge
    P  what was copied is a prefix of the truth           A2 a refusal stays true     stuck: the goal cannot be reached
    E  an append with `expected_seq` stands behind just so many messages

Promise: `Rules()` are the product's rules; every field that is changed is a mistake. Must not be done here: gateways'
queues, streams, files below the level of a log, the archive (`archived.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

from tests.model.checker import Step

SERVING: Final = 3
"""Stages of a boot: 0 started, 1 has its term, 2 has the map, 3 has cut the log."""
KEYLESS: Final = 100
"""Added to a message that was copied without its key (a mistake)."""
HOLE: Final = 0
"""In a log: a seq whose message the source of a move had not any more (`archived.py`)."""


class Mark(NamedTuple):
    """A record that is no message: Sealed, Confirmed, Released."""

    kind: str
    move: int
    epoch: int


Entry = int | Mark


class Move(NamedTuple):
    """A move in flight."""

    id: int
    source: int
    target: int
    sealing: bool


class Map(NamedTuple):
    """A ring map of one slot: its owner, the move that made it owner (0: none), the move in flight."""

    owner: int
    via: int
    move: Move | None


class Volume(NamedTuple):
    """A shard's disk: what a boot would read, how much of that is synced, newest term, term of the last cut, map."""

    log: tuple[Entry, ...] = ()
    synced: int = 0
    term: int = 0
    writer: int = 0
    stored: int = 0
    trimmed: int = 0
    """Below it nothing can be read any more (`archived.py`); the state of the session is kept."""


class Process(NamedTuple):
    """A container of a shard: its own view of the log, how much of it is synced and shown, what it waits for."""

    stage: int = 0
    term: int = 0
    epoch: int = 0
    log: tuple[Entry, ...] = ()
    synced: int = 0
    shown: int = 0
    sealing: int = 0
    heard: int = 0
    placed: int = -1
    """Below it all is archived, as the database said last (`archived.py`); -1 before it said anything."""
    owed: int = -1
    """From here its archiver has yet to write what it has said to be written (a mistake)."""


class Shard(NamedTuple):
    """A volume, the processes on it (elder first), and the move that it announced as confirmed."""

    volume: Volume
    processes: tuple[Process, ...]
    announced: int = 0


class Archive(NamedTuple):
    """The database: messages by seq (0: none), and of each volume (term, position) of its archiver."""

    rows: tuple[int, ...] = ()
    positions: tuple[tuple[int, int], ...] = ()


class State(NamedTuple):
    """Everything."""

    maps: tuple[Map, ...]
    decided: int
    shards: tuple[Shard, ...]
    seen: tuple[int, ...]
    refused: frozenset[int]
    moves: int
    aborts: int
    crashes: int
    seconds: int
    archive: Archive = Archive()


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The rules; each default is the product's, each other value a mistake."""

    look: bool = True
    """Nothing is shown, sealed, confirmed or copied before a look at the term."""
    boot_sync: bool = True
    """A boot syncs what it read."""
    boot_sealed: bool = True
    """A boot opens sealed what its map shows in Sealing."""
    stale_boot: bool = False
    """A boot's map may be an old one (the control plane answers from a lagging copy)."""
    floor: bool = True
    """A boot refuses a map older than the newest that the volume acted upon."""
    term_first: bool = True
    """The term is durable before the map and the log are read."""
    self_unseal: bool = False
    """A sealed source gives up waiting."""
    copy_shown: bool = True
    """Only what is shown is copied."""
    keys_travel: bool = True
    """Copies keep their keys."""
    confirm_durable: bool = True
    """The confirmation is on disk before it counts."""
    confirm_keyed: bool = True
    """A confirmation counts for its own move only."""
    seal_before_confirm: bool = True
    """A target confirms only what a sealed source said was all."""
    marker: bool = True
    """A target serves only with its own confirmation on its volume."""
    serve_on_confirm: bool = False
    """A target serves before the commit."""
    cas: bool = True
    """The commit is a compare-and-swap."""
    clean_keyed: bool = True
    """A clean-up is void if the map names the shard target again."""
    dedupe_waits: bool = True
    """A dedupe hit on a record that is not shown yet waits for it."""
    conflict_looks: bool = True
    """CONFLICT is answered after a look, when all it rests on is shown."""
    dedupe_first: bool = True
    """A known key is answered as before, whatever it expected."""
    expects_queued: bool = True
    """`expected_seq` is compared with everything that has a seq, shown or not."""
    expects_imported: bool = True
    """`expected_seq` is compared with what moves brought, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """How much happens; `seconds`: second containers on a volume, `expected`: the `expected_seq` of key 1."""

    keys: int = 2
    moves: int = 2
    aborts: int = 1
    crashes: int = 1
    seconds: int = 0
    expected: int | None = None
    shards: int = 2


def messages(log: tuple[Entry, ...]) -> tuple[int, ...]:
    """The slot's messages in a log: those behind its last clean-up."""
    found: list[int] = []
    for entry in log:
        if isinstance(entry, int):
            found.append(entry)
        elif entry.kind == "Released":
            found.clear()
    return tuple(found)


def plain(keys: tuple[int, ...]) -> tuple[int, ...]:
    """Messages without the mistake of `KEYLESS`."""
    return tuple(key % KEYLESS for key in keys)


def agree(one: tuple[int, ...], two: tuple[int, ...]) -> bool:
    """No seq has two messages; `HOLE` is none."""
    return all(left == right or HOLE in (left, right) for left, right in zip(plain(one), plain(two), strict=False))


class Moves:
    """The model; see the module.

    Args:
        scope: how much happens.
        rules: the product's, or with a mistake.
    """

    def __init__(self, scope: Scope, rules: Rules) -> None:
        self._scope = scope
        self._rules = rules
        self._stepwise = scope.seconds > 0

    def start(self) -> State:
        """Shard 0 owns the slot, every shard runs."""
        shard = Shard(Volume(term=1, writer=1), (Process(stage=SERVING, term=1),))
        scope = self._scope
        budgets = (scope.moves, scope.aborts, scope.crashes, scope.seconds)
        return State((Map(0, 0, None),), -1, (shard,) * scope.shards, (), frozenset(), *budgets)

    # Properties

    def broken(self, state: State) -> str | None:
        """S1, S3, S4, A2, E."""
        seen = plain(state.seen)
        if len(set(seen)) != len(seen):
            return "S3"
        if state.refused & set(seen):
            return "A2"
        if self._scope.expected is not None and 1 in seen and seen.index(1) != self._scope.expected:
            return "E"
        if not self._kept(state, state.shards[state.maps[-1].owner].volume, seen):
            return "S1"
        able = sum(
            self._may_append(state, at, process) and self._fenced_in(shard, process)
            for at, shard in enumerate(state.shards)
            for process in shard.processes
        )
        return "S4" if able > 1 else None

    def _kept(self, state: State, volume: Volume, seen: tuple[int, ...]) -> bool:
        return plain(messages(volume.log[: volume.synced]))[: len(seen)] == seen

    def goal(self, state: State) -> bool:
        """No move, every append answered, the slot served by a process with the newest map."""
        ring = state.maps[-1]
        answered = len(state.seen) + len(state.refused) >= self._scope.keys
        return (
            ring.move is None
            and answered
            and any(
                process.epoch == len(state.maps) - 1
                and self._may_append(state, ring.owner, process)
                and self._fenced_in(state.shards[ring.owner], process)
                for process in state.shards[ring.owner].processes
            )
        )

    def _owns(self, state: State, at: int, process: Process) -> bool:
        if process.stage != SERVING:
            return False
        ring = state.maps[process.epoch]
        if ring.owner != at:
            early = ring.move is not None and ring.move.target == at and _confirmed(process.log, ring.move.id)
            return self._rules.serve_on_confirm and early
        return ring.via == 0 or not self._rules.marker or _confirmed(process.log, ring.via)

    def _may_append(self, state: State, at: int, process: Process) -> bool:
        return self._owns(state, at, process) and not process.sealing

    def _fenced_in(self, shard: Shard, process: Process) -> bool:
        """A look now would find no younger term."""
        return not self._rules.look or process.term == shard.volume.term

    # Steps

    def steps(self, state: State) -> Iterator[Step[State]]:
        """Controllers, then every shard."""
        yield from self._controller(state)
        for at, shard in enumerate(state.shards):
            yield from self._starts(state, at, shard)
            for index, process in enumerate(shard.processes):
                yield from self._crashes(state, at, index)
                if process.stage < SERVING:
                    yield from self._boots(state, at, index)
                else:
                    yield from self._learns(state, at, index)
                    yield from self._writes(state, at, index)
                    yield from self._moves(state, at, index)

    def _controller(self, state: State) -> Iterator[Step[State]]:
        now = len(state.maps) - 1
        ring = state.maps[-1]
        move = ring.move
        if move is None:
            for target in range(len(state.shards)):
                if state.moves and target != ring.owner:
                    begun = ring._replace(move=Move(now + 1, ring.owner, target, False))
                    yield Step(f"begin {begun.move}", self._swap(state, begun, moves=state.moves - 1), fault=True)
        else:
            if not move.sealing:
                yield Step("seal", self._swap(state, ring._replace(move=move._replace(sealing=True))))
            if state.aborts:
                aborted = self._swap(state, ring._replace(move=None), aborts=state.aborts - 1)
                yield Step("abort", aborted, fault=True)
            told = state.shards[move.target].announced
            if move.sealing and state.decided < 0 and (told == move.id or (told and not self._rules.confirm_keyed)):
                yield Step("decide to commit", state._replace(decided=now))
        if state.decided >= 0 and (state.decided == now or not self._rules.cas):
            decided = state.maps[state.decided].move
            assert decided is not None
            yield Step("commit", self._swap(state, Map(decided.target, decided.id, None))._replace(decided=-1))

    def _swap(self, state: State, ring: Map, **budgets: int) -> State:
        """The next map; a decision made for the one before is void."""
        decided = -1 if self._rules.cas else state.decided
        return state._replace(maps=(*state.maps, ring), decided=decided, **budgets)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]  budgets are ints

    def _starts(self, state: State, at: int, shard: Shard) -> Iterator[Step[State]]:
        alive = len(shard.processes)
        if alive == 0 or (alive == 1 and state.seconds):
            processes = (*shard.processes, Process())
            after = _with(state, at, shard._replace(processes=processes))
            if alive:
                after = after._replace(seconds=state.seconds - 1)
            if self._stepwise:
                yield Step(f"{at}: starts", after, fault=alive > 0)
            else:
                yield from (
                    Step(f"{at}: boots", booted) for booted in self._booted(after, at, alive)
                )  # one container: nothing happens between the steps of its boot that is not also possible before it

    def _booted(self, state: State, at: int, index: int) -> Iterator[State]:
        """The states after a whole boot."""
        todo = [state]
        while todo:
            found = todo.pop()
            if found.shards[at].processes[index].stage == SERVING:
                yield found
            else:
                todo.extend(step.state for step in self._boots(found, at, index))

    def _boots(self, state: State, at: int, index: int) -> Iterator[Step[State]]:
        shard = state.shards[at]
        process = shard.processes[index]
        volume = shard.volume
        order = ("term", "map", "log") if self._rules.term_first else ("map", "log", "term")
        step = order[process.stage]
        onward = process._replace(stage=process.stage + 1)
        if step == "term":
            term = volume.term + 1
            writer = volume.writer if self._rules.term_first else term
            yield self._put(
                state,
                at,
                index,
                onward._replace(term=term),
                volume._replace(term=term, writer=writer),
                "takes its term",
            )
        elif step == "map":
            newest = len(state.maps) - 1
            lowest = volume.stored if self._rules.floor else 0
            for epoch in range(lowest, newest + 1) if self._rules.stale_boot else (newest,):
                stored = volume._replace(stored=max(volume.stored, epoch))
                yield self._put(state, at, index, onward._replace(epoch=epoch), stored, f"reads map {epoch}")
        else:
            synced = len(volume.log) if self._rules.boot_sync else volume.synced
            cut = volume._replace(synced=synced, writer=process.term or volume.writer)
            read = onward._replace(log=volume.log, synced=len(volume.log))
            if not self._rules.boot_sync:
                read = read._replace(shown=len(volume.log))
            if self._rules.floor and any(entry.epoch > read.epoch for entry in read.log if isinstance(entry, Mark)):
                # An elder went on after our map was read: its log tells of a newer one.
                read = read._replace(epoch=len(state.maps) - 1)
            if self._rules.boot_sealed:
                read = read._replace(sealing=_sealing(state.maps[read.epoch], at))
            yield self._put(state, at, index, read, cut, "reads and cuts the log")

    def _crashes(self, state: State, at: int, index: int) -> Iterator[Step[State]]:
        if not state.crashes:
            return
        shard = state.shards[at]
        process, volume = shard.processes[index], shard.volume
        others = shard.processes[:index] + shard.processes[index + 1 :]
        writes = process.stage == SERVING and process.term == volume.writer
        for kept in range(volume.synced, len(volume.log) + 1) if writes else (len(volume.log),):
            left = shard._replace(processes=others, volume=volume._replace(log=volume.log[:kept]))
            yield Step(f"{at}: crashes, keeps {kept}", _with(state, at, left)._replace(crashes=state.crashes - 1), True)

    def _learns(self, state: State, at: int, index: int) -> Iterator[Step[State]]:
        shard = state.shards[at]
        process = shard.processes[index]
        if process.term != shard.volume.term and self._rules.look:
            gone = shard.processes[:index] + shard.processes[index + 1 :]
            yield Step(f"{at}: sees a younger term, ends", _with(state, at, shard._replace(processes=gone)))
        for epoch in range(process.epoch + 1, len(state.maps)):
            ring = state.maps[epoch]
            heard = process.heard if ring.move is not None and ring.move.id == process.heard else 0
            after = process._replace(epoch=epoch, sealing=_sealing(ring, at), heard=heard)
            stored = shard.volume._replace(stored=max(shard.volume.stored, epoch))
            yield self._put(state, at, index, after, stored, f"learns map {epoch}")
        if process.sealing and self._rules.self_unseal:
            yield self._put(state, at, index, process._replace(sealing=0), shard.volume, "unseals itself")

    def _writes(self, state: State, at: int, index: int) -> Iterator[Step[State]]:
        """Appends, syncs, what is shown then."""
        shard = state.shards[at]
        process = shard.processes[index]
        held = messages(process.log)
        if self._may_append(state, at, process):
            for key in self._arriving(state):
                if key in held and (self._rules.dedupe_first or not self._conflict(process, key)):
                    yield from self._hits(state, at, index, key)
                elif self._conflict(process, key):
                    yield from self._conflicts(state, at, index)
                else:
                    yield self._append(state, at, index, key, f"appends {key}")
        if process.synced < len(process.log):
            volume = shard.volume
            if process.term == volume.writer:
                volume = volume._replace(synced=len(volume.log))
            yield self._put(state, at, index, process._replace(synced=len(process.log)), volume, "syncs")
        elif self._fenced_in(shard, process) and self._news(state, at, process):
            yield self._show(state, at, index)

    def _arriving(self, state: State) -> Iterable[int]:
        """Keys of appends that may arrive."""
        return range(1, self._scope.keys + 1)

    def _news(self, state: State, at: int, process: Process) -> bool:
        """Something is synced that was not shown, or was not this shard's to show when it was."""
        if process.shown < process.synced:
            return True
        return self._owns(state, at, process) and len(messages(process.log[: process.synced])) > len(state.seen)

    def _hits(self, state: State, at: int, index: int, key: int) -> Iterator[Step[State]]:
        if self._rules.dedupe_waits:
            return  # answered with the record itself, when that is shown
        log = state.shards[at].processes[index].log
        yield self._seen(state, messages(log[: log.index(key) + 1]), f"{at}: answers {key} deduped")

    def _conflict(self, process: Process, key: int) -> bool:
        """The key expects another last seq."""
        expected = self._scope.expected
        return key == 1 and expected is not None and self._last_seq(process) != expected

    def _last_seq(self, process: Process) -> int:
        """What `expected_seq` is compared with."""
        log = process.log if self._rules.expects_queued else process.log[: process.shown]
        last_seq = len(messages(log))
        if not self._rules.expects_imported:
            imported = max((at for at, entry in enumerate(log) if _is_of(entry, "Confirmed")), default=0)
            last_seq -= len(messages(log[:imported]))
        return last_seq

    def _conflicts(self, state: State, at: int, index: int) -> Iterator[Step[State]]:
        """CONFLICT is for ever once the session has more; before that a retry may find what it expects."""
        shard = state.shards[at]
        process = shard.processes[index]
        sure = process.shown == len(process.log) and self._fenced_in(shard, process)
        assert self._scope.expected is not None
        behind = self._last_seq(process) < self._scope.expected
        if (sure or not self._rules.conflict_looks) and not behind and 1 not in state.refused:
            yield Step(f"{at}: refuses 1", state._replace(refused=state.refused | {1}))

    def _append(self, state: State, at: int, index: int, entry: Entry, label: str) -> Step[State]:
        shard = state.shards[at]
        process, volume = shard.processes[index], shard.volume
        if process.term == volume.writer:
            volume = volume._replace(log=(*volume.log, entry))
        return self._put(state, at, index, process._replace(log=(*process.log, entry)), volume, label)

    def _show(self, state: State, at: int, index: int) -> Step[State]:
        """After sync and look: what is synced may be acknowledged, published, copied, announced."""
        shard = state.shards[at]
        process = shard.processes[index]
        visible = process.log[: process.synced]
        announced = _last(visible, "Confirmed") or shard.announced
        shown = replaced(shard.processes, index, process._replace(shown=process.synced))
        after = _with(state, at, shard._replace(processes=shown, announced=announced))
        if not self._owns(state, at, process):
            return Step(f"{at}: shows {process.synced}", after)
        return self._seen(after, messages(visible), f"{at}: shows {process.synced}")

    def _seen(self, state: State, shown: tuple[int, ...], label: str) -> Step[State]:
        seen = state.seen
        if not agree(seen, shown):
            return Step(label, state, broken="S1")
        return Step(label, state._replace(seen=(*seen, *shown[len(seen) :])))

    # Moves

    def _moves(self, state: State, at: int, index: int) -> Iterator[Step[State]]:
        shard = state.shards[at]
        process = shard.processes[index]
        ring = state.maps[process.epoch]
        sealed = Mark("Sealed", process.sealing, process.epoch)
        if process.sealing and _last(process.log, "Sealed") != process.sealing and self._owns(state, at, process):
            yield self._append(state, at, index, sealed, "seals")
        target = ring.move is not None and ring.move.target == at and ring.owner != at
        if ring.move is not None and target and not _confirmed(process.log, ring.move.id):
            yield from self._imports(state, at, index, ring.move)
        owned = ring.owner == at or self._owns(state, at, process)
        if messages(process.log) and not owned and not (target and self._rules.clean_keyed):
            yield self._append(state, at, index, Mark("Released", 0, process.epoch), "cleans")

    def _imports(self, state: State, at: int, index: int, move: Move) -> Iterator[Step[State]]:
        process = state.shards[at].processes[index]
        held = messages(process.log)
        for source in state.shards[move.source].processes:
            sees = state.maps[source.epoch].move if source.stage == SERVING else None
            if sees is None or sees.id != move.id or not self._owns(state, move.source, source):
                continue
            shown = self._told(state.shards[move.source].volume, source)
            if not agree(held, shown):
                yield Step(f"{at}: copies", state, broken="P")
            elif len(held) < len(shown):
                missing = shown[len(held) :]
                if not self._rules.keys_travel:
                    missing = tuple(key % KEYLESS + KEYLESS for key in missing)
                yield self._copy(state, at, index, missing)
            elif process.heard != move.id and self._said_all(state, source, move, held):
                heard = process._replace(heard=move.id)
                yield self._put(state, at, index, heard, state.shards[at].volume, f"hears that {len(held)} is all")
        if process.heard == move.id:
            yield from self._confirms(state, at, index, Mark("Confirmed", move.id, process.epoch))

    def _told(self, volume: Volume, source: Process) -> tuple[int, ...]:
        return messages(source.log[: source.shown] if self._rules.copy_shown else source.log)

    def _said_all(self, state: State, source: Process, move: Move, held: tuple[int, ...]) -> bool:
        if not self._rules.seal_before_confirm:
            return True
        sealed = _last(source.log[: source.shown], "Sealed") == move.id and source.sealing == move.id
        return sealed and len(held) == self._total(state.shards[move.source].volume, source)

    def _total(self, volume: Volume, source: Process) -> int:
        """How many messages there are, says a sealed source."""
        return len(messages(source.log))

    def _copy(self, state: State, at: int, index: int, keys: tuple[int, ...]) -> Step[State]:
        step = Step("", state)
        for key in keys:
            step = self._append(step.state, at, index, key, f"copies {keys}")
        return step

    def _confirms(self, state: State, at: int, index: int, mark: Mark) -> Iterator[Step[State]]:
        step = self._append(state, at, index, mark, f"confirms {mark.move}")
        if self._rules.confirm_durable:
            yield step
        else:
            shard = step.state.shards[at]
            yield Step(step.label, _with(step.state, at, shard._replace(announced=mark.move)))

    def _put(self, state: State, at: int, index: int, process: Process, volume: Volume, what: str) -> Step[State]:  # noqa: PLR0917  where, who, what
        shard = state.shards[at]
        processes = replaced(shard.processes, index, process)
        return Step(f"{at}: {what}", _with(state, at, shard._replace(volume=volume, processes=processes)))


T = TypeVar("T")


def replaced(items: tuple[T, ...], at: int, item: T) -> tuple[T, ...]:
    return (*items[:at], item, *items[at + 1 :])


def _with(state: State, at: int, shard: Shard) -> State:
    return state._replace(shards=replaced(state.shards, at, shard))


def _sealing(ring: Map, at: int) -> int:
    """The move for which this map seals the shard."""
    move = ring.move
    return move.id if move is not None and move.sealing and move.source == at and ring.owner == at else 0


def _last(log: tuple[Entry, ...], kind: str) -> int:
    """The move that the newest mark of that kind names; 0 without one."""
    return next((entry.move for entry in reversed(log) if isinstance(entry, Mark) and entry.kind == kind), 0)


def _is_of(entry: Entry, kind: str) -> bool:
    return isinstance(entry, Mark) and entry.kind == kind


def _confirmed(log: tuple[Entry, ...], move: int) -> bool:
    return any(isinstance(entry, Mark) and entry.kind == "Confirmed" and entry.move == move for entry in log)
