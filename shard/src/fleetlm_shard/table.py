"""Immutable sorted tables (docs/log.md, "Tables"): segment indexes and checkpoints.

    header | blocks of entries | directory (one line a block) | metadata JSON | footer

Promise: every byte of the file is under a checksum that is checked before the byte is believed; `get` reads one block.
Blocks are read by `pread`, not through a mapping: a bad sector is then an `OSError` of one call and not the end of the
process (SIGBUS). Must not be done here: names, links, syncs of folders, and the meaning of keys and values.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from typing import TYPE_CHECKING, Final

from crc32c import crc32c

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fleetlm_shard.disk import File

FORMAT: Final = 1
KIND_INDEX: Final = 1
KIND_CHECKPOINT: Final = 2
BLOCK_BYTES: Final = 4096
"""A block is closed when it has this much: one `get` reads and checks about a page."""
_WRITE_BYTES: Final = 256 * 1024
"""Written at once: few calls, and no large buffer."""

_SLICE_ENTRIES: Final = 64
"""Entries merged between two chances to pause."""

_MAGIC: Final = b"FLEETTB"
_HEADER: Final = struct.Struct("<7sBB3xI")
_ENTRY: Final = struct.Struct("<HI")
_LINE: Final = struct.Struct("<QIIIH")
_FOOTER: Final = struct.Struct("<QQIIIIII")


class TableDamaged(Exception):
    """A checksum or a length is wrong, or the disk does not give the bytes."""


class TableBuilder:
    """Writes a table to a new file, streaming; the caller syncs and names it.

    Args:
        file: empty.
        kind: `KIND_INDEX` or `KIND_CHECKPOINT`.
    """

    def __init__(self, file: File, kind: int) -> None:
        self._file = file
        self._written = 0
        self._out = bytearray(_HEADER.pack(_MAGIC, FORMAT, kind, 0))
        self._out[-4:] = crc32c(self._out[:-4]).to_bytes(4, "little")
        self._block = bytearray()
        self._block_entries = 0
        self._first_key = b""
        self._last_key = b""
        self._lines: list[bytes] = []
        self._entries = 0

    def add(self, key: bytes, value: bytes) -> None:
        """Append an entry; keys must ascend."""
        assert key > self._last_key or not self._entries, "keys ascend"
        if not self._block:
            self._first_key = key
        self._block += _ENTRY.pack(len(key), len(value))
        self._block += key
        self._block += value
        self._last_key = key
        self._block_entries += 1
        self._entries += 1
        if len(self._block) >= BLOCK_BYTES:
            self._close_block()

    def add_block(self, first_key: bytes, block: bytes, entries: int) -> None:
        """Append a whole checked block of another table as it is; the next key must be beyond its last."""
        assert first_key > self._last_key or not self._entries, "keys ascend"
        self._close_block()
        self._block += block
        self._first_key = self._last_key = first_key
        self._block_entries = entries
        self._entries += entries
        self._close_block()

    def _close_block(self) -> None:
        if not self._block:
            return
        line = _LINE.pack(
            self._written + len(self._out),
            len(self._block),
            crc32c(self._block),
            self._block_entries,
            len(self._first_key),
        )
        self._lines.append(line + self._first_key)
        self._out += self._block
        self._block.clear()
        self._block_entries = 0
        if len(self._out) >= _WRITE_BYTES:
            self._flush()

    def _flush(self) -> None:
        self._file.pwrite(self._out, self._written)
        self._written += len(self._out)
        self._out = bytearray()

    def finish(self, meta: bytes) -> int:
        """Write what closes the table; return the file's length. Not synced."""
        self._close_block()
        directory = b"".join(self._lines)
        at = self._written + len(self._out)
        footer = _FOOTER.pack(
            at, self._entries, len(directory), crc32c(directory), len(meta), crc32c(meta), len(self._lines), 0
        )[:-4]
        self._out += directory + meta + footer + crc32c(footer).to_bytes(4, "little")
        self._flush()
        return self._written


