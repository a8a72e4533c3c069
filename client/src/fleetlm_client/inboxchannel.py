"""One inbox over one connection after another: a `Topic` whose every join brings a page, then changes. Pure.

    pushed: sessions (a page), session (an entry), …  ─►  held until taken  ─►  the consumer

What is held is what the consumer does not know yet, not what was pushed: a page takes the place of all that was held
before it, an entry that of the one of its session. When more sessions changed than may be held, changes are dropped
until the consumer has taken the rest; then the inbox is joined again, for a page.

Promise: a consumer that has taken everything knows what the server told last; memory is bounded whatever it does.
Must not be done here: sockets (`client.py`), when to join (`topic.py`).
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from fleetlm_client.backoff import Backoff
from fleetlm_client.events import InboxEntry, InboxPage, InboxUpdate
from fleetlm_client.frames import (
    INBOX_PREFIX,
    Frame,
    InboxJoinPayload,
    decode_inbox_entry,
    decode_inbox_page,
    encode_json,
)
from fleetlm_client.settings import Settings
from fleetlm_client.topic import Sender, Topic


class InboxChannel(Topic):
    """One inbox.

    Args:
        participant_id: whose.
        limit: sessions of a page; None: the server's most.
        settings: how much is held.
        backoff: makes waits.
        on_change: see `Topic`.
    """

    def __init__(
        self,
        participant_id: str,
        *,
        limit: int | None,
        settings: Settings,
        backoff: Callable[[], Backoff],
        on_change: Callable[[], None],
    ) -> None:
        super().__init__(INBOX_PREFIX + participant_id, backoff=backoff(), on_change=on_change)
        self.behind = False
        self._limit = limit
        self._entries_max = settings.buffer_messages_max
        self._page: InboxPage | None = None
        self._entries: dict[str, InboxEntry] = {}
        """By session, in the order of their changes; newer than the page."""

    def take(self) -> InboxUpdate | None:
        """The next update, or None when there is none now."""
        page, self._page = self._page, None
        if page is not None:
            return page
        for session_id in self._entries:
            return self._entries.pop(session_id)
        return None

    def pump(self, now_s: float, link: Sender) -> None:
        """Join when it is time, and when what was dropped can be had again."""
        super().pump(now_s, link)
        if self.state == "joined" and self.behind and self._page is None and not self._entries:
            self._join(link)

    def _join_payload(self) -> bytes:
        return encode_json(InboxJoinPayload(self._limit))

    def _take_join(self, response: msgspec.Raw) -> None:
        self.behind = False  # a page follows

    def _take_push(self, frame: Frame) -> None:
        match frame.event:
            case "sessions":
                self._page = decode_inbox_page(frame.payload)
                self._entries.clear()
            case "session":
                self._hold(decode_inbox_entry(frame.payload))
            case _:
                pass

    def _hold(self, entry: InboxEntry) -> None:
        self._entries.pop(entry.session_id, None)
        self.behind = self.behind or len(self._entries) >= self._entries_max
        if not self.behind:
            self._entries[entry.session_id] = entry
