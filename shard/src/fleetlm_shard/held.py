"""Requests that wait while their slot is sealed: a move of it is about to end, one way or the other.

    sealed ──► wait() ──► slot unsealed: go on, in order      (the move was aborted)
                     └──► slot released: MOVED, in order      (it was committed)
                     └──► too many, too old: TRY_AGAIN moving (and so is all behind it, until the seal ends)

Promise: whoever waits is told once, in the order of arrival; a retry of a request that waits joins it at its place;
count, bytes and age are bounded. Must not be done here: deciding what is sealed (`ownership.py`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Final

from fleetlm_common.errors import FleetError, TryAgain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from fleetlm_common.ids import Slot

HELD_REQUESTS_MAX: Final = 10_000
"""Waiting requests of a shard: a second of a busy one."""
HELD_BYTES_MAX: Final = 32 * 1024 * 1024
"""The same in bytes: as much as may wait for the disk."""
HELD_AGE_S_MAX: Final = 5.0
"""Longer than a controller lets a slot be sealed (3 s), well below a request's deadline (10 s): it can still retry."""
RETRY_AFTER_MS: Final = 100
"""A seal takes some milliseconds when nothing is wrong."""

Name = tuple[str, tuple[str, ...]]
"""What makes a request the same as its retry: session, and the keys (or what is set) in it."""


class _Request:
    """One request, and its retries."""

    __slots__ = ("name", "since_s", "size_bytes", "waiters")

    def __init__(self, name: Name, size_bytes: int, since_s: float) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.since_s = since_s
        self.waiters: list[asyncio.Future[None]] = []


class Held:
    """All waiting requests of a shard. Belongs to the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queues: dict[Slot, deque[_Request]] = {}
        self._names: dict[Name, _Request] = {}
        self._refusing: set[Slot] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.count = 0
        self.bytes = 0
        self.held = 0
        self.refused = 0

    @property
    def slots(self) -> set[Slot]:
        """Slots that somebody waits for."""
        return set(self._queues)

    async def wait(self, slot: Slot, name: Name, size_bytes: int) -> None:
        """Return when the slot is unsealed. Cancel-safe.

        Raises:
            Moved: somebody else owns the slot now.
            TryAgain: `moving`; too much waits, or for too long.
        """
        request = self._names.get(name)
        if request is None:
            request = self._enter(slot, name, size_bytes)
        waiter: asyncio.Future[None] = self._loop.create_future()
        request.waiters.append(waiter)
        await waiter

    def _enter(self, slot: Slot, name: Name, size_bytes: int) -> _Request:
        if slot in self._refusing or self.count >= HELD_REQUESTS_MAX or self.bytes + size_bytes > HELD_BYTES_MAX:
            # Nothing of this slot may overtake what was refused.
            self._refusing.add(slot)
            self.refused += 1
            raise _too_much(slot)
        request = _Request(name, size_bytes, self._loop.time())
        self._queues.setdefault(slot, deque()).append(request)
        self._names[name] = request
        self.count += 1
        self.bytes += size_bytes
        self.held += 1
        if self._timer is None:
            self._timer = self._loop.call_later(HELD_AGE_S_MAX, self._expire)
        return request

    def go_on(self, slots: Iterable[Slot]) -> None:
        """These slots are unsealed."""
        self._end(slots, None)

    def refuse(self, slots: Iterable[Slot], error: Callable[[Slot], FleetError]) -> None:
        """These slots are not this shard's any more."""
        self._end(slots, error)

    def refuse_all(self, error: FleetError) -> None:
        """The shard is leaving."""
        self._end(list(self._queues), lambda _: error)

    def _end(self, slots: Iterable[Slot], error: Callable[[Slot], FleetError] | None) -> None:
        for slot in slots:
            self._refusing.discard(slot)
            for request in self._queues.pop(slot, ()):
                self._answer(request, None if error is None else error(slot))

    def _answer(self, request: _Request, error: FleetError | None) -> None:
        del self._names[request.name]
        self.count -= 1
        self.bytes -= request.size_bytes
        # Futures wake their tasks in the order in which they are set.
        for waiter in request.waiters:
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)

    def _expire(self) -> None:
        """Refuse whole slots whose oldest request is too old: a later one may not be worked on before it."""
        self._timer = None
        now_s = self._loop.time()
        oldest_s = now_s
        for slot, queue in list(self._queues.items()):
            if now_s - queue[0].since_s >= HELD_AGE_S_MAX:
                self.refused += len(queue)
                for request in self._queues.pop(slot):
                    self._answer(request, _too_much(slot))
                self._refusing.add(slot)
            else:
                oldest_s = min(oldest_s, queue[0].since_s)
        if self._queues:
            self._timer = self._loop.call_later(max(0.0, oldest_s + HELD_AGE_S_MAX - now_s), self._expire)


def _too_much(slot: Slot) -> TryAgain:
    return TryAgain(f"slot {slot} is being handed over", reason="moving", retry_after_ms=RETRY_AFTER_MS)
