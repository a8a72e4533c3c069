"""What is fuzzed, and what each case must lead to. A surface makes case `n` from `Random(f"{seed}-{surface}-{n}")`.

Promise: each case ends with `Wrong`, or with a word for what the answer was: `ok`, an error's code, a close code.
Must not be done here: starting processes (`run.py`), the wire between gateway and shard (`wire.py`).
"""

from __future__ import annotations

import asyncio
import json
import random
import struct
import zlib
from typing import Any, Final, Protocol

from tests.fuzz import wsclient
from tests.fuzz.mutate import NASTY_JSON, Mutator
from tests.fuzz.wsclient import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, Socket

SESSIONS: Final = ["fz-0", "fz-1", "fz-2", "fz/../%2e", "fz \u00e9\U0001f600", 'fz\u0000\n"\\', "f" * 128]
"""Sessions that cases write to: ids of odd but legal bytes."""
CLOSES: Final = {4000, 4001, 4002, 4003, 4500, 4501, 4502, 4503}
"""Close codes that a client may be given; 4004 (`internal`) is a mistake of ours."""
CODES: Final = {
    "TRY_AGAIN", "INVALID", "TOO_LARGE", "UNAUTHENTICATED", "FORBIDDEN", "NOT_FOUND", "CONFLICT",
    "IDEMPOTENCY_CONFLICT",
}  # fmt: skip
CASES_A_SOCKET: Final = 200
"""Then a fresh one: mutated joins fill the topics of a socket."""
QUIET_S: Final = 0.05
"""How long a damaged HTTP request may wait for the rest of itself before the client leaves."""


class Wrong(AssertionError):
    """A case that was not answered as promised."""


class Surface(Protocol):
    """One worker's place at one entrance."""

    async def case(self, chance: random.Random) -> str:
        """One case.

        Raises:
            Wrong: it was not answered as promised.
            wsclient.BadServer: the server broke the protocol or was silent.
        """
        ...

    async def close(self) -> None:
        """Leave."""
        ...


def templates(session: str) -> list[tuple[str, Any]]:
    """Valid events with payloads."""
    return [
        ("phx_join", {"cursor": 0}),
        ("phx_join", {"tail": 3}),
        ("phx_join", {}),
        ("append", {"content": {"text": "hi", "n": [1, 2.5, None]}, "kind": "message", "metadata": {"a": "b"}}),
        ("append", {"content": "x", "idempotency_key": f"key-{session[:20]}", "expected_seq": 0}),
        ("append", {"messages": [{"content": 1}, {"content": "two", "idempotency_key": "k2"}, {"content": [3]}]}),
        ("append", {"messages": []}),
        ("replay", {"after": 0, "limit": 5}),
        ("replay", {"before": 3, "limit": 2}),
        ("mark_read", {"seq": 0}),
        ("phx_leave", {}),
        ("heartbeat", {}),
        ("access_token", {"token": "x"}),
    ]


