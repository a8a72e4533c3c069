"""One shard, put together: everything between its connections and its log, without a process around it.

    server ─► sequencer ─► writes ─► log          (appends)
       └────► service ─► replay, cursors          (the rest)      ownership decides what may be asked at all

Promise: the parts are wired here and nowhere else, so that the simulator runs the real ones. Must not be done here:
sockets, signals, files (`process.py`), the rules of the parts.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from fleetlm_common.errors import FleetError, TryAgain
from fleetlm_common.ids import ShardName
from fleetlm_common.ops import Health
from fleetlm_common.slots import slot_of
from fleetlm_shard.archive.cold import Cold
from fleetlm_shard.archive.inboxes import Inboxes
from fleetlm_shard.cursors import SessionWrites
from fleetlm_shard.exporter import Exporter
from fleetlm_shard.importer import ImportParts
from fleetlm_shard.keys import KeyWindow
from fleetlm_shard.log import Log
from fleetlm_shard.moving import Moves
from fleetlm_shard.ownership import Ownership
from fleetlm_shard.peer import source_of
from fleetlm_shard.records import SlotsOpened
from fleetlm_shard.replay import Replay
from fleetlm_shard.sequencer import Sequencer, log_stopped
from fleetlm_shard.server import Credentials, Server
from fleetlm_shard.service import Service
from fleetlm_shard.sessions import Sessions
from fleetlm_shard.subscriptions import Subscriptions
from fleetlm_shard.upkeep import Upkeep
from fleetlm_shard.writes import Writes

if TYPE_CHECKING:
    import random
    from collections.abc import Awaitable, Callable, Coroutine

    from fleetlm_common.clock import Clock
    from fleetlm_common.control import ControlPlane
    from fleetlm_common.ids import Epoch, SessionId, Slot
    from fleetlm_common.logs import Logger
    from fleetlm_common.ring import RingMap
    from fleetlm_shard.appender import Durable
    from fleetlm_shard.archive.archiver import Archiver
    from fleetlm_shard.archive.restore import Restore
    from fleetlm_shard.config import ShardConfig
    from fleetlm_shard.lanes import Lanes
    from fleetlm_shard.rebuild import Rebuilt
    from fleetlm_shard.recovery import LogStart
    from fleetlm_shard.sessions import RowSource
    from fleetlm_shard.writes import Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What a shard gets from outside: time, chance, control plane, threads."""

    clock: Clock
    entropy: random.Random
    control: ControlPlane
    lanes: Lanes
    sleep: Callable[[float], Awaitable[None]]
    events: Logger
    store_map: Callable[[RingMap], Awaitable[None]]
    observe_sync: Callable[[float], None]
    measured: Measured
    on_stopped: Callable[[BaseException], None]
    """The log has stopped: called once, before anybody who waits is told; may end the process at once."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What boot rebuilds from the log: made before it, given to the shard after it."""

    sessions: Sessions
    keys: KeyWindow

    @classmethod
    def empty(cls, config: ShardConfig, *, slots: int, rows: RowSource) -> Memory:
        """Before the log was read."""
        return cls(
            Sessions(slot_of=lambda ident: slot_of(ident, slots), rows=rows, bytes_max=config.hot_bytes_max),
            KeyWindow(window_s=config.keys_window_s, soft_max=config.keys_max, hard_max=config.keys_hard_max),
        )


