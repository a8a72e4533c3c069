"""Runs the SDK's pure core against the model of a gateway in virtual time."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from fleetlm_client.channel import Channel
from fleetlm_client.drafts import Fragment, NewMessage, fragment, fragments
from fleetlm_client.events import Ack, Event
from fleetlm_client.inboxchannel import InboxChannel
from fleetlm_client.link import Link
from fleetlm_client.outbox import Append
from fleetlm_client.settings import Settings
from fleetlm_common.errors import FleetError
from tests.support.phoenix_model import Fault, Model, ModelSocket


class Harness:
    """One client, one socket at a time, and a clock that only moves when told."""

    def __init__(
        self,
        *,
        settings: Settings | None = None,
        seed: int = 1,
        model: Model | None = None,
        fault: Callable[[str], Fault] | None = None,
    ) -> None:
        self.now_s = 100.0
        self.entropy = random.Random(seed)
        self.model = model or Model()
        self.fault = fault
        self.settings = settings or Settings()
        self.link = Link(settings=self.settings, entropy=self.entropy)
        self.socket: ModelSocket | None = None
        self.reachable = True
        self.results: dict[str, list[Ack] | FleetError] = {}
        self.answers = 0

    def channel(self, session_id: str = "s", *, cursor: int | None = 0, tail: int | None = None) -> Channel:
        """Join a session."""
        channel = Channel(
            session_id,
            cursor=cursor,
            tail=tail,
            settings=self.settings,
            backoff=self.link.backoff,
            on_change=lambda: None,
        )
        self.link.add(channel, self.now_s)
        return channel

    def inbox(self, participant_id: str = "alice", *, limit: int | None = None) -> InboxChannel:
        """Join an inbox; the model's socket is Alice's."""
        inbox = InboxChannel(
            participant_id, limit=limit, settings=self.settings, backoff=self.link.backoff, on_change=lambda: None
        )
        self.link.add(inbox, self.now_s)
        return inbox

    def append(
        self,
        channel: Channel,
        *contents: Any,
        key: str | None = None,
        expected_seq: int | None = None,
        deadline_s: float = 1_000.0,
    ) -> Append:
        """Submit an append; its result appears in `results` under its first key."""
        drafts = [NewMessage(content=content, idempotency_key=key) for content in contents]
        made: tuple[Fragment, ...]
        if len(drafts) == 1:
            made = (fragment(drafts[0], now_ms=0, entropy=self.entropy),)
        else:
            made = fragments(drafts, now_ms=0, entropy=self.entropy)

        def done(result: list[Ack] | FleetError) -> None:
            self.answers += 1
            assert made[0].key not in self.results or key is not None, "answered twice"
            self.results[made[0].key] = result

        append = Append(
            fragments=made,
            deadline_s=self.now_s + deadline_s,
            done=done,
            expected_seq=expected_seq,
            batch=len(drafts) > 1,
        )
        channel.append(append)
        self.link.pump(channel, self.now_s)
        return append

    def connect(self) -> None:
        """Connect if the link wants to."""
        if not self.link.should_connect(self.now_s):
            return
        if self.reachable:
            self.socket = ModelSocket(self.model, fault=self.fault)
            self.link.connected(self.now_s)
        else:
            self.link.connect_failed(self.now_s)

    def cut(self, close_code: int = 1006, reason: str = "") -> None:
        """The connection is gone; what was under way is lost."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None
            self.link.disconnected(self.now_s, close_code=close_code, reason=reason)

    def to_server(self, count: int = 1_000_000) -> None:
        """Let frames of the client arrive."""
        if self.socket is not None:
            for text in self.link.take_outgoing()[:count]:
                self.socket.receive(text)

    def to_client(self, count: int = 1_000_000) -> None:
        """Let frames of the server arrive."""
        for _ in range(count):
            if self.socket is None or not self.socket.out:
                return
            self.link.received(self.socket.out.popleft(), self.now_s)

    def advance(self, seconds: float) -> None:
        """Time passes."""
        self.now_s += seconds
        self.link.tick(self.now_s)

    def settle(self) -> None:
        """Exchange frames until nobody has anything to say at this moment."""
        for _ in range(10_000):
            self.connect()
            if self.link.wants_close:
                self.cut()
            self.to_server()
            self.to_client()
            quiet = not self.link.has_outgoing and (self.socket is None or not self.socket.out)
            if quiet and not self.link.wants_close:
                return
        raise AssertionError("client and server never come to rest")

    def run(self, seconds: float) -> None:
        """Settle, and again at each moment the link asks for, until `seconds` have passed."""
        end_s = self.now_s + seconds
        for _ in range(100_000):
            self.settle()
            at_s = self.link.next_at_s()
            if at_s is None or at_s > end_s:
                self.advance(max(0.0, end_s - self.now_s))
                self.settle()
                return
            self.advance(max(1e-6, at_s - self.now_s))
        raise AssertionError("the link asks to be woken without end")

    def take_all(self, channel: Channel) -> list[Event]:
        """Everything that the reader has."""
        events: list[Event] = []
        while (event := channel.reader.take()) is not None:
            events.append(event)
            if channel.reader.behind:
                self.link.pump(channel, self.now_s)
                self.settle()
        return events
