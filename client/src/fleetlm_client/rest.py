"""REST `/v1` for what needs no socket: sessions, pages, single appends.

Promise: the same typed errors as over the socket; TRY_AGAIN and lost connections are retried with the same key until
the deadline. Must not be done here: following a session (`session.py`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from fleetlm_client.address import Address
from fleetlm_client.backoff import Backoff
from fleetlm_client.drafts import NewMessage, fragment
from fleetlm_client.errors import NotReachable, OutcomeUnknown
from fleetlm_client.events import Ack, InboxEntry, InboxPage, Page
from fleetlm_client.frames import encode_json
from fleetlm_client.settings import Settings
from fleetlm_common.clock import Clock
from fleetlm_common.errors import ErrorBody, FleetError, Rejected, TryAgain, from_body

LIST_PAGE = 500
"""Sessions asked for at once when all are listed."""


class SessionInfo(msgspec.Struct, frozen=True):
    """A session as REST shows it."""

    session_id: str
    last_seq: int
    earliest_seq: int
    inserted_at: str = ""
    metadata: dict[str, Any] | None = None


class SessionPage(msgspec.Struct, frozen=True):
    """Some sessions in the order of their ids; the next page begins after the last of them."""

    sessions: list[SessionInfo]
    has_more: bool = False


class _Problem(msgspec.Struct, frozen=True):
    """RFC 9457 problem with FleetLM's fields."""

    code: str = ""
    reason: str = "unavailable"
    message: str = ""
    detail: str = ""
    retry_after_ms: int | None = None
    field: str | None = None
    limit: int | None = None
    last_seq: int | None = None


