"""Judges what clients saw of FleetLM, and nothing else: imports no product code.

Clients write down what they asked (`Invocation`), what they were answered, and what they were delivered; afterwards
every session is read from its beginning (`final`) and `judge` compares. Each message's key must be told by its content
(`key_of`), for keys are not part of what readers get.

Promise: each broken promise of the design becomes a `Violation` with its kind and the facts:

    lost            an acknowledged message is not in the log, or another one stands at its seq
    changed         a message at its seq has another id or other content than was acknowledged, sent or delivered
    hole            the log is not 1, 2, 3 … without an explicit gap
    twice           two messages of one key
    phantom         a message that nobody sent, or that was refused for good
    torn            a batch is in the log in part, or its seqs are not consecutive
    unequal         one key was acknowledged with two seqs or ids
    expected        an append with `expected_seq` stands elsewhere than right behind it
    reordered       a writer's acknowledged appends stand in another order than it asked; or an append that was asked
                    after another was acknowledged stands before it
    stream          a reader's stream skipped, repeated or went back without saying a gap
    answers         a request was answered twice, or never although its socket lived
    caught_up       a join was told `caught_up` not exactly once, or at another seq than it had got to
    gap             messages are said to be missing although nothing was allowed to lose them
    unhealed        faults are over, and some request, reader or process still hangs
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal[
    "lost", "changed", "hole", "twice", "phantom", "torn", "unequal", "expected", "reordered", "stream", "answers",
    "caught_up", "gap", "unhealed",
]  # fmt: skip
Outcome = Literal["pending", "acked", "rejected", "unknown"]


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise."""

    kind: Kind
    session: str
    text: str


@dataclass(frozen=True, slots=True)
class Entry:
    """A message as some client saw it."""

    seq: int
    id: str
    content: str


@dataclass(frozen=True, slots=True)
class Acked:
    """An acknowledgement."""

    seq: int
    id: str
    deduped: bool


@dataclass(slots=True, eq=False)
class Invocation:
    """One append as one writer asked it; keys and contents run in parallel."""

    writer: str
    session: str
    keys: tuple[str, ...]
    contents: tuple[str, ...]
    expected_seq: int | None
    asked_at: int
    again: bool = False
    outcome: Outcome = "pending"
    answered_at: int = 0
    acks: tuple[Acked, ...] = ()
    code: str = ""


@dataclass(slots=True)
class Stream:
    """One reader's place in one session."""

    reader: str
    session: str
    cursor: int
    seen: int = 0
    gaps: int = 0


