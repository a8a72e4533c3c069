"""The newest live messages of one session, kept so that a reader that catches up meets the live stream without a hole.

Promise: what is kept is contiguous and ends at the last seq that was added. Pure.
Must not be done here: deciding how much is kept (`streams.py` knows who needs it).
"""

from __future__ import annotations

from collections import deque

import msgspec


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """`count` messages from `first_seq`, as JSON joined by commas."""

    first_seq: int
    count: int
    body: bytes

    @property
    def last_seq(self) -> int:
        """The seq of the last message."""
        return self.first_seq + self.count - 1


def joined(first_seq: int, messages: list[bytes]) -> Chunk:
    """A chunk of single messages."""
    return Chunk(first_seq, len(messages), b",".join(messages))


_split = msgspec.json.Decoder(list[msgspec.Raw]).decode


def cut(chunk: Chunk, after: int) -> Chunk:
    """What of `chunk` comes after seq `after`, which lies within it; parses, and is needed only where streams overlap.

    Raises:
        msgspec.DecodeError: the body is not JSON objects joined by commas.
        msgspec.ValidationError: it has another number of messages than it says.
    """
    messages = _split(b"[%b]" % chunk.body)
    if len(messages) != chunk.count:
        raise msgspec.ValidationError(f"{len(messages)} messages in a push of {chunk.count}")
    return joined(after + 1, [bytes(message) for message in messages[after + 1 - chunk.first_seq :]])


class Tail:
    """Chunks in order.

    Args:
        last_seq: where the stream stands; nothing is kept yet.
    """

    __slots__ = ("_chunks", "last_seq", "messages", "size_bytes")

    def __init__(self, last_seq: int) -> None:
        self._chunks: deque[Chunk] = deque()
        self.last_seq = last_seq
        self.messages = 0
        self.size_bytes = 0

    @property
    def first_seq(self) -> int:
        """The first seq that is kept; `last_seq` + 1 when none is."""
        return self.last_seq - self.messages + 1

    def add(self, chunk: Chunk) -> None:
        """Keep what follows `last_seq`."""
        assert chunk.first_seq == self.last_seq + 1, "a stream is contiguous"
        self._chunks.append(chunk)
        self.last_seq = chunk.last_seq
        self.messages += chunk.count
        self.size_bytes += len(chunk.body)

    def restart(self, last_seq: int) -> None:
        """The stream goes on after `last_seq`; what was kept is not contiguous with it any more."""
        self._chunks.clear()
        self.last_seq = last_seq
        self.messages = self.size_bytes = 0

    def trim(self, *, messages: int, size_bytes: int) -> None:
        """Drop the oldest chunks until both bounds hold."""
        while self._chunks and (self.messages > messages or self.size_bytes > size_bytes):
            dropped = self._chunks.popleft()
            self.messages -= dropped.count
            self.size_bytes -= len(dropped.body)

    def after(self, seq: int) -> list[Chunk]:
        """The chunks that hold what comes after `seq` (at least `first_seq` - 1); the first may begin before that."""
        assert seq + 1 >= self.first_seq, "the caller replays what is not kept"
        return [chunk for chunk in self._chunks if chunk.last_seq > seq]
