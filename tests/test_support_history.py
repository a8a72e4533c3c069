"""The history checker finds each kind of broken promise, and nothing in a run that kept them."""

from __future__ import annotations

from tests.support.history import Acked, Entry, History, Invocation, canonical


def content(key: str, extra: int = 0) -> dict[str, object]:
    return {"key": key, "extra": extra}


def entry(seq: int, key: str, *, ident: str | None = None, extra: int = 0) -> Entry:
    return Entry(seq, ident or f"id-{key}", canonical(content(key, extra)))


def acked(history: History, writer: str, *keys: str, seq: int, expected_seq: int | None = None) -> Invocation:
    made = history.invoke(writer, "s", [(key, content(key)) for key in keys], expected_seq=expected_seq)
    history.ack(made, [Acked(seq + at, f"id-{key}", deduped=False) for at, key in enumerate(keys)])
    return made


def kinds(history: History) -> set[str]:
    return {violation.kind for violation in history.judge()}


def good() -> History:
    """Two writers, a batch, a duplicate retry, a refusal, an unknown that landed and one that did not, a reader."""
    history = History()
    acked(history, "w1", "a", seq=1)
    acked(history, "w2", "b", "c", seq=2, expected_seq=1)
    again = history.invoke("w1", "s", [("a", content("a"))])
    history.ack(again, [Acked(1, "id-a", deduped=True)])
    history.reject(history.invoke("w1", "s", [("no", content("no"))], expected_seq=9), "CONFLICT")
    history.unknown(history.invoke("w1", "s", [("d", content("d"))]))
    history.unknown(history.invoke("w1", "s", [("e", content("e"))]))
    stream = history.open_stream("r", "s", 1)
    history.deliver(stream, entry(2, "b"))
    history.deliver(stream, entry(3, "c"))
    history.asked("socket", "1")
    history.answered("socket", "1")
    history.asked("socket", "2")
    history.socket_lost("socket")
    history.final("s", [entry(1, "a"), entry(2, "b"), entry(3, "c"), entry(4, "d")])
    return history


def test_a_run_that_kept_every_promise_is_clean() -> None:
    """No violation, and figures that say what was looked at."""
    history = good()
    assert history.judge() == []
    assert history.figures() == {
        "sessions": 1, "messages": 4, "delivered": 2, "acked": 3, "rejected": 1, "unknown": 2, "pending": 0,
        "deduped": 1,
    }  # fmt: skip


def test_a_lost_message_is_found() -> None:
    """Acknowledged and not in the log; or another one at its seq; or the session is not read at all."""
    history = History()
    acked(history, "w", "a", seq=1)
    history.final("s", [])
    assert kinds(history) == {"lost"}
    history = History()
    acked(history, "w", "a", seq=1)
    history.unknown(history.invoke("x", "s", [("b", content("b"))]))
    history.final("s", [entry(1, "b")])
    assert kinds(history) == {"lost"}
    history = History()
    acked(history, "w", "a", seq=1)
    assert kinds(history) == {"lost"}


def test_a_changed_message_is_found() -> None:
    """Another id than was acknowledged, other content than was sent, or another message than a reader got."""
    history = History()
    acked(history, "w", "a", seq=1)
    history.final("s", [entry(1, "a", ident="other")])
    assert kinds(history) == {"changed"}
    history = History()
    acked(history, "w", "a", seq=1)
    history.final("s", [entry(1, "a", extra=7)])
    assert kinds(history) == {"changed"}
    history = good()
    history.deliver(history.open_stream("r2", "s", 4), entry(5, "e"))
    assert kinds(history) == {"changed"}, "seen by a reader, then taken back by a crash"


def test_two_readers_that_got_different_messages_are_found() -> None:
    """The same seq, other content."""
    history = good()
    history.deliver(history.open_stream("r2", "s", 3), entry(4, "e"))
    assert "changed" in kinds(history)


def test_a_hole_is_found_unless_it_was_told() -> None:
    """1, 3 is a hole; 1, gap, 3 is not."""
    for gaps, expected in (((), {"hole"}), (((2, 3),), set[str]())):
        history = History()
        acked(history, "w", "a", seq=1)
        acked(history, "w", "b", seq=3)
        history.final("s", [entry(1, "a"), entry(3, "b")], gaps=gaps)
        assert kinds(history) == expected
    history = History()
    acked(history, "w", "a", seq=1)
    history.final("s", [entry(1, "a"), entry(1, "a")])
    assert kinds(history) == {"hole"}


def test_a_message_that_is_there_twice_is_found() -> None:
    """One key, two seqs."""
    history = good()
    history.final("s", [entry(1, "a"), entry(2, "b"), entry(3, "c"), entry(4, "a")])
    assert kinds(history) == {"twice"}


