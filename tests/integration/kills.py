"""SIGKILL and SIGSTOP at random under load, then the judgement: nothing acknowledged is lost, doubled or changed.

    python -m tests.integration.kills --kills 300 [--seed N]

A whole `fleetlm up` with writers (raw Phoenix frames and the SDK; single messages, batches, `expected_seq`, deliberate
repeats) and readers (both kinds) while shards, gateways and the controller are killed or frozen. Afterwards every
session is read from 0, everything that any client saw is judged by `tests/support/history.py`, and the volumes are
checked offline.

Promise: any broken promise ends with status 1, the violations, the seed and the folder with logs and data. The seed
fixes what is killed in which order and what writers choose, not the machine's timing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import fleetlm_client
from fleetlm_client import FleetError, Gap, Message, NewMessage, NotSent, OutcomeUnknown, Rejected, Session, Settings
from fleetlm_shard.verify import verify
from tests.support.eventually import poll
from tests.support.fleet import Fleet, fleet
from tests.support.history import Acked, Entry, History, Invocation, Stream, Violation, canonical
from tests.support.rawclient import Lost, RawSocket, Unanswered, raw_socket

GIVE_UP_S = 60.0
"""A writer keeps trying one append for this long; restarts take seconds."""
CATCH_UP_S = 60.0
"""Readers must have everything this long after the last kill."""
STOP_S_MAX = 3.0
"""Longest freeze: longer than heartbeats between parts, shorter than a takeover."""
RETRY_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run."""

    kills: int
    seed: int
    shards: int = 3
    gateways: int = 2
    sessions: int = 6
    writers: int = 6
    readers: int = 4
    pause_s: float = 0.6
    stop_share: float = 0.2
    write_pause_s: float = 0.01


@dataclass(slots=True)
class Report:
    """What came of it."""

    plan: Plan
    seconds: float = 0.0
    killed: Counter[str] = field(default_factory=Counter[str])
    stopped: Counter[str] = field(default_factory=Counter[str])
    figures: dict[str, int] = field(default_factory=dict[str, int])
    reconnects: int = 0
    slowest_append_s: float = 0.0
    slowest_append: str = ""
    gaps: int = 0
    violations: list[Violation] = field(default_factory=list[Violation])

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
            "gaps": self.gaps,
            "violations": len(self.violations),
        }
        return json.dumps(values)


