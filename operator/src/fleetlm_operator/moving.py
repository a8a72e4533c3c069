"""What to do about the moves of a ring: those in flight, and those that are needed next. Pure.

    in flight  not wanted any more                           abort
               the target gave it up, a volume is lost       abort, and later again
               Copying, the target says Ready                seal
               Sealing, the target says Confirmed            commit
               Sealing for SEAL_S_MAX and not confirmed      abort, and later again
    needed     both shards serve, and have few moves         begin

Promise: an owner changes only by a move that its target has confirmed under this very id, seen in `Sealing` in the map
that the change replaces. Slots of a move in flight count as its target's, so that a plan is never changed by its own
progress. Must not be done here: deciding which shard should own what (`assignment.py`), or who is a member.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Final

import msgspec

from fleetlm_common.control import MoveProgress, View
from fleetlm_common.ids import ShardName, Slot
from fleetlm_common.ring import Move, RingMap
from fleetlm_operator.assignment import assign
from fleetlm_operator.mapsteps import Abort, Begin, Commit, Seal, Step, counted, told
from fleetlm_operator.memory import Failure, Memory, Pair

SEAL_S_MAX: Final = 3.0
"""A sealed batch answers nobody: the target had all but a remainder before, so what takes longer is broken."""
STALLED_S: Final = 10.0
"""A copy whose target says nothing new for so long, or a pair whose moves have failed for so long, does not get on, and
people are told why."""
BATCH_SLOTS_MAX: Final = 32
"""Slots of one move: they stall together, and a move that fails is begun again as a whole."""
SHARD_MOVES_MAX: Final = 2
"""Moves that a shard gives, and that it takes, at once: while one is being sealed the next one copies."""
RING_MOVES_MAX: Final = 8
"""Moves in flight in a ring: each costs three changes of the map, which every gateway and shard reads."""
RESTING: Final = ("", 0, 0)
"""What a target says that says nothing of a move."""


class Stall(msgspec.Struct, frozen=True):
    """What does not get on (a move, or all moves of a pair), and why."""

    what: str
    why: str


class Moves(msgspec.Struct, frozen=True, kw_only=True):
    """The decision."""

    steps: tuple[Step, ...]
    memory: Memory
    left: int
    """Slots that are not where they should be."""
    stalls: tuple[Stall, ...]
    failures: tuple[tuple[Pair, Failure], ...]
    """Pairs that wait after a failure, and have not failed for so long that it is a stall."""
    awaited: tuple[ShardName, ...]
    """Shards that must become ready before a move can begin."""
    again_s: float | None
    """Time alone changes something so soon."""


def projected(ring: RingMap, takers: Collection[ShardName]) -> list[ShardName]:
    """The owner of each slot once the moves in flight are done, as far as their targets may get slots."""
    owners = [found.owner for found in ring.owners()]
    for move in ring.moves:
        if move.target in takers:
            for slot in move.slots:
                owners[slot] = move.target
    return owners


def progress(view: View, ring: RingMap, move: Move) -> MoveProgress | None:
    """What the target says of a move; the word of another volume than the member's is none."""
    if not is_bound(view, ring, move.target):
        return None
    return next((said for said in view.shards[move.target].moves if said.id == move.id), None)


def is_bound(view: View, ring: RingMap, shard: ShardName) -> bool:
    """Whether the member has announced the volume that the map binds it to."""
    endpoint, member = view.shards.get(shard), ring.member(shard)
    return endpoint is not None and member is not None and endpoint.volume_id == member.volume_id


def serves(view: View, ring: RingMap, shard: ShardName) -> bool:
    """Whether it can take part in a move now."""
    return is_bound(view, ring, shard) and view.shards[shard].ready and view.shards[shard].serves >= 0


