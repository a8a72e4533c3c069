"""The protocols of `tests/bench/peers.py`: answers are counted rightly however the network cuts them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pytest

from fleetlm_common import rpc
from fleetlm_common.rpc import Kind
from fleetlm_common.wire import HEADER
from tests.bench.check import worse
from tests.bench.peers import Sample, summary
from tests.bench.peerwire import NatsWire, PeerError, PostgresWire, RedisWire, ShardWire, Wire


def shard_wire() -> ShardWire:
    wire = ShardWire("s", hello=rpc.Hello(rpc.PROTOCOL, "ring", "shard-0", "volume", "bench", b"secret", 1))
    welcome = rpc.encode(rpc.Welcome(rpc.PROTOCOL, "shard-0", 1, 1))
    assert wire.greeted(HEADER.pack(len(welcome), Kind.WELCOME, 0) + welcome)
    wire.requests(3)
    return wire


ACK = rpc.encode(rpc.Appended([]))
CASES: Final[dict[str, tuple[Callable[[], Wire], bytes]]] = {
    "redis": (lambda: RedisWire("r"), b"$15\r\n1700000000000-0\r\n" * 3),
    "postgres": (
        lambda: PostgresWire("p", user="u", database="d"),
        b"2\0\0\0\x04C\0\0\0\x0fINSERT 0 1\0Z\0\0\0\x05I" * 3,
    ),
    "nats": (lambda: NatsWire("n"), b'MSG _INBOX.n 1 25\r\n{"stream":"S", "seq":1234}\r\n' * 3),
    "shard": (shard_wire, b"".join(HEADER.pack(len(ACK), Kind.APPENDED, at) + ACK for at in range(3))),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_answers_are_counted_however_they_are_cut(name: str, size: int) -> None:
    """Three answers are three, in pieces of any size, and never early."""
    make, stream = CASES[name]
    wire: Wire = make()
    counted = [wire.answers(stream[at : at + size]) for at in range(0, len(stream), size)]
    assert sum(counted) == 3
    assert make().answers(stream[: len(stream) // 3 - 1]) == 0


@pytest.mark.parametrize(
    ("name", "refusal"),
    [
        ("redis", b"-ERR no\r\n"),
        ("postgres", b"E\0\0\0\x10SERROR\0C1\0\0"),
        ("nats", b"-ERR 'no'\r\n"),
        ("shard", HEADER.pack(0, Kind.ERROR, 0)),
    ],
)
def test_a_refusal_ends_the_run(name: str, refusal: bytes) -> None:
    """A server that refuses is not fast: the run fails."""
    with pytest.raises(PeerError):
        CASES[name][0]().answers(refusal)


def test_ratios_are_of_the_same_round() -> None:
    """A round in which the whole machine was slow changes no ratio."""
    samples = [
        Sample(number, server, "pipelined", rate * pace, 1, 1, 1, 1, 0.5)
        for number, pace in enumerate((1.0, 0.1, 0.5))
        for server, rate in (("shard", 30.0), ("redis", 60.0))
    ]
    assert summary(samples)["pipelined"]["shard_ratio"] == {"redis": 0.5}


def test_check_says_what_got_worse() -> None:
    """Beyond the tolerance, or gone; what is better or within it is no news."""
    stored = {"same": 0.5, "slower": 0.5, "faster": 0.5, "gone": 0.5}
    said = worse(stored, {"same": 0.4, "slower": 0.3, "faster": 0.9}, tolerance=0.35)
    assert [sentence.split(":")[0] for sentence in said] == ["slower", "gone"]
    assert "-40%" in said[0]