class Phoenix:
    """Frames of Phoenix Channels in sound WebSocket frames: exactly one reply each, or a close code."""

    def __init__(self, host: str, port: int) -> None:
        self._where = host, port
        self._socket: Socket | None = None
        self._left = 0
        self._probes = 0

    async def case(self, chance: random.Random) -> str:
        """See `Surface`."""
        socket = await self._connected()
        text = self._frame(Mutator(chance), chance)
        if not text:
            text = b" "
        self._probes += 1
        probe = f"probe-{self._probes}"
        await socket.send(wsclient.encode(TEXT, text))
        await socket.send(wsclient.encode(TEXT, f'[null,"{probe}","phoenix","heartbeat",{{}}]'.encode()))
        replies: list[Any] = []
        probed = False
        while not (probed and replies):
            frame = await socket.frame()
            if frame is None or frame.opcode == CLOSE:
                self._socket = None
                socket.drop()
                if frame is None or frame.code not in CLOSES:
                    raise Wrong(f"closed with {frame} for {text[:300]!r}")
                return str(frame.code)
            _, ref, _, event, payload = json.loads(frame.payload)
            if event != "phx_reply":
                continue
            if ref == probe:
                probed = True
            else:
                replies.append(payload)
        if len(replies) != 1:
            raise Wrong(f"{len(replies)} replies to {text[:300]!r}")
        return _outcome(replies[0]["status"] == "ok", replies[0]["response"])

    async def _connected(self) -> Socket:
        if self._socket is None or not self._left:
            await self.close()
            self._socket, self._left = await wsclient.connect(*self._where), CASES_A_SOCKET
            for at, session in enumerate(SESSIONS):
                join = json.dumps([f"j{at}", f"j{at}", f"session:{session}", "phx_join", {}])
                await self._socket.send(wsclient.encode(TEXT, join.encode()))
            left = len(SESSIONS)
            while left:
                frame = await self._socket.frame()
                assert frame is not None
                left -= json.loads(frame.payload)[3] == "phx_reply"
        self._left -= 1
        return self._socket

    def _frame(self, mutator: Mutator, chance: random.Random) -> bytes:
        at = chance.randrange(len(SESSIONS))
        event, payload = chance.choice(templates(SESSIONS[at]))
        topic = "phoenix" if event == "heartbeat" else f"session:{SESSIONS[at]}"
        # A good join in the midst of a case would take the place of the worker's own.
        refs: list[Any] = [f"j{at}", f"r{chance.randrange(1000)}"]
        frame = [*refs, topic, event, payload]
        roll = chance.random()
        if roll < 0.5:
            return mutator.json(frame)
        if roll < 0.8:
            head = json.dumps(frame[:4], ensure_ascii=False).encode()
            return head[:-1] + b"," + mutator.json(payload) + b"]"
        whole = json.dumps(frame, ensure_ascii=False).encode()
        return mutator.damage(whole) if roll < 0.97 else chance.choice(NASTY_JSON)

    async def close(self) -> None:
        """See `Surface`."""
        if self._socket is not None:
            self._socket.drop()
            self._socket = None


def _outcome(ok: bool, response: Any) -> str:
    if ok:
        return "ok"
    if response.get("code") not in CODES or not response.get("message"):
        raise Wrong(f"an error without code or message: {response}")
    return str(response["code"])


class WebSocketBytes:
    """Frames that break RFC 6455 in every way: the connection ends, with a close code where one can still be said."""

    def __init__(self, host: str, port: int) -> None:
        self._where = host, port

    async def case(self, chance: random.Random) -> str:
        """See `Surface`."""
        if chance.random() < 0.1:
            return await self._handshake(chance)
        socket = await wsclient.connect(*self._where)
        try:
            return await self._bytes(socket, chance)
        finally:
            socket.drop()

    async def _bytes(self, socket: Socket, chance: random.Random) -> str:
        data = b"".join(self._piece(chance) for _ in range(chance.randrange(1, 5)))
        if chance.random() < 0.4:
            data = Mutator(chance).damage(data)
        try:
            if chance.random() < 0.05:
                for at in range(min(len(data), 400)):
                    await socket.send(data[at : at + 1])
                await socket.send(data[400:])
            else:
                await socket.send(data)
            await socket.send(wsclient.encode(CLOSE, struct.pack(">H", 1000)))
            socket.writer.write_eof()
        except OSError:
            pass
        said = "ended"
        while (frame := await socket.frame()) is not None:
            if frame.opcode == CLOSE:
                if frame.code == 4004:
                    raise Wrong(f"internal error for {data[:300].hex()}")
                said = str(frame.code) if frame.code in CLOSES else "echo"
        return said

    def _piece(self, chance: random.Random) -> bytes:
        """A sound frame, or one that is wrong in one way."""
        beat = b'[null,"1","phoenix","heartbeat",{}]'
        choices: list[bytes] = [
            wsclient.encode(TEXT, beat),
            wsclient.encode(PING, chance.randbytes(chance.randrange(126))),
            wsclient.encode(PONG, b""),
            wsclient.encode(TEXT, beat[:9], first=TEXT) + wsclient.encode(CONTINUATION, beat[9:]),
            wsclient.encode(TEXT, beat[:9], first=TEXT)
            + wsclient.encode(PING, b"?")
            + wsclient.encode(CONTINUATION, beat[9:]),
            wsclient.encode(TEXT, beat[:9], first=TEXT) * 2,
            wsclient.encode(CONTINUATION, beat),
            wsclient.encode(TEXT, b"", first=TEXT) * 40 + wsclient.encode(CONTINUATION, beat),
            wsclient.encode(TEXT, beat, mask=None),
            wsclient.encode(TEXT, beat, mask=b"\0\0\0\0"),
            wsclient.encode(TEXT, beat, first=0x80 | TEXT | chance.choice((0x10, 0x20, 0x40, 0x70))),
            wsclient.encode(BINARY, beat),
            wsclient.encode(chance.choice((3, 7, 11, 15)), beat),
            wsclient.encode(PING, b"x" * 126),
            wsclient.encode(PING, b"x", first=PING),
            wsclient.encode(CLOSE, b""),
            wsclient.encode(CLOSE, b"\x03"),
            wsclient.encode(CLOSE, struct.pack(">H", chance.randrange(65_536)) + b"\xff\xfe"),
            wsclient.encode(TEXT, b"\xff\xfe\xfd"),
            wsclient.encode(TEXT, b"x" * (256 * 1024 + 1)),
            b"\x81\xff" + struct.pack(">Q", chance.choice((10**9, 2**63, 2**64 - 1))) + b"\0\0\0\0" + b"9" * 1000,
            b"\x81\xfe\x00\x05\0\0\0\0[1,2]",
            _bomb(),
            chance.randbytes(chance.randrange(1, 200)),
        ]
        return chance.choice(choices)

    async def _handshake(self, chance: random.Random) -> str:
        query = chance.choice(("vsn=2.0.0&participant_id=a", "vsn=1.0.0", "", "vsn=2.0.0&participant_id=%ff"))
        extra = chance.choice(
            ("", "Sec-WebSocket-Extensions: permessage-deflate\r\n", "Origin: http://evil\r\n",
             "Transfer-Encoding: chunked\r\n",
             "Content-Length: 5\r\n", "X: " + "y" * 20_000 + "\r\n", "Upgrade: h2c\r\n", "Sec-WebSocket-Key: again\r\n")
        )  # fmt: skip
        request = wsclient.handshake(query, extra=extra)
        if chance.random() < 0.6:
            request = Mutator(chance).damage(request)
        status, _, _ = await _http(self._where, request, damaged=True)
        if status >= 500 and status != 503:
            raise Wrong(f"status {status} for {request[:300]!r}")
        return f"http-{status}" if status else "ended"

    async def close(self) -> None:
        """See `Surface`."""


