"""The workload of a drill and the judge of what it saw.

Place: under `drill.py`. One writer a session with one append under way, repeated with its key until it is answered; one
reader a session, from its beginning. Promise: the judge knows nothing of the system: it compares what was acknowledged,
what readers got and what stands in the log at the end. Must not be done here: harming the ring.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Final

import msgspec

import fleetlm_client
from fleetlm_client import Client, FleetError, Gap, Message, NotReachable, NotSent, OutcomeUnknown, Session, TryAgain

AGAIN_S: Final = 0.1
PAUSE_S: Final = 0.05
"""Between two appends of a writer: a drill disturbs others as little as it can."""
END_S: Final = 60.0
"""Appends under way are answered, and readers have everything, this long after the end at the latest."""
POLL_S: Final = 0.02
_AGAIN: Final = (TryAgain, OutcomeUnknown, NotSent)


@dataclass(slots=True)
class Saw:
    """One session as its users saw it; messages are numbered by their writer."""

    acked: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """Number and seq of each acknowledged append."""
    read: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """Seq and number of what the reader got, in the order it got them."""
    log: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """Seq and number of what stands in the session at the end."""
    errors: list[str] = field(default_factory=list[str])


class Broken(msgspec.Struct, frozen=True, kw_only=True):
    """Promises that did not hold: a sentence each."""

    lost: list[str]
    repeated: list[str]
    reordered: list[str]
    errors: list[str]

    @property
    def any(self) -> bool:
        """Something was broken."""
        return bool(self.lost or self.repeated or self.reordered or self.errors)


def judge(saw: dict[str, Saw]) -> Broken:
    """Compare acknowledgements, readers and logs."""
    broken = Broken(lost=[], repeated=[], reordered=[], errors=[])
    for session, one in saw.items():
        where = dict(one.log)
        for number, seq in one.acked:
            if where.get(seq) != number:
                broken.lost.append(f"{session}: message {number} was acknowledged at {seq} and does not stand there")
        seqs_read = {seq for seq, _ in one.read}
        broken.lost.extend(
            f"{session}: seq {seq} never reached the reader" for seq, _ in one.log if seq not in seqs_read
        )
        broken.errors.extend(
            f"{session}: the reader got message {number} at {seq}, where the log has {where.get(seq)}"
            for seq, number in one.read
            if where.get(seq) != number
        )
        for who, listed in (("log", one.log), ("reader", one.read)):
            _order(session, who, listed, broken)
        broken.errors.extend(f"{session}: {error}" for error in one.errors)
    return broken


def _order(session: str, who: str, listed: list[tuple[int, int]], broken: Broken) -> None:
    seen: set[int] = set()
    for at, (seq, number) in enumerate(listed):
        if number in seen:
            broken.repeated.append(f"{session}: the {who} has message {number} again, at {seq}")
        elif at and (seq <= listed[at - 1][0] or number < listed[at - 1][1]):
            broken.reordered.append(f"{session}: the {who} has message {number} at {seq} after {listed[at - 1]}")
        seen.add(number)


class Stalls(msgspec.Struct, frozen=True):
    """Append to acknowledged, retries included, in milliseconds (nearest rank)."""

    appends: int
    p50_ms: float
    p99_ms: float
    max_ms: float


def stalls(took_s: Sequence[float]) -> Stalls:
    """Percentiles; zeros when there was nothing."""
    if not took_s:
        return Stalls(0, 0.0, 0.0, 0.0)
    ranked = sorted(took_s)

    def rank(share: float) -> float:
        return round(ranked[min(len(ranked) - 1, int(len(ranked) * share))] * 1000, 1)

    return Stalls(len(ranked), rank(0.5), rank(0.99), rank(1.0))


class DrillLoad:
    """Writers and readers of sessions with a prefix of their own.

    Args:
        urls: gateways; sessions are spread over them.
        prefix: of session ids; never used before.
        sessions: how many.
    """

    def __init__(self, urls: Sequence[str], prefix: str, sessions: int) -> None:
        self._urls = urls
        self._names = [f"{prefix}-{number}" for number in range(sessions)]
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._stack = AsyncExitStack()
        self.saw = {name: Saw() for name in self._names}
        self.took: list[tuple[float, float]] = []
        """When each append was acknowledged (monotonic), and how long it took."""
        self.try_again = 0

    async def begin(self) -> None:
        """Connect and start.

        Raises:
            NotReachable: nobody answers.
        """
        for at, name in enumerate(self._names):
            writer = await self._client(self._urls[at % len(self._urls)], "drill-writer")
            reader = await self._client(self._urls[(at + 1) % len(self._urls)], "drill-reader")
            written = await self._stack.enter_async_context(writer.join(name))
            followed = await self._stack.enter_async_context(reader.join(name, cursor=0))
            self._tasks.append(asyncio.create_task(self._write(written, self.saw[name])))
            self._tasks.append(asyncio.create_task(_read(followed, self.saw[name])))

    async def _client(self, url: str, who: str) -> Client:
        return await self._stack.enter_async_context(
            fleetlm_client.connect(url, participant_id=who, participant_kind="system")
        )

    async def _write(self, session: Session, saw: Saw) -> None:
        number = 0
        while not self._stopping:
            number += 1
            began_s = time.monotonic()
            try:
                seq = await self._append(session, number)
            except FleetError as error:
                saw.errors.append(f"append {number}: {error.code} {error.message}")
                return
            now_s = time.monotonic()
            self.took.append((now_s, now_s - began_s))
            saw.acked.append((number, seq))
            await asyncio.sleep(PAUSE_S)

    async def _append(self, session: Session, number: int) -> int:
        while True:
            try:
                return (await session.append(number, idempotency_key=f"drill-{number}")).seq
            except _AGAIN:
                self.try_again += 1
                await asyncio.sleep(AGAIN_S)

    async def end(self) -> None:
        """Let appends under way end, wait for the readers, and read every log."""
        self._stopping = True
        writers, readers = self._tasks[::2], self._tasks[1::2]
        _, late = await asyncio.wait(writers, timeout=END_S)
        for at, task in enumerate(writers):
            if task in late:
                self.saw[self._names[at]].errors.append(f"an append was not answered within {END_S:g} s")
        await _ended(late)
        for name in self._names:
            await self._read_log(name)
        with suppress(TimeoutError):  # what did not come is the judge's to say
            async with asyncio.timeout(END_S):
                while True:
                    if all(map(_has_all, self.saw.values())) or all(reader.done() for reader in readers):
                        break
                    await asyncio.sleep(POLL_S)
        await self.close()

    async def _read_log(self, name: str) -> None:
        saw = self.saw[name]
        try:
            async with fleetlm_client.connect_rest(self._urls[0], participant_id="drill-judge") as rest:
                after = 0
                while True:
                    page = await rest.messages(name, after=after)
                    saw.log.extend((message.seq, _number(message)) for message in page.messages)
                    if not page.has_more or not page.messages:
                        return
                    after = page.messages[-1].seq
        except (FleetError, NotReachable) as error:
            saw.errors.append(f"the log cannot be read: {error.code} {error.message}")

    async def close(self) -> None:
        """End everything; may be called twice."""
        await _ended(self._tasks)
        await self._stack.aclose()


def _has_all(saw: Saw) -> bool:
    return not saw.log or (bool(saw.read) and saw.read[-1][0] >= saw.log[-1][0])


async def _read(session: Session, saw: Saw) -> None:
    try:
        async for event in session:
            if isinstance(event, Message):
                saw.read.append((event.seq, _number(event)))
            elif isinstance(event, Gap):
                saw.errors.append(f"the reader was told of a gap from {event.from_seq} to {event.next_seq - 1}")
    except FleetError as error:
        saw.errors.append(f"the reader ended: {error.code} {error.message}")


def _number(message: Message) -> int:
    return message.content if isinstance(message.content, int) else -1


async def _ended(tasks: Sequence[asyncio.Task[None]] | set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