def decide(
    view: View,
    ring: RingMap,
    eligible: Sequence[ShardName],
    *,
    avoided: Collection[ShardName],
    pins: Mapping[int, ShardName],
    draining_only: bool,
    memory: Memory,
    now_s: float,
) -> Moves:
    """Decide about every move.

    Args:
        view: what was seen.
        ring: the map in it.
        eligible: the members that may own slots, in the ring's order; at least one that is not avoided.
        avoided: those of them that keep what they have and get nothing.
        pins: slots that people want on a shard.
        draining_only: begin only what empties shards that may own nothing.
        memory: of the looks before.
        now_s: monotonic.
    """
    said = {move.id: progress(view, ring, move) for move in ring.moves}
    memory = memory.watching({move.id: (move, _words(said[move.id])) for move in ring.moves}, now_s)
    takers = [each for each in eligible if each not in avoided]
    wanted = assign(projected(ring, takers), eligible, pins, avoided)
    steps: list[Step] = []
    stalls: list[Stall] = []
    for move in ring.moves:
        step = _step(view, ring, move, wanted=wanted, memory=memory, now_s=now_s)
        if step is not None:
            steps.append(step)
            memory = _remembered(memory, step, now_s)
        elif move.state == "Copying" and now_s - memory.moves[move.id].said_since_s >= STALLED_S:
            stalls.append(Stall(told(move), _why_stalled(view, ring, move, said[move.id])))
    beginnings = _Beginnings(view, ring, memory, now_s)
    for step in steps:
        beginnings.forget(step)
    begun, awaited = beginnings.choose(wanted, only_from=_leaving(ring, eligible) if draining_only else None)
    steps += begun
    memory = memory.needing({(found.owner, owner) for found, owner in zip(ring.owners(), wanted, strict=True)})
    waiting = _waiting(ring, steps, memory, now_s)
    stalls += [
        Stall(f"{source} to {target}", f"it failed {_times(failure)}: {failure.why}")
        for (source, target), failure in waiting.items()
        if now_s - failure.since_s >= STALLED_S
    ]
    return Moves(
        steps=tuple(steps),
        memory=memory,
        left=sum(found.owner != owner for found, owner in zip(ring.owners(), wanted, strict=True)),
        stalls=tuple(stalls),
        failures=tuple(each for each in waiting.items() if now_s - each[1].since_s < STALLED_S),
        awaited=awaited,
        again_s=_again_s(ring, memory, now_s),
    )


def _words(said: MoveProgress | None) -> tuple[str, int, int]:
    return RESTING if said is None else (said.state, said.done, said.behind)


def _step(
    view: View, ring: RingMap, move: Move, *, wanted: Sequence[ShardName], memory: Memory, now_s: float
) -> Step | None:
    """The next step of a move in flight."""
    if any(wanted[slot] != move.target for slot in move.slots):
        return Abort(move, "it is not wanted any more", failed=False)
    for shard in (move.source, move.target):
        if shard in view.shards and not is_bound(view, ring, shard):
            return Abort(move, f"{shard} lost its volume", failed=True)
    said = progress(view, ring, move)
    if said is not None and said.state == "Failed":
        return Abort(move, f"{move.target} gave it up: {_reason(said)}", failed=True)
    if move.state == "Sealing":
        if said is not None and said.state == "Confirmed":
            return Commit(move)
        if now_s - memory.moves[move.id].since_s >= SEAL_S_MAX:
            return Abort(move, f"{move.target} did not confirm it within {SEAL_S_MAX:g} s", failed=True)
        return None
    ready = said is not None and said.state in {"Ready", "Confirmed"}
    return Seal(move) if ready and serves(view, ring, move.source) and serves(view, ring, move.target) else None


def _remembered(memory: Memory, step: Step, now_s: float) -> Memory:
    match step:
        case Abort(move, why, failed=True):
            return memory.failed((move.source, move.target), why, now_s)
        case Commit(move):
            return memory.succeeded((move.source, move.target))
        case _:
            return memory


def _waiting(ring: RingMap, steps: Sequence[Step], memory: Memory, now_s: float) -> dict[Pair, Failure]:
    """Pairs whose last move failed and whose next one has not begun: its time has not come, or a shard is not ready."""
    ended = {step.move.id for step in steps if isinstance(step, Commit | Abort)}
    begun = {(move.source, move.target) for move in ring.moves if move.id not in ended}
    begun |= {(step.source, step.target) for step in steps if isinstance(step, Begin)}
    return {pair: failure for pair, failure in memory.failures.items() if failure.until_s > now_s or pair not in begun}


def _why_stalled(view: View, ring: RingMap, move: Move, said: MoveProgress | None) -> str:
    away = [shard for shard in (move.source, move.target) if not serves(view, ring, shard)]
    if away:
        return f"{' and '.join(away)} {'is' if len(away) == 1 else 'are'} not ready"
    if said is None:
        return f"{move.target} says nothing of it"
    return f"{move.target} says {_reason(said)}" if said.reason else f"{said.behind} sessions are left to copy"