class Shard:
    """A running shard. Made in the loop, after boot has read and cut the log.

    Args:
        config: settings.
        credentials: whom gateways must name and what they must present.
        slots: of the ring.
        start: the log, cut.
        memory: what was rebuilt from it.
        rebuilt: what else was found.
        world: the outside.
    """

    def __init__(
        self,
        *,
        config: ShardConfig,
        credentials: Credentials,
        slots: int,
        start: LogStart,
        memory: Memory,
        rebuilt: Rebuilt,
        world: World,
    ) -> None:
        self.config = config
        self.credentials = credentials
        self.memory = memory
        self.draining = False
        self.stopped: BaseException | None = None
        self.archiver: Archiver | None = None
        """Set by the process if there is an archive."""
        self.restore: Restore | None = None
        """Set by the process if its volume took the place of one that was given up."""
        self._world = world
        self._slots = slots
        self.log = Log(
            start,
            lanes=world.lanes,
            loop=asyncio.get_running_loop(),
            on_durable=self._on_durable,
            on_stopped=self._on_stopped,
            monotonic=world.clock.monotonic_s,
            observe_sync=world.observe_sync,
        )
        sessions = memory.sessions
        sessions.rows = self.log
        self.subscriptions = Subscriptions()
        self.writes = Writes(self.log, sessions, self.subscriptions, clock=world.clock, measured=world.measured)
        self.cold = Cold(self.log)
        self.inboxes = Inboxes()
        self.replay = Replay(sessions, self.cold)
        self.holdings = rebuilt.holdings
        self.news = asyncio.Event()
        """Set when something must be announced at once."""
        self.ownership = self._make_ownership()
        self.sequencer = Sequencer(
            writes=self.writes,
            sessions=sessions,
            keys=memory.keys,
            clock=world.clock,
            entropy=world.entropy,
            look=self.log.look,
            stored=self.replay.message,
            admits=self._admits,
            spawn=self._spawn,
        )
        self.session_writes = SessionWrites(
            writes=self.writes,
            sessions=sessions,
            subscriptions=self.subscriptions,
            clock=world.clock,
            admits=self._admits,
        )
        self.moves = self._make_moves(config)
        self.server = self._make_server(config)
        self.upkeep = self._make_upkeep(config)

    def _make_upkeep(self, config: ShardConfig) -> Upkeep:
        world = self._world
        return Upkeep(
            log=self.log,
            sessions=self.memory.sessions,
            keys=self.memory.keys,
            holdings=self.holdings,
            clean=self.moves.clean,
            archived_below=lambda: None if self.archiver is None else self.archiver.floor_pos,
            slot_of=self.slot_of,
            config=config,
            clock=world.clock,
            sleep=world.sleep,
            events=world.events,
        )

    def _make_ownership(self) -> Ownership:
        world = self._world
        return Ownership(
            shard=ShardName(self.credentials.shard),
            volume_id=self.credentials.volume_id,
            control=world.control,
            store_map=world.store_map,
            open_slots=self._open_slots,
            on_released=self._on_released,
            on_map=self._on_map,
            news=self.news.set,
            holdings=self.holdings,
            log=world.events,
        )

    def _make_moves(self, config: ShardConfig) -> Moves:
        world, memory, synced = self._world, self.memory, config.fsync == "always"
        exporter = Exporter(
            shard=self.ownership.shard,
            log=self.log,
            writes=self.writes,
            sessions=memory.sessions,
            keys=memory.keys,
            holdings=self.holdings,
            slot_of=self.slot_of,
            refresh=self.ownership.refresh,
            synced=synced,
            monotonic=world.clock.monotonic_s,
            sleep=world.sleep,
            spawn=self._spawn,
        )
        parts = ImportParts(
            log=self.log,
            writes=self.writes,
            sessions=memory.sessions,
            keys=memory.keys,
            holdings=self.holdings,
            clock=world.clock,
            sleep=world.sleep,
            events=world.events,
            slot_of=self.slot_of,
            source_of=lambda move: source_of(move, self.ownership, self.credentials),
            reader=lambda: f"{self.credentials.shard}/{world.entropy.getrandbits(64):016x}",
            epoch=lambda: self.ownership.epoch,
            synced=synced,
            changed=self.news.set,
        )
        return Moves(
            credentials=self.credentials,
            exporter=exporter,
            parts=parts,
            ownership=self.ownership,
            holdings=self.holdings,
            sessions=memory.sessions,
            writes=self.writes,
            clock=world.clock,
            clean_after_s=config.clean_after_s,
            events=world.events,
            news=self.news.set,
        )

    def _make_server(self, config: ShardConfig) -> Server:
        sessions = self.memory.sessions
        service = Service(
            ownership=self.ownership,
            slot_of=self.slot_of,
            look=self.log.look,
            sessions=sessions,
            replay=self.replay,
            writes=self.session_writes,
            names=self._names,
        )
        return Server(
            credentials=self.credentials,
            service=service,
            exporter=self.moves.exporter,
            inboxes=self.inboxes,
            sequencer=self.sequencer,
            sessions=sessions,
            ownership=self.ownership,
            subscriptions=self.subscriptions,
            slot_of=self.slot_of,
            refusal=self.refusal,
            log=self._world.events,
            connections_max=config.connections_max,
            requests_max=config.requests_max,
        )

    def slot_of(self, ident: SessionId) -> Slot:
        """The slot of a session in this ring."""
        return slot_of(ident, self._slots)

    def refusal(self) -> FleetError | None:
        """Why no request at all is taken now."""
        if self.stopped is not None:
            return log_stopped()
        if self.draining:
            return _leaving()
        return None

    def drain(self) -> None:
        """Take no further request, say so to every gateway, end subscriptions; what is in flight is still answered."""
        self.draining = True
        self.moves.cancel()
        self.ownership.held.refuse_all(_leaving())
        self.server.goaway("draining")

    def health(self) -> Health:
        """Whether this shard serves what the ring map gives it, and why not."""
        standing = self.ownership.standing
        if standing == "VolumeLost":
            return Health(ok=False, reason=standing, message="the ring map binds this shard to another volume")
        if standing == "NotMember":
            return Health(ok=False, reason=standing, message="no ring map names this shard yet")
        if self.log.full:
            return Health(ok=False, reason="DiskFull", message="the volume has no space for a further segment")
        if self.ownership.unconfirmed:
            return self._unconfirmed()
        opening, readable = self.ownership.opening, len(self.ownership.readable)
        # One that serves goes on: unready, its pod would be no loss to a disruption budget, and its moves would wait.
        if opening and not readable:
            return Health(ok=False, reason="OpeningSlots", message=f"{opening} slots are being opened")
        if self.log.damage:
            words = f"{len(self.log.damage)} ranges of the log are unreadable; readers get gaps"
            return Health(ok=True, reason="LogDamaged", message=words)
        archive = None if self.archiver is None else self.archiver.health()
        if archive is not None:
            return archive
        slots = f"{readable} slots, {opening} being opened" if opening else f"{readable} slots"
        words = "; ".join(filter(None, (slots, self.moves.words)))
        return Health(ok=True, reason="Ready", message=words)

    def _unconfirmed(self) -> Health:
        if self.restore is not None and not self.restore.done:
            return self.restore.health()
        move = next(iter(self.ownership.unconfirmed.values()))
        words = f"the ring map gives slots to this shard by move {move}, which its volume does not hold"
        return Health(ok=False, reason="MoveNotHere", message=words)

    async def close(self, *, checkpoint: bool) -> None:
        """Graceful end after `drain`: what is queued becomes durable, a checkpoint shortens the next boot.

        Raises:
            LogStopped: the log failed first.
        """
        await self.writes.all_settled()
        if checkpoint:
            await self.upkeep.checkpoint()
        await self.log.close()

    def _on_durable(self, records: list[Durable]) -> None:
        try:
            self.writes.on_durable(records)
        except Exception as error:
            # A mistake of ours between disk and answer: whoever waits would wait for ever. Only a restart is safe.
            self._on_stopped(error)
            raise

    def _on_stopped(self, error: BaseException) -> None:
        self.stopped = error
        self._world.on_stopped(error)
        self.writes.on_stopped()

    def _admits(self, slot: Slot) -> None:
        """After a wait inside an append: may it still be written?"""
        error = self.refusal()
        if error is not None:
            raise error
        self.ownership.admit(slot)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        self.server.spawn(work)

    async def _open_slots(self, slots: dict[Slot, Epoch]) -> None:
        by_epoch: dict[Epoch, list[int]] = {}
        for slot, epoch in slots.items():
            by_epoch.setdefault(epoch, []).append(slot)
        # From the reserve, too: on a full disk these slots are read, and their appends hear that it is full.
        for epoch, opened in by_epoch.items():
            self.writes.own(SlotsOpened(epoch, opened), _nothing)
        await self.writes.all_settled()

    def _on_map(self, ring: RingMap) -> None:
        self.moves.on_map(ring)

    def _on_released(self, slots: set[Slot]) -> None:
        """Slots that fell silent: their subscriptions end after their last push."""
        self.subscriptions.end(iter(self.memory.sessions.hot_of(slots)), self.ownership.ended)

    async def _names(self, after: str, limit: int) -> list[str]:
        stored = (name for name, _ in islice(self.log.rows(after), limit))
        return self.memory.sessions.names(after, limit, stored)


def _leaving() -> TryAgain:
    """What everybody hears from a shard that ends; a new one each time, for what is raised keeps frames."""
    return TryAgain("this shard is leaving", reason="draining")


def _nothing(_: int) -> None:
    """The record that slots are opened changes nothing but the log."""
