"""A ring without shards: its control plane as a value, and shards that are played by their announcements.

Promise: a played shard says what a real one may say (docs/moves.md): `Confirmed` only of a move that a map which it has
acted on shows in `Sealing`, and only after the source has acted on that map too. Every map that a controller makes is
held against the rules as it is made. Must not be done here: deciding (the controller under test does).
"""

from __future__ import annotations

import msgspec

from fleetlm_common.control import Forgotten, MoveProgress, Pin, RingSpec, ShardEndpoint, View, shard_names
from fleetlm_common.ids import Epoch, ShardName, Term
from fleetlm_common.ring import RingMap
from fleetlm_operator.mapsteps import Begin
from fleetlm_operator.memory import NO_MEMORY, Memory
from fleetlm_operator.planning import Decision, plan


class PlayedShard:
    """One shard: what its process has acted on, and what its volume remembers."""

    def __init__(self, ring: PlayedRing, name: ShardName) -> None:
        self.name = name
        self.up = True
        self.volume = f"volume of {name}"
        self.acted: RingMap | None = None
        self.confirmed: set[str] = set()
        self.failed: set[str] = set()
        self.ready_moves: set[str] = set()
        self._ring = ring

    def act(self) -> None:
        """See the newest map, get on with what it asks for, and say so."""
        if not self.up:
            return
        self.acted = ring_map = self._ring.map
        for move in () if ring_map is None else ring_map.moves:
            if move.target != self.name or move.id in self.failed:
                continue
            source = self._ring.shards[move.source]
            if move.state == "Copying" and source.up:
                self.ready_moves.add(move.id)
            sealed = source.up and source.acted is not None and move in source.acted.moves
            if move.state == "Sealing" and sealed and move.id in self.ready_moves:
                self.confirmed.add(move.id)
        self.announce()

    def announce(self) -> None:
        """Say how it is."""
        acted = self.acted
        said: list[MoveProgress] = []
        serves = 0
        if acted is not None:
            serves = len(acted.slots_of(self.name))
            said = [self._said(move.id) for move in acted.moves if move.target == self.name]
        member = acted is not None and acted.member(self.name) is not None
        self._ring.announcements[self.name] = ShardEndpoint(
            name=self.name,
            volume_id=self.volume,
            term=Term(1),
            host="127.0.0.1",
            port=1,
            ops_url="",
            ready=self.up and member,
            moves=tuple(said),
            epoch=Epoch(0) if acted is None else acted.epoch,
            serves=serves,
        )

    def _said(self, ident: str) -> MoveProgress:
        if ident in self.failed:
            return MoveProgress(ident, "Failed", reason="disk_full")
        if ident in self.confirmed:
            return MoveProgress(ident, "Confirmed")
        return MoveProgress(ident, "Ready" if ident in self.ready_moves else "Copying")

    def stop(self) -> None:
        """It dies; its last word stays, and says that it is not ready."""
        self.up = False
        self.acted = None
        self.ready_moves.clear()
        said = self._ring.announcements.get(self.name)
        if said is not None:
            self._ring.announcements[self.name] = msgspec.structs.replace(said, ready=False)

    def start(self) -> None:
        """It comes back with its volume."""
        self.up = True

    def renew(self) -> None:
        """Its volume is gone, and what it announced of it is taken back; it begins with an empty one."""
        self.stop()
        self.volume += " anew"
        self.confirmed.clear()
        self.failed.clear()
        self._ring.announcements.pop(self.name, None)
        self.start()


class PlayedController:
    """One of any number; a look and the change that follows from it may lie apart."""

    def __init__(self, ring: PlayedRing) -> None:
        self.memory: Memory = NO_MEMORY
        self.decision: Decision | None = None
        self._expected: Epoch | None = None
        self._ring = ring

    def look(self) -> Decision:
        """Observe and plan."""
        view = self._ring.view()
        self.decision = plan(view, self.memory, now_s=self._ring.now_s)
        begun = [step.target for step in self.decision.steps if isinstance(step, Begin)]
        assert not set(begun) & self._ring.without_new(), "nothing goes where nothing new should go"
        assert self.decision == plan(view, self.memory, now_s=self._ring.now_s)
        self._expected = None if view.map is None else view.map.epoch
        return self.decision

    def act(self) -> bool:
        """Do what the last look came to; False if somebody else was quicker."""
        decision, self.decision = self.decision, None
        if decision is None:
            return True
        if decision.new_map is not None:
            if self._expected != (None if self._ring.map is None else self._ring.map.epoch):
                return False
            self._ring.change(decision.new_map)
        self.memory = decision.memory
        return True

    def crash(self) -> None:
        """Another process takes its place."""
        self.memory, self.decision = NO_MEMORY, None


