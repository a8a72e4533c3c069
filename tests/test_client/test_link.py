"""The connection: heartbeats, half-open sockets, reconnecting with jitter, close codes, draining."""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable

import pytest

from fleetlm_client.backoff import Backoff
from fleetlm_client.channel import Call
from fleetlm_client.errors import ProtocolMismatch
from fleetlm_client.settings import Settings
from fleetlm_client.subscription import raise_if_failed
from fleetlm_common.errors import FleetError, TryAgain
from tests.support.phoenix_model import Fault
from tests.test_client.harness import Harness


def test_heartbeats_keep_an_idle_socket() -> None:
    """An idle connection lives for an hour on one socket, with a heartbeat each interval."""
    harness = Harness()
    harness.channel()
    harness.run(3_600)
    assert harness.link.connections == 1
    assert harness.socket is not None
    beats = [frame for frame in harness.socket.received if frame[3] == "heartbeat"]
    assert len(beats) == pytest.approx(3_600 / harness.settings.heartbeat_interval_s, abs=2)
    assert all(frame[0] is None and frame[2] == "phoenix" for frame in beats)


def test_a_half_open_connection_is_noticed() -> None:
    """The other side vanished without a word: given up after interval + timeout."""
    harness = Harness()
    harness.channel()
    harness.settle()
    limit_s = harness.settings.heartbeat_interval_s + harness.settings.heartbeat_timeout_s
    for _ in range(int(limit_s * 10) + 2):
        harness.advance(0.1)
        if harness.link.wants_close:
            break
    assert harness.link.wants_close
    assert harness.now_s >= 100 + limit_s - 0.2


def test_any_frame_proves_that_the_other_side_lives() -> None:
    """A heartbeat's answer that is late behind a long replay does not end the connection."""
    harness = Harness()
    channel = harness.channel()
    harness.settle()
    harness.advance(harness.settings.heartbeat_interval_s)
    for number in range(60):
        harness.advance(1)
        assert not harness.link.wants_close
        assert harness.socket is not None
        harness.socket.push("s", "read", {"participant_id": "bob", "last_read_seq": number})
        harness.to_client()
        channel.reader.take()


def test_waits_are_jittered_and_capped() -> None:
    """Full jitter: anything from 0 to the doubling bound, never above the cap."""
    backoff = Backoff(base_s=0.1, cap_s=5.0, entropy=random.Random(3))
    waits = [backoff.next_s() for _ in range(2_000)]
    assert all(wait <= min(5.0, 0.1 * 2**at) for at, wait in enumerate(waits[:50]))
    assert max(waits) > 4.9
    assert min(waits[10:]) < 0.1
    backoff.reset()
    assert backoff.next_s(2.0) <= 2.1


def test_close_codes_decide() -> None:
    """4000–4499 comes back, after the time told; 4500–4999 does not."""
    harness = Harness()
    channel = harness.channel()
    harness.settle()
    harness.cut(close_code=4000, reason='{"retry_after_ms": 3000}')
    harness.run(2.9)
    assert harness.link.connections == 1
    harness.run(1)
    assert harness.link.connections == 2
    harness.cut(close_code=4999, reason="no")
    harness.run(1_000)
    assert harness.link.connections == 2
    assert channel.state == "failed"


def test_an_unreachable_server_is_tried_at_growing_intervals() -> None:
    """About one try per capped wait, not a storm."""
    harness = Harness()
    harness.reachable = False
    harness.channel()
    tries = 0
    end_s = harness.now_s + 600
    while harness.now_s < end_s:
        before = harness.link.state
        harness.connect()
        tries += before == "down"
        at_s = harness.link.next_at_s()
        assert at_s is not None
        harness.advance(max(0.001, at_s - harness.now_s))
    assert 600 / harness.settings.backoff_cap_s < tries < 400


def test_draining_moves_at_a_random_moment_within_the_time_given() -> None:
    """A thousand clients of one gateway do not leave at once."""
    moments: list[float] = []
    for seed in range(40):
        harness = Harness(seed=seed)
        harness.channel()
        harness.settle()
        assert harness.socket is not None
        harness.socket.push("s", "draining", {"retry_after_ms": 8_000})
        harness.to_client()
        begin_s = harness.now_s
        while not harness.link.wants_close:
            harness.advance(0.05)
        moments.append(harness.now_s - begin_s)
    assert max(moments) <= 8.05
    assert max(moments) > 6
    assert min(moments) < 2


