"""Appends: order, retries with the same keys, deadlines, refusals."""

from __future__ import annotations

import pytest

from fleetlm_client.errors import NotSent, OutcomeUnknown
from fleetlm_client.events import Ack
from fleetlm_client.settings import Settings
from fleetlm_common.errors import Conflict, FleetError, IdempotencyConflict, Invalid, TryAgain
from tests.support.phoenix_model import Fault
from tests.test_client.harness import Harness


def seqs(result: list[Ack] | FleetError) -> list[int]:
    assert isinstance(result, list), result
    return [ack.seq for ack in result]


def contents(harness: Harness) -> list[object]:
    return [message["content"] for message in harness.model.log("s").messages]


def test_what_waits_during_a_flight_goes_out_in_one_frame_in_order() -> None:
    """The first append leaves alone, the forty that came meanwhile share the next frame."""
    harness = Harness()
    channel = harness.channel()
    harness.settle()
    for number in range(41):
        harness.append(channel, number)
    harness.settle()
    assert contents(harness) == list(range(41))
    assert harness.model.log("s").frames == 2


def test_a_frame_holds_at_most_a_hundred_messages() -> None:
    """The server's bound on a batch is kept however many wait."""
    harness = Harness()
    channel = harness.channel()
    harness.settle()
    for number in range(252):
        harness.append(channel, number)
    harness.settle()
    assert contents(harness) == list(range(252))
    assert harness.model.log("s").frames == 1 + 3


def test_nothing_leaves_while_a_try_again_is_outstanding() -> None:
    """Order holds through TRY_AGAIN: the next append waits for the one before."""
    faults: list[Fault] = ["try_again", "try_again_done", "none"]
    harness = Harness(fault=lambda event: faults.pop(0) if event == "append" and faults else "none")
    channel = harness.channel()
    harness.settle()
    first = harness.append(channel, "one")
    harness.settle()
    second = harness.append(channel, "two")
    harness.settle()
    assert contents(harness) == []
    harness.run(20)
    assert contents(harness) == ["one", "two"]
    assert seqs(harness.results[first.keys[0]]) == [1]
    assert seqs(harness.results[second.keys[0]]) == [2]


@pytest.mark.parametrize("seed", range(20))
def test_a_retry_waits_at_least_as_long_as_the_server_said(seed: int) -> None:
    """`retry_after_ms` is a lower limit; the jitter comes on top."""
    faults: list[Fault] = ["try_again"]
    harness = Harness(seed=seed, fault=lambda event: faults.pop() if event == "append" and faults else "none")
    channel = harness.channel()
    harness.settle()
    harness.append(channel, "one")
    harness.settle()
    harness.advance(0.0499)
    harness.settle()
    assert contents(harness) == []
    harness.run(1)
    assert contents(harness) == ["one"]


def test_an_answer_lost_with_the_connection_is_asked_for_again_with_the_same_key() -> None:
    """The server had appended it: the second answer is the first one again, and there is one message."""
    faults: list[Fault] = ["answer_lost"]
    harness = Harness(fault=lambda event: faults.pop() if event == "append" and faults else "none")
    channel = harness.channel()
    harness.settle()
    append = harness.append(channel, "one")
    harness.settle()
    assert contents(harness) == ["one"]
    harness.append(channel, "two")
    harness.cut()
    harness.run(10)
    assert contents(harness) == ["one", "two"]
    (ack,) = harness.results[append.keys[0]]  # type: ignore[misc]
    assert ack.seq == 1
    assert ack.deduped


def test_one_bad_message_does_not_refuse_its_neighbours() -> None:
    """A frame put together from several calls that is refused is asked for call by call, in order."""
    harness = Harness()
    harness.model.append("s", [{"content": "other", "idempotency_key": "k"}], sender="x", expected_seq=None)
    channel = harness.channel()
    harness.settle()
    before = [harness.append(channel, number) for number in range(3)]
    bad = harness.append(channel, "mine", key="k")
    after = [harness.append(channel, number) for number in range(3, 6)]
    harness.settle()
    assert isinstance(harness.results["k"], IdempotencyConflict)
    assert [seqs(harness.results[one.keys[0]])[0] for one in before + after] == [2, 3, 4, 5, 6, 7]
    assert bad.finished