def _bomb() -> bytes:
    """A mebibyte of zeros, compressed, in a frame that says so: no extension was agreed."""
    squeezer = zlib.compressobj(9, zlib.DEFLATED, -15)
    squeezed = squeezer.compress(bytes(1 << 20)) + squeezer.flush(zlib.Z_SYNC_FLUSH)
    return wsclient.encode(TEXT, squeezed[:-4], first=0xC1)


class Rest:
    """HTTP requests: an answer each, never a 500; problem JSON where HTTP itself was sound."""

    def __init__(self, host: str, port: int) -> None:
        self._where = host, port

    async def case(self, chance: random.Random) -> str:
        """See `Surface`."""
        request, damaged = self._request(Mutator(chance), chance)
        status, head, body = await _http(self._where, request, damaged=damaged)
        if not status:
            if damaged:
                return "ended"
            raise Wrong(f"no answer to {request[:400]!r}")
        if status >= 500 and status != 503:
            raise Wrong(f"status {status} for {request[:400]!r}")
        if status < 400:
            return "ok"
        if (damaged and b"problem+json" not in head) or request.startswith(b"HEAD "):
            return f"http-{status}"
        try:
            return _outcome(False, json.loads(body))
        except ValueError as error:
            raise Wrong(f"{status} {body[:200]!r} for {request[:400]!r}") from error

    def _request(self, mutator: Mutator, chance: random.Random) -> tuple[bytes, bool]:
        method, path, body = self._valid(chance)
        headers = ["Host: gateway", "X-Participant-Id: fuzz", "Content-Type: application/json"]
        if chance.random() < 0.2:
            headers.append("Idempotency-Key: " + chance.choice(("k", '"k"', "x" * 129, "", "\u00e9", "a\x01b")))
        if chance.random() < 0.1:
            odd = ("X-Participant-Id: %ff", "X-Participant-Id: b", "X-Participant-Kind: god", "Content-Encoding: gzip",
                   "Origin: http://evil", "Content-Type: text/plain", "Accept: nothing/at-all", "Expect: 100-continue",
                   "Range: bytes=0-", "X-Participant-Id: " + "%00" * 50)  # fmt: skip
            headers.append(chance.choice(odd))
        content = b"" if body is None else mutator.json(body)
        if body is not None:
            headers.append(f"Content-Length: {len(content)}")
        whole = f"{method} {path} HTTP/1.1\r\n".encode() + "\r\n".join(headers).encode() + b"\r\n\r\n" + content
        roll = chance.random()
        if roll < 0.15:
            return mutator.damage(whole), True
        if roll < 0.2:
            return self._too_much(chance), True
        # Not HTTP for the parser below us, which then answers in plain text: a control character, a header twice that
        # may be there once, a method that nobody ever heard of.
        return whole, b"\x01" in whole.partition(b"\r\n\r\n")[
            0
        ] or "Content-Type: text/plain" in headers or method == "BREW"

    def _valid(self, chance: random.Random) -> tuple[str, str, Any]:
        """Method, path and body, the path with odd ids and numbers."""
        session = chance.choice(("fz-0", "fz-1", "fz%2F..%2F%252e", "%C3%A9", "%00", "%ff", "%ED%A0%80", "f" * 128,
                                 "f" * 129, "%",
                                 "..", ".", "%2e%2e", "a;b", "a+b", "a%20b", "", "%F0%9F%98%80" * 33))  # fmt: skip
        number = chance.choice(
            ("0", "1", "5", "-1", "", "9" * 30, "1e3", "%31", "0x1", "\u0664".encode().hex(), "9007199254740992")
        )
        name = chance.choice(("after", "before", "tail", "limit", "nothing", "after=1&after"))
        content = chance.choice([payload for event, payload in templates("rest") if event == "append"])
        choices: list[tuple[str, str, Any]] = [
            ("GET", f"/v1/sessions/{session}/messages?{name}={number}&limit=3", None),
            ("GET", f"/v1/sessions/{session}", None),
            ("GET", f"/v1/sessions?{name}={number}", None),
            ("GET", f"/v1/participants/{session}/inbox", None),
            (
                "GET",
                chance.choice(("/", "/openapi.json", "/v1/limits", "//", "/v1/../etc", "/v1/sessions/a/b/c")),
                None,
            ),
            ("POST", f"/v1/sessions/{session}/messages", content),
            ("POST", f"/v1/sessions/{session}/messages", content),
            ("POST", "/v1/sessions", {"id": f"fz-new-{chance.randrange(100)}", "metadata": {"a": [1]}}),
            ("PUT", f"/v1/sessions/{session}/read", {"seq": 0}),
            (chance.choice(("DELETE", "PATCH", "HEAD", "OPTIONS", "BREW")), f"/v1/sessions/{session}", None),
        ]
        return chance.choice(choices)

    def _too_much(self, chance: random.Random) -> bytes:
        """Bodies that are larger than they may be, or say so, and numbers of a thousand million digits."""
        head = "POST /v1/sessions/fz-0/messages HTTP/1.1\r\nHost: g\r\nX-Participant-Id: f\r\n"
        head += "Content-Type: application/json\r\n"
        choices = (
            f"{head}Content-Length: 1000000000\r\n\r\n" + '{"content":' + "9" * 300_000,
            f"{head}Transfer-Encoding: chunked\r\n\r\n"
            "40000\r\n" + "9" * 0x40000 + "\r\n40000\r\n" + "9" * 0x40000 + "\r\n0\r\n\r\n",
            f"{head}Transfer-Encoding: chunked\r\n\r\nzz\r\n",
            f"{head}Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n1\r\n1\r\n0\r\n\r\n",
            f"{head}Content-Length: -1\r\n\r\n",
            f"{head}Content-Length: 1\r\nContent-Length: 2\r\n\r\n12",
            head + "A: b\r\n" * 5000 + "\r\n",
            head + "A: " + "b" * 100_000 + "\r\n\r\n",
            "GET /" + "a" * 100_000 + " HTTP/1.1\r\n\r\n",
            "GET / HTTP/9.9\r\n\r\n",
            "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        )
        return chance.choice(choices).encode("latin-1")

    async def close(self) -> None:
        """See `Surface`."""


async def _http(where: tuple[str, int], request: bytes, *, damaged: bool) -> tuple[int, bytes, bytes]:
    """One request on a connection of its own; status 0: none came, although the client waited (or the server left)."""
    reader, writer = await asyncio.open_connection(*where, limit=1 << 22)
    try:
        writer.write(request)
        async with asyncio.timeout(QUIET_S if damaged else wsclient.WAIT_S):
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head.split(b" ", 2)[1])
            size = _length(head)
            empty = status in {101, 204, 304} or request.startswith(b"HEAD ")
            return status, head, b"" if empty else await reader.readexactly(size)
    except TimeoutError:
        return 0, b"", b""
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
        return 0, b"", b""
    finally:
        writer.transport.abort()


def _length(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0
