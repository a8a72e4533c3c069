"""From an HTTP request to a WebSocket: who may connect, the handshake, and the hand-over of the connection.

Promise: everything that can be refused is refused before the upgrade, as problem JSON; after it the connection belongs
to a `Socket` alone, with no task and no HTTP object kept for it.
Must not be done here: frames.

aiohttp reads the request; then its protocol is told that its connection is lost, and the transport gets ours. aiohttp's
own WebSocket would hold a task, a request and a queue for each socket and cost 13.8 µs a message (design §8).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from typing import TYPE_CHECKING, Final, cast

from aiohttp import web

from fleetlm_common.errors import Invalid
from fleetlm_gateway import principal as principals
from fleetlm_gateway.hub import Hub
from fleetlm_gateway.websocket import Socket

if TYPE_CHECKING:
    from aiohttp.http import WebSocketReader

PATH: Final = "/socket/websocket"
_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_KEY_BYTES: Final = 16


class HandedOver(web.StreamResponse):
    """What the handler gives back to aiohttp when the connection is not aiohttp's any more: nothing is to be sent."""

    async def prepare(self, request: web.BaseRequest) -> None:
        """Send nothing."""

    async def write_eof(self, data: bytes = b"") -> None:
        """Send nothing."""


class _Tail:
    """Takes what arrived behind the request's head: a client that did not wait for the handshake."""

    def __init__(self) -> None:
        self.data = b""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self.data += data
        return False, b""

    def feed_eof(self) -> None:
        """Aiohttp's call at the end of the connection."""


def accept(request: web.Request, hub: Hub) -> web.StreamResponse:
    """Make a WebSocket of the request's connection.

    Raises:
        Invalid: not a WebSocket handshake, another serializer than 2, or a participant that cannot be.
        Unauthenticated: nobody is named.
        TryAgain: no room, or this gateway is leaving.
    """
    accepted = _accept_value(request)
    fields = principals.query_fields(request.rel_url.raw_query_string)
    _check_version(fields.get("vsn"))
    principal = principals.of_socket(fields)
    hub.admit()
    transport = request.transport
    if transport is None:
        return HandedOver()
    socket = Socket(hub, principal)
    tail = _take_over(request)
    transport.write(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: %b\r\n%b\r\n" % (accepted, _subprotocol(request))
    )
    transport.set_protocol(socket)
    socket.connection_made(transport)
    if tail:
        socket.data_received(tail)
    return HandedOver()


def _take_over(request: web.Request) -> bytes:
    """Make aiohttp forget the connection without closing it; returns what it had read too far."""
    protocol = request.protocol
    tail = _Tail()
    protocol.set_parser(cast("WebSocketReader", tail))
    protocol.transport = None
    protocol.connection_lost(None)
    return tail.data


def _accept_value(request: web.Request) -> bytes:
    headers = request.headers
    upgrades = {part.strip().lower() for part in headers.get("Connection", "").split(",")}
    if headers.get("Upgrade", "").lower() != "websocket" or "upgrade" not in upgrades:
        raise Invalid(f"{PATH} speaks WebSocket: Upgrade: websocket", reason="upgrade_required", field="Upgrade")
    if headers.get("Sec-WebSocket-Version") != "13":
        raise Invalid("Sec-WebSocket-Version must be 13", field="Sec-WebSocket-Version")
    key = headers.get("Sec-WebSocket-Key", "")
    try:
        valid = len(base64.b64decode(key, validate=True)) == _KEY_BYTES
    except (binascii.Error, ValueError):
        valid = False
    if not valid:
        raise Invalid("Sec-WebSocket-Key must be 16 bytes in base64", field="Sec-WebSocket-Key")
    digest = hashlib.sha1(key.encode() + _GUID, usedforsecurity=False).digest()
    return base64.b64encode(digest)


def _subprotocol(request: web.Request) -> bytes:
    """Newer phoenix clients offer `phoenix` beside a token; browsers give up when nothing of the offer is chosen."""
    offered = {part.strip() for part in request.headers.get("Sec-WebSocket-Protocol", "").split(",")}
    return b"Sec-WebSocket-Protocol: phoenix\r\n" if "phoenix" in offered else b""


def _check_version(vsn: str | None) -> None:
    """Phoenix clients say which serializer they speak; without a word it is version 1, which has other frames."""
    if vsn is None or not vsn.startswith("2."):
        said = "none was given" if vsn is None else f"not {vsn[:20]!r}"
        raise Invalid(f"vsn must be 2.0.0 (the V2 JSON serializer), {said}", reason="unsupported_version", field="vsn")
