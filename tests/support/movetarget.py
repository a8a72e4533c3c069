"""A move's target that a test plays: it asks a real source, in any order, as any container of the target.

Promise: one request a call, with the newest epoch; what the source answers or raises is what a target gets. Must not be
done here: what a target does with it (`importer.py`).
"""

from __future__ import annotations

from fleetlm_common import rpc
from fleetlm_common.ring import Move
from fleetlm_common.rpc import Kind
from tests.support.movesrig import MovesRig
from tests.support.rpcclient import RpcClient


class Target:
    """Asks as one does.

    Args:
        client: to the source.
        ring: whose map it knows.
        move: that it is part of.
    """

    def __init__(self, client: RpcClient, ring: MovesRig, move: Move) -> None:
        self._client = client
        self._ring = ring
        self._move = move

    async def states(self, reader: str = "r", *, after: str = "", limit: int = 100) -> rpc.Exported:
        """A page of the pass."""
        request = rpc.Export(self._move.id, self._ring.map.epoch, reader, after, limit)
        return await self._client.ask(Kind.EXPORT, request, rpc.Exported)

    async def round(self, number: int, reader: str = "r") -> tuple[list[str], bool]:
        """Names of what changed, and whether more did."""
        request = rpc.ExportChanged(self._move.id, self._ring.map.epoch, reader, number)
        found = await self._client.ask(Kind.EXPORT_CHANGED, request, rpc.Exported)
        return [state.session for state in found.sessions], found.more

    async def messages(self, session: str) -> rpc.ExportedMessages:
        """Its first ones."""
        request = rpc.ExportMessages(self._move.id, self._ring.map.epoch, session, 0, 100, 100_000)
        return await self._client.ask(Kind.EXPORT_MESSAGES, request, rpc.ExportedMessages)

    async def sealed(self, reader: str = "r") -> rpc.ExportedAll:
        """How much there is."""
        request = rpc.ExportSealed(self._move.id, self._ring.map.epoch, reader)
        return await self._client.ask(Kind.EXPORT_SEALED, request, rpc.ExportedAll)