class PlayedRing:
    """The control plane, the shards and their time.

    Args:
        shards: that the ring begins with.
        slots: of the ring.
    """

    def __init__(self, *, shards: int, slots: int) -> None:
        self.spec = RingSpec("ring-1", slots, shards)
        self.map: RingMap | None = None
        self.announcements: dict[ShardName, ShardEndpoint] = {}
        self.shards: dict[ShardName, PlayedShard] = {}
        self.avoided: tuple[ShardName, ...] = ()
        """As the view has it: their nodes are cordoned."""
        self.alive: tuple[ShardName, ...] = ()
        """As the view has it: they are seen to run."""
        self.now_s = 0.0
        self.begun: list[str] = []
        self.committed: list[str] = []
        self.run_processes()

    def view(self) -> View:
        """What a look shows."""
        return View(self.spec, self.map, dict(self.announcements), self.avoided, self.alive)

    def without_new(self) -> set[ShardName]:
        """Members that get no slots now; nobody if that were all who may own some."""
        eligible = {
            name
            for name in shard_names(self.spec)
            if name not in self.spec.cordoned and self.map is not None and self.map.member(name) is not None
        }
        return set() if eligible <= set(self.avoided) else eligible & set(self.avoided)

    def ask(
        self,
        *,
        shards: int | None = None,
        cordoned: tuple[ShardName, ...] | None = None,
        pins: tuple[Pin, ...] | None = None,
        forgotten: tuple[Forgotten, ...] | None = None,
    ) -> None:
        """People change their mind; whoever runs the processes follows."""
        self.spec = msgspec.structs.replace(
            self.spec,
            shards=self.spec.shards if shards is None else shards,
            cordoned=self.spec.cordoned if cordoned is None else cordoned,
            pins=self.spec.pins if pins is None else pins,
            forgotten=self.spec.forgotten if forgotten is None else forgotten,
        )
        self.run_processes()

    def run_processes(self) -> None:
        """A process for each shard that is asked for or a member."""
        members = [] if self.map is None else [member.name for member in self.map.members]
        for name in {**dict.fromkeys(shard_names(self.spec)), **dict.fromkeys(members)}:
            if name not in self.shards:
                self.shards[name] = PlayedShard(self, name)

    def change(self, new: RingMap) -> None:
        """A map is made: hold it against the rules."""
        old, self.map = self.map, new
        if old is None:
            assert new.epoch == 1
            return
        assert new.epoch == old.epoch + 1
        moves = {move.id: move for move in old.moves}
        for slot, (was, now) in enumerate(zip(old.owners(), new.owners(), strict=True)):
            if was.owner == now.owner:
                assert (was.epoch, was.via) == (now.epoch, now.via)
                continue
            move = moves[now.via]
            assert move.state == "Sealing", "an owner changes only by a sealed move"
            assert (slot in move.slots, move.source, move.target) == (True, was.owner, now.owner)
            assert now.epoch == new.epoch
            assert move.id in self.shards[now.owner].confirmed, "and only by one that its target confirmed"
        for move in new.moves:
            before = moves.get(move.id)
            if before is None:
                assert (move.epoch, move.state) == (new.epoch, "Copying")
                self.begun.append(move.id)
            else:
                assert before in {move, msgspec.structs.replace(move, state="Copying")}, "a move goes on, never back"
        self.committed += sorted({now.via for now in new.owners()} - {was.via for was in old.owners()})
        assert len(set(self.begun)) == len(self.begun), "an id is used once"
        gone = {member.name for member in old.members} - {member.name for member in new.members}
        assert all(not old.slots_of(name) for name in gone), "who leaves owned nothing"

    def settle(self, controllers: list[PlayedController], *, rounds: int = 400) -> int:
        """Let everything run without further misfortune until nothing changes; returns the rounds."""
        quiet = 0
        for turn in range(rounds):
            before = (self.map, dict(self.announcements))
            self.run_processes()
            for shard in self.shards.values():
                shard.act()
            for controller in controllers:
                controller.look()
                controller.act()
            self.now_s += 1.0
            quiet = quiet + 1 if before == (self.map, dict(self.announcements)) else 0
            if quiet > 70:  # longer than the longest pause after a failure
                return turn - quiet
        raise AssertionError(f"not at rest after {rounds} rounds: {controllers[0].look().sentence}")
