"""The control plane in memory, with the semantics of `filecontrol`, for tests of parts and for the simulator.

Promise: as the interface says; `away` makes every call raise and silences watchers, like a control plane that is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from fleetlm_common.control import ControlPlaneUnavailable, MapConflict, RingSpec, ShardEndpoint, View, replaces
from fleetlm_common.ids import Epoch, ShardName
from fleetlm_common.ring import RingMap


class MemoryControlPlane:
    """`ControlPlane` of one process; any number of components may share it on one event loop.

    Args:
        spec: the ring.
        ring_map: the map that is there from the start.
    """

    def __init__(self, spec: RingSpec, ring_map: RingMap | None = None) -> None:
        self._view = View(spec, ring_map, {})
        self._changed = asyncio.Event()
        self._away = False
        self.sentences: list[str] = []

    @property
    def away(self) -> bool:
        """Whether the control plane is gone."""
        return self._away

    @away.setter
    def away(self, away: bool) -> None:
        self._away = away
        self._wake()

    @property
    def trouble(self) -> str | None:
        """See `ControlPlane.trouble`."""
        return "the control plane in memory is away" if self._away else None

    @property
    def view(self) -> View:
        """What is there, also while the control plane is away (for assertions)."""
        return self._view

    def set_spec(self, spec: RingSpec) -> None:
        """What people do: ask for something else."""
        self._show(View(spec, self._view.map, self._view.shards))

    async def read(self) -> View:
        """See `ControlPlane.read`."""
        self._answer()
        return self._view

    async def watch(self) -> AsyncIterator[View]:
        """See `ControlPlane.watch`."""
        shown: View | None = None
        while True:
            changed = self._changed
            if not self._away and self._view != shown:
                shown = self._view
                yield shown
            else:
                await changed.wait()

    async def announce(self, endpoint: ShardEndpoint) -> None:
        """See `ControlPlane.announce`."""
        self._answer()
        known = self._view.shards.get(endpoint.name)
        if known is None or replaces(endpoint, known):
            shards: dict[ShardName, ShardEndpoint] = {**self._view.shards, endpoint.name: endpoint}
            self._show(View(self._view.spec, self._view.map, shards))

    async def compare_and_swap(self, *, expected: Epoch | None, new: RingMap) -> None:
        """See `ControlPlane.compare_and_swap`."""
        if new.epoch != (expected or 0) + 1:
            raise ValueError(f"the map after epoch {expected} cannot have epoch {new.epoch}")
        if (new.uid, new.slots) != (self._view.spec.uid, self._view.spec.slots):
            raise ValueError("a map of another ring")
        self._answer()
        found = None if self._view.map is None else self._view.map.epoch
        if found != expected:
            raise MapConflict(expected=expected, found=found)
        self._show(View(self._view.spec, new, self._view.shards))

    async def report(self, sentence: str, *, reason: str = "", epoch: int = 0) -> None:
        """See `ControlPlane.report`."""
        self._answer()
        self.sentences.append(sentence)

    async def close(self) -> None:
        """See `ControlPlane.close`."""

    def _answer(self) -> None:
        if self._away:
            raise ControlPlaneUnavailable("the control plane in memory is away")

    def _show(self, view: View) -> None:
        self._view = view
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