class Run:
    """One run against one fleet."""

    def __init__(self, plan: Plan, running: Fleet) -> None:
        self.plan = plan
        self.fleet = running
        self.history = History()
        self.report = Report(plan)
        self.writing = True
        self.reading = True
        self.random = random.Random(plan.seed)
        self.urls = [process.url for process in running.up.processes if process.kind == "gateway" and process.url]
        self.sessions = [f"kill-{plan.seed}-{at}" for at in range(plan.sessions)]
        self.last_seqs: dict[str, int] = dict.fromkeys(self.sessions, 0)
        self.streams: list[Stream] = []
        self.count = 0
        self.begin_s = time.monotonic()

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
            made.append((key, {"key": key, "text": "x" * (self.count % 300)}))
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
            except (Lost, Unanswered):
                again.append(invocation)
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
        return bool(reply["status"] == "ok")

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
            if refusal.last_seq is not None:
                self.saw(invocation.session, refusal.last_seq)
        except (OutcomeUnknown, NotSent):
            self.history.unknown(invocation)
        else:
            self.history.ack(invocation, [Acked(ack.seq, ack.id, ack.deduped) for ack in acks])
            self.saw(invocation.session, acks[-1].seq)
        self._took(invocation, begin_s)

    def _took(self, invocation: Invocation, begin_s: float) -> None:
        """Remember the slowest append, and when it was asked (to find it in the logs)."""
        seconds = time.monotonic() - begin_s
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

    # --- chaos

    async def disturb(self) -> None:
        """Kill until the plan is done; what is only frozen comes on top.

        A process is hit again only once it was ready in between, or once more during its boot: `up` gives up on one
        that dies five times in a row.
        """
        names = self.fleet.names
        returning: dict[str, asyncio.Task[None]] = {}
        try:
            while self.report.killed.total() < self.plan.kills:
                await asyncio.sleep(self.random.random() * self.plan.pause_s * 2)
                name = self.random.choice(names)
                while name in returning and not returning[name].done():
                    name = self.random.choice(names)
                    await asyncio.sleep(0.02)
                if name in returning:
                    await returning.pop(name)
                returning[name] = asyncio.create_task(self._hit(name))
            await asyncio.gather(*returning.values())
        finally:
            for task in returning.values():
                task.cancel()

    async def _hit(self, name: str) -> None:
        kind = name.partition("-")[0]
        if self.random.random() < self.plan.stop_share:
            self.report.stopped[kind] += 1
            sys.stderr.write(f"{time.monotonic() - self.begin_s:8.1f} s  SIGSTOP {name}\n")
            self.fleet.kill(name, signal.SIGSTOP)
            try:
                await asyncio.sleep(self.random.random() * STOP_S_MAX)
            finally:
                with suppress(ProcessLookupError):
                    self.fleet.kill(name, signal.SIGCONT)
            return
        self.report.killed[kind] += 1
        self.fleet.kill(name)
        sys.stderr.write(f"{time.monotonic() - self.begin_s:8.1f} s  SIGKILL {name}\n")
        if self.random.random() < 0.2:
            await self._hit_in_boot(name, kind)
        await self.fleet.wait_ready(name)

    async def _hit_in_boot(self, name: str, kind: str) -> None:
        """Once more, as soon as `up` says that there is a new process."""
        before = self.fleet.killed[name]
        end_s = time.monotonic() + 20
        while self.fleet.pid(name) == before:
            if time.monotonic() > end_s:
                return
            await asyncio.sleep(0.01)
        await asyncio.sleep(self.random.random() * 0.5)
        self.report.killed[kind] += 1
        with suppress(ProcessLookupError):
            self.fleet.kill(name)

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
        chaos = asyncio.create_task(self.disturb())
        try:
            done, _ = await asyncio.wait([chaos, *tasks], return_when="FIRST_COMPLETED")
            for task in done:
                await task
            assert chaos in done, "a writer or reader ended on its own"
            self.writing = False
            await self.fleet.wait_ready()
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


def entry_of(message: dict[str, Any]) -> Entry:
    """A message as the history keeps it."""
    return Entry(message["seq"], message["id"], canonical(message["content"]))


async def kill_run(plan: Plan, folder: Path) -> Report:
    """One run in a folder of its own."""
    async with fleet(folder / "ring", shards=plan.shards, gateways=plan.gateways) as running:
        report = await Run(plan, running).whole()
    for volume in sorted((folder / "ring").glob("shard-*")):
        problems = (await asyncio.to_thread(verify, volume)).problems
        report.violations += [Violation("changed", volume.name, f"{one.path}: {one.what}") for one in problems]
    return report


def main() -> int:
    """By hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=None, help="random when not given")
    parser.add_argument("--stops", type=float, default=0.2, help="share of SIGSTOP among the hits")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--gateways", type=int, default=2)
    parser.add_argument("--pause", type=float, default=0.6, help="mean seconds between hits")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed
    plan = Plan(
        kills=given.kills,
        seed=seed,
        stop_share=given.stops,
        shards=given.shards,
        gateways=given.gateways,
        pause_s=given.pause,
    )
    folder = Path(tempfile.mkdtemp(prefix=f"fleetlm-kills-{seed}-"))
    sys.stderr.write(f"seed {seed}, folder {folder}\n")
    report = asyncio.run(kill_run(plan, folder))
    sys.stdout.write(report.as_json() + "\n")
    for violation in report.violations[:50]:
        sys.stdout.write(f"{violation.kind} {violation.session}: {violation.text}\n")
    return 1 if report.violations else 0


if __name__ == "__main__":
    sys.exit(main())
