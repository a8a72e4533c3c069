"""One topic over one connection after another: joined, joined again, refused, left. Pure.

    away ──connected──▶ joining ──ok──▶ joined
      ▲                   │ TRY_AGAIN       │ phx_error, phx_close
      └────disconnected───┴──▶ waiting ◀────┘        any ──refused for good──▶ failed

What a join asks for and what is pushed then is the business of the kinds of topics (`channel.py`, `inboxchannel.py`);
the `Link` knows only this.

Promise: after each loss the topic is joined again, with backoff, until it is left or refused for good.
Must not be done here: sockets, refs (the `Link` owns them).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, Protocol

import msgspec

from fleetlm_client.backoff import Backoff
from fleetlm_client.frames import EMPTY, Frame, Reply, decode_draining, decode_error
from fleetlm_common.errors import FleetError, Rejected, TryAgain, from_body

State = Literal["away", "joining", "joined", "waiting", "failed", "left"]
ReplyTo = Callable[[Reply, float], None]
"""Takes a reply and the time (monotonic seconds)."""


class Sender(Protocol):
    """What a topic needs of its link."""

    def send(self, topic: Topic, event: str, payload: bytes, reply_to: ReplyTo) -> str:
        """Queue a frame of that topic; its reply goes to `reply_to`. Returns the ref."""
        ...

    def on_draining(self, retry_after_ms: int, now_s: float) -> None:
        """The gateway says that it is leaving."""
        ...


class Topic(ABC):
    """A topic of a client's connection.

    Args:
        name: as it stands in frames.
        backoff: waits between joins.
        on_change: called when there may be something to take, the join was answered, or there is room again.
    """

    def __init__(self, name: str, *, backoff: Backoff, on_change: Callable[[], None]) -> None:
        self.name = name
        self.state: State = "away"
        self.join_ref: str | None = None
        self.was_joined = False
        self.error: FleetError | None = None
        self.refusal: FleetError | None = None
        """Why the newest join was not granted; it is tried again."""
        self._backoff = backoff
        self._on_change = on_change
        self._rejoin_at_s = 0.0

    # --- the kinds of topics

    @abstractmethod
    def _join_payload(self) -> bytes:
        """What a join asks for now."""

    @abstractmethod
    def _take_join(self, response: msgspec.Raw) -> None:
        """The join is granted.

        Raises:
            Rejected: what the server says cannot be gone on with.
        """

    @abstractmethod
    def _take_push(self, frame: Frame) -> None:
        """Something was pushed; events of a newer server are not ours to judge."""

    def _forget_flights(self) -> None:
        """Replies to what was sent may never come: it will be sent again."""
        self.join_ref = None

    def _leaving(self, retry_after_ms: int) -> None:  # noqa: B027 - an inbox has nobody to tell
        """The gateway leaves; the link sees to it."""

    def _end(self, error: FleetError) -> None:  # noqa: B027 - the same
        """It is over: tell whoever waits for an answer."""

    # --- the link's calls

    def on_connected(self) -> None:
        """A new connection stands."""
        if self.state not in {"failed", "left"}:
            self.state = "waiting"
            self._rejoin_at_s = 0.0

    def on_disconnected(self) -> None:
        """The connection is gone."""
        if self.state not in {"failed", "left"}:
            self._forget_flights()
            self.state = "away"

    def on_push(self, frame: Frame, now_s: float, link: Sender) -> None:
        """A frame that is no reply."""
        match frame.event:
            case "draining":
                retry_after_ms = decode_draining(frame.payload).retry_after_ms
                self._leaving(retry_after_ms)
                link.on_draining(retry_after_ms, now_s)
            case "phx_error" | "phx_close":
                if self.state in {"joined", "joining"}:
                    self._rejoin_later(now_s, at_least_s=0.0)
            case _:
                self._take_push(frame)
        self._on_change()

    def pump(self, now_s: float, link: Sender) -> None:
        """Send whatever may be sent now."""
        if self.state == "waiting" and now_s >= self._rejoin_at_s:
            self._join(link)

    def next_at_s(self) -> float | None:
        """When `pump` should be called next, whatever arrives until then."""
        return self._rejoin_at_s if self.state == "waiting" else None

    def fail(self, error: FleetError) -> None:
        """The topic cannot go on: every waiter is told why."""
        if self.state in {"failed", "left"}:
            return
        self.state = "failed"
        self.error = error
        self._end(error)
        self._on_change()

    def leave(self, link: Sender) -> None:
        """Say goodbye, also when the join is not answered yet."""
        if self.join_ref is not None:
            link.send(self, "phx_leave", EMPTY, _ignore_reply)
        if self.state != "failed":
            self._end(TryAgain(f"{self.name} was left", reason="unavailable"))
        self._forget_flights()
        self.state = "left"

    # --- joining

    def _join(self, link: Sender) -> None:
        self.state = "joining"
        self.join_ref = link.send(self, "phx_join", self._join_payload(), self._join_answered)

    def _join_answered(self, reply: Reply, now_s: float) -> None:
        if reply.status != "ok":
            error = from_body(decode_error(reply.response))
            if isinstance(error, Rejected):
                self.join_ref = None
                self.fail(error)
            else:
                self.refusal = error
                self._rejoin_later(now_s, at_least_s=told_wait_s(error))
            return
        try:
            self._take_join(reply.response)
        except Rejected as error:
            self.fail(error)
            return
        self.state = "joined"
        self.was_joined = True
        self.refusal = None
        self._backoff.reset()
        self._on_change()

    def _rejoin_later(self, now_s: float, *, at_least_s: float) -> None:
        self._forget_flights()
        self.state = "waiting"
        self._rejoin_at_s = now_s + self._backoff.next_s(at_least_s)


def _ignore_reply(reply: Reply, now_s: float) -> None:
    """Nobody waits for it."""


def told_wait_s(error: FleetError) -> float:
    """How long the server asked to wait."""
    return error.retry_after_ms / 1000 if isinstance(error, TryAgain) else 0.0
