"""Delivery: contiguous or an explicit gap, resumed by cursor, bounded memory."""

from __future__ import annotations

from fleetlm_client.events import CaughtUp, Draining, Event, Gap, Message, Page, ReadCursor, Reconnected
from fleetlm_client.reader import Reader
from fleetlm_client.settings import Settings
from fleetlm_common.errors import Invalid
from tests.support.phoenix_model import Fault
from tests.test_client.harness import Harness

SMALL = Settings(buffer_messages_max=40, page_messages=20)


def brief(events: list[Event]) -> list[object]:
    """Seqs of messages, names of the rest."""
    return [event.seq if isinstance(event, Message) else type(event).__name__ for event in events]


def test_replay_then_caught_up_then_live() -> None:
    """A cursor of 0 gets everything from 1, one `CaughtUp`, then what comes."""
    harness = Harness()
    harness.model.add("s", ["a", "b", "c"])
    channel = harness.channel(cursor=0)
    harness.settle()
    harness.model.add("s", ["d"])
    harness.settle()
    assert brief(harness.take_all(channel)) == [1, 2, 3, "CaughtUp", 4]
    assert channel.reader.cursor == 4


def test_live_only_begins_after_the_joins_last_seq() -> None:
    """Without cursor and tail nothing old is delivered, and the cursor is known at once."""
    harness = Harness()
    harness.model.add("s", ["a", "b"])
    channel = harness.channel(cursor=None)
    harness.settle()
    assert channel.reader.cursor == 2
    harness.cut()
    harness.model.add("s", ["c"])
    harness.run(10)
    assert brief(harness.take_all(channel)) == ["CaughtUp", "Reconnected", 3, "CaughtUp"]


def test_tail_begins_with_the_last() -> None:
    """`tail` begins in the middle without a gap, and resumes by cursor afterwards."""
    harness = Harness()
    harness.model.add("s", list("abcde"))
    channel = harness.channel(cursor=None, tail=2)
    harness.settle()
    assert brief(harness.take_all(channel)) == [4, 5, "CaughtUp"]
    harness.cut()
    harness.model.add("s", ["f"])
    harness.run(10)
    assert brief(harness.take_all(channel)) == ["Reconnected", 6, "CaughtUp"]


def test_what_is_known_is_dropped_and_a_hole_is_filled() -> None:
    """A repeated push delivers nothing; a skipped one is read again before anything after it."""
    harness = Harness()
    harness.model.add("s", ["a"])
    channel = harness.channel()
    harness.settle()
    assert harness.socket is not None
    harness.socket.push_live("s", harness.model.log("s").messages)
    harness.settle()
    assert [frame[3] for frame in harness.socket.received] == ["phx_join"], "what is known is no reason to ask"
    socket, harness.socket.joins = harness.socket, {}
    harness.model.add("s", ["b", "c"])
    socket.joins = {"s": ("1", 1)}
    harness.model.add("s", ["d"])
    harness.settle()
    assert brief(harness.take_all(channel)) == [1, "CaughtUp", 2, 3, 4]


def test_a_gap_at_the_join_is_told_exactly() -> None:
    """Retention took 1–3: the reader is told so, then gets the rest."""
    harness = Harness()
    harness.model.add("s", list("abcde"))
    harness.model.trim("s", 4)
    channel = harness.channel(cursor=1)
    harness.settle()
    events = harness.take_all(channel)
    assert brief(events) == ["Gap", 4, 5, "CaughtUp"]
    assert isinstance(events[0], Gap)
    assert (events[0].from_seq, events[0].next_seq, events[0].reason) == (2, 4, "trimmed")


def test_a_leading_hole_that_nobody_explains_is_a_gap() -> None:
    """A page that begins late without saying why becomes an explicit gap, never silence."""
    harness = Harness(settings=SMALL)
    harness.model.add("s", list(range(100)))
    channel = harness.channel(cursor=0)
    harness.settle()
    assert channel.reader.behind
    harness.model.trim("s", 61)
    harness.model.explains_gaps = False
    events = harness.take_all(channel)
    gaps = [event for event in events if isinstance(event, Gap)]
    assert [(gap.from_seq, gap.next_seq) for gap in gaps] == [(41, 61)]
    assert [event.seq for event in events if isinstance(event, Message)] == [*range(1, 41), *range(61, 101)]


def test_a_slow_consumer_costs_bounded_memory_and_misses_nothing() -> None:
    """The buffer never exceeds its bound while thousands are pushed; everything arrives once the consumer reads."""
    harness = Harness(settings=SMALL)
    harness.model.add("s", list(range(1_000)))
    channel = harness.channel(cursor=0)
    harness.settle()
    for number in range(1_000, 2_000):
        harness.model.add("s", [number])
        harness.settle()
        assert channel.reader.buffered <= SMALL.buffer_messages_max + 3
    seqs = [event.seq for event in harness.take_all(channel) if isinstance(event, Message)]
    assert seqs == list(range(1, 2_001))
    harness.model.add("s", ["live again"])
    harness.settle()
    assert brief(harness.take_all(channel))[-1] == 2_001


def test_an_overflowing_replay_is_stopped_at_the_server() -> None:
    """What would be dropped is not pushed on: the client joins live-only and reads pages at its own pace."""
    harness = Harness(settings=SMALL)
    harness.model.add("s", list(range(300)))
    channel = harness.channel(cursor=0)
    harness.settle()
    assert harness.socket is not None
    joins = [frame[4] for frame in harness.socket.received if frame[3] == "phx_join"]
    assert joins == [{"cursor": 0}, {}]
    pages = [frame for frame in harness.socket.received if frame[3] == "replay"]
    assert len(pages) <= 1
    assert len([event for event in harness.take_all(channel) if isinstance(event, Message)]) == 300