def test_phantoms_are_found() -> None:
    """Nobody sent it, or it was refused for good and is there all the same."""
    history = good()
    history.final("s", [entry(1, "a"), entry(2, "b"), entry(3, "c"), entry(4, "ghost")])
    assert kinds(history) == {"phantom"}
    history = good()
    history.final("s", [entry(1, "a"), entry(2, "b"), entry(3, "c"), entry(4, "no")])
    assert kinds(history) == {"phantom"}


def test_torn_batches_are_found() -> None:
    """In part, or with somebody in the middle; whether it was acknowledged or not."""
    history = History()
    history.unknown(history.invoke("w", "s", [("a", content("a")), ("b", content("b"))]))
    history.final("s", [entry(1, "a")])
    assert kinds(history) == {"torn"}
    history = History()
    made = history.invoke("w", "s", [("a", content("a")), ("b", content("b"))])
    history.ack(made, [Acked(1, "id-a", deduped=False), Acked(3, "id-b", deduped=False)])
    acked(history, "x", "c", seq=2)
    history.final("s", [entry(1, "a"), entry(2, "c"), entry(3, "b")])
    assert "torn" in kinds(history)


def test_two_answers_to_one_key_are_found() -> None:
    """A retry that was given another seq."""
    history = good()
    again = history.invoke("w1", "s", [("a", content("a"))])
    history.ack(again, [Acked(4, "id-d", deduped=True)])
    assert "unequal" in kinds(history)


def test_a_wrong_expected_seq_is_found() -> None:
    """It was appended although somebody else was quicker."""
    history = History()
    acked(history, "w", "a", seq=1)
    acked(history, "w", "b", seq=2, expected_seq=0)
    history.final("s", [entry(1, "a"), entry(2, "b")])
    assert kinds(history) == {"expected"}


def test_a_writers_order_is_kept() -> None:
    """Pipelined appends: asked a, b; the log has b, a."""
    history = History()
    first = history.invoke("w", "s", [("a", content("a"))])
    second = history.invoke("w", "s", [("b", content("b"))])
    history.ack(first, [Acked(2, "id-a", deduped=False)])
    history.ack(second, [Acked(1, "id-b", deduped=False)])
    history.final("s", [entry(1, "b"), entry(2, "a")])
    assert kinds(history) == {"reordered"}


def asked_again(*, seq: int, deduped: bool) -> History:
    """One writer: `a` acknowledged, `b` given up, `c` acknowledged, `b` asked again and acknowledged at `seq`."""
    history = History()
    acked(history, "w", "a", seq=2)
    history.unknown(history.invoke("w", "s", [("b", content("b"))]))
    acked(history, "w", "c", seq=3)
    again = history.invoke("w", "s", [("b", content("b"))], again=True)
    history.ack(again, [Acked(seq, "id-b", deduped=deduped)])
    places = {2: "a", 3: "c", seq: "b"}
    history.unknown(history.invoke("x", "s", [("other", content("other"))]))
    history.final("s", [entry(at, places.get(at, "other")) for at in range(1, 5)])
    return history


def test_what_was_given_up_may_land_later_but_never_earlier() -> None:
    """Nothing overtakes what its writer had asked before; what the second asking made stands where that was."""
    assert kinds(asked_again(seq=4, deduped=True)) == set()
    assert kinds(asked_again(seq=4, deduped=False)) == set()
    assert kinds(asked_again(seq=1, deduped=True)) == {"reordered"}
    history = asked_again(seq=4, deduped=False)
    acked(history, "w", "d", seq=1)
    history.final("s", [entry(1, "d"), entry(2, "a"), entry(3, "c"), entry(4, "b")])
    assert kinds(history) == {"reordered"}


def test_time_is_kept_between_writers() -> None:
    """Asked after another writer's append was acknowledged, and stands before it."""
    history = History()
    acked(history, "w1", "a", seq=2)
    acked(history, "w2", "b", seq=1)
    history.final("s", [entry(1, "b"), entry(2, "a")])
    assert kinds(history) == {"reordered"}


def test_broken_streams_are_found() -> None:
    """Skipped, repeated, gone back, or a gap that does not fit."""
    for seqs in ([2, 4], [2, 2], [3, 2]):
        history = good()
        stream = history.open_stream("r2", "s", 1)
        keys = {2: "b", 3: "c", 4: "d"}
        for seq in seqs:
            history.deliver(stream, entry(seq, keys[seq]))
        assert kinds(history) == {"stream"}, seqs
    history = good()
    stream = history.open_stream("r2", "s", 1)
    history.gap(stream, 2, 4)
    history.deliver(stream, entry(4, "d"))
    assert history.judge() == []
    history.gap(stream, 9, 12)
    assert "stream" in {violation.kind for violation in history.found}


def test_answers_are_counted() -> None:
    """Twice, never, or to nothing."""
    history = good()
    history.asked("s2", "1")
    assert kinds(history) == {"answers"}
    history = good()
    history.answered("socket", "1")
    assert kinds(history) == {"answers"}
    history = good()
    history.answered("socket", "77")
    assert kinds(history) == {"answers"}
