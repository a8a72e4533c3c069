"""One joined topic as its user holds it: entered, iterated, left.

Promise: entering returns when the topic is joined or raises why it is not; iterating raises what ended the topic for
good, and ends when its owner closed it. Must not be done here: decisions about frames, what is in a topic
(`session.py`, `inbox.py`).
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

from fleetlm_client.backoff import Backoff
from fleetlm_client.errors import ClientClosed, NotReachable
from fleetlm_client.settings import Settings
from fleetlm_client.topic import Topic
from fleetlm_common.errors import FleetError

TopicT = TypeVar("TopicT", bound=Topic)
EventT = TypeVar("EventT")


class Owner(Protocol):
    """What a subscription needs of its client."""

    def now_s(self) -> float: ...  # noqa: D102 - see Client
    def now_ms(self) -> int: ...  # noqa: D102
    def backoff(self) -> Backoff: ...  # noqa: D102
    def add(self, topic: Topic) -> None: ...  # noqa: D102
    def pump(self, topic: Topic) -> None: ...  # noqa: D102
    def drop(self, topic: Topic) -> None: ...  # noqa: D102
    @property
    def last_failure(self) -> str: ...  # noqa: D102


class Subscription(ABC, Generic[TopicT, EventT]):
    """A topic of a client; enter it with `async with`, iterate it with `async for`.

    Args:
        owner: whose connection is used.
        settings: bounds and times.
    """

    def __init__(self, *, owner: Owner, settings: Settings) -> None:
        self._owner = owner
        self._settings = settings
        self._topic: TopicT | None = None
        self._changed = asyncio.Event()
        self._reading = False
        self._closed = False

    @abstractmethod
    def _make(self, on_change: Callable[[], None]) -> TopicT:
        """The topic, not joined yet."""

    @abstractmethod
    def _take(self, topic: TopicT) -> EventT | None:
        """The next event, None when there is none now; says to the owner that there is room again."""

    async def __aenter__(self) -> Self:
        """Join.

        Raises:
            FleetError: refused (for example `Invalid` `cursor_ahead`), or not answered within `connect_deadline_s`.
        """
        topic = self._topic = self._make(self._changed.set)
        self._owner.add(topic)
        try:
            async with asyncio.timeout(self._settings.connect_deadline_s):
                while not topic.was_joined:
                    raise_if_failed(topic)
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError as error:
            self._owner.drop(topic)
            why = self._owner.last_failure if topic.refusal is None else topic.refusal.message
            raise NotReachable(f"{topic.name!r} was not joined in time: {why}") from error
        except BaseException:
            self._owner.drop(topic)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave."""
        self.close()

    def close(self) -> None:
        """Leave; what waits for an answer ends, appends in `OutcomeUnknown` or `NotSent`. May be called twice."""
        if self._topic is not None and not self._closed:
            self._owner.drop(self._topic)
        self._closed = True
        self._changed.set()

    @property
    def _open(self) -> TopicT:
        if self._topic is None or self._closed:
            raise ClientClosed(f"the {type(self).__name__.lower()} is not open: use `async with`")
        return self._topic

    def __aiter__(self) -> Self:
        """Iterate events; one iteration at a time."""
        return self

    async def __anext__(self) -> EventT:
        """The next event.

        Raises:
            FleetError: the topic cannot go on (refused, or the client was closed by the server for good).
            RuntimeError: somebody else iterates at the same time.
        """
        if self._reading:
            raise RuntimeError(f"{self._open.name!r} is iterated twice at the same time")
        self._reading = True
        try:
            while True:
                if self._closed:
                    raise StopAsyncIteration
                topic = self._open
                event = self._take(topic)
                if event is not None:
                    return event
                if topic.error is not None:
                    _raise_unless_closed(topic.error)
                self._changed.clear()
                await self._changed.wait()
        finally:
            self._reading = False


def raise_if_failed(topic: Topic) -> None:
    """Raise what ended the topic, if anything did."""
    if topic.error is not None:
        raise topic.error.with_traceback(None)


def _raise_unless_closed(error: FleetError) -> None:
    if isinstance(error, ClientClosed):
        raise StopAsyncIteration
    raise error.with_traceback(None)
