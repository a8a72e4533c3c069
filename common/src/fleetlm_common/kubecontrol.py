"""The control plane on Kubernetes: one RingMap, and one Lease per shard with its announcement.

    read              two quorum reads: the RingMap, the Leases of the ring
    watch             list, then watch from there; a cut resumes at the last version, a forgotten one (410) lists anew
    announce          the annotation of the shard's Lease, replaced with its resourceVersion as precondition
    compare_and_swap  the RingMap, replaced with its resourceVersion as precondition, once its epoch is the expected one

Promise: as `ControlPlane` says. An epoch never goes back in what one instance shows, whatever an answer that was under
way for long, a lagging or a restored API server says; what is deleted stays known (the last good copy). Nothing here
needs the API server for what has been seen. Memory: the newest state of one ring, at most `SHARDS_MAX` announcements.
Must not be done here: planning, judging liveness, making objects (the operator makes RingMap and Leases).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final, Generic, NamedTuple, TypeVar

import msgspec

from fleetlm_common import kubenames
from fleetlm_common.control import (
    ControlPlaneUnavailable,
    MapConflict,
    RingSpec,
    ShardEndpoint,
    View,
    replaces,
)
from fleetlm_common.ids import Epoch, ShardName
from fleetlm_common.kubeapi import ApiConflict, ApiError, ApiExpired, KubeApi, Object
from fleetlm_common.kubemap import read_ring_map, ring_map_spec
from fleetlm_common.kubenames import Resource
from fleetlm_common.ring import SHARDS_MAX, RingMap

READ_S: Final = 5.0
"""A live read that takes longer counts as no answer: a shard that boots goes by its stored map then, if it may."""
CHANGE_S: Final = 10.0
"""Longest change, its retries included."""
TRIES_MAX: Final = 8
"""Writes lost against other writers of one object: each loss means that somebody else got through."""
RETRY_BASE_S: Final = 0.2
"""Bound of the first wait after a watch broke; waits are random below a bound that doubles."""
RETRY_CAP_S: Final = 5.0
"""Largest bound: how late a watcher notices that the API server is back. Hundreds of them come back spread over it."""
HOLDER_CHARS_MAX: Final = 128
"""The Lease's holder is for people: `kubectl get leases` shows it."""
NO_RING_MAP: Final = "there is no RingMap; the operator makes it"

T = TypeVar("T")


class _Meta(msgspec.Struct, frozen=True, rename="camel"):
    """What is used of an object's metadata."""

    resource_version: str
    name: str = ""
    """A bookmark's object has none."""
    annotations: dict[str, str] = {}


class _Known(NamedTuple, Generic[T]):
    """The state of one object: its value, its version, and at which look it was taken."""

    value: T
    version: int
    taken: int


class _Ring(NamedTuple):
    spec: RingSpec
    map: RingMap | None


@dataclass(slots=True)
class _Follower:
    """One watched collection."""

    resource: Resource
    labels: str
    fields: str
    take: Callable[[Object, int], None]
    listed: bool = False
    """It has been seen whole at least once."""


