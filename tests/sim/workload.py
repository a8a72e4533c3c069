"""What clients do in a run: write in every way that the SDK has, read from a cursor that they keep, die and come back.

Promise: everything asked and answered is in the history; a life's writer has a name of its own; what a life that died
had not been answered is unknown. Must not be done here: judging (`support/history.py`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fleetlm_client.drafts import NewMessage
from fleetlm_client.errors import NotSent, OutcomeUnknown
from fleetlm_client.events import Ack, Gap, Message
from fleetlm_client.session import Session
from fleetlm_client.settings import Settings
from fleetlm_common.errors import FleetError, Rejected, TryAgain
from tests.sim.client import SimClient
from tests.sim.loop import SimProcess
from tests.sim.nodes import Node
from tests.support.history import Acked, Entry, Invocation, canonical

if TYPE_CHECKING:
    from tests.sim.world import World

SETTINGS = Settings(
    heartbeat_interval_s=5.0,
    heartbeat_timeout_s=5.0,
    append_deadline_s=20.0,
    connect_deadline_s=3.0,
    backoff_cap_s=1.0,
)


TIGHT = replace(SETTINGS, buffer_messages_max=16, page_messages=5, outbox_messages_max=32)
"""The same with bounds that runs meet."""


@dataclass
class Asked:
    """An append under way, or given up."""

    invocation: Invocation
    messages: list[NewMessage]
    expected_seq: int | None
    tries: int = 1
    done: bool = False


@dataclass
class Place:
    """What an application keeps of a session over its deaths."""

    cursor: int = 0
    last_read_seq: int = 0
    unknown: list[Asked] = field(default_factory=list[Asked])


class ClientNode(Node):
    """A participant's machine: an application on the SDK."""

    def __init__(self, world: World, name: str, sessions: Sequence[str]) -> None:
        super().__init__(world, name)
        self.places = {session: Place() for session in sessions}
        self.client: SimClient | None = None
        self.clients: list[SimClient] = []
        self.pending: list[Asked] = []
        self.writing = True
        self._count = 0

    def boot(self, process: SimProcess) -> None:
        """A new life."""
        process.on_kill.append(self._forget_pending)
        self.run(process, self._main(process))

    def _forget_pending(self) -> None:
        for asked in self.pending:
            if not asked.done:
                asked.done = True
                self.world.history.unknown(asked.invocation)
                self.places[asked.invocation.session].unknown.append(asked)
        self.pending.clear()
        if self.client is not None:
            for watch in self.client.watches:
                watch.lost()

    @property
    def writer(self) -> str:
        """The name of this life."""
        return f"{self.name}/{self.lives}"

    async def _main(self, process: SimProcess) -> int:
        world, rng = self.world, self.entropy()
        client = self.client = SimClient(
            self.name,
            ports=[gateway.port for gateway in world.gateways],
            settings=TIGHT if world.tight else SETTINGS,
            entropy=rng,
            clock=self.clock,
            history=world.history,
            life=self.lives,
        )
        self.clients.append(client)
        process.spawn(client.run(), name="client")
        for session in self.places:
            process.spawn(self._in_session(client, session, rng), name=f"in {session}")
        await asyncio.get_running_loop().create_future()
        return 0

    async def _in_session(self, client: SimClient, name: str, rng: random.Random) -> None:
        place = self.places[name]
        while True:
            session = client.join(name, cursor=place.cursor)
            try:
                await session.__aenter__()
                break
            except FleetError as error:
                self.world.trace.add(self.writer, "join_failed", f"{name} {error.code} {error.reason}")
                if error.reason == "cursor_ahead":
                    self.world.history.broken("lost", name, f"{self.writer}: cursor {place.cursor} is ahead: {error}")
                await asyncio.sleep(rng.uniform(0.1, 0.5))
        reader = asyncio.create_task(self._read(session, name))
        await self._write(session, name, rng)
        await reader

    async def _read(self, session: Session, name: str) -> None:
        place, history = self.places[name], self.world.history
        stream = history.open_stream(self.writer, name, place.cursor)
        async for event in session:
            if isinstance(event, Message):
                history.deliver(stream, Entry(event.seq, event.id, canonical(event.content)))
                place.cursor = event.seq
            elif isinstance(event, Gap):
                history.gap(stream, event.from_seq, event.next_seq)
                place.cursor = max(place.cursor, event.next_seq - 1)
            if self.world.rng.random() < (0.05 if self.world.tight else 0.01):
                await asyncio.sleep(self.world.rng.uniform(0, 0.3))

    async def _write(self, session: Session, name: str, rng: random.Random) -> None:
        place = self.places[name]
        # Who is in many sessions writes less in each.
        pace_s = rng.choice((0.05, 0.15, 0.4)) * max(1.0, len(self.places) / 3)
        while True:
            await asyncio.sleep(rng.expovariate(1 / pace_s))
            if not self.writing:
                return
            dice = rng.random()
            if dice < 0.1 and place.unknown:
                await self._again(session, place.unknown.pop(0))
            elif dice < 0.5:
                self._submit(session, name, rng.randrange(1, 6), rng)
            elif dice < 0.7:
                await self._append(session, self._ask(name, rng.randrange(2, 8), None, rng))
            elif dice < 0.85:
                expected = max(0, place.cursor - (rng.random() < 0.1))
                await self._append(session, self._ask(name, 1, expected, rng))
            elif dice < 0.93:
                await self._call(session, place, rng)
            else:
                await self._append(session, self._ask(name, 1, None, rng))

    # --- appends

    def _ask(self, name: str, count: int, expected_seq: int | None, rng: random.Random) -> Asked:
        messages: list[NewMessage] = []
        for _ in range(count):
            self._count += 1
            key = f"{self.writer}-{self._count}"
            content: dict[str, Any] = {"key": key, "text": "x" * rng.choice((1, 10, 100, 100, 2000))}
            messages.append(NewMessage(content=content, idempotency_key=key))
        asked = Asked(self._invoke(name, messages, expected_seq), messages, expected_seq)
        self.pending.append(asked)
        return asked

    def _invoke(
        self, name: str, messages: list[NewMessage], expected_seq: int | None, *, again: bool = False
    ) -> Invocation:
        told = [(message.idempotency_key or "", message.content) for message in messages]
        return self.world.history.invoke(self.writer, name, told, expected_seq=expected_seq, again=again)

    async def _again(self, session: Session, before: Asked) -> None:
        """Ask again what nobody knows, with the same keys."""
        name = before.invocation.session
        made = self._invoke(name, before.messages, before.expected_seq, again=True)
        asked = Asked(made, before.messages, before.expected_seq)
        asked.tries = before.tries + 1
        self.pending.append(asked)
        await self._append(session, asked)

    async def _append(self, session: Session, asked: Asked) -> None:
        try:
            if len(asked.messages) == 1:
                (message,) = asked.messages
                acks = [
                    await session.append(
                        message.content, idempotency_key=message.idempotency_key, expected_seq=asked.expected_seq
                    )
                ]
            else:
                acks = await session.append_batch(asked.messages, expected_seq=asked.expected_seq)
        except FleetError as error:
            self._refused(asked, error)
        else:
            self._acked(asked, acks)

    def _submit(self, session: Session, name: str, count: int, rng: random.Random) -> None:
        """Several at once, nobody waits."""
        for _ in range(count):
            asked = self._ask(name, 1, None, rng)
            (message,) = asked.messages
            try:
                future = session.submit(message.content, idempotency_key=message.idempotency_key)
            except FleetError as error:
                self._refused(asked, error)
                continue
            future.add_done_callback(lambda future, asked=asked: self._submitted(asked, future))  # type: ignore[misc]

    def _submitted(self, asked: Asked, future: asyncio.Future[Ack]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self._acked(asked, [future.result()])
        elif isinstance(error, FleetError):
            self._refused(asked, error)
        else:
            raise error

    def _acked(self, asked: Asked, acks: list[Ack]) -> None:
        if asked.done:
            return
        self._settle(asked)
        self.world.history.ack(asked.invocation, [Acked(ack.seq, ack.id, ack.deduped) for ack in acks])

    def _refused(self, asked: Asked, error: FleetError) -> None:
        if asked.done:
            return
        self._settle(asked)
        history, place = self.world.history, self.places[asked.invocation.session]
        self.world.trace.add(self.writer, "refused", f"{asked.invocation.keys} {error.code} {error.reason}")
        if isinstance(error, NotSent | Rejected) or (isinstance(error, TryAgain) and asked.tries == 1):
            # A refusal of the SDK itself (its outbox is full) was never sent.
            if asked.tries > 1:
                history.unknown(asked.invocation)
                if isinstance(error, Rejected):
                    self.world.trace.add(self.writer, "rejected_later", error.code)
            else:
                history.reject(asked.invocation, error.code)
        elif isinstance(error, OutcomeUnknown):
            history.unknown(asked.invocation)
            place.unknown.append(asked)
        else:
            history.unknown(asked.invocation)

    def _settle(self, asked: Asked) -> None:
        asked.done = True
        if asked in self.pending:
            self.pending.remove(asked)

    async def _call(self, session: Session, place: Place, rng: random.Random) -> None:
        try:
            if rng.random() < 0.7:
                if place.cursor:
                    await self._mark_read(session, place, rng.randrange(1, place.cursor + 1))
            else:
                after = rng.randrange(0, place.cursor + 1)
                page = await session.replay(after=after, limit=rng.randrange(1, 50))
                seqs = [message.seq for message in page.messages]
                if page.gap is None and seqs != list(range(after + 1, after + 1 + len(seqs))):
                    self.world.history.broken("stream", session.session_id, f"replay after {after} gave {seqs}")
        except FleetError as error:
            self.world.trace.add(self.writer, "call_refused", f"{error.code} {error.reason}")
            if isinstance(error, Rejected):
                self.world.history.broken("lost", session.session_id, f"{self.writer} at {place.cursor}: {error}")

    async def _mark_read(self, session: Session, place: Place, seq: int) -> None:
        """A read cursor never goes back, whatever dies."""
        told_seq = await session.mark_read(seq)
        if told_seq < max(seq, place.last_read_seq) and not self.world.nemesis.may_lose:
            text = f"{self.name} marked {seq}, had marked {place.last_read_seq}, the answer is {told_seq}"
            self.world.history.broken("lost", session.session_id, text)
        place.last_read_seq = max(place.last_read_seq, told_seq)
