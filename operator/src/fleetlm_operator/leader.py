"""Who leads: one of several operators, by a Lease.

Promise: a leader that ends says so, and a standby leads within RETRY_S; one that dies is followed after LEASE_S. A
leader that cannot renew stops before LEASE_S is over. Ages are measured here, by this process's own clock, from the
moment at which a change was seen: clocks of machines are never compared. Safety does not rest on it: two leaders at
once do no harm (compare-and-swap, preconditions), they only work twice. Must not be done here: the leader's work.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Final

import msgspec

from fleetlm_common.clock import Clock
from fleetlm_common.kubeapi import ApiConflict, ApiError, KubeApi, Object
from fleetlm_common.kubenames import LEASES
from fleetlm_common.logs import Logger
from fleetlm_operator.resources import DEPLOYMENTS

LEASE_S: Final = 8
"""A leader that is not heard of for so long is followed."""
RENEW_S: Final = 2.0
"""Time between two renewals."""
LOST_S: Final = 6.0
"""Without a renewal for so long a leader stops: before anybody follows it."""
RETRY_S: Final = 1.0
"""Time between two looks of a standby."""


class _Held(msgspec.Struct, frozen=True):
    """The Lease as last seen, and when it last changed by our clock."""

    holder: str
    version: str
    seen_s: float
    body: Object


class Leadership:
    """This operator's part in the election.

    Args:
        api: the connection.
        namespace: where the Lease is.
        name: its name.
        identity: who this is; different for each process.
        deployment: of the operator, in the same namespace: the Lease goes with it. Empty or not there: it stays.
        clock: for ages.
        now: the time, for people who look at the Lease.
        log: where changes are told.
    """

    def __init__(
        self,
        api: KubeApi,
        *,
        namespace: str,
        name: str,
        identity: str,
        deployment: str,
        clock: Clock,
        now: Callable[[], datetime],
        log: Logger,
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._deployment = deployment
        self._clock = clock
        self._now = now
        self._log = log
        self._held: _Held | None = None

    @asynccontextmanager
    async def lead(self) -> AsyncGenerator[asyncio.Event]:
        """Wait until this operator leads; inside, the event is set when it does not any more.

        On the way out the Lease is given back, so that the next one need not wait.
        """
        while not await self._take():  # noqa: ASYNC110 - what is waited for is at the API server
            await asyncio.sleep(RETRY_S)
        self._log.event("leading", lease=self._name)
        lost = asyncio.Event()
        keeper = asyncio.create_task(self._keep(lost))
        try:
            yield lost
        finally:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
            if not lost.is_set():
                with suppress(ApiError):
                    await self._write(holder="", transitions=0)
            self._log.event("not_leading", lease=self._name)

    async def _keep(self, lost: asyncio.Event) -> None:
        """Renew until it fails for too long or somebody else leads."""
        renewed_s = self._clock.monotonic_s()
        while self._clock.monotonic_s() - renewed_s < LOST_S:
            await asyncio.sleep(RENEW_S)
            begun_s = self._clock.monotonic_s()
            try:
                async with asyncio.timeout(LOST_S - RENEW_S):
                    await self._write(holder=self._identity, transitions=0)
                renewed_s = begun_s
            except ApiConflict:
                if not await self._still_mine():
                    break
            except (ApiError, TimeoutError):
                continue
        self._log.event("lease_lost", level="warning", lease=self._name)
        lost.set()

    async def _still_mine(self) -> bool:
        """Whether a conflict was only a touch by somebody (an annotation), not another leader."""
        try:
            await self._look()
        except ApiError:
            return True
        return self._held is not None and self._held.holder == self._identity

    async def _take(self) -> bool:
        """One try to lead."""
        try:
            await self._look()
            held = self._held
            if held is None:
                await self._make(await self._owner())
                return True
            free = not held.holder or held.holder == self._identity
            if not free and self._clock.monotonic_s() - held.seen_s <= LEASE_S:
                return False
            await self._write(holder=self._identity, transitions=1, owner=await self._owner())
        except ApiError:
            return False
        return True

    async def _look(self) -> None:
        found = await self._api.get(LEASES, self._namespace, self._name)
        if found is None:
            self._held = None
            return
        version = found["metadata"]["resourceVersion"]
        if self._held is None or self._held.version != version:
            self._remember(found)
        assert self._held is not None

    def _remember(self, found: Object) -> None:
        holder = found.get("spec", {}).get("holderIdentity") or ""
        version = found["metadata"]["resourceVersion"]
        self._held = _Held(holder, version, self._clock.monotonic_s(), found)

    async def _owner(self) -> Object:
        """What the Lease's metadata says of whom it goes with; nothing if that cannot be read: leading matters more."""
        found = None
        if self._deployment:
            with suppress(ApiError):
                found = await self._api.get(DEPLOYMENTS, self._namespace, self._deployment)
        if found is None:
            return {}
        uid = found["metadata"]["uid"]
        owner = {"apiVersion": DEPLOYMENTS.api, "kind": DEPLOYMENTS.kind, "name": self._deployment, "uid": uid}
        return {"ownerReferences": [owner]}

    async def _make(self, owner: Object) -> None:
        body: Object = {
            "apiVersion": LEASES.api,
            "kind": LEASES.kind,
            "metadata": {"name": self._name, "namespace": self._namespace, **owner},
            "spec": self._spec(self._identity, 0),
        }
        self._remember(await self._api.create(LEASES, self._namespace, body))

    async def _write(self, *, holder: str, transitions: int, owner: Object | None = None) -> None:
        """Compare-and-swap from the version last seen."""
        assert self._held is not None
        spec = self._held.body.get("spec", {})
        count = spec.get("leaseTransitions", 0) + transitions
        metadata = {**self._held.body["metadata"], **(owner or {})}
        body = {**self._held.body, "metadata": metadata, "spec": {**spec, **self._spec(holder, count)}}
        self._remember(await self._api.replace(LEASES, self._namespace, body))

    def _spec(self, holder: str, transitions: int) -> Object:
        moment = self._now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        return {
            "holderIdentity": holder,
            "leaseDurationSeconds": LEASE_S,
            "renewTime": moment,
            "leaseTransitions": transitions,
        }