class KubernetesControlPlane:
    """`ControlPlane` of one ring on Kubernetes. One instance belongs to one event loop.

    Every method may be cancelled; the outcome of a cancelled change is unknown.

    Args:
        namespace: of the ring.
        ring: the ShardRing's name, which is the RingMap's too.
        connect: makes the connection to the API server, when it is first needed.
        entropy: for jitter.
        sleep: waits.
    """

    def __init__(
        self,
        namespace: str,
        ring: str,
        *,
        connect: Callable[[], Awaitable[KubeApi]],
        entropy: random.Random,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._namespace = namespace
        self._name = ring
        self._connect = connect
        self._entropy = entropy
        self._sleep = sleep
        self._connecting = asyncio.Lock()
        self._api: KubeApi | None = None
        self._looks = 0
        self._ring: _Known[_Ring] | None = None
        self._shards: dict[ShardName, _Known[ShardEndpoint]] = {}
        self._changed: set[asyncio.Event] = set()
        self._troubles: dict[str, str] = {}

    @property
    def trouble(self) -> str | None:
        """See `ControlPlane.trouble`."""
        return "; ".join(self._troubles.values()) or None

    async def close(self) -> None:
        """See `ControlPlane.close`."""
        if self._api is not None:
            await self._api.close()
            self._api = None

    async def read(self) -> View:
        """See `ControlPlane.read`."""
        async with self._translated(READ_S):
            api = await self._connected()
            known, began = self._ring, self._begin()
            found, leases = await _both(
                api.get(kubenames.RING_MAPS, self._namespace, self._name),
                api.list(kubenames.LEASES, self._namespace, labels=self._labels),
            )
            if found is None:
                raise ControlPlaneUnavailable(f"{self}: {NO_RING_MAP}")
            self._take_ring(found, began, known)
            for lease in leases.items:
                self._take_lease(lease, began)
        return self._view()

    async def watch(self) -> AsyncIterator[View]:
        """See `ControlPlane.watch`."""
        news = asyncio.Event()
        followers = (
            _Follower(kubenames.RING_MAPS, "", f"metadata.name={self._name}", self._take_ring),
            _Follower(kubenames.LEASES, self._labels, "", self._take_lease),
        )
        self._changed.add(news)
        tasks = [
            asyncio.create_task(self._follow(each, news), name=f"watch {each.resource.plural}") for each in followers
        ]
        for task in tasks:
            task.add_done_callback(lambda _: news.set())
        shown: View | None = None
        try:
            while True:
                await news.wait()
                news.clear()
                for task in tasks:
                    if task.done():
                        task.result()  # followers end by a defect only
                if self._ring is not None and all(each.listed for each in followers):
                    view = self._view()
                    if view != shown:
                        shown = view
                        yield view
        finally:
            self._changed.discard(news)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def announce(self, endpoint: ShardEndpoint) -> None:
        """Write it on the shard's Lease; see `ControlPlane.announce`."""
        lease = kubenames.shard_pod(self._name, kubenames.ordinal_of(endpoint.name))
        said = msgspec.json.encode(endpoint).decode()
        holder = f"{endpoint.host}:{endpoint.port} term {endpoint.term}"[:HOLDER_CHARS_MAX]
        async with self._translated(CHANGE_S):
            api = await self._connected()
            for _ in range(TRIES_MAX):
                found = await api.get(kubenames.LEASES, self._namespace, lease)
                if found is None:
                    raise ControlPlaneUnavailable(f"{self}: the operator has not made the Lease {lease} yet")
                meta = _meta(found)
                known = _endpoint(meta)
                if known is not None and (known == endpoint or not replaces(endpoint, known)):
                    return
                patch = {
                    "metadata": {
                        "resourceVersion": meta.resource_version,
                        "annotations": {kubenames.ENDPOINT_ANNOTATION: said},
                    },
                    "spec": {"holderIdentity": holder},
                }
                with suppress(ApiConflict):
                    await api.merge(kubenames.LEASES, self._namespace, lease, patch, manager=endpoint.name)
                    return
            raise ControlPlaneUnavailable(f"{self}: somebody else writes the Lease {lease} all the time")

    async def compare_and_swap(self, *, expected: Epoch | None, new: RingMap) -> None:
        """Replace the RingMap's map; see `ControlPlane.compare_and_swap`."""
        if new.epoch != (expected or 0) + 1:
            raise ValueError(f"the map after epoch {expected} cannot have epoch {new.epoch}")
        async with self._translated(CHANGE_S):
            api = await self._connected()
            for _ in range(TRIES_MAX):
                found = await api.get(kubenames.RING_MAPS, self._namespace, self._name)
                if found is None:
                    raise ControlPlaneUnavailable(f"{self}: {NO_RING_MAP}")
                spec, current = self._decoded(found)
                if (new.uid, new.slots) != (spec.uid, spec.slots):
                    raise ValueError(
                        f"a map of ring {new.uid} ({new.slots} slots) for ring {spec.uid} ({spec.slots} slots)"
                    )
                epoch = None if current is None else current.epoch
                if epoch != expected:
                    raise MapConflict(expected=expected, found=epoch)
                with suppress(ApiConflict):  # the number of shards may have changed: only the epoch decides
                    await api.replace(kubenames.RING_MAPS, self._namespace, {**found, "spec": ring_map_spec(spec, new)})
                    return
            raise ControlPlaneUnavailable(f"{self}: somebody else writes the RingMap all the time")

    # Following -------------------------------------------------------------------------------------------------------

    async def _follow(self, what: _Follower, news: asyncio.Event) -> None:
        """List and watch until cancelled; trouble is waited out."""
        version: str | None = None
        failures = 0
        while True:
            progressed = False
            try:
                api = await self._connected()
                if version is None:
                    version = await self._list(api, what)
                    news.set()
                    progressed = True
                began = self._begin()
                events = api.watch(
                    what.resource, self._namespace, version=version, labels=what.labels, fields=what.fields
                )
                async for event in events:
                    version = _meta(event.object).resource_version
                    progressed = True
                    self._troubles.pop(what.resource.plural, None)
                    if event.type in {"ADDED", "MODIFIED"}:
                        self._took(what, event.object, began)
            except ApiExpired:
                version = None
            except ApiError as error:
                self._troubles[what.resource.plural] = f"{self}: {error}"
                if error.status and not progressed:  # perhaps it dislikes the version, as after a restore from a backup
                    version = None
            failures = 1 if progressed else failures + 1
            await self._sleep(self._entropy.uniform(0, min(RETRY_CAP_S, RETRY_BASE_S * 2 ** min(failures, 16))))

    async def _list(self, api: KubeApi, what: _Follower) -> str:
        began = self._begin()
        listing = await api.list(what.resource, self._namespace, labels=what.labels, fields=what.fields)
        self._troubles.pop(what.resource.plural, None)
        for found in listing.items[:SHARDS_MAX]:
            self._took(what, found, began)
        if what.resource == kubenames.RING_MAPS and not listing.items:
            self._troubles[what.resource.plural] = f"{self}: {NO_RING_MAP}"
        what.listed = True
        return listing.version

    def _took(self, what: _Follower, found: Object, began: int) -> None:
        """What cannot be taken is no news."""
        try:
            what.take(found, began)
        except ControlPlaneUnavailable as error:
            self._troubles[what.resource.plural] = str(error)

    # What is known ---------------------------------------------------------------------------------------------------

    def _begin(self) -> int:
        """The number of what happens now: a look's beginning, an answer's taking."""
        self._looks += 1
        return self._looks

    def _take_ring(self, found: Object, began: int, known: _Known[_Ring] | None = None) -> None:
        """Merge a RingMap.

        Args:
            found: the object.
            began: the look that it belongs to.
            known: what was known when the look began; a live answer that is older than this has gone back.

        Raises:
            ControlPlaneUnavailable: it is damaged, of another ring, or has gone back.
        """
        spec, ring = self._decoded(found)
        for seen in (known, self._ring):
            if seen is not None:
                self._refuse_other(seen.value, spec, ring, lagging=seen is not known)
        version = int(_meta(found).resource_version)
        current = self._ring
        if current is not None:
            if current.version > version and current.taken > began:
                return  # newer, and taken since this look began
            if _epoch(ring) < _epoch(current.value.map):
                return  # an answer that lags behind is no news
        self._ring = _Known(_Ring(spec, ring), version, self._begin())
        self._tell(current is None or current.value != self._ring.value)

    def _refuse_other(self, seen: _Ring, spec: RingSpec, ring: RingMap | None, *, lagging: bool) -> None:
        """A ring keeps uid and slots for life, an epoch never goes back, and one epoch has one map."""
        if (spec.uid, spec.slots) != (seen.spec.uid, seen.spec.slots):
            raise ControlPlaneUnavailable(f"{self}: the RingMap names another ring than before")
        back, same = _epoch(ring) < _epoch(seen.map), _epoch(ring) == _epoch(seen.map)
        if (back and not lagging) or (same and ring != seen.map):
            raise ControlPlaneUnavailable(
                f"{self}: the RingMap went from epoch {_epoch(seen.map)} to another of epoch {_epoch(ring)}"
            )

    def _take_lease(self, found: Object, began: int) -> None:
        """Merge an announcement; one that cannot be read is no news, and neither is an elder's word."""
        meta = _meta(found)
        endpoint = _endpoint(meta)
        if endpoint is None or meta.name != _lease_name(self._name, endpoint.name):
            return
        current = self._shards.get(endpoint.name)
        version = int(meta.resource_version)
        if current is not None:
            if current.version > version and current.taken > began:
                return
            if not replaces(endpoint, current.value):
                return
        self._shards[endpoint.name] = _Known(endpoint, version, self._begin())
        self._tell(current is None or current.value != endpoint)

    def _tell(self, changed: bool) -> None:
        if changed:
            for news in self._changed:
                news.set()

    def _view(self) -> View:
        assert self._ring is not None
        spec, ring = self._ring.value
        shards: Mapping[ShardName, ShardEndpoint] = {name: self._shards[name].value for name in sorted(self._shards)}
        return View(spec, ring, shards)

    def _decoded(self, found: Object) -> tuple[RingSpec, RingMap | None]:
        try:
            return read_ring_map(found)
        except (ValueError, KeyError) as error:
            raise ControlPlaneUnavailable(f"{self}: the RingMap is damaged: {error}") from error

    # The API server --------------------------------------------------------------------------------------------------

    @property
    def _labels(self) -> str:
        return f"{kubenames.RING_LABEL}={self._name}"

    async def _connected(self) -> KubeApi:
        async with self._connecting:
            if self._api is None:
                self._api = await self._connect()
            return self._api

    @asynccontextmanager
    async def _translated(self, deadline_s: float) -> AsyncGenerator[None]:
        """Within it there is one deadline, and what the API server refuses is said in the control plane's words."""
        try:
            async with asyncio.timeout(deadline_s):
                yield
        except TimeoutError as error:
            raise ControlPlaneUnavailable(f"{self}: no answer within {deadline_s:g} s") from error
        except ApiError as error:
            raise ControlPlaneUnavailable(f"{self}: {error}") from error

    def __str__(self) -> str:
        return f"{kubenames.CONTROL_SCHEME}{self._namespace}/{self._name}"


async def _both(one: Awaitable[T], two: Awaitable[Any]) -> tuple[T, Any]:
    """Wait for two requests; if one fails the other is not left behind."""
    tasks = asyncio.ensure_future(one), asyncio.ensure_future(two)
    try:
        first, second = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return first, second


def _meta(found: Object) -> _Meta:
    return msgspec.convert(found["metadata"], _Meta)


def _epoch(ring: RingMap | None) -> int:
    return 0 if ring is None else ring.epoch


def _lease_name(ring: str, shard: ShardName) -> str | None:
    try:
        return kubenames.shard_pod(ring, kubenames.ordinal_of(shard))
    except ValueError:
        return None


def _endpoint(meta: _Meta) -> ShardEndpoint | None:
    """The announcement on a Lease, if it is a whole one."""
    try:
        return msgspec.json.decode(meta.annotations.get(kubenames.ENDPOINT_ANNOTATION, ""), type=ShardEndpoint)
    except msgspec.DecodeError:
        return None