def test_calls_survive_a_lost_connection_and_end_at_their_deadline() -> None:
    """`mark_read` is asked again after a reconnect; when nobody ever answers it raises TRY_AGAIN."""
    faults: list[Fault] = ["silence", "try_again"]
    harness = Harness(fault=lambda event: faults.pop(0) if event == "mark_read" and faults else "none")
    channel = harness.channel()
    harness.model.add("s", ["x"])
    harness.settle()
    results: list[object] = []
    channel.call(Call(event="mark_read", payload=b'{"seq":1}', deadline_s=harness.now_s + 60, done=results.append))
    harness.link.pump(channel, harness.now_s)
    harness.settle()
    harness.cut()
    harness.run(30)
    assert len(results) == 1
    assert not isinstance(results[0], FleetError)
    harness.reachable = False
    harness.cut()
    channel.call(Call(event="mark_read", payload=b'{"seq":1}', deadline_s=harness.now_s + 5, done=results.append))
    harness.link.pump(channel, harness.now_s)
    harness.run(6)
    assert isinstance(results[1], TryAgain)


def test_leaving_ends_calls() -> None:
    """Who waits for a page of a session that is left is told, now and not at the deadline."""
    harness = Harness(fault=lambda event: "silence" if event == "replay" else "none")
    channel = harness.channel()
    harness.settle()
    results: list[object] = []
    channel.call(Call(event="replay", payload=b'{"after":0}', deadline_s=harness.now_s + 60, done=results.append))
    harness.link.pump(channel, harness.now_s)
    harness.settle()
    harness.link.remove(channel, harness.now_s)
    assert [type(result) for result in results] == [TryAgain]


def test_calls_are_bounded() -> None:
    """Too many unanswered calls of a session are refused at once."""
    harness = Harness(settings=Settings(calls_max=2))
    channel = harness.channel()
    for _ in range(2):
        channel.call(Call(event="mark_read", payload=b"{}", deadline_s=200, done=lambda result: None))
    with pytest.raises(TryAgain, match="wait"):
        channel.call(Call(event="mark_read", payload=b"{}", deadline_s=200, done=lambda result: None))


def test_what_cannot_be_read_ends_the_connection() -> None:
    """A frame that is not one: the connection is made anew and nothing is lost."""
    harness = Harness()
    harness.channel()
    harness.settle()
    for text in ("", "{}", "[1,2]", '["1","1","t","messages"]', "\x00"):
        harness.link.received(text, harness.now_s)
        assert harness.link.wants_close
        harness.settle()
        harness.run(10)
    assert harness.link.connections == 6


def test_a_server_that_cannot_be_read_at_all_is_said() -> None:
    """Three connections in a row end at once with an unreadable frame: raised, not retried for ever."""
    harness = Harness()
    channel = harness.channel()
    for _ in range(3):
        harness.run(1)
        harness.link.received("nonsense", harness.now_s)
    assert isinstance(channel.error, ProtocolMismatch)
    assert harness.link.state == "failed"


def test_connections_that_end_at_once_are_made_less_and_less_often() -> None:
    """A server that accepts and closes is not stormed: the waits grow although connecting works."""
    harness = Harness()
    harness.channel()
    begin_s = harness.now_s
    for _ in range(40):
        while harness.socket is None:
            at_s = harness.link.next_at_s()
            assert at_s is not None
            harness.advance(max(0.0, at_s - harness.now_s))
            harness.settle()
        harness.cut()
    assert harness.now_s - begin_s > 30


def test_a_session_is_joined_once_per_client() -> None:
    """Two readers of one session on one socket would end each other."""
    harness = Harness()
    first = harness.channel("s")
    with pytest.raises(ValueError, match="joined on this client already"):
        harness.channel("s")
    harness.settle()
    harness.link.remove(first, harness.now_s)
    harness.channel("s")
    harness.settle()
    assert harness.socket is not None
    assert [frame[3] for frame in harness.socket.received] == ["phx_join", "phx_leave", "phx_join"]


def test_being_offline_costs_no_wakeups() -> None:
    """An append that waits for a connection does not make the client spin."""
    harness = Harness()
    channel = harness.channel()
    harness.settle()
    harness.append(channel, 1)
    harness.cut()
    harness.reachable = False
    wakeups = 0
    end_s = harness.now_s + 100
    while harness.now_s < end_s:
        harness.connect()
        at_s = harness.link.next_at_s()
        assert at_s is not None
        harness.advance(max(0.0, at_s - harness.now_s))
        wakeups += 1
        assert wakeups < 500


def test_an_error_that_is_raised_again_does_not_grow() -> None:
    """An application that goes on asking a session that has failed needs no more memory each time."""
    harness = Harness()
    channel = harness.channel()
    harness.settle()
    harness.link.fail(ProtocolMismatch("nonsense"))

    call = Call(event="replay", payload=b"{}", deadline_s=200, done=lambda _: None)

    def frames(ask: Callable[[], object]) -> int:
        with pytest.raises(ProtocolMismatch) as raised:
            ask()
        return len(list(traceback.walk_tb(raised.value.__traceback__)))

    for ask in (
        lambda: harness.append(channel, 1),
        lambda: channel.call(call),
        lambda: harness.channel("other"),
        lambda: raise_if_failed(channel),
    ):
        assert frames(ask) == frames(ask)