def canonical(content: Any) -> str:
    """JSON values that are equal become equal texts."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def key_in_content(content: str) -> str:
    """The usual `key_of`: contents are objects with a `key`."""
    return str(json.loads(content)["key"])


class History:
    """Everything that clients saw in one run.

    Args:
        key_of: the key that a content tells.
        gaps_allowed: something may have lost messages (rot, retention): then a gap that was told is no violation, and
            what it covers is not looked for.
    """

    def __init__(self, *, key_of: Callable[[str], str] = key_in_content, gaps_allowed: bool = True) -> None:
        self.gaps_allowed = gaps_allowed
        self.invocations: list[Invocation] = []
        self.found: list[Violation] = []
        self._key_of = key_of
        self._step = 0
        self._final: dict[str, list[Entry]] = {}
        self._final_gaps: dict[str, list[tuple[int, int]]] = {}
        self._delivered: dict[str, dict[int, Entry]] = defaultdict(dict)
        self._asked: dict[tuple[str, str], int] = {}
        self.delivered = 0

    # --- writing down

    def invoke(
        self,
        writer: str,
        session: str,
        messages: Sequence[tuple[str, Any]],
        *,
        expected_seq: int | None = None,
        again: bool = False,
    ) -> Invocation:
        """A writer asks; `messages` are (key, content).

        Args:
            writer: who.
            session: where.
            messages: what.
            expected_seq: as asked.
            again: the outcome of these keys was given up as unknown; order among the writer's others is promised no
                more.
        """
        made = Invocation(
            writer,
            session,
            tuple(key for key, _ in messages),
            tuple(canonical(content) for _, content in messages),
            expected_seq,
            self._tick(),
            again=again,
        )
        self.invocations.append(made)
        return made

    def ack(self, invocation: Invocation, acks: Sequence[Acked]) -> None:
        """It was acknowledged."""
        invocation.outcome, invocation.acks, invocation.answered_at = "acked", tuple(acks), self._tick()
        if len(acks) != len(invocation.keys):
            self._say("answers", invocation.session, f"{len(acks)} acks for {len(invocation.keys)} messages")

    def reject(self, invocation: Invocation, code: str) -> None:
        """It was refused for good."""
        invocation.outcome, invocation.code, invocation.answered_at = "rejected", code, self._tick()

    def unknown(self, invocation: Invocation) -> None:
        """Nobody knows: TRY_AGAIN until the writer gave up, or no answer."""
        invocation.outcome, invocation.answered_at = "unknown", self._tick()

    def open_stream(self, reader: str, session: str, cursor: int) -> Stream:
        """A reader begins, or goes on, after `cursor`."""
        return Stream(reader, session, cursor)

    def deliver(self, stream: Stream, entry: Entry) -> None:
        """A reader got a message."""
        stream.seen += 1
        self.delivered += 1
        if entry.seq != stream.cursor + 1:
            self._say("stream", stream.session, f"{stream.reader} got seq {entry.seq} after {stream.cursor}")
        stream.cursor = max(stream.cursor, entry.seq)
        known = self._delivered[stream.session].setdefault(entry.seq, entry)
        if known != entry:
            self._say("changed", stream.session, f"{stream.reader} got {entry}, another reader {known}")

    def gap(self, stream: Stream, from_seq: int, next_seq: int) -> None:
        """A reader was told that messages are missing."""
        stream.gaps += 1
        if not self.gaps_allowed:
            self._say("gap", stream.session, f"{stream.reader} was told a gap {from_seq}..{next_seq}")
        if from_seq != stream.cursor + 1 or next_seq <= from_seq:
            text = f"{stream.reader} was told a gap {from_seq}..{next_seq} after {stream.cursor}"
            self._say("stream", stream.session, text)
        stream.cursor = max(stream.cursor, next_seq - 1)

    def asked(self, socket: str, ref: str) -> None:
        """A request left on a socket (a name used once)."""
        self._asked[socket, ref] = 0

    def answered(self, socket: str, ref: str) -> None:
        """Its reply came."""
        count = self._asked.get((socket, ref))
        if count is None:
            self._say("answers", "", f"{socket}: a reply to ref {ref} that was never asked")
        elif count:
            self._say("answers", "", f"{socket}: ref {ref} was answered twice")
        self._asked[socket, ref] = (count or 0) + 1

    def excuse(self, socket: str, ref: str) -> None:
        """The run ended before the answer was due."""
        self._asked.pop((socket, ref), None)

    def broken(self, kind: Kind, session: str, text: str) -> None:
        """Somebody who watches saw a broken promise."""
        self._say(kind, session, text)

    def socket_lost(self, socket: str) -> None:
        """The socket ended: what was not answered on it never can be."""
        for key in [key for key, count in self._asked.items() if key[0] == socket and not count]:
            del self._asked[key]

    def final(self, session: str, entries: Sequence[Entry], *, gaps: Sequence[tuple[int, int]] = ()) -> None:
        """What a replay from 0 gives at the end; `gaps` are (from_seq, next_seq) as the server told them."""
        self._final[session] = list(entries)
        self._final_gaps[session] = list(gaps)

    def log(self, session: str) -> list[Entry]:
        """What the replay from 0 gave."""
        return self._final.get(session, [])

    # --- judging

    def judge(self) -> list[Violation]:
        """Every violation; an empty list means that every promise held."""
        by_session: dict[str, list[Invocation]] = defaultdict(list)
        for invocation in self.invocations:
            by_session[invocation.session].append(invocation)
        for session in sorted({*by_session, *self._final, *self._delivered}):
            if session not in self._final:
                self._say("lost", session, "the session was not read at the end")
                continue
            log = {entry.seq: entry for entry in self._final[session]}
            self._judge_log(session, log)
            self._judge_contents(session, log, by_session[session])
            present = {self._key_of(entry.content) for entry in log.values()}
            for invocation in by_session[session]:
                self._judge_invocation(invocation, log, present)
            self._judge_keys(session, by_session[session])
            self._judge_order(session, by_session[session])
            self._judge_real_time(session, by_session[session])
        for (socket, ref), count in self._asked.items():
            if not count:
                self._say("answers", "", f"{socket}: ref {ref} was never answered")
        return self.found

    def _judge_log(self, session: str, log: dict[int, Entry]) -> None:
        """1, 2, 3 … but for gaps that were told; what readers saw stands there."""
        expected = 1
        gaps = dict(self._final_gaps[session])
        for entry in self._final[session]:
            if entry.seq != expected and gaps.get(expected) == entry.seq:
                expected = entry.seq
            if entry.seq != expected:
                self._say("hole", session, f"seq {entry.seq} where {expected} should be")
            expected = entry.seq + 1
        if gaps and not self.gaps_allowed:
            self._say("gap", session, f"the replay from 0 has gaps {self._final_gaps[session]}")
        for seq, entry in self._delivered.get(session, {}).items():
            if log.get(seq) != entry and not self._in_gap(session, seq):
                self._say("changed", session, f"a reader got {entry}, the log has {log.get(seq)}")

    def _in_gap(self, session: str, seq: int) -> bool:
        """Whether the log said itself that this seq is gone."""
        return any(first <= seq < after for first, after in self._final_gaps[session])

    def _judge_contents(self, session: str, log: dict[int, Entry], invocations: list[Invocation]) -> None:
        """Each message was sent by somebody, once, and not refused."""
        sent: dict[str, set[str]] = defaultdict(set)
        outcomes: dict[str, set[Outcome]] = defaultdict(set)
        for invocation in invocations:
            for key, content in zip(invocation.keys, invocation.contents, strict=True):
                sent[key].add(content)
                outcomes[key].add(invocation.outcome)
        places: dict[str, int] = {}
        for seq, entry in log.items():
            key = self._key_of(entry.content)
            if key in places:
                self._say("twice", session, f"key {key} at seq {places[key]} and {seq}")
            places[key] = seq
            if key not in sent:
                self._say("phantom", session, f"seq {seq} has key {key} that nobody sent")
            elif entry.content not in sent[key]:
                self._say("changed", session, f"seq {seq} has other content than was sent with key {key}")
            elif outcomes[key] == {"rejected"}:
                self._say("phantom", session, f"seq {seq} has key {key} that was refused for good")

    def _judge_invocation(self, invocation: Invocation, log: dict[int, Entry], present: set[str]) -> None:
        session = invocation.session
        if invocation.outcome == "acked":
            for ack, content in zip(invocation.acks, invocation.contents, strict=False):
                entry = log.get(ack.seq)
                if entry is None and self._in_gap(session, ack.seq):
                    continue
                if entry is None or self._key_of(entry.content) != self._key_of(content):
                    self._say("lost", session, f"acknowledged at {ack.seq}: {content}; there stands {entry}")
                elif (entry.id, entry.content) != (ack.id, content):
                    self._say("changed", session, f"acknowledged {ack} {content}; there stands {entry}")
            seqs = [ack.seq for ack in invocation.acks]
            if seqs and seqs != list(range(seqs[0], seqs[0] + len(seqs))):
                self._say("torn", session, f"a batch has seqs {seqs}")
            expected = invocation.expected_seq
            if expected is not None and seqs and not invocation.acks[0].deduped and seqs[0] != expected + 1:
                self._say("expected", session, f"expected_seq {expected} was given seq {seqs[0]}")
        if len(invocation.keys) > 1 and not self._final_gaps[session]:
            count = sum(key in present for key in invocation.keys)
            if count not in {0, len(invocation.keys)}:
                self._say("torn", session, f"{count} of {len(invocation.keys)} messages of a batch are there")

    def _judge_keys(self, session: str, invocations: list[Invocation]) -> None:
        """One key, one answer."""
        answers: dict[str, tuple[int, str]] = {}
        for invocation in invocations:
            for key, ack in zip(invocation.keys, invocation.acks, strict=False):
                first = answers.setdefault(key, (ack.seq, ack.id))
                if first != (ack.seq, ack.id):
                    self._say("unequal", session, f"key {key} was acknowledged as {first} and as {(ack.seq, ack.id)}")

    def _judge_order(self, session: str, invocations: list[Invocation]) -> None:
        """A writer's acknowledged appends stand in the order in which it first asked for each key.

        A key that was given up as unknown and asked again may have landed later than its place, never earlier; where
        the second asking made the message (its answer is not `deduped`), its place is there.
        """
        last: dict[str, tuple[int, str]] = {}
        asked: set[tuple[str, str]] = set()
        given_up = {key for invocation in invocations if invocation.again for key in invocation.keys}
        acked = {
            key: ack.seq
            for invocation in invocations
            for key, ack in zip(invocation.keys, invocation.acks, strict=False)
        }
        for invocation in invocations:
            made = [not ack.deduped for ack in invocation.acks]
            for at, key in enumerate(invocation.keys):
                made_here = invocation.again and at < len(made) and made[at]
                if key not in acked or ((invocation.writer, key) in asked and not made_here):
                    continue
                if invocation.again and not made_here:
                    continue
                asked.add((invocation.writer, key))
                before = last.get(invocation.writer)
                if before is not None and acked[key] < before[0]:
                    text = f"{invocation.writer} asked {before[1]} (seq {before[0]}) before {key} (seq {acked[key]})"
                    self._say("reordered", session, text)
                if made_here or key not in given_up:
                    last[invocation.writer] = (acked[key], key)

    def _judge_real_time(self, session: str, invocations: list[Invocation]) -> None:
        """Acknowledged before another was asked for the first time means a lower seq."""
        first_asked: dict[int, int] = {}
        first_acked: dict[int, int] = {}
        asked_of_key: dict[str, int] = {}
        for invocation in invocations:
            for key in invocation.keys:
                asked_of_key.setdefault(key, invocation.asked_at)
        for invocation in invocations:
            for key, ack in zip(invocation.keys, invocation.acks, strict=False):
                first_asked[ack.seq] = min(first_asked.get(ack.seq, asked_of_key[key]), asked_of_key[key])
                answered_at = invocation.answered_at
                first_acked[ack.seq] = min(first_acked.get(ack.seq, answered_at), answered_at)
        earliest_ack, of_seq = float("inf"), 0
        for seq in sorted(first_asked, reverse=True):
            if earliest_ack < first_asked[seq]:
                self._say("reordered", session, f"seq {seq} was asked after {of_seq} was acknowledged")
            if first_acked[seq] < earliest_ack:
                earliest_ack, of_seq = first_acked[seq], seq

    def figures(self) -> dict[str, int]:
        """What was judged."""
        counts: dict[str, int] = {"sessions": len(self._final), "messages": sum(map(len, self._final.values()))}
        counts["delivered"] = self.delivered
        for outcome in ("acked", "rejected", "unknown", "pending"):
            counts[outcome] = sum(invocation.outcome == outcome for invocation in self.invocations)
        counts["deduped"] = sum(ack.deduped for invocation in self.invocations for ack in invocation.acks)
        return counts

    def _tick(self) -> int:
        self._step += 1
        return self._step

    def _say(self, kind: Kind, session: str, text: str) -> None:
        self.found.append(Violation(kind, session, text))
