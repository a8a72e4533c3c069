"""A shard's connection to another shard, from which a move brings slots: requests, each answered once.

Promise: `ask` returns the answer, raises what the other shard refused, or raises `PeerLost` (also when none comes). One
owner, who closes it. Must not be done here: trying again, what is asked.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from fleetlm_common import rpc
from fleetlm_common.decoding import UNREADABLE
from fleetlm_common.errors import ErrorBody, TryAgain, from_body
from fleetlm_common.rpc import Kind
from fleetlm_common.wire import FrameConnection

if TYPE_CHECKING:
    from fleetlm_common.control import ShardEndpoint
    from fleetlm_common.ring import Move
    from fleetlm_shard.ownership import Ownership
    from fleetlm_shard.server import Credentials

ANSWER_S: Final = 5.0
"""For any answer: a source that takes longer is asked again, on a new connection."""

P = TypeVar("P", bound=msgspec.Struct)


class PeerLost(Exception):
    """The other shard is not there, or does not answer; says why."""


def source_of(move: Move, ownership: Ownership, own: Credentials) -> tuple[ShardEndpoint, rpc.Hello]:
    """Where the source of a move is, and how to introduce ourselves.

    Raises:
        PeerLost: nobody knows.
    """
    endpoint = ownership.shards.get(move.source)
    member = None if ownership.map is None else ownership.map.member(move.source)
    if endpoint is None or member is None:
        raise PeerLost(f"{move.source} has not said where it is")
    return endpoint, rpc.Hello(
        rpc.PROTOCOL, own.ring_uid, move.source, member.volume_id, f"shard:{own.shard}", own.secret, ownership.epoch
    )


class Peer:
    """One connection, after HELLO."""

    def __init__(self) -> None:
        self._wire = FrameConnection(on_frame=self._on_frame, on_lost=self._on_lost)
        self._idents = itertools.count(1)
        self._answers: dict[int, asyncio.Future[tuple[int, bytes]]] = {}

    @classmethod
    async def connect(cls, endpoint: ShardEndpoint, hello: rpc.Hello) -> Peer:
        """Connect and introduce ourselves.

        Raises:
            PeerLost: it cannot be reached, or is another one.
        """
        peer = cls()
        try:
            async with asyncio.timeout(ANSWER_S):
                await asyncio.get_running_loop().create_connection(lambda: peer._wire, endpoint.host, endpoint.port)
            await peer.ask(Kind.HELLO, hello, Kind.WELCOME, rpc.Welcome)
        except (OSError, TimeoutError) as error:
            peer.close()
            raise PeerLost(f"{endpoint.name} at {endpoint.host}:{endpoint.port}: {error!r}") from error
        except BaseException:
            peer.close()
            raise
        return peer

    async def ask(self, kind: Kind, request: msgspec.Struct, reply: Kind, answer: type[P]) -> P:
        """Send a request and wait for its answer. Cancel-safe.

        Raises:
            FleetError: the other shard refuses.
            PeerLost: the connection ended, or nothing came.
        """
        ident = next(self._idents)
        future: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        if self._wire.closed:
            raise PeerLost("the connection has ended")
        self._answers[ident] = future
        self._wire.send(kind, ident, rpc.encode(request))
        try:
            async with asyncio.timeout(ANSWER_S):
                found, payload = await future
        except TimeoutError as error:
            raise PeerLost(f"no answer within {ANSWER_S} s") from error
        finally:
            self._answers.pop(ident, None)
        try:
            if found == reply:
                return msgspec.msgpack.decode(payload, type=answer)
            if found == Kind.MOVED:
                raise TryAgain("the source does not own the slots", reason="moving")
            refused = from_body(msgspec.msgpack.decode(payload, type=ErrorBody))
        except UNREADABLE as error:
            raise PeerLost(f"an answer of kind {found} cannot be read: {error}") from error
        raise refused

    def close(self) -> None:
        """End the connection."""
        self._wire.abort()

    def _on_frame(self, kind: int, ident: int, payload: bytes) -> None:
        future = self._answers.get(ident)
        # Without one it is a GOAWAY (the next answers say so, too), or an answer that came too late.
        if future is not None and not future.done():
            future.set_result((kind, payload))

    def _on_lost(self, error: Exception | None) -> None:
        for future in self._answers.values():
            if not future.done():
                future.set_exception(PeerLost(f"the connection ended: {error or 'closed'}"))
