"""The shard's process: ports, signals, and how it ends.

    boot ─► serve ─┬─ SIGTERM, SIGINT      drain: answer what is in flight, checkpoint, exit 0
                   ├─ a younger one asks   stop sequencing, sync, exit EXIT_LEFT
                   ├─ log or volume failed tell who waits, exit EXIT_FAILED
                   └─ fenced               exit EXIT_FENCED at once, without a further word

Promise: the operations port answers from the start and says why the shard is not ready; a refusal that a person must
look at (foreign volume, lost volume, unreadable log) stays up, not ready, and serves nobody.
Must not be done here: anything about sessions.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, Literal, NoReturn

import msgspec
from prometheus_client import CollectorRegistry

from fleetlm_common.config import host_port
from fleetlm_common.control import ControlPlaneUnavailable, ShardEndpoint
from fleetlm_common.ids import Epoch, ShardName
from fleetlm_common.ops import Health, OpsServer
from fleetlm_common.outofmemory import end_when_out_of_memory
from fleetlm_common.ring import is_restored
from fleetlm_shard import admin
from fleetlm_shard.archive.archiver import Archiver, Source
from fleetlm_shard.archive.asking import Asker
from fleetlm_shard.archive.feed import Segment
from fleetlm_shard.archive.library import Library
from fleetlm_shard.archive.link import Start
from fleetlm_shard.archive.restore import Restore
from fleetlm_shard.boot import Boot, Booted, BootInputs, LogLost
from fleetlm_shard.config import PREFIX
from fleetlm_shard.log_types import LogError, LogUnreadable
from fleetlm_shard.metrics import Histograms, ShardCollector
from fleetlm_shard.server import Credentials
from fleetlm_shard.shard import Shard, World
from fleetlm_shard.volume_types import Fenced, ForeignVolume, VolumeUnreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from fleetlm_common.clock import Clock
    from fleetlm_common.control import ControlPlane
    from fleetlm_common.logs import Logger
    from fleetlm_common.ring import RingMap
    from fleetlm_shard.config import ShardConfig
    from fleetlm_shard.disk import Disk
    from fleetlm_shard.lanes import Lanes
    from fleetlm_shard.volume import Volume

EXIT_FENCED: Final = 70
"""A younger process holds the volume."""
EXIT_FAILED: Final = 74
"""The disk, the log on it, or memory failed (EX_IOERR): only a restart that reads the files knows what is there."""
EXIT_LEFT: Final = 75
"""A younger process asked for the volume (EX_TEMPFAIL)."""
PROGRESS_S: Final = 0.5
"""How often the counts of a move are announced; a change of its state is at once."""
ANNOUNCE_S: Final = 0.2
"""How often it is looked whether there is something new to announce: where we are, whether we are ready."""
HANDOVER_BEGINS_S: Final = 10.0
"""A shard that is asked to end waits so long for a move away from it, and is served meanwhile.

A controller begins one within a second; an operator that goes with the same node is replaced only seconds later.
"""
HANDOVER_LOOK_S: Final = 0.02
"""How often it looks whether others have its slots; users are served meanwhile."""
FLUSH_S: Final = 0.5
"""For answers on their way out of a process that ends."""

Ending = Literal["signal", "asked", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What the process gets from `__main__`."""

    disk: Disk
    control: ControlPlane
    clock: Clock
    entropy: random.Random
    events: Logger
    secret: bytes
    new_volume_id: str
    boot_id: str
    lanes: Callable[[asyncio.AbstractEventLoop], Lanes]
    """Makes the log's threads."""
    archive_dsn: str
    """Where PostgreSQL is, as `store.connect` takes it; empty: no archive."""
    exit_now: Callable[[int], NoReturn]
    """Ends the process before another line of it runs (`os._exit`)."""


