"""`fleetlm shards forget`: what keeps a member is said and nothing is written; the word names shard and volume."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner, Result

from fleetlm_cli.main import app
from fleetlm_common.control import Forgotten, RingSpec
from fleetlm_common.filecontrol import change_ring, create_ring
from fleetlm_common.ids import Epoch, ShardName, Slot
from fleetlm_common.ring import Member, Move, RingMap, encode, ranges_from
from tests.support.eventually import eventually

NAMES = [ShardName(f"shard-{number}") for number in range(3)]
MEMBERS = tuple(Member(name, f"volume-{name[-1]}") for name in NAMES)
WORD = Forgotten(NAMES[2], "volume-2")


def ring_in(folder: Path, *, owners: list[int], shards: int = 2, moves: tuple[Move, ...] = ()) -> Path:
    """Eight slots on three members, and no process anywhere."""
    create_ring(folder / "control", RingSpec("ring-1", len(owners), shards))
    table = [(NAMES[owner], Epoch(1)) for owner in owners]
    made = RingMap("ring-1", len(owners), Epoch(1), MEMBERS, ranges_from(table), moves)
    (folder / "control" / "map.json").write_bytes(encode(made))
    return folder


def spec_of(folder: Path) -> RingSpec:
    return change_ring(folder / "control", lambda spec: spec)


def forget(folder: Path, *arguments: str, answer: str = "") -> Result:
    return CliRunner().invoke(app, ["shards", "forget", *arguments, "--data", str(folder)], input=answer)


def why(result: Result) -> str:
    return str(result.exception)


EMPTY = [0, 0, 0, 0, 1, 1, 1, 1]


def test_without_a_volume_it_is_shown(tmp_path: Path) -> None:
    """The id, what it would mean, what to type; nothing is written."""
    ring = ring_in(tmp_path, owners=EMPTY)
    shown = forget(ring, "shard-2")
    assert shown.exit_code == 0
    words = " ".join(shown.output.split())
    assert words.startswith("the ring map binds shard-2 to volume volume-2. shard-2 owns no slot, so nothing that")
    assert "fleetlm shards forget shard-2 --volume volume-2" in words
    machine = forget(ring, "shard-2", "--json")
    assert msgspec.json.decode(machine.output) == {"shard": "shard-2", "volume": "volume-2", "forgotten": False}
    assert spec_of(ring).forgotten == ()


def test_it_asks_first(tmp_path: Path) -> None:
    """No is no; yes is written once, however often; taken back it is gone."""
    ring = ring_in(tmp_path, owners=EMPTY)
    arguments = ("shard-2", "--volume", "volume-2", "--no-wait")
    refused = forget(ring, *arguments, answer="n\n")
    assert refused.exit_code == 1
    assert "owns no slot" in refused.output
    assert spec_of(ring).forgotten == ()
    assert forget(ring, *arguments, answer="y\n").exit_code == 0
    done = forget(ring, *arguments, "--yes", "--json")
    said = {"shard": "shard-2", "volume": "volume-2", "forgotten": True, "waited": False}
    assert (done.exit_code, msgspec.json.decode(done.output)) == (0, said)
    assert spec_of(ring).forgotten == (WORD,)
    assert forget(ring, "shard-2", "--volume", "volume-2", "--take-back").exit_code == 0
    assert spec_of(ring).forgotten == ()
    again = forget(ring, "shard-2", "--volume", "volume-2", "--take-back")
    assert "nobody had the ring forget shard-2 with volume volume-2" in why(again)


MOVE = Move("1.1", (Slot(0),), NAMES[0], NAMES[2], "Copying", Epoch(1))


@pytest.mark.parametrize(
    ("owners", "shards", "moves", "arguments", "words"),
    [
        (EMPTY, 2, (), ("shard-2", "--volume", "other"), "the ring map binds it to volume volume-2, not to other"),
        (EMPTY, 3, (), ("shard-2", "--volume", "volume-2"), "the ring asks for 3 shards, and it is one of them"),
        ([0, 0, 0, 2, 1, 1, 1, 1], 2, (), ("shard-2",), "it owns 1 slot, and their messages are on its volume"),
        (EMPTY, 2, (MOVE,), ("shard-2", "--volume", "volume-2"), "move 1.1 names it"),
        (EMPTY, 2, (), ("shard-9",), "there is no member 'shard-9'; there are shard-0, shard-1, shard-2"),
        (EMPTY, 2, (), ("shard-2", "--take-back"), "say with --volume which word is taken back"),
    ],
)
def test_what_keeps_it_is_said_and_nothing_is_written(
    tmp_path: Path, *, owners: list[int], shards: int, moves: tuple[Move, ...], arguments: tuple[str, ...], words: str
) -> None:
    """Each condition by its own words, before anybody is asked."""
    ring = ring_in(tmp_path, owners=owners, shards=shards, moves=moves)
    refused = forget(ring, *arguments, "--yes", "--no-wait")
    assert refused.exit_code != 0
    assert words in why(refused)
    assert spec_of(ring).forgotten == ()


async def test_nobody_waits_for_what_is_refused_meanwhile(tmp_path: Path) -> None:
    """Somebody asks for the shard again after the word was written: the wait ends, and says why."""
    ring = ring_in(tmp_path, owners=EMPTY)
    waiting = asyncio.create_task(asyncio.to_thread(forget, ring, "shard-2", "--volume", "volume-2", "--yes"))
    await eventually(lambda: spec_of(ring).forgotten == (WORD,), "the word is written", timeout_s=20)
    change_ring(ring / "control", lambda spec: msgspec.structs.replace(spec, shards=3))
    async with asyncio.timeout(20):
        refused = await waiting
    assert "shard-2 is not forgotten: the ring asks for 3 shards" in why(refused)
    assert "the word stands (--take-back ends it)" in why(refused)


def test_a_wait_ends_the_command_and_not_the_wish(tmp_path: Path) -> None:
    """No controller runs here."""
    ring = ring_in(tmp_path, owners=EMPTY)
    late = forget(ring, "shard-2", "--volume", "volume-2", "--yes", "--timeout", "1")
    assert "not done within 1 s; it goes on without this command" in why(late)
    assert spec_of(ring).forgotten == (WORD,)


def test_there_must_be_a_ring(tmp_path: Path) -> None:
    """Status 3, as everywhere."""
    assert "cannot use the ring" in why(forget(tmp_path, "shard-2"))