class Table:
    """Reads a table.

    Args:
        file: stays open as long as the table is used; `close` closes it.
        kind: what it must be.

    Raises:
        TableDamaged: header, directory, metadata or footer are not what they should be.
    """

    def __init__(self, file: File, kind: int) -> None:
        self._file = file
        self.size_bytes = file.size()
        if self.size_bytes < _HEADER.size + _FOOTER.size:
            raise TableDamaged("the file is too short to be a table")
        header = self._read(0, _HEADER.size)
        magic, version, own_kind, crc = _HEADER.unpack(header)
        if magic != _MAGIC or crc != crc32c(header[:-4]):
            raise TableDamaged("the header is damaged")
        if version != FORMAT or own_kind != kind:
            raise TableDamaged(f"format {version} kind {own_kind} where format {FORMAT} kind {kind} belongs")
        footer = self._read(self.size_bytes - _FOOTER.size, _FOOTER.size)
        at, entries, dir_bytes, dir_crc, meta_bytes, meta_crc, blocks, crc = _FOOTER.unpack(footer)
        if crc != crc32c(footer[:-4]) or at + dir_bytes + meta_bytes + _FOOTER.size != self.size_bytes:
            raise TableDamaged("the footer is damaged")
        self.entries = int(entries)
        directory = self._read(at, dir_bytes)
        self.meta = self._read(at + dir_bytes, meta_bytes)
        if crc32c(directory) != dir_crc or crc32c(self.meta) != meta_crc:
            raise TableDamaged("the directory or the metadata is damaged")
        self._first_keys: list[bytes] = []
        self._blocks: list[tuple[int, int, int, int]] = []
        self._near: tuple[int, bytes, int, bytes] = (-1, b"", 0, b"")
        """The block that `get` read last, and where it stood in it, behind which key; set as one, for any thread."""
        self._read_directory(directory, blocks, at)

    def _read_directory(self, directory: bytes, blocks: int, end: int) -> None:
        at, expected = 0, _HEADER.size
        while at < len(directory):
            offset, size, crc, entries, key_bytes = _LINE.unpack_from(directory, at)
            at += _LINE.size
            self._first_keys.append(directory[at : at + key_bytes])
            self._blocks.append((offset, size, crc, entries))
            at += key_bytes
            if offset != expected:
                raise TableDamaged("blocks do not follow each other")
            expected = offset + size
        if len(self._blocks) != blocks or expected != end:
            raise TableDamaged("the directory does not cover the blocks")

    def _read(self, offset: int, size: int) -> bytes:
        try:
            data = self._file.pread(size, offset)
        except OSError as error:
            raise TableDamaged(f"cannot read {size} bytes at {offset}") from error
        if len(data) != size:
            raise TableDamaged(f"the file ends within {size} bytes at {offset}")
        return data

    def __len__(self) -> int:
        return self.entries

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self._blocks)

    def block(self, number: int) -> bytes:
        """The checked bytes of a block."""
        offset, size, crc, _ = self._blocks[number]
        data = self._read(offset, size)
        if crc32c(data) != crc:
            raise TableDamaged(f"block {number} at {offset} is damaged")
        return data

    def block_entries(self, number: int) -> int:
        """How many entries a block has."""
        return self._blocks[number][3]

    def first_key(self, number: int) -> bytes:
        """The key that a block begins with."""
        return self._first_keys[number]

    def get(self, key: bytes) -> bytes | None:
        """The value of `key`.

        Raises:
            TableDamaged: the one block that may hold it is damaged.
        """
        number = bisect_right(self._first_keys, key) - 1
        if number < 0:
            return None
        # Whoever asks in the order of keys asks for more of this block.
        last, block, at, behind = self._near
        if number != last:
            block, at, behind = self.block(number), 0, b""
            self._near = (number, block, at, behind)
        if key not in block:
            return None
        return self._walk(number, block, at if key > behind else 0, key)

    def _walk(self, number: int, block: bytes, at: int, key: bytes) -> bytes | None:
        while at < len(block):
            key_bytes, value_bytes = _ENTRY.unpack_from(block, at)
            value_at = at + _ENTRY.size + key_bytes
            own = block[at + _ENTRY.size : value_at]
            if own == key:
                self._near = (number, block, value_at + value_bytes, key)
                return block[value_at : value_at + value_bytes]
            if own > key:
                break
            at = value_at + value_bytes
        self._near = (number, block, at, key)
        return None

    def items(self, after: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Entries with keys beyond `after`, ascending."""
        for number in range(max(bisect_right(self._first_keys, after) - 1, 0), len(self._blocks)):
            for key, value in entries_of(self.block(number)):
                if key > after:
                    yield key, value

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def entries_of(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The entries of a checked block."""
    at = 0
    while at < len(block):
        key_bytes, value_bytes = _ENTRY.unpack_from(block, at)
        at += _ENTRY.size
        value_at = at + key_bytes
        yield block[at:value_at], block[value_at : value_at + value_bytes]
        at = value_at + value_bytes


def merge(
    builder: TableBuilder,
    old: Table | None,
    changed: Iterator[tuple[bytes, bytes]],
    gone: Callable[[bytes], bool] | None = None,
) -> Iterator[None]:
    """Write `old` with `changed` (ascending) put over it; blocks that nothing changes in are copied as they are.

    Args:
        builder: of the new table.
        old: the table before, if there is one.
        changed: entries that replace old ones or are new.
        gone: tells of an old value whether its entry is left out.

    Yields:
        After each slice of work, so that the caller can pause.
    """
    following = next(changed, None)
    blocks = old.blocks if old is not None else 0
    for number in range(blocks):
        assert old is not None
        block = old.block(number)
        below = old.first_key(number + 1) if number + 1 < blocks else None
        mine: list[tuple[bytes, bytes]] = []
        while following is not None and (below is None or following[0] < below):
            mine.append(following)
            following = next(changed, None)
            if len(mine) % _SLICE_ENTRIES == 0:
                yield
        if not mine and gone is None and len(block) >= BLOCK_BYTES // 2:
            builder.add_block(old.first_key(number), block, old.block_entries(number))
        else:
            entries = {key: value for key, value in entries_of(block) if gone is None or not gone(value)}
            entries.update(mine)
            for key in sorted(entries):
                builder.add(key, entries[key])
        yield
    count = 0
    while following is not None:
        builder.add(*following)
        following = next(changed, None)
        count += 1
        if count % _SLICE_ENTRIES == 0:
            yield
