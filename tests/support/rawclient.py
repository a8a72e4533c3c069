"""Phoenix frames by hand over a WebSocket: an independent client, so that the SDK's own cleverness hides nothing.

Promise: every request and every reply is written down in the history; nothing is retried, reordered or dropped here.
Must not be done here: using the SDK, judging.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import aiohttp

from tests.support.history import History

REPLY_TIMEOUT_S = 25.0
"""The gateway answers within 10 s; a process may be stopped for some of them."""
_numbers = itertools.count(1)

OnPush = Callable[[str, str, dict[str, Any]], None]


class Lost(Exception):
    """The socket is gone; what was asked and not answered never will be."""


class Unanswered(Exception):
    """No reply on the ref although the socket lives."""


class RawSocket:
    """One WebSocket.

    Args:
        socket: connected.
        history: where requests and replies are written down.
        on_push: called with topic, event and payload of what is no reply.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, history: History, on_push: OnPush | None) -> None:
        self._socket = socket
        self._history = history
        self._on_push = on_push
        self._name = f"raw-{next(_numbers)}"
        self._refs = itertools.count(1)
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self._joins: dict[str, str] = {}
        self._reader = asyncio.create_task(self._read())

    @property
    def lost(self) -> bool:
        """Whether the socket is gone."""
        return self._reader.done()

    async def join(self, session: str, **payload: Any) -> dict[str, Any]:
        """Join; the whole reply `{status, response}`."""
        return await self.request(session, "phx_join", payload)

    async def request(self, session: str, event: str, payload: dict[str, Any]) -> dict[str, Any]:
        """Ask, and wait for the reply on the ref.

        Raises:
            Lost: the socket went first.
            Unanswered: no reply in time.
        """
        if self.lost:
            raise Lost
        topic = f"session:{session}"
        ref = str(next(self._refs))
        if event == "phx_join":
            self._joins[topic] = ref
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: None if done.cancelled() else done.exception())  # nobody may wait by then
        self._waiting[ref] = future
        self._history.asked(self._name, ref)
        try:
            await self._socket.send_str(json.dumps([self._joins.get(topic), ref, topic, event, payload]))
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                return await future
        except TimeoutError as error:
            raise Unanswered(f"{event} on {topic}, ref {ref}") from error
        except (aiohttp.ClientError, OSError) as error:
            await self.close()
            raise Lost from error

    async def close(self) -> None:
        """Close at once."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await asyncio.wait([asyncio.ensure_future(self._socket.close())], timeout=1)

    async def _read(self) -> None:
        try:
            async for message in self._socket:
                if message.type is aiohttp.WSMsgType.TEXT:
                    self._on_text(message.data)
        finally:
            self._history.socket_lost(self._name)
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(Lost())

    def _on_text(self, text: str) -> None:
        join_ref, ref, topic, event, payload = json.loads(text)
        if event == "phx_reply":
            self._history.answered(self._name, ref)
            future = self._waiting.pop(ref, None)
            if future is not None and not future.done():
                future.set_result(payload)
        elif self._on_push is not None and join_ref in {None, self._joins.get(topic)}:
            self._on_push(topic.removeprefix("session:"), event, payload)


@asynccontextmanager
async def raw_socket(
    websocket_url: str, history: History, *, participant: str, on_push: OnPush | None = None
) -> AsyncGenerator[RawSocket]:
    """Connect.

    Raises:
        Lost: not possible.
    """
    url = f"{websocket_url}?vsn=2.0.0&participant_id={quote(participant)}&participant_kind=agent"
    async with aiohttp.ClientSession() as http:
        try:
            async with asyncio.timeout(10):
                socket = await http.ws_connect(url, max_msg_size=0)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Lost from error
        raw = RawSocket(socket, history, on_push)
        try:
            yield raw
        finally:
            await raw.close()