def _reason(said: MoveProgress) -> str:
    return ": ".join(filter(None, [said.reason, said.message])) or "no reason"


def _leaving(ring: RingMap, eligible: Collection[ShardName]) -> set[ShardName]:
    return {member.name for member in ring.members} - set(eligible)


def _again_s(ring: RingMap, memory: Memory, now_s: float) -> float | None:
    """When the next deadline passes."""
    deadlines = [memory.moves[move.id].since_s + SEAL_S_MAX for move in ring.moves if move.state == "Sealing"]
    deadlines += [memory.moves[move.id].said_since_s + STALLED_S for move in ring.moves if move.state == "Copying"]
    for failure in memory.failures.values():
        deadlines += [failure.until_s, failure.since_s + STALLED_S]
    ahead = [deadline - now_s for deadline in deadlines if deadline > now_s]
    return min(ahead) if ahead else None


class _Beginnings:
    """Chooses the moves to begin; counts what is in flight."""

    def __init__(self, view: View, ring: RingMap, memory: Memory, now_s: float) -> None:
        self._view = view
        self._ring = ring
        self._memory = memory
        self._now_s = now_s
        self._gives = Counter(move.source for move in ring.moves)
        self._takes = Counter(move.target for move in ring.moves)
        self._in_flight = len(ring.moves)

    def forget(self, step: Step) -> None:
        """A move that ends with this map makes room; its slots wait for the next one, which shows what became of it."""
        if isinstance(step, (Commit, Abort)):
            self._gives[step.move.source] -= 1
            self._takes[step.move.target] -= 1
            self._in_flight -= 1

    def choose(
        self, wanted: Sequence[ShardName], only_from: Collection[ShardName] | None
    ) -> tuple[list[Begin], tuple[ShardName, ...]]:
        """One batch of each pair in turn, as long as there is room; and who must become ready first."""
        needed = self._needed(wanted)
        pairs = [pair for pair in needed if only_from is None or pair[0] in only_from]
        awaited = {shard: None for pair in pairs for shard in pair if not serves(self._view, self._ring, shard)}
        pairs = [pair for pair in pairs if self._may(pair) and not awaited.keys() & set(pair)]
        begun: list[Begin] = []
        while pairs:
            for pair in list(pairs):
                source, target = pair
                full = self._gives[source] >= SHARD_MOVES_MAX or self._takes[target] >= SHARD_MOVES_MAX
                if full or self._in_flight >= RING_MOVES_MAX or not needed[pair]:
                    pairs.remove(pair)
                    continue
                batch, needed[pair] = needed[pair][:BATCH_SLOTS_MAX], needed[pair][BATCH_SLOTS_MAX:]
                begun.append(Begin(tuple(batch), source, target))
                self._gives[source] += 1
                self._takes[target] += 1
                self._in_flight += 1
        return begun, tuple(awaited)

    def _needed(self, wanted: Sequence[ShardName]) -> dict[Pair, list[Slot]]:
        """Slots that are in no move and not where they should be, by source and target."""
        moving = {slot for move in self._ring.moves for slot in move.slots}
        needed: dict[Pair, list[Slot]] = {}
        for number, found in enumerate(self._ring.owners()):
            if found.owner != wanted[number] and number not in moving:
                needed.setdefault((found.owner, wanted[number]), []).append(Slot(number))
        return needed

    def _may(self, pair: Pair) -> bool:
        failure = self._memory.failures.get(pair)
        return failure is None or failure.until_s <= self._now_s


def _times(failure: Failure) -> str:
    return "once" if failure.count == 1 else f"{failure.count} times"


def moving_words(ring: RingMap, moves: Moves) -> str:
    """How far the ring is, in words that change with its steps only."""
    sealed = sum(move.state == "Sealing" for move in ring.moves)
    flight = f"{len(ring.moves)} {'move' if len(ring.moves) == 1 else 'moves'} in flight"
    tail = f" ({sealed} sealed)" if sealed else ""
    words = f"{counted(moves.left)} left to move, {flight}{tail}"
    for (source, target), failure in moves.failures:
        words += f"; {source} to {target} failed {_times(failure)} and waits: {failure.why}"
    return words


def stalled_words(moves: Moves) -> str:
    """What does not get on first, and how much else."""
    rest = len(moves.stalls) - 1
    return f"{moves.stalls[0].what} does not get on: {moves.stalls[0].why}" + (f" (and {rest} more)" if rest else "")
