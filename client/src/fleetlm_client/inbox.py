"""A participant's inbox as its user sees it: enter, iterate, leave.

Promise: iterating yields a page first, which replaces whatever was known, then each session that changes; a page comes
again after each loss, so nothing stays unknown; a slow consumer costs bounded memory. Must not be done here: decisions
about frames (`inboxchannel.py`), the pages that follow (`rest.py`).
"""

from __future__ import annotations

from collections.abc import Callable

from fleetlm_client.events import InboxUpdate
from fleetlm_client.inboxchannel import InboxChannel
from fleetlm_client.settings import Settings
from fleetlm_client.subscription import Owner, Subscription


class Inbox(Subscription[InboxChannel, InboxUpdate]):
    """Made by `Client.inbox`; enter it with `async with`, iterate it with `async for`."""

    def __init__(self, participant_id: str, *, limit: int | None, owner: Owner, settings: Settings) -> None:
        super().__init__(owner=owner, settings=settings)
        self.participant_id = participant_id
        self._limit = limit

    def _make(self, on_change: Callable[[], None]) -> InboxChannel:
        return InboxChannel(
            self.participant_id,
            limit=self._limit,
            settings=self._settings,
            backoff=self._owner.backoff,
            on_change=on_change,
        )

    def _take(self, topic: InboxChannel) -> InboxUpdate | None:
        update = topic.take()
        if update is not None and topic.behind:
            self._owner.pump(topic)
        return update
