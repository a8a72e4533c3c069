"""The load of all runs under faults: writers and readers through gateways, and the judgement of what they saw.

Writers: raw Phoenix frames and the SDK; single messages, batches, `expected_seq`, deliberate repeats. Readers: both
kinds. A subclass says what disturbs them (`disturb`) and what there is to see when something is stuck (`evidence`).

Promise: at the end every session is read from 0, and everything that any client saw is judged by
`tests/support/history.py`. The seed fixes what writers choose, not the machine's timing.
Must not be done here: faults; knowing how gateways were started.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import fleetlm_client
from fleetlm_client import FleetError, Gap, Message, NewMessage, NotSent, OutcomeUnknown, Rejected, Session, Settings
from tests.support.eventually import poll
from tests.support.history import Acked, Entry, History, Invocation, Stream, Violation, canonical
from tests.support.rawclient import Lost, RawSocket, Unanswered, raw_socket

GIVE_UP_S = 60.0
"""A writer keeps trying one append for this long; restarts take seconds."""
CATCH_UP_S = 60.0
"""Readers must have everything this long after the last fault."""
PROGRESS_S = 30.0
"""After a fault is over, an append must be acknowledged within it."""
RETRY_S = 0.05
LOAD = 50
"""With fewer acknowledged appends a run says little."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """How much is written and read."""

    seed: int
    name: str = "kill"
    """Sessions begin with it: runs on one ring have sessions of their own by it and the seed."""
    sessions: int = 6
    writers: int = 6
    readers: int = 4
    write_pause_s: float = 0.01
    text_chars_max: int = 300


@dataclass(slots=True)
class Report:
    """What came of it."""

    plan: LoadPlan
    seconds: float = 0.0
    killed: Counter[str] = field(default_factory=Counter[str])
    stopped: Counter[str] = field(default_factory=Counter[str])
    figures: dict[str, int] = field(default_factory=dict[str, int])
    reconnects: int = 0
    slowest_append_s: float = 0.0
    slowest_append: str = ""
    took_s: list[float] = field(default_factory=list[float])
    """How long each append took, retries included, in the order of their answers."""
    refused: Counter[str] = field(default_factory=Counter[str])
    """What clients were told instead of an answer, TRY_AGAIN left out: codes of refusals, of what the SDK gave up, of
    channels that ended. A CONFLICT that was asked for (`expected_seq`) is an answer."""
    gaps: int = 0
    violations: list[Violation] = field(default_factory=list[Violation])

    def told(self, code: str, *, asked_for: bool = False) -> None:
        """A client was told a code; `asked_for`: with an append that had `expected_seq`."""
        if code != "TRY_AGAIN" and not (asked_for and code == "CONFLICT"):
            self.refused[code] += 1

    def as_json(self) -> str:
        """One line of figures."""
        values: dict[str, Any] = {
            "seed": self.plan.seed,
            "seconds": round(self.seconds, 1),
            "killed": dict(self.killed),
            "stopped": dict(self.stopped),
            **self.figures,
            "reconnects": self.reconnects,
            "slowest_append_s": round(self.slowest_append_s, 2),
            "slowest_append": self.slowest_append,
            "refused": dict(self.refused),
            "gaps": self.gaps,
            "violations": len(self.violations),
        }
        return json.dumps(values)


class Load:
    """One run against gateways that are there.

    Args:
        plan: how much.
        urls: of the gateways; clients are spread over them.
    """

    def __init__(self, plan: LoadPlan, urls: list[str]) -> None:
        self.plan = plan
        self.urls = urls
        self.history = History()
        self.report = Report(plan)
        self.writing = True
        self.reading = True
        self.random = random.Random(plan.seed)
        self.sessions = [f"{plan.name}-{plan.seed}-{at}" for at in range(plan.sessions)]
        self.last_seqs: dict[str, int] = dict.fromkeys(self.sessions, 0)
        self.streams: list[Stream] = []
        self.count = 0
        self.begin_s = time.monotonic()

    async def disturb(self) -> None:
        """What happens under the load; the run ends when it does."""
        raise NotImplementedError

    async def settle(self) -> None:
        """Wait until the system should be whole again."""

    def evidence(self) -> str:
        """What helps to understand that nothing goes on."""
        return ""

    def acked(self, session: str | None = None) -> int:
        """Acknowledged appends so far (of one session)."""
        return sum(one.outcome == "acked" and session in {None, one.session} for one in self.history.invocations)

    async def progress(self, *, within_s: float = PROGRESS_S) -> None:
        """Wait until more is acknowledged in every session than now.

        Raises:
            AssertionError: in one of them nothing is.
        """
        before = {session: self.acked(session) for session in self.sessions}
        written = {self.sessions[at % len(self.sessions)] for at in range(self.plan.writers)}
        try:
            async with asyncio.timeout(within_s):
                await poll(lambda: all(self.acked(one) > before[one] for one in written), every_s=0.05)
        except TimeoutError as error:
            stuck = [session for session in written if self.acked(session) <= before[session]]
            raise AssertionError(f"nothing is acknowledged in {stuck}\n{self.evidence()}") from error

    def url(self, at: int) -> str:
        """Clients are spread over the gateways."""
        return self.urls[at % len(self.urls)]

    def websocket_url(self, at: int) -> str:
        """The same for sockets."""
        return "ws" + self.url(at).removeprefix("http") + "/socket/websocket"

    def messages(self, writer: str, count: int) -> list[tuple[str, dict[str, Any]]]:
        """Keys and contents that are used once."""
        made: list[tuple[str, dict[str, Any]]] = []
        for _ in range(count):
            self.count += 1
            key = f"{writer}-{self.count}"
            made.append((key, {"key": key, "text": "x" * (self.count % self.plan.text_chars_max)}))
        return made

    def saw(self, session: str, seq: int) -> None:
        """Somebody knows that the session has come so far (for `expected_seq`)."""
        self.last_seqs[session] = max(self.last_seqs[session], seq)

    # --- the raw writer

    async def write_raw(self, number: int) -> None:
        """Sequential appends by hand; each is repeated with its key until it is answered for good."""
        chance = random.Random(f"{self.plan.seed}-raw-{number}")
        writer = f"raw{number}"
        session = self.sessions[number % len(self.sessions)]
        again: list[Invocation] = []
        while self.writing:
            with suppress(Lost):
                async with raw_socket(self.websocket_url(number), self.history, participant=writer) as raw:
                    await self._write_on(raw, writer, session, chance, again)
            await asyncio.sleep(RETRY_S)

    async def _write_on(
        self, raw: RawSocket, writer: str, session: str, chance: random.Random, again: list[Invocation]
    ) -> None:
        """Write over one socket until it is lost."""
        if not await self._joined(raw, session):
            return
        while again or self.writing:
            invocation = again.pop() if again else self._invoke(writer, session, chance)
            begin_s = time.monotonic()
            try:
                done = await self._append_raw(raw, invocation)
            except (Lost, Unanswered) as error:
                again.append(invocation)
                if isinstance(error, Unanswered):
                    self.report.told("UNANSWERED")
                raise Lost from None
            if not done:
                again.append(invocation)
                await asyncio.sleep(RETRY_S)
                continue
            self._took(invocation, begin_s)
            await asyncio.sleep(self.plan.write_pause_s * chance.random() * 2)

    async def _joined(self, raw: RawSocket, session: str) -> bool:
        try:
            reply = await raw.join(session)
        except Unanswered:
            return False
        if reply["status"] == "ok":
            return True
        self.report.told(reply["response"]["code"])
        return False

    def _invoke(self, writer: str, session: str, chance: random.Random) -> Invocation:
        """What to append next: a single, a batch, with `expected_seq`, or one that is acknowledged already."""
        choice = chance.random()
        acked = [one for one in self.history.invocations[-200:] if one.writer == writer and one.outcome == "acked"]
        if choice < 0.1 and acked:
            old = chance.choice(acked)
            messages = [(key, json.loads(content)) for key, content in zip(old.keys, old.contents, strict=True)]
            return self.history.invoke(writer, session, messages)
        expected = self.last_seqs[session] if choice > 0.85 else None
        count = chance.randrange(2, 8) if choice < 0.25 else 1
        return self.history.invoke(writer, session, self.messages(writer, count), expected_seq=expected)

    async def _append_raw(self, raw: RawSocket, invocation: Invocation) -> bool:
        """One try; False: TRY_AGAIN."""
        drafts = [
            {"content": json.loads(content), "idempotency_key": key}
            for key, content in zip(invocation.keys, invocation.contents, strict=True)
        ]
        payload: dict[str, Any] = drafts[0] if len(drafts) == 1 else {"messages": drafts}
        if invocation.expected_seq is not None:
            payload = {**payload, "expected_seq": invocation.expected_seq}
        reply = await raw.request(invocation.session, "append", payload)
        response = reply["response"]
        if reply["status"] == "ok":
            acks = response["messages"] if len(drafts) > 1 else [response]
            self.history.ack(invocation, [Acked(ack["seq"], ack["id"], ack["deduped"]) for ack in acks])
            self.saw(invocation.session, acks[-1]["seq"])
            return True
        if response["code"] == "TRY_AGAIN":
            return False
        self.history.reject(invocation, response["code"])
        self.report.told(response["code"], asked_for=invocation.expected_seq is not None)
        if response["code"] == "CONFLICT":
            self.saw(invocation.session, response["last_seq"])
        return True

    # --- the SDK's writer

    async def write_sdk(self, number: int) -> None:
        """Pipelined appends through the SDK: several callers at once on one session object."""
        chance = random.Random(f"{self.plan.seed}-sdk-{number}")
        writer = f"sdk{number}"
        session = self.sessions[number % len(self.sessions)]
        settings = Settings(append_deadline_s=GIVE_UP_S, connect_deadline_s=GIVE_UP_S)
        async with (
            fleetlm_client.connect(self.url(number), participant_id=writer, settings=settings) as client,
            client.join(session) as joined,
        ):
            waiting: set[asyncio.Task[None]] = set()
            while self.writing:
                invocation = self._invoke(writer, session, chance)
                task = asyncio.create_task(self._append_sdk(joined, invocation))
                waiting.add(task)
                if len(waiting) >= 20:
                    _, waiting = await asyncio.wait(waiting, return_when="FIRST_COMPLETED")
                await asyncio.sleep(self.plan.write_pause_s * chance.random() * 2)
            await asyncio.gather(*waiting)
            self.report.reconnects += client.connections - 1

    async def _append_sdk(self, joined: Session, invocation: Invocation) -> None:
        drafts = [
            NewMessage(content=json.loads(content), idempotency_key=key)
            for key, content in zip(invocation.keys, invocation.contents, strict=True)
        ]
        begin_s = time.monotonic()
        try:
            if len(drafts) == 1:
                one = drafts[0]
                acks = [
                    await joined.append(
                        one.content, idempotency_key=one.idempotency_key, expected_seq=invocation.expected_seq
                    )
                ]
            else:
                acks = await joined.append_batch(drafts, expected_seq=invocation.expected_seq)
        except Rejected as refusal:
            self.history.reject(invocation, refusal.code)
            self.report.told(refusal.code, asked_for=invocation.expected_seq is not None)
            if refusal.last_seq is not None:
                self.saw(invocation.session, refusal.last_seq)
        except (OutcomeUnknown, NotSent) as given_up:
            self.history.unknown(invocation)
            self.report.told(given_up.code)
        else:
            self.history.ack(invocation, [Acked(ack.seq, ack.id, ack.deduped) for ack in acks])
            self.saw(invocation.session, acks[-1].seq)
        self._took(invocation, begin_s)

    def _took(self, invocation: Invocation, begin_s: float) -> None:
        """Remember the slowest append, and when it was asked (to find it in the logs)."""
        seconds = time.monotonic() - begin_s
        self.report.took_s.append(seconds)
        if seconds > self.report.slowest_append_s:
            self.report.slowest_append_s = seconds
            self.report.slowest_append = (
                f"{invocation.keys[0]} in {invocation.session}, asked {begin_s - self.begin_s:.1f} s after the start"
            )

    # --- readers

    async def read_raw(self, number: int) -> None:
        """Every session by hand: join with the cursor, take what is pushed, come back when the socket is lost."""
        streams = {session: self._stream(f"rawreader{number}", session) for session in self.sessions}

        def on_push(session: str, event: str, payload: dict[str, Any]) -> None:
            if event == "messages":
                for message in payload["messages"]:
                    self.history.deliver(streams[session], entry_of(message))
            elif event == "gap":
                self.history.gap(streams[session], payload["from_seq"], payload["next_seq"])
            elif event in {"phx_error", "phx_close"}:
                self.report.told(payload.get("code", event))
                rejoin.set()

        rejoin = asyncio.Event()
        while self.reading:
            rejoin.clear()
            with suppress(Lost, Unanswered):
                async with raw_socket(
                    self.websocket_url(number), self.history, participant=f"rawreader{number}", on_push=on_push
                ) as raw:
                    for session, stream in streams.items():
                        reply = await raw.join(session, cursor=stream.cursor)
                        if reply["status"] != "ok":
                            self._check_join_refusal(stream, reply["response"])
                            rejoin.set()
                    await poll(partial(self._reader_is_done, raw, rejoin), every_s=RETRY_S)
            await asyncio.sleep(RETRY_S)

    def _reader_is_done(self, raw: RawSocket, rejoin: asyncio.Event) -> bool:
        return not self.reading or raw.lost or rejoin.is_set()

    def _check_join_refusal(self, stream: Stream, response: dict[str, Any]) -> None:
        """A reader's cursor must never be ahead of what the ring holds."""
        if response["code"] != "TRY_AGAIN":
            text = f"{stream.reader} was refused at cursor {stream.cursor}: {response}"
            self.history.found.append(Violation("stream", stream.session, text))

    async def read_sdk(self, number: int) -> None:
        """One session through the SDK."""
        session = self.sessions[number % len(self.sessions)]
        stream = self._stream(f"sdkreader{number}", session)
        settings = Settings(connect_deadline_s=GIVE_UP_S, buffer_messages_max=200, page_messages=50)
        async with (
            fleetlm_client.connect(self.url(number), participant_id=stream.reader, settings=settings) as client,
            client.join(session, cursor=0) as joined,
        ):
            try:
                async for event in joined:
                    if isinstance(event, Message):
                        content = canonical(event.content)
                        self.history.deliver(stream, Entry(event.seq, event.id, content))
                    elif isinstance(event, Gap):
                        self.history.gap(stream, event.from_seq, event.next_seq)
            except FleetError as error:
                text = f"{stream.reader} failed at cursor {stream.cursor}: {error!r}"
                self.history.found.append(Violation("stream", session, text))
            finally:
                self.report.reconnects += client.connections - 1

    def _stream(self, reader: str, session: str) -> Stream:
        stream = self.history.open_stream(reader, session, 0)
        self.streams.append(stream)
        return stream

    # --- the whole

    async def whole(self) -> Report:
        """Load, chaos, quiet, judgement."""
        half = self.plan.writers // 2
        writers = [
            asyncio.create_task(self.write_raw(at) if at < half else self.write_sdk(at))
            for at in range(self.plan.writers)
        ]
        readers = [
            asyncio.create_task(self.read_raw(at) if at % 2 else self.read_sdk(at)) for at in range(self.plan.readers)
        ]
        tasks = [*writers, *readers]
        chaos = asyncio.create_task(self._disturbed())
        try:
            done, _ = await asyncio.wait([chaos, *tasks], return_when="FIRST_COMPLETED")
            for task in done:
                await task
            assert chaos in done, "a writer or reader ended on its own"
            self.writing = False
            await self.settle()
            await asyncio.gather(*writers)
            await self._read_finals()
            await self._catch_up()
            self.reading = False
        finally:
            for task in [chaos, *tasks]:
                task.cancel()
            await asyncio.gather(chaos, *tasks, return_exceptions=True)
        self.report.seconds = time.monotonic() - self.begin_s
        self.report.violations = self.history.judge()
        self.report.figures = self.history.figures()
        self.report.gaps = sum(stream.gaps for stream in self.streams)
        return self.report

    async def _disturbed(self) -> None:
        """The disturbance; a quick one does not end the run before there was a load."""
        await self.disturb()
        while self.acked() < LOAD:
            await self.progress()

    async def _read_finals(self) -> None:
        """Every session from its beginning, by hand."""
        for session in self.sessions:
            async with raw_socket(self.websocket_url(0), self.history, participant="judge") as raw:
                async with asyncio.timeout(CATCH_UP_S):
                    assert await self._joined(raw, session), "everything is ready"
                    self.history.final(session, await self._pages(raw, session))

    async def _pages(self, raw: RawSocket, session: str) -> list[Entry]:
        found: list[Entry] = []
        while True:
            after = found[-1].seq if found else 0
            reply = await raw.request(session, "replay", {"after": after, "limit": 1_000})
            response = reply["response"]
            if reply["status"] != "ok":
                assert response["code"] == "TRY_AGAIN", response
                await asyncio.sleep(RETRY_S)
                continue
            found += [entry_of(message) for message in response["messages"]]
            if "gap" in response:
                self.history.found.append(Violation("hole", session, f"a gap that nobody made: {response['gap']}"))
            if not response["has_more"]:
                return found

    async def _catch_up(self) -> None:
        """Every reader has everything, without being asked."""
        end_s = time.monotonic() + CATCH_UP_S
        for stream in self.streams:
            last_seq = max((entry.seq for entry in self.history.log(stream.session)), default=0)
            while stream.cursor < last_seq:
                if time.monotonic() > end_s:
                    text = f"{stream.reader} stands at {stream.cursor}, the session at {last_seq}"
                    self.history.found.append(Violation("stream", stream.session, text))
                    break
                await asyncio.sleep(RETRY_S)


def append_ms(took_s: Sequence[float]) -> dict[str, float]:
    """How long appends took: half and 99 of 100 no longer than, and the longest."""
    took = sorted(took_s)
    at = {f"p{share}": took[min(len(took) - 1, int(len(took) * share / 100))] for share in (50, 99)}
    return {name: round(seconds * 1000, 1) for name, seconds in {**at, "max": took[-1]}.items()}


def entry_of(message: dict[str, Any]) -> Entry:
    """A message as the history keeps it."""
    return Entry(message["seq"], message["id"], canonical(message["content"]))


def clean(report: Report) -> None:
    """No promise was broken, and the load was one."""
    assert report.violations == [], report.as_json()
    assert report.gaps == 0, report.as_json()
    assert report.figures["acked"] >= LOAD, report.as_json()