class Rest:
    """REST calls of one participant.

    Args:
        http: whose connections are used; stays the caller's.
        address: where.
        participant: id and kind.
        settings: deadline and backoff.
        entropy: keys and jitter.
        clock: deadlines.
    """

    def __init__(
        self,
        http: aiohttp.ClientSession,
        address: Address,
        *,
        participant: tuple[str, str],
        settings: Settings,
        entropy: random.Random,
        clock: Clock,
    ) -> None:
        self._http = http
        self._base = address.base + "/v1"
        self._headers = {"X-Participant-Id": quote(participant[0], safe=""), "X-Participant-Kind": participant[1]}
        self._settings = settings
        self._entropy = entropy
        self._clock = clock

    async def create_session(
        self, session_id: str | None = None, *, metadata: Mapping[str, Any] | None = None
    ) -> SessionInfo:
        """Make a session; the same metadata again is no error. Without an id the server chooses one.

        Raises:
            Conflict: it exists with other metadata.
        """
        asked = {"id": session_id, "metadata": None if metadata is None else dict(metadata)}
        body = encode_json({name: value for name, value in asked.items() if value is not None})
        return msgspec.json.decode(await self._request("POST", "/sessions", body=body), type=SessionInfo)

    async def session(self, session_id: str) -> SessionInfo:
        """What is known of a session.

        Raises:
            NotFound: nobody ever wrote to it.
        """
        return msgspec.json.decode(await self._request("GET", _path(session_id)), type=SessionInfo)

    async def sessions(
        self, *, after: str = "", limit: int = LIST_PAGE, participant_id: str | None = None
    ) -> SessionPage:
        """One page of sessions.

        Args:
            after: the last id of the page before.
            limit: how many.
            participant_id: only those of this participant.
        """
        query = {"limit": str(limit)}
        if after:
            query["after"] = after
        if participant_id is not None:
            query["participant_id"] = participant_id
        return msgspec.json.decode(await self._request("GET", "/sessions", query=query), type=SessionPage)

    async def all_sessions(self) -> AsyncIterator[SessionInfo]:
        """Every session, page by page."""
        after = ""
        while True:
            page = await self.sessions(after=after)
            for session in page.sessions:
                yield session
            if not page.has_more or not page.sessions:
                return
            after = page.sessions[-1].session_id

    async def inbox_page(self, *, after: str | None = None, limit: int | None = None) -> InboxPage:
        """A page of this participant's inbox.

        Args:
            after: `next` of the page before.
            limit: how many.

        Raises:
            NotFound: the ring has no archive, which inboxes are answered from.
        """
        asked = {"after": after, "limit": None if limit is None else str(limit)}
        query = {name: value for name, value in asked.items() if value is not None}
        path = f"/participants/{self._headers['X-Participant-Id']}/inbox"
        return msgspec.json.decode(await self._request("GET", path, query=query), type=InboxPage)

    async def inbox(self) -> AsyncIterator[InboxEntry]:
        """Every session of this participant's inbox, page by page; one that becomes active meanwhile may come twice."""
        page = await self.inbox_page()
        while True:
            for entry in page.sessions:
                yield entry
            if page.next is None:
                return
            page = await self.inbox_page(after=page.next)

    async def messages(
        self,
        session_id: str,
        *,
        after: int | None = None,
        before: int | None = None,
        tail: int | None = None,
        limit: int | None = None,
    ) -> Page:
        """One page of messages, ascending; at most one of `after`, `before` and `tail` is given."""
        asked = {"after": after, "before": before, "tail": tail, "limit": limit}
        query = {name: str(value) for name, value in asked.items() if value is not None}
        return msgspec.json.decode(await self._request("GET", _path(session_id, "/messages"), query=query), type=Page)

    async def append(self, session_id: str, message: NewMessage, *, expected_seq: int | None = None) -> Ack:
        """Append one message; repeated with its key until it is acknowledged.

        Raises:
            Rejected: was not and will not be appended.
            OutcomeUnknown: not answered in time.
        """
        made = fragment(message, now_ms=self._clock.now_ms(), entropy=self._entropy)
        expected = b"" if expected_seq is None else b',"expected_seq":%d' % expected_seq
        try:
            answer = await self._request(
                "POST",
                _path(session_id, "/messages"),
                body=made.body[:-1] + expected + b"}",
                deadline_s=self._settings.append_deadline_s,
            )
        except (TryAgain, NotReachable) as error:
            raise OutcomeUnknown(keys=(made.key,), last_error=error) from error
        return msgspec.json.decode(answer, type=Ack)

    async def limits(self) -> dict[str, int]:
        """The server's limits by name."""
        return msgspec.json.decode(await self._request("GET", "/limits"), type=dict[str, int])

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: bytes | None = None,
        deadline_s: float | None = None,
    ) -> bytes:
        """Ask until there is an answer that is not TRY_AGAIN, or the deadline passes (then the last failure raises)."""
        settings = self._settings
        backoff = Backoff(base_s=settings.backoff_base_s, cap_s=settings.backoff_cap_s, entropy=self._entropy)
        end_s = self._clock.monotonic_s() + (settings.call_deadline_s if deadline_s is None else deadline_s)
        while True:
            left_s = end_s - self._clock.monotonic_s()
            try:
                return await self._once(method, path, query=query, body=body, timeout_s=max(0.001, left_s))
            except TryAgain as error:
                failure: FleetError = error
                wait_s = backoff.next_s(error.retry_after_ms / 1000)
            except NotReachable as error:
                failure = error
                wait_s = backoff.next_s()
            if self._clock.monotonic_s() + wait_s >= end_s:
                raise failure
            await asyncio.sleep(wait_s)

    async def _once(
        self, method: str, path: str, *, query: Mapping[str, str] | None, body: bytes | None, timeout_s: float
    ) -> bytes:
        headers = self._headers if body is None else {**self._headers, "Content-Type": "application/json"}
        url = URL(self._base + path, encoded=True)
        try:
            async with self._http.request(
                method,
                url.with_query(query) if query else url,
                data=body,
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=timeout_s),
            ) as response:
                answer = await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise NotReachable(f"{self._base} cannot be reached: {str(error) or type(error).__name__}") from error
        if response.status < 400:
            return answer
        raise _refusal(response.status, answer)


def _refusal(status: int, answer: bytes) -> FleetError:
    """The typed error of an answer, also of one that some proxy gave."""
    try:
        problem = msgspec.json.decode(answer, type=_Problem)
    except msgspec.DecodeError:
        problem = _Problem()
    message = problem.message or problem.detail or f"the server answered {status}"
    if not problem.code:
        if status >= 500 or status == 429:
            return TryAgain(message, reason="unavailable")
        return Rejected(message, reason=f"http_{status}")
    return from_body(
        ErrorBody(
            problem.code,
            problem.reason,
            message,
            retry_after_ms=problem.retry_after_ms,
            field=problem.field,
            limit=problem.limit,
            last_seq=problem.last_seq,
        )
    )


def _path(session_id: str, suffix: str = "") -> str:
    return f"/sessions/{quote(session_id, safe='')}{suffix}"
