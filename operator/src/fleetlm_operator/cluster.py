"""The operator on Kubernetes: election, kopf as the watcher, one reconciler, an operations port, an orderly end.

Promise: whoever leads looks after every ring; a standby is ready to follow; nothing but the API server's objects is
state. kopf brings hints only (`on.event`): its timers and daemons would put a finalizer on every ShardRing, and
deleting one would then wait for an operator. Must not be done here: anything about a ring (`reconcile.py`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Final

import kopf
from prometheus_client import CollectorRegistry

from fleetlm_common.clock import Clock, SystemClock
from fleetlm_common.config import ConfigError, host_port
from fleetlm_common.kubeapi import ApiError, KubeApi
from fleetlm_common.kubenames import LEASES, RING_LABEL, RING_MAPS, SHARD_RINGS
from fleetlm_common.logs import Logger, StreamLogger
from fleetlm_common.ops import Health, OpsServer
from fleetlm_operator.config import OPERATOR_PREFIX, OperatorConfig
from fleetlm_operator.kubemetrics import KubeMetrics
from fleetlm_operator.kubeworld import KubeWorld
from fleetlm_operator.leader import Leadership
from fleetlm_operator.reconcile import Reconciler
from fleetlm_operator.resources import CLAIMS, DEPLOYMENTS, PODS, SERVICES, STATEFUL_SETS
from fleetlm_operator.ringplan import Defaults
from fleetlm_operator.shardwords import ShardWords

WATCHED: Final = (RING_MAPS, LEASES, PODS, STATEFUL_SETS, DEPLOYMENTS, SERVICES, CLAIMS)
"""Children whose changes are hints. Others (accounts, roles, policies, the Secret) are seen at the next resync:
watching Secrets would need the right to list them all. So are nodes: a cordon alone asks for no step."""
WATCH_AGAIN_S: Final = 2.0
"""Pause before kopf is started again after it ended."""
CREDENTIAL_BYTES: Final = 32
"""Of a ring's credential."""


class Operator:
    """One operator process.

    Args:
        config: its settings.
        api: the connection.
        registry: where metrics are shown.
        clock: for ages.
        log: where events go.
    """

    def __init__(
        self, config: OperatorConfig, api: KubeApi, *, registry: CollectorRegistry, clock: Clock, log: Logger
    ) -> None:
        self._config = config
        self._api = api
        self._clock = clock
        self._log = log
        self._metrics = KubeMetrics(registry)
        self._reconciler: Reconciler | None = None
        self.stop = asyncio.Event()
        own = config.version or version("fleetlm-operator")
        self._defaults = Defaults(registry=config.image_registry, version=own, namespace=config.pod_namespace)

    def ready(self) -> Health:
        """A standby is as ready as a leader."""
        return Health(ok=True, reason="Standby" if self._reconciler is None else "Leading")

    def live(self) -> Health:
        """Whether steps end, while this operator leads."""
        return Health(ok=True, reason="Alive") if self._reconciler is None else self._reconciler.live()

    async def run(self) -> None:
        """Take part in the election, lead when elected, until `stop`."""
        election = Leadership(
            self._api,
            namespace=self._config.pod_namespace,
            name=self._config.lease_name,
            identity=self._config.pod_name,
            deployment=self._config.deployment,
            clock=self._clock,
            now=_now,
            log=self._log,
        )
        while not self.stop.is_set():
            await self._until_stopped(self._term(election))

    async def _until_stopped(self, work: Any) -> None:
        """Run `work`; `stop` cancels it."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.create_task(self.stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopped.cancel()
            if not task.done():
                task.cancel()
            results = await asyncio.gather(task, stopped, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    async def _term(self, election: Leadership) -> None:
        """One time as leader."""
        async with election.lead() as lost, ShardWords() as words:
            self._metrics.leader.set(1)
            self._metrics.leaderships.inc()
            world = KubeWorld(
                self._api,
                now=_now,
                new_credential=lambda: secrets.token_urlsafe(CREDENTIAL_BYTES),
                words=words,
                log=self._log,
            )
            reconciler = Reconciler(
                self._api,
                world,
                defaults=self._defaults,
                clock=self._clock,
                now=_now,
                log=self._log,
                metrics=self._metrics,
            )
            self._reconciler = reconciler
            work: list[asyncio.Task[None]] = [
                asyncio.create_task(reconciler.run()),
                asyncio.create_task(self._watch(reconciler, lost)),
            ]
            ended = asyncio.create_task(_until(lost))
            try:
                await asyncio.wait({ended, *work}, return_when=asyncio.FIRST_COMPLETED)
                for task in work:
                    if task.done():
                        task.result()  # it ends only by an error, which is a defect: fail loudly, be started again
            finally:
                for task in (ended, *work):
                    task.cancel()
                await asyncio.gather(ended, *work, return_exceptions=True)
                self._reconciler = None
                self._metrics.leader.set(0)

    async def _watch(self, reconciler: Reconciler, lost: asyncio.Event) -> None:
        """kopf, again and again: it ends when a kind of object disappears, or was not there yet."""
        while True:
            try:
                await self._api.list(SHARD_RINGS, self._config.only[0] if self._config.only else None)
                await kopf.operator(
                    registry=hint_registry(reconciler),
                    settings=kopf_settings(),
                    namespaces=self._config.only,
                    clusterwide=not self._config.only,
                    standalone=True,
                    stop_flag=lost,
                    ready_flag=self._signals_back(),
                )
                if not lost.is_set():  # it had the signals while it started, and one came
                    self.stop.set()
            except ApiError as error:
                self._log.event("watch_failed", level="warning", error=str(error))
            except Exception as error:  # noqa: BLE001 - whatever ended kopf, watching must go on; it is told and counted
                self._log.event("watch_failed", level="warning", error=repr(error))
            self._metrics.watch_restarts.inc()
            await asyncio.sleep(WATCH_AGAIN_S)

    def _signals_back(self) -> asyncio.Event:
        """Kopf takes the process's signals when it starts; ours are put back when it is ready."""
        ready = asyncio.Event()

        async def put_back() -> None:
            await ready.wait()
            on_signals(self.stop)

        self._putting_back = asyncio.create_task(put_back())
        return ready


