"""Ports are chosen once, remembered, and never changed behind the clients' back."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from fleetlm_cli import ports
from fleetlm_cli.exits import Failure

ENTROPY = random.Random(1)


def free_but(*taken: int) -> Callable[[int], bool]:
    return lambda port: port not in taken


@pytest.mark.parametrize(
    ("wanted", "remembered", "port"),
    [(None, None, 4000), (None, 5000, 5000), (6000, None, 6000), (6000, 5000, 6000), (0, 5000, 5000)],
)
def test_the_clients_port_is_asked_for_or_remembered(wanted: int | None, remembered: int | None, port: int) -> None:
    """What the user says, else what it was, else 4000."""
    assert ports.client_port(wanted=wanted, remembered=remembered, entropy=ENTROPY, free=free_but()) == port


@pytest.mark.parametrize(("wanted", "remembered"), [(None, None), (4000, None), (None, 4000)])
def test_the_clients_port_never_changes_unasked(wanted: int | None, remembered: int | None) -> None:
    """Taken: refused, with the way out."""
    with pytest.raises(Failure, match="port 4000 is taken by another program; choose one with --port"):
        ports.client_port(wanted=wanted, remembered=remembered, entropy=ENTROPY, free=free_but(4000))


def test_any_port_is_a_free_one() -> None:
    """Zero with a remembered port that is taken: another one, below the range of outgoing connections."""
    port = ports.client_port(wanted=0, remembered=4000, entropy=ENTROPY, free=free_but(4000))
    assert port in ports.FREE_PORTS


def test_other_ports_are_kept_while_they_are_free() -> None:
    """Nobody but the processes themselves knows them: one that is taken is replaced, none is given twice."""
    chosen = ports.choose(
        ["a", "b", "c", "d"],
        chosen={"client": 4000},
        remembered={"a": 20_001, "b": 20_002, "c": 4000, "client": 9},
        entropy=ENTROPY,
        free=free_but(20_002),
    )
    assert chosen["client"] == 4000
    assert chosen["a"] == 20_001
    assert len(set(chosen.values())) == 5
    assert {chosen["b"], chosen["c"], chosen["d"]} <= set(ports.FREE_PORTS) - {20_002}


def test_a_machine_without_free_ports_is_said_to_be_one() -> None:
    """Bounded tries, then words."""
    with pytest.raises(Failure, match="found no free port"):
        ports.choose(["a"], chosen={}, remembered={}, entropy=ENTROPY, free=lambda port: False)


def test_a_port_with_a_listener_is_not_free() -> None:
    """On this address or on all of them."""
    for host in ("127.0.0.1", "0.0.0.0"):
        with socket.create_server((host, 0)) as server:
            assert not ports.is_free(server.getsockname()[1])


def test_ports_are_remembered_with_those_that_rest(tmp_path: Path) -> None:
    """A gateway that is left out this time has its port next time; a damaged file is no reason to fail."""
    ports.save(tmp_path, {"a": 1, "b": 2})
    ports.save(tmp_path, {"a": 3})
    assert ports.load(tmp_path) == {"a": 3, "b": 2}
    (tmp_path / ports.PORTS_FILE).write_text("{")
    assert ports.load(tmp_path) == {}
