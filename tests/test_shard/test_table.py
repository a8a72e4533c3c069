"""Tables: what goes in comes out, and no byte of the file may be wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetlm_shard.table import KIND_CHECKPOINT, KIND_INDEX, Table, TableBuilder, TableDamaged, merge
from tests.support.simdisk import SimVolume

META = b'{"pos":1}'


def build(entries: dict[bytes, bytes], volume: SimVolume, name: str = "t") -> Table:
    """Write and open a table."""
    file = volume.process("p").create(name)
    builder = TableBuilder(file, KIND_INDEX)
    for key in sorted(entries):
        builder.add(key, entries[key])
    assert builder.finish(META) == file.size()
    return Table(file, KIND_INDEX)


keys = st.binary(min_size=1, max_size=20)
values = st.binary(max_size=300)


@given(st.dictionaries(keys, values, max_size=80), keys)
@settings(max_examples=100, deadline=None)
def test_every_entry_is_found_and_nothing_else(entries: dict[bytes, bytes], other: bytes) -> None:
    """`get`, iteration from any key, count and metadata agree with a dict."""
    table = build(entries, SimVolume())
    assert len(table) == len(entries)
    assert table.meta == META
    assert dict(table.items()) == entries
    assert [key for key, _ in table.items(other)] == sorted(key for key in entries if key > other)
    for key, value in entries.items():
        assert table.get(key) == value
    assert table.get(other) == entries.get(other)


@given(st.dictionaries(keys, values, max_size=80), st.data())
@settings(max_examples=100, deadline=None)
def test_lookups_in_any_order_find_the_same(entries: dict[bytes, bytes], data: st.DataObject) -> None:
    """A lookup goes on where the last one stood; that neither hides an entry nor makes one up."""
    table = build(entries, SimVolume())
    asked = st.one_of(st.sampled_from(sorted(entries)), keys) if entries else keys
    for key in data.draw(st.lists(asked, max_size=40)):
        assert table.get(key) == entries.get(key)


@given(st.dictionaries(keys, values, max_size=80), st.dictionaries(keys, values, max_size=40))
@settings(max_examples=100, deadline=None)
def test_a_merge_is_an_update(old: dict[bytes, bytes], changed: dict[bytes, bytes]) -> None:
    """New rows over old ones, wherever they fall; unchanged blocks are copied whole."""
    volume = SimVolume()
    table = build(old, volume)
    file = volume.process("p").create("merged")
    builder = TableBuilder(file, KIND_INDEX)

    def in_order() -> Iterator[tuple[bytes, bytes]]:
        yield from sorted(changed.items())

    for _ in merge(builder, table, in_order()):
        pass
    builder.finish(META)
    assert dict(Table(file, KIND_INDEX).items()) == {**old, **changed}


def test_large_values_and_many_blocks() -> None:
    """An entry larger than a block has one of its own."""
    entries = {f"{number:05d}".encode(): bytes([number % 256]) * (number * 37 % 9000) for number in range(300)}
    table = build(entries, SimVolume())
    assert table.blocks > 50
    assert all(table.get(key) == value for key, value in entries.items())


def test_every_flipped_byte_is_noticed_before_it_is_believed() -> None:
    """Opening or reading fails; no entry is ever wrong."""
    volume = SimVolume()
    entries = {f"{number:03d}".encode(): b"value" * (number % 40) for number in range(120)}
    build(entries, volume)
    for offset in range(len(volume.read("t"))):
        twin = volume.copy()
        twin.flip("t", offset, 1 << offset % 8)
        with pytest.raises(TableDamaged):
            dict(Table(twin.process("q").open("t"), KIND_INDEX).items())


def test_every_truncation_is_noticed() -> None:
    """A table that is too short does not open."""
    volume = SimVolume()
    build({b"a": b"1", b"b": b"2"}, volume)
    for length in range(len(volume.read("t"))):
        twin = volume.copy()
        twin.truncate("t", length)
        with pytest.raises(TableDamaged):
            Table(twin.process("q").open("t"), KIND_INDEX)


def test_a_table_of_another_kind_is_refused() -> None:
    """An index is not a checkpoint."""
    volume = SimVolume()
    build({}, volume)
    with pytest.raises(TableDamaged, match="kind"):
        Table(volume.process("q").open("t"), KIND_CHECKPOINT)
