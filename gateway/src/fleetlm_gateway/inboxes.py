"""The inboxes that are joined on this gateway, and the one look that serves all of them.

    join ─► registered ─► its page is read ─► …    every POLL_S: what changed for any of them? ─► the entries ─► sinks

Promise: what was archived after an inbox was registered is told to its sink, at least once, or the sink is asked to
read anew; nothing is asked while none is joined. The entries of one session come in the order in which they were true.
Must not be done here: what a client sees (`inboxchannel.py`), which shard is asked (`boundary.py`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from fleetlm_common.errors import FleetError
from fleetlm_common.limits import INBOX_LIMIT_MAX
from fleetlm_common.rpc import ChangesPlace

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterator

    from fleetlm_common.rpc import InboxEntry
    from fleetlm_gateway.boundary import Boundary

POLL_S: Final = 0.5
"""Between two looks, about: a message is archived within a second, so this is not what one waits for."""
PARTICIPANTS_MAX: Final = 1000
"""Of one question."""
_NOW: Final = ChangesPlace(0, 0)

T = TypeVar("T")


class InboxSink(Protocol):
    """Who is told of changes. Its calls must not raise, and return at once."""

    def changed(self, entry: InboxEntry, /) -> None:
        """A session of the inbox as it is now."""
        ...

    def lost(self) -> None:
        """Changes may have gone untold: read the inbox anew."""
        ...


class Inboxes:
    """All joined inboxes of a gateway.

    Args:
        boundary: asks the shards.
        entropy: so that gateways do not ask in step.
        fault: told of a mistake of ours.
    """

    def __init__(self, boundary: Boundary, *, entropy: random.Random, fault: Callable[[BaseException], None]) -> None:
        self._boundary = boundary
        self._entropy = entropy
        self._fault = fault
        self._sinks: dict[str, dict[InboxSink, None]] = {}
        self._since: ChangesPlace | None = None
        self._turn = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None
        self._told: dict[tuple[str, str], tuple[int, int]] = {}
        """What was told last, by participant and session: a look that tells it again is not told on."""

    async def register(self, participant: str, sink: InboxSink) -> None:
        """From now on `sink` hears of changes; what is read after this call is as new as what it hears.

        Cancel-safe.

        Raises:
            FleetError: the archive cannot be asked.
        """
        async with self._turn:  # a look under way does not know of it, and may be newer than what is read next
            if self._since is None:
                self._since = (await self._boundary.changes([], _NOW)).now
            self._sinks.setdefault(participant, {})[sink] = None
            if self._looking is None:
                self._looking = asyncio.create_task(self._look_on(), name="inboxes")
                self._looking.add_done_callback(self._looked)

    def unregister(self, participant: str, sink: InboxSink) -> None:
        """It hears no more; harmless when repeated."""
        sinks = self._sinks.get(participant)
        if sinks is not None:
            sinks.pop(sink, None)
            if not sinks:
                del self._sinks[participant]

    def stop(self) -> None:
        """Look no more."""
        if self._looking is not None:
            self._looking.cancel()

    def _looked(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._looking = None  # the next join looks on
            self._fault(error)

    async def _look_on(self) -> None:
        """Look until no inbox is joined any more."""
        while True:
            await asyncio.sleep(POLL_S * self._entropy.uniform(0.8, 1.2))
            async with self._turn:
                if not self._sinks:
                    self._since, self._looking = None, None
                    self._told.clear()
                    return
                try:
                    await self._look()
                except FleetError:
                    continue  # the place stays: what is missed now is told later, or lost

    async def _look(self) -> None:
        """Ask what changed, and tell it; the place moves on when all of it was told."""
        assert self._since is not None
        places: list[ChangesPlace] = []
        pairs: dict[tuple[str, str], tuple[int, int]] = {}
        lost = False
        for names in _slices(list(self._sinks), PARTICIPANTS_MAX):
            changed = await self._boundary.changes(names, self._since)
            places.append(changed.now)
            lost = lost or changed.lost
            pairs |= {(participant, session): (last, read) for participant, session, last, read in changed.pairs}
        if lost:
            self._told.clear()
            for sink in [sink for sinks in self._sinks.values() for sink in sinks]:
                sink.lost()
        else:
            news = [pair for pair, seqs in pairs.items() if self._told.get(pair) != seqs]
            for asked in _slices(news, INBOX_LIMIT_MAX):
                for participant, entry in await self._boundary.entries(asked):
                    for sink in list(self._sinks.get(participant, ())):
                        sink.changed(entry)
            self._told = pairs
        self._since = min(places, key=lambda place: place.xid)


def _slices(items: list[T], size: int) -> Iterator[list[T]]:
    return (items[at : at + size] for at in range(0, len(items), size))