class ShardProcess:
    """One process of one shard.

    Args:
        config: settings.
        outside: disk, control plane, time, chance.
    """

    def __init__(self, config: ShardConfig, outside: Outside) -> None:
        self._config = config
        self._outside = outside
        self._events = outside.events
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Ending] = self._loop.create_future()
        self._tasks: dict[asyncio.Task[None], None] = {}
        self._boot = Boot(
            BootInputs(
                config=config,
                disk=outside.disk,
                control=outside.control,
                clock=outside.clock,
                entropy=outside.entropy,
                sleep=asyncio.sleep,
                events=outside.events,
                new_volume_id=outside.new_volume_id,
                boot_id=outside.boot_id,
                keep=lambda work: self._run("keep_term", self._kept(work)),
                announce=lambda volume: outside.control.announce(self._endpoint(volume, ready=False)),
            )
        )
        self._refused: Health | None = None
        self._handing_over = False
        self._volume: Volume | None = None
        self._shard: Shard | None = None
        self._listener: asyncio.Server | None = None
        host, port = host_port(config.listen, variable=PREFIX + "LISTEN")
        self._address = (config.advertise_host or host, port)
        self._ops_port = 0
        registry = CollectorRegistry()
        self._histograms = Histograms(registry)
        registry.register(ShardCollector(shard=lambda: self._shard, ready=lambda: self.health().ok))
        self._ops = OpsServer(
            registry=registry,
            ready=self.health,
            routes=admin.routes(lambda: admin.status_of(config.name, self.health(), self._shard)),
        )

    async def run(self) -> int:
        """Live until something ends it; returns the exit status.

        Raises:
            OSError: the operations port cannot be listened on.
        """
        end_when_out_of_memory(self._loop, status=EXIT_FAILED)
        host, port = host_port(self._config.ops_listen, variable=PREFIX + "OPS_LISTEN")
        self._ops_port = await self._ops.start(host, port)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._asked_to_end)
        self._events.event("started", ops_port=self._ops_port, pid=os.getpid())
        self._run("serve", self._serve())
        ending = await self._ended
        self._events.event("ending", why=ending)
        status = await self._finish(ending)
        await self._ops.stop()
        self._events.event("ended", status=status)
        if ending == "failed":
            # A thread may hang in the disk that failed: nobody waits for it.
            self._outside.exit_now(status)
        return status

    def health(self) -> Health:
        """Whether this shard serves what the ring map gives it, and why not."""
        shard = self._shard
        if self._refused is not None:
            return self._refused
        if shard is None:
            return self._boot.stage
        if shard.stopped is not None:
            return Health(ok=False, reason="LogStopped", message=str(shard.stopped))
        if shard.draining or self._ended.done():
            return Health(ok=False, reason="Draining", message="the shard is leaving")
        return shard.health()

    # Serving ---------------------------------------------------------------------------------------------------------

    async def _serve(self) -> None:
        try:
            booted = await self._boot.run()
        except (ForeignVolume, VolumeUnreadable, LogUnreadable, LogLost) as error:
            # Staying up says it where people look; a restart would find the same.
            reason = "VolumeLost" if isinstance(error, LogLost) else type(error).__name__
            self._refused = Health(ok=False, reason=reason, message=str(error))
            self._events.event("boot.refused", level="error", reason=reason, why=str(error))
            return
        self._volume = booted.volume
        lanes = self._outside.lanes(self._loop)
        self._events.event("log.syncs", by="thread" if lanes.syncs is None else "kernel")
        shard = self._make(booted, lanes)
        shard.log.start()
        if booted.ring is not None:
            await shard.ownership.adopt(booted.ring)
        host, port = host_port(self._config.listen, variable=PREFIX + "LISTEN")
        self._listener = await self._loop.create_server(shard.server.protocol, host, port)
        self._address = (self._config.advertise_host or host, self._listener.sockets[0].getsockname()[1])
        self._events.event("listening", host=host, port=self._address[1], term=booted.volume.term)
        self._shard = shard
        if self._outside.archive_dsn:
            shard.archiver = self._archiver(shard, booted.volume)
            dsn, who = self._outside.archive_dsn, f"fleetlm {self._config.name}"
            shard.cold.shelves = Library(dsn, name=f"{who} reader")
            shard.inboxes.asker = Asker(dsn, name=f"{who} inboxes", what="sessions by participant are")
            self._run("archive", shard.archiver.run())
        if any(map(is_restored, shard.ownership.unconfirmed.values())):
            shard.restore = Restore(
                self._outside.archive_dsn,
                writes=shard.writes,
                sessions=shard.memory.sessions,
                keys=shard.memory.keys,
                holdings=shard.holdings,
                ownership=shard.ownership,
                clock=self._outside.clock,
                entropy=self._outside.entropy,
                events=self._events,
            )
            self._run("restore", shard.restore.run())
        self._run("announce", self._announce(booted.volume, shard))
        self._run("watch", shard.ownership.watch())
        self._run("upkeep", shard.upkeep.run())
        self._run("sweep", shard.server.sweep(asyncio.sleep))

    def _make(self, booted: Booted, lanes: Lanes) -> Shard:
        volume, outside = booted.volume, self._outside

        async def store_map(ring: RingMap) -> None:
            await asyncio.to_thread(volume.store_map, ring)

        return Shard(
            config=self._config,
            credentials=Credentials(
                ring_uid=volume.ring_uid,
                shard=self._config.name,
                volume_id=volume.volume_id,
                term=volume.term,
                secret=outside.secret,
            ),
            slots=booted.slots,
            start=booted.start,
            memory=booted.memory,
            rebuilt=booted.rebuilt,
            world=World(
                clock=outside.clock,
                entropy=outside.entropy,
                control=outside.control,
                lanes=lanes,
                sleep=asyncio.sleep,
                events=outside.events,
                store_map=store_map,
                observe_sync=self._histograms.sync_seconds.observe,
                measured=self._histograms.measured,
                on_stopped=self._on_log_stopped,
            ),
        )

    def _archiver(self, shard: Shard, volume: Volume) -> Archiver:
        config, log = self._config, shard.log
        start = Start(
            folder=config.data,
            dsn=self._outside.archive_dsn,
            ring_uid=volume.ring_uid,
            shard=config.name,
            volume_id=volume.volume_id,
            term=volume.term,
            log_style=config.log_style,
            log_level=config.log_level,
            retention_s=config.archive_retention_s,
        )
        source = Source(
            segments=lambda: [Segment(header, end_pos) for header, end_pos in log.places()],
            durable_pos=lambda: log.durable_pos,
            messages_from=log.messages_from,
        )
        return Archiver(start=start, source=source, clock=self._outside.clock, events=self._events)

    async def _announce(self, volume: Volume, shard: Shard) -> None:
        """Say where this shard is and whether it is ready, whenever that changes; runs until cancelled."""
        said: ShardEndpoint | None = None
        said_s = 0.0
        while True:
            shard.news.clear()
            endpoint = self._endpoint(volume, ready=self.health().ok)
            now_s = self._outside.clock.monotonic_s()
            # What only counts has time: on Kubernetes each announcement is a write to the API server.
            if (endpoint != said or self._displaced(volume, shard)) and (
                said is None or now_s - said_s >= PROGRESS_S or _without_counts(endpoint) != _without_counts(said)
            ):
                try:
                    await self._outside.control.announce(endpoint)
                except ControlPlaneUnavailable as error:
                    self._events.event("control.away", level="warning", error=str(error))
                else:
                    said, said_s = endpoint, now_s
            with suppress(TimeoutError):
                async with asyncio.timeout(ANNOUNCE_S):
                    # A target that is ready or done is what everybody who waits for the move waits for.
                    await shard.news.wait()

    def _displaced(self, volume: Volume, shard: Shard) -> bool:
        """Whether a process on another volume speaks in our name, and the map says that it is not the one.

        It was frozen or cut off until people did without its volume. Only the member answers it, so it ends there.
        """
        there = shard.ownership.shards.get(ShardName(self._config.name))
        member = shard.ownership.standing == "Member"
        return member and there is not None and there.volume_id != volume.volume_id

    def _endpoint(self, volume: Volume, *, ready: bool) -> ShardEndpoint:
        host, port = self._address
        shard = self._shard
        ownership = None if shard is None else shard.ownership
        return ShardEndpoint(
            name=ShardName(self._config.name),
            volume_id=volume.volume_id,
            term=volume.term,
            host=host,
            port=port,
            ops_url=f"http://{host}:{self._ops_port}",
            ready=ready,
            moves=() if shard is None else shard.moves.progress,
            epoch=Epoch(0) if ownership is None else ownership.acted_epoch,
            serves=-1 if ownership is None else ownership.holds,
        )

    # Ending ----------------------------------------------------------------------------------------------------------

    def _asked_to_end(self) -> None:
        """A second signal does not wait for anybody."""
        if self._config.handover_s and self._shard is not None and not self._handing_over:
            self._handing_over = True
            self._run("hand over", self._hand_over(self._shard))
        else:
            self._end("signal")

    async def _hand_over(self, shard: Shard) -> None:
        """Serve on while others take the slots; if nobody shall, or no move begins, waiting helps nobody."""
        self._events.event("handing_over", slots=len(shard.ownership.readable))
        clock = self._outside.clock
        begun_s = moved_s = clock.monotonic_s()
        while shard.ownership.holds and clock.monotonic_s() - begun_s < self._config.handover_s:
            if shard.ownership.leaving:
                moved_s = clock.monotonic_s()
            nobody = shard.ownership.in_place or not shard.ownership.has_others
            if nobody or clock.monotonic_s() - moved_s > HANDOVER_BEGINS_S:
                break
            await asyncio.sleep(HANDOVER_LOOK_S)
        self._events.event("handed_over", left=shard.ownership.holds, seconds=round(clock.monotonic_s() - begun_s, 3))
        self._end("signal")

    def _end(self, why: Ending) -> None:
        if not self._ended.done():
            self._ended.set_result(why)

    async def _kept(self, keep_term: Coroutine[None, None, None]) -> None:
        await keep_term
        self._end("asked")

    def _on_log_stopped(self, error: BaseException) -> None:
        self._failed("log", error)

    def _run(self, name: str, work: Coroutine[None, None, None]) -> None:
        """Run a part of the process as a task; if it fails, the process ends."""
        task = self._loop.create_task(work, name=name)
        self._tasks[task] = None
        task.add_done_callback(partial(self._task_done, name))

    def _task_done(self, name: str, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        if not task.cancelled():
            error = task.exception()
            if error is not None:
                self._failed(name, error)

    def _failed(self, part: str, error: BaseException) -> None:
        self._events.event("failed", level="error", part=part, error=repr(error), cause=repr(error.__cause__))
        if isinstance(error, Fenced) or isinstance(error.__cause__, Fenced):
            # Not even what is queued on connections may go out: it could be an answer that is not ours any more.
            self._outside.exit_now(EXIT_FENCED)
        self._end("failed")

    async def _finish(self, ending: Ending) -> int:
        shard = self._shard
        if self._listener is not None:
            self._listener.close()
        self._cancel(*(("serve",) if shard is None else ("serve", "watch", "upkeep", "sweep")))
        status = {"signal": 0, "asked": EXIT_LEFT, "failed": EXIT_FAILED}[ending]
        if shard is not None and ending != "failed":
            status = await self._leave(shard, status, checkpoint=ending == "signal")
        if shard is not None:
            shard.server.close()
            await self._flushed(shard)
        # The archiver has its own process: it ends with what it hears from us.
        self._cancel("announce", "keep_term", "archive", "restore")
        if self._volume is not None:
            with suppress(ControlPlaneUnavailable, TimeoutError):
                async with asyncio.timeout(FLUSH_S):
                    await self._outside.control.announce(self._endpoint(self._volume, ready=False))
            # Last: the lock is the sign of life, and whoever takes the volume goes on at once.
            self._volume.close()
        return status

    async def _leave(self, shard: Shard, status: int, *, checkpoint: bool) -> int:
        """Answer what is in flight, make the log's end durable."""
        shard.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.drain_s):
                # The append path must not pay for an event that only the end needs.
                while shard.server.in_flight:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
        try:
            await shard.close(checkpoint=checkpoint)
        except (LogError, OSError) as error:  # OSError: what is left to tidy up when all is synced
            self._events.event("leave.failed", level="error", error=repr(error))
            return EXIT_FAILED
        return status

    async def _flushed(self, shard: Shard) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                while shard.server.connections:  # noqa: ASYNC110  as above
                    await asyncio.sleep(0.005)

    def _cancel(self, *names: str) -> None:
        for task in self._tasks:
            if task.get_name() in names:
                task.cancel()


def _without_counts(endpoint: ShardEndpoint) -> ShardEndpoint:
    moves = tuple(msgspec.structs.replace(move, done=0, total=0, behind=0) for move in endpoint.moves)
    return msgspec.structs.replace(endpoint, moves=moves)