def test_bytes_bound_the_buffer_too() -> None:
    """Few large messages are as bounded as many small ones."""
    settings = Settings(buffer_bytes_max=100_000)
    harness = Harness(settings=settings)
    channel = harness.channel()
    harness.settle()
    for _ in range(20):
        harness.model.add("s", ["x" * 20_000])
        harness.settle()
    assert channel.reader.buffered <= 7
    assert len([event for event in harness.take_all(channel) if isinstance(event, Message)]) == 20


def test_a_ring_that_holds_less_than_the_reader_saw_fails_the_session() -> None:
    """`cursor_ahead` after a reconnect is raised with the true `last_seq`, never papered over."""
    harness = Harness()
    harness.model.add("s", ["a", "b"])
    channel = harness.channel()
    harness.settle()
    harness.cut()
    harness.model.logs.clear()
    harness.run(10)
    assert isinstance(channel.error, Invalid)
    assert channel.error.reason == "cursor_ahead"
    assert channel.error.last_seq == 0


def test_a_live_only_rejoin_notices_a_ring_that_holds_less() -> None:
    """Also when the server did not check the cursor, because none was sent."""
    harness = Harness(settings=SMALL)
    harness.model.add("s", list(range(100)))
    channel = harness.channel(cursor=0)
    harness.to_server()
    harness.connect()
    harness.to_server()
    harness.to_client()
    harness.model.logs.clear()
    harness.settle()
    assert isinstance(channel.error, Invalid)
    assert channel.error.reason == "cursor_ahead"


def test_other_events_reach_the_reader() -> None:
    """Read cursors and draining are events of their own; unknown ones are skipped."""
    harness = Harness()
    channel = harness.channel()
    harness.settle()
    assert harness.socket is not None
    harness.socket.push("s", "read", {"participant_id": "bob", "last_read_seq": 3})
    harness.socket.push("s", "confetti", {"of": "tomorrow"})
    harness.socket.push("s", "draining", {"retry_after_ms": 1_000})
    harness.to_client()
    events = harness.take_all(channel)
    assert brief(events) == ["CaughtUp", "ReadCursor", "Draining"]
    assert isinstance(events[1], ReadCursor)
    assert isinstance(events[2], Draining)
    harness.run(2)
    assert harness.link.connections == 2
    assert brief(harness.take_all(channel)) == ["Reconnected", "CaughtUp"]


def test_connection_events_do_not_pile_up() -> None:
    """A consumer that never reads while the connection flaps a thousand times holds a handful of events."""
    harness = Harness()
    channel = harness.channel()
    harness.settle()
    for _ in range(1_000):
        harness.cut()
        harness.run(10)
    assert channel.reader.buffered <= 4
    assert {type(event) for event in harness.take_all(channel)} == {CaughtUp, Reconnected}


def test_a_crashed_channel_is_joined_again() -> None:
    """`phx_error` and `phx_close` that nobody asked for lead back into the session."""
    harness = Harness()
    channel = harness.channel()
    harness.settle()
    for event in ("phx_error", "phx_close"):
        assert harness.socket is not None
        harness.socket.push("s", event, {})
        harness.to_client()
        states = [channel.state]
        harness.run(5)
        assert [*states, channel.state] == ["waiting", "joined"]
    harness.model.add("s", ["x"])
    harness.settle()
    assert brief(harness.take_all(channel))[-1] == 1


def test_a_join_is_retried_after_try_again() -> None:
    """The session comes up as soon as the server can."""
    faults: list[Fault] = ["try_again"] * 5
    harness = Harness(fault=lambda event: faults.pop() if event == "phx_join" and faults else "none")
    harness.model.add("s", ["x"])
    channel = harness.channel()
    harness.run(30)
    assert brief(harness.take_all(channel)) == [1, "CaughtUp"]


def message(seq: int) -> Message:
    return Message(
        id=f"id-{seq}", session_id="s", seq=seq, sender_id="a", sender_kind="human", kind="message", content=seq,
        inserted_at="",
    )  # fmt: skip


def reader(cursor: int) -> Reader:
    return Reader(cursor=cursor, messages_max=100, bytes_max=1_000_000, page_messages=10)


def test_a_push_that_was_dropped_while_a_page_was_on_its_way_is_asked_for() -> None:
    """The page was read before that message existed and says that there is no more: it is not believed."""
    one = reader(0)
    one.on_messages([message(5)], size_bytes=10)
    assert one.wants_page() == 0
    one.on_messages([message(6)], size_bytes=10)
    assert one.on_page(Page([message(seq) for seq in range(1, 6)], has_more=False), size_bytes=50)
    assert one.wants_page() == 5
    assert one.on_page(Page([message(6)], has_more=False), size_bytes=10)
    assert one.wants_page() is None


def test_a_gap_behind_a_hole_waits_until_the_hole_is_filled() -> None:
    """Told 5–7 are missing while 2–4 were never seen: those are asked for first, the gap is not put over them."""
    one = reader(1)
    one.on_gap(Gap(reason="trimmed", from_seq=5, next_seq=8, earliest_seq=8, last_seq=9))
    assert one.take() is None
    assert one.wants_page() == 1


def test_what_an_earlier_join_still_says_is_ignored() -> None:
    """Phoenix closes the elder of two joins of a topic: its `phx_close` is no reason to join again."""
    harness = Harness()
    channel = harness.channel()
    harness.settle()
    assert harness.socket is not None
    harness.socket.emit("0", None, "session:s", "phx_close", {})
    harness.socket.emit("0", None, "session:s", "gap", {"reason": "x", "from_seq": 1, "next_seq": 9})
    harness.to_client()
    assert channel.state == "joined"
    assert brief(harness.take_all(channel)) == ["CaughtUp"]