def test_expected_seq_and_batches_have_frames_of_their_own() -> None:
    """A conflict refuses exactly the call that asked for it; a batch is consecutive."""
    harness = Harness()
    channel = harness.channel()
    harness.settle()
    first = harness.append(channel, "a")
    good = harness.append(channel, "b", expected_seq=1)
    bad = harness.append(channel, "c", expected_seq=7)
    batch = harness.append(channel, "d", "e", "f", expected_seq=2)
    last = harness.append(channel, "g")
    harness.settle()
    assert contents(harness) == ["a", "b", "d", "e", "f", "g"]
    refusal = harness.results[bad.keys[0]]
    assert isinstance(refusal, Conflict)
    assert refusal.last_seq == 2
    assert seqs(harness.results[batch.keys[0]]) == [3, 4, 5]
    assert [seqs(harness.results[one.keys[0]]) for one in (first, good, last)] == [[1], [2], [6]]


def test_expected_seq_is_never_lost_in_a_shared_frame() -> None:
    """Waiting behind a plain append, it still has a frame of its own."""
    harness = Harness()
    channel = harness.channel()
    harness.settle()
    for content in ("in flight", "waits"):
        harness.append(channel, content)
    bad = harness.append(channel, "no", expected_seq=0)
    harness.settle()
    assert isinstance(harness.results[bad.keys[0]], Conflict)
    assert contents(harness) == ["in flight", "waits"]


def test_calls_of_a_refused_frame_count_as_not_sent() -> None:
    """The server said that nothing of the frame was appended; what then never leaves is `NotSent`, not unknown."""
    harness = Harness()
    harness.model.append("s", [{"content": "other", "idempotency_key": "k"}], sender="x", expected_seq=None)
    channel = harness.channel()
    harness.settle()
    harness.append(channel, "first")
    harness.append(channel, "mine", key="k")
    last = harness.append(channel, "last", deadline_s=5)
    harness.to_server()
    harness.to_client()
    harness.to_server()
    harness.to_client()
    harness.reachable = False
    harness.cut()
    harness.run(10)
    assert isinstance(harness.results[last.keys[0]], NotSent)


def test_a_late_answer_to_a_frame_of_an_earlier_join_is_ignored() -> None:
    """The session was joined again on the same connection and the append sent again: only the newer answer counts."""
    faults: list[Fault] = ["silence", "silence"]
    harness = Harness(fault=lambda event: faults.pop() if event == "append" and faults else "none")
    channel = harness.channel()
    harness.settle()
    append = harness.append(channel, "one")
    harness.settle()
    assert harness.socket is not None
    old = harness.socket.received[-1]
    harness.socket.push("s", "phx_error", {})
    harness.to_client()
    harness.run(5)
    assert not faults, "it was sent again"
    refusal = {"code": "INVALID", "reason": "late", "message": "late"}
    harness.socket.emit(old[0], old[1], old[2], "phx_reply", {"status": "error", "response": refusal})
    harness.to_client()
    assert append.keys[0] not in harness.results
    harness.cut()
    harness.run(5)
    assert seqs(harness.results[append.keys[0]]) == [1]


def test_deadlines_say_whether_it_was_sent() -> None:
    """Sent and unanswered: `OutcomeUnknown` with the key. Never sent: `NotSent`, and it never is."""
    harness = Harness(fault=lambda event: "silence" if event == "append" else "none")
    channel = harness.channel()
    harness.settle()
    sent = harness.append(channel, "sent", deadline_s=5)
    waiting = harness.append(channel, "waiting", deadline_s=5)
    harness.run(6)
    unknown = harness.results[sent.keys[0]]
    assert isinstance(unknown, OutcomeUnknown)
    assert unknown.key == sent.keys[0]
    assert isinstance(harness.results[waiting.keys[0]], NotSent)
    harness.fault = None
    harness.cut()
    harness.run(60)
    assert contents(harness) == []