def hint_registry(reconciler: Reconciler) -> kopf.OperatorRegistry:
    """What kopf watches, and that each event is a hint and no more."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    def login(**given: Any) -> kopf.ConnectionInfo | None:
        return kopf.login_with_service_account(**given) or kopf.login_with_kubeconfig(**given)

    def on_ring(name: str | None, namespace: str | None, **_: object) -> None:
        if name and namespace:
            reconciler.hint(namespace, name)

    def on_child(namespace: str | None, labels: kopf.Labels, **_: object) -> None:
        if namespace:
            reconciler.hint(namespace, labels[RING_LABEL])

    kopf.on.event(*_group_and_plural(SHARD_RINGS.api, SHARD_RINGS.plural), registry=registry)(on_ring)
    for resource in WATCHED:
        where = _group_and_plural(resource.api, resource.plural)
        kopf.on.event(*where, registry=registry, labels={RING_LABEL: kopf.PRESENT}, id=f"on_{resource.plural}")(
            on_child
        )
    return registry


def _group_and_plural(api: str, plural: str) -> tuple[str, str, str]:
    group, _, name = api.rpartition("/")
    return group, name, plural


def kopf_settings() -> kopf.OperatorSettings:
    """Kopf as a watcher: it writes nothing, posts nothing, needs no rights beyond what it watches."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.process.ultimate_exiting_timeout = None
    settings.networking.error_backoffs = (1, 2, 3, 5)
    settings.watching.server_timeout = 240
    settings.watching.connect_timeout = 10
    for resource in WATCHED:
        settings.watching.label_selectors[_group_and_plural(resource.api, resource.plural)] = RING_LABEL
    return settings


class _KopfLines(logging.Handler):
    """kopf's own warnings as events."""

    def __init__(self, log: Logger) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """One event a line."""
        self._log.event("kopf", level="warning", message=record.getMessage())


async def _until(event: asyncio.Event) -> None:
    await event.wait()


def on_signals(stop: asyncio.Event) -> None:
    """SIGTERM and SIGINT set `stop`."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


def _now() -> datetime:
    return datetime.fromtimestamp(SystemClock().now_ms() / 1000, UTC)


async def run(config: OperatorConfig) -> None:
    """Look after rings until SIGTERM or SIGINT.

    Raises:
        ConfigError: there is no API server to talk to.
        OSError: the operations port cannot be listened on.
    """
    clock = SystemClock()
    log = StreamLogger("operator", style=config.log_style, level=config.log_level, clock=clock)
    kopf_log = logging.getLogger("kopf")
    kopf_log.handlers, kopf_log.propagate = [_KopfLines(log)], False
    registry = CollectorRegistry()
    try:
        api = await KubeApi.connect(os.environ, agent=f"fleetlm-operator/{version('fleetlm-operator')}")
    except ApiError as error:
        raise ConfigError(str(error)) from error
    operator = Operator(config, api, registry=registry, clock=clock, log=log)
    ops = OpsServer(registry=registry, ready=operator.ready, live=operator.live)
    host, port = host_port(config.ops_listen, variable=OPERATOR_PREFIX + "OPS_LISTEN")
    try:
        port = await ops.start(host, port)
        on_signals(operator.stop)
        log.event("started", ops_port=port, namespaces=list(config.only))
        await operator.run()
        log.event("stopping")
    finally:
        await ops.stop()
        await api.close()
