"""A client's end of a WebSocket in the simulation, and a checker of every frame on it.

Promise: `Watch` judges by the protocol's document alone: each request answered once on its ref, a join's reply before
its pushes, pushes contiguous from the join's cursor or a gap, `caught_up` exactly once a join. Must not be done here:
anything that the SDK does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from tests.support.history import History

_decode = msgspec.json.Decoder().decode

ANSWER_S = 12.0
"""A gateway answers within 10 s; a request that is younger than this at the end may still be under way."""


def masked_text(text: str, mask: bytes) -> bytes:
    """A client's text frame."""
    return _masked(0x1, text.encode(), mask)


def masked_close(mask: bytes) -> bytes:
    """A client's close frame."""
    return _masked(0x8, struct.pack(">H", 1000), mask)


def _masked(opcode: int, payload: bytes, mask: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        head = struct.pack(">BB", 0x80 | opcode, 0x80 | size)
    elif size < 65536:
        head = struct.pack(">BBH", 0x80 | opcode, 0x80 | 126, size)
    else:
        head = struct.pack(">BBQ", 0x80 | opcode, 0x80 | 127, size)
    key = (mask * (size // 4 + 1))[:size]
    body = (int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")
    return head + mask + body


class FrameReader:
    """Cuts what a server sends into (opcode, payload)."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> list[tuple[int, bytes]]:
        """Frames that are whole now."""
        self._data += data
        frames: list[tuple[int, bytes]] = []
        while len(self._data) >= 2:
            size, at = self._data[1] & 0x7F, 2
            if size == 126:
                if len(self._data) < 4:
                    break
                size, at = struct.unpack_from(">H", self._data, 2)[0], 4
            elif size == 127:
                if len(self._data) < 10:
                    break
                size, at = struct.unpack_from(">Q", self._data, 2)[0], 10
            if len(self._data) < at + size:
                break
            frames.append((self._data[0] & 0xF, bytes(self._data[at : at + size])))
            del self._data[: at + size]
        return frames


@dataclass
class _Join:
    """One join of one topic on one socket."""

    cursor: int | None
    replied: bool = False
    refused: bool = False
    caught_up: int = 0
    replied_s: float = 0.0


class Watch:
    """Looks at both directions of one socket.

    Args:
        name: of the socket, used once.
        history: where violations go.
        now_s: simulated time.
    """

    def __init__(self, name: str, history: History, now_s: Callable[[], float]) -> None:
        self.name = name
        self._history = history
        self._now_s = now_s
        self._joins: dict[tuple[str, str], _Join] = {}
        self._current: dict[str, str] = {}
        self._asked: dict[str, float] = {}
        self._left_s: dict[str, float] = {}
        self.over = False

    def sent(self, text: str) -> None:
        """The client sent a frame."""
        _, ref, topic, event, payload = _decode(text)
        self._history.asked(self.name, ref)
        self._asked[ref] = self._now_s()
        if event == "phx_join":
            self._joins[topic, ref] = _Join(payload.get("cursor"))
            self._current[topic] = ref
        elif event == "phx_leave":
            self._current.pop(topic, None)

    def received(self, text: str) -> None:
        """The server sent a frame."""
        join_ref, ref, topic, event, payload = _decode(text)
        if event == "phx_reply":
            self._history.answered(self.name, ref)
            self._asked.pop(ref, None)
            join = self._joins.get((topic, ref))
            if join is not None:
                self._joined(join, payload)
        elif event in {"messages", "gap", "caught_up"}:
            join = self._joins.get((topic, join_ref))
            if join is None or not join.replied or join.refused:
                self._say("stream", topic, f"{event} before the reply to its join ({join_ref})")
            else:
                self._push(topic, join, event, payload)

    def _joined(self, join: _Join, payload: dict[str, Any]) -> None:
        join.replied, join.replied_s = True, self._now_s()
        join.refused = payload["status"] != "ok"
        if not join.refused and join.cursor is None:
            join.cursor = payload["response"]["last_seq"]

    def _push(self, topic: str, join: _Join, event: str, payload: dict[str, Any]) -> None:
        cursor = join.cursor
        assert cursor is not None
        if event == "messages":
            for message in payload["messages"]:
                if message["seq"] != cursor + 1:
                    self._say("stream", topic, f"seq {message['seq']} on the wire after {cursor}")
                cursor = message["seq"]
            join.cursor = cursor
        elif event == "gap":
            if payload["from_seq"] != cursor + 1 or payload["next_seq"] <= payload["from_seq"]:
                self._say("stream", topic, f"a gap {payload} on the wire after {cursor}")
            join.cursor = payload["next_seq"] - 1
        else:
            join.caught_up += 1
            if join.caught_up > 1:
                self._say("caught_up", topic, "caught_up twice")
            if payload["seq"] != cursor:
                self._say("caught_up", topic, f"caught_up {payload['seq']} at {cursor}")

    def lost(self) -> None:
        """The socket is gone: what was not answered on it never can be."""
        if not self.over:
            self.over = True
            self._history.socket_lost(self.name)

    @property
    def owed(self) -> bool:
        """Something that was asked is not answered yet, or a join is not caught up."""
        if self.over:
            return False
        joins = (self._joins[topic, ref] for topic, ref in self._current.items())
        return bool(self._asked) or any(not join.refused and join.caught_up != 1 for join in joins)

    def finish(self) -> None:
        """The run is over while the socket lives: what is owed since `ANSWER_S` is a broken promise."""
        if self.over:
            return
        due_s = self._now_s() - ANSWER_S
        for topic, ref in self._current.items():
            join = self._joins[topic, ref]
            if join.replied and not join.refused and join.replied_s < due_s and join.caught_up != 1:
                self._say("caught_up", topic, f"join {ref} was never told caught_up")
        for ref, asked_s in self._asked.items():
            if asked_s >= due_s:
                self._history.excuse(self.name, ref)

    def _say(self, kind: Any, topic: str, text: str) -> None:
        self._history.broken(kind, topic, f"{self.name}: {text}")