def test_a_silent_socket_is_given_up_and_the_append_sent_again() -> None:
    """Silence on a request is a bug of the other side, never a reason to hang."""
    faults: list[Fault] = ["silence"]
    harness = Harness(fault=lambda event: faults.pop() if event == "append" and faults else "none")
    channel = harness.channel()
    harness.settle()
    append = harness.append(channel, "one")
    harness.run(harness.settings.reply_timeout_s + 5)
    assert seqs(harness.results[append.keys[0]]) == [1]
    assert harness.link.connections == 2


def test_a_full_outbox_refuses() -> None:
    """The bound holds in messages and in bytes; an empty outbox takes anything that the server would."""
    settings = Settings(outbox_messages_max=3, outbox_bytes_max=100_000)
    harness = Harness(settings=settings)
    channel = harness.channel()
    for number in range(3):
        harness.append(channel, number)
    with pytest.raises(TryAgain, match="full"):
        harness.append(channel, 4)
    harness.settle()
    assert channel.outbox.messages == 0
    harness.append(channel, *["x" * 60_000] * 3)
    with pytest.raises(TryAgain, match="full"):
        harness.append(channel, 5)


def test_failing_for_good_answers_everyone() -> None:
    """A close code that forbids reconnecting ends every append: sent ones unknown, others not sent."""
    harness = Harness(fault=lambda event: "silence" if event == "append" else "none")
    channel = harness.channel()
    harness.settle()
    sent = harness.append(channel, 1)
    waiting = harness.append(channel, 2)
    harness.settle()
    harness.cut(close_code=4500, reason="go away")
    assert isinstance(harness.results[sent.keys[0]], OutcomeUnknown)
    assert isinstance(harness.results[waiting.keys[0]], NotSent)
    assert channel.error is not None
    assert channel.error.code == "CONNECTION_REFUSED"
    harness.run(100)
    assert harness.link.connections == 1


def test_a_cancelled_append_that_waits_is_never_sent() -> None:
    """Cancelling before the frame was made withdraws it; its neighbours go on."""
    harness = Harness()
    channel = harness.channel()
    first = harness.append(channel, "a")
    gone = harness.append(channel, "b")
    last = harness.append(channel, "c")
    channel.outbox.cancel(gone)
    harness.settle()
    assert contents(harness) == ["a", "c"]
    assert gone.keys[0] not in harness.results
    assert [seqs(harness.results[one.keys[0]]) for one in (first, last)] == [[1], [2]]


def test_an_answer_that_is_not_one_gives_the_connection_up() -> None:
    """Acks for another number of messages are not believed: the append is sent again elsewhere."""
    harness = Harness(fault=lambda event: "silence" if event == "append" and harness.link.connections == 1 else "none")
    channel = harness.channel()
    harness.settle()
    append = harness.append(channel, "one")
    harness.to_server()
    assert harness.socket is not None
    frame = harness.socket.received[-1]
    harness.socket.emit(frame[0], frame[1], frame[2], "phx_reply", {"status": "ok", "response": {"messages": []}})
    harness.run(5)
    assert seqs(harness.results[append.keys[0]]) == [1]
    assert harness.link.connections == 2


def test_refusals_are_typed() -> None:
    """INVALID raises `Invalid` with the field, and is not retried."""
    harness = Harness(fault=lambda event: "invalid" if event == "append" else "none")
    channel = harness.channel()
    harness.settle()
    append = harness.append(channel, "one")
    harness.settle()
    refusal = harness.results[append.keys[0]]
    assert isinstance(refusal, Invalid)
    assert refusal.field == "content"
