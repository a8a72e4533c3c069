"""What a FleetLM gateway says to a client, in memory: a small independent model of design §5, with faults on demand.

Promise: an honest server as far as the contract goes (one answer a ref, replies before pushes, dedupe before
`expected_seq`, batches all or nothing); whatever it does wrong was asked for by a test through `fault`.
Must not be done here: sockets (`phoenix_server.py`), judging the client.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Fault = Literal["none", "silence", "try_again", "try_again_done", "answer_lost", "invalid"]
"""`silence`: nothing happens; `try_again`: refused; `try_again_done`: refused although done; `answer_lost`: done, and
the answer never sent; `invalid`: refused for good."""

REPLAY_PAGE = 50
INBOX_LIMIT_MAX = 100


@dataclass(slots=True)
class Log:
    """One session."""

    messages: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    keys: dict[str, int] = field(default_factory=dict[str, int])
    earliest_seq: int = 1
    read_seq: int = 0
    frames: int = 0

    @property
    def last_seq(self) -> int:
        """Seq of the newest message."""
        return len(self.messages)


class Model:
    """Sessions by id, and the sockets that are open."""

    def __init__(self) -> None:
        self.logs: dict[str, Log] = {}
        self.sockets: list[ModelSocket] = []
        self.explains_gaps = True
        self.archived = True

    def log(self, session_id: str) -> Log:
        """A session; made when it is named."""
        return self.logs.setdefault(session_id, Log())

    def add(self, session_id: str, contents: list[Any], *, sender: str = "server") -> None:
        """Append on behalf of somebody else."""
        drafts = [{"content": content} for content in contents]
        self.append(session_id, drafts, sender=sender, expected_seq=None)

    def trim(self, session_id: str, earliest_seq: int) -> None:
        """Forget what lies below."""
        self.log(session_id).earliest_seq = earliest_seq

    def mark_read(self, session_id: str, seq: int) -> None:
        """Every inbox's participant has read up to `seq`."""
        self.log(session_id).read_seq = seq
        self._push_inboxes(session_id)

    def _push_inboxes(self, session_id: str) -> None:
        for socket in self.sockets:
            socket.push_inbox("session", self.inbox_entry(session_id))

    def append(
        self, session_id: str, drafts: list[dict[str, Any]], *, sender: str, expected_seq: int | None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Acks, or an error body."""
        log = self.log(session_id)
        keys = [str(draft.get("idempotency_key") or f"made-{log.last_seq + at}") for at, draft in enumerate(drafts)]
        known = [log.keys.get(key) for key in keys]
        for seq, draft in zip(known, drafts, strict=True):
            if seq is not None and log.messages[seq - 1]["content"] != draft["content"]:
                return {"code": "IDEMPOTENCY_CONFLICT", "reason": "key_reused", "message": "the key was used"}
        if any(seq is None for seq in known) and any(seq is not None for seq in known):
            return {"code": "INVALID", "reason": "mixed", "message": "a batch was sent again with other messages"}
        if known[0] is None and expected_seq is not None and expected_seq != log.last_seq:
            return {"code": "CONFLICT", "reason": "expected_seq", "message": "no", "last_seq": log.last_seq}
        log.frames += 1
        deduped = known[0] is not None
        first = log.last_seq + 1
        if not deduped:
            for key, draft in zip(keys, drafts, strict=True):
                self._store(session_id, key, draft, sender)
            for socket in self.sockets:
                socket.push_live(session_id, log.messages[first - 1 :])
            self._push_inboxes(session_id)
        return [
            {"seq": seq, "id": f"id-{seq}", "inserted_at": "2026-01-01T00:00:00Z", "deduped": deduped}
            for seq in (log.keys[key] for key in keys)
        ]

    def _store(self, session_id: str, key: str, draft: dict[str, Any], sender: str) -> None:
        log = self.log(session_id)
        seq = log.last_seq + 1
        log.keys[key] = seq
        log.messages.append(
            {
                "id": f"id-{seq}",
                "session_id": session_id,
                "seq": seq,
                "sender_id": sender,
                "sender_kind": "human",
                "kind": draft.get("kind", "message"),
                "content": draft["content"],
                "metadata": draft.get("metadata"),
                "inserted_at": "2026-01-01T00:00:00Z",
            }
        )

    def page(self, session_id: str, after: int, limit: int) -> dict[str, Any]:
        """Answer to `replay {after}`."""
        log = self.log(session_id)
        first = max(after + 1, log.earliest_seq)
        messages = log.messages[first - 1 : first - 1 + limit]
        page: dict[str, Any] = {"messages": messages, "has_more": first - 1 + len(messages) < log.last_seq}
        if first > after + 1 and self.explains_gaps:
            page["gap"] = gap_body(log, after + 1)
        return page

    def inbox_entry(self, session_id: str) -> dict[str, Any]:
        """A session as inboxes show it: to the model everybody takes part, and others wrote all of it."""
        log = self.log(session_id)
        return {
            "session_id": session_id,
            "last_seq": log.last_seq,
            "last_read_seq": log.read_seq,
            "unread": log.last_seq - log.read_seq,
            "unread_more": False,
            "active_at": "2026-01-01T00:00:00Z",
            "inserted_at": "2026-01-01T00:00:00Z",
            "metadata": {},
        }

    def inbox(self, *, after: str = "", limit: int) -> dict[str, Any]:
        """A page of an inbox, by name: the model has no time."""
        names = sorted(name for name in self.logs if name > after)
        following = names[limit - 1] if len(names) > limit else None
        return {"sessions": [self.inbox_entry(name) for name in names[:limit]], "next": following}


def gap_body(log: Log, from_seq: int) -> dict[str, Any]:
    """A gap from `from_seq` to the earliest."""
    return {
        "reason": "trimmed",
        "from_seq": from_seq,
        "next_seq": log.earliest_seq,
        "earliest_seq": log.earliest_seq,
        "last_seq": log.last_seq,
    }


def _no_fault(event: str) -> Fault:
    return "none"


class ModelSocket:
    """One client's socket at the server.

    Args:
        model: the sessions.
        participant: who opened it.
        fault: asked with the event's name for each request.
    """

    def __init__(
        self, model: Model, *, participant: str = "alice", fault: Callable[[str], Fault] | None = None
    ) -> None:
        self.out: deque[str] = deque()
        self.received: list[list[Any]] = []
        self.joins: dict[str, tuple[str, int]] = {}
        self.inbox_ref: str | None = None
        self._model = model
        self._participant = participant
        self._fault = fault or _no_fault
        model.sockets.append(self)

    def close(self) -> None:
        """The connection is gone."""
        if self in self._model.sockets:
            self._model.sockets.remove(self)
        self.out.clear()

    def receive(self, text: str) -> None:
        """A frame of the client."""
        frame = json.loads(text)
        self.received.append(frame)
        _, ref, topic, event, payload = frame
        if event == "heartbeat":
            self._ok(frame, {})
            return
        fault = self._fault(event)
        if fault == "silence":
            return
        if fault in {"try_again", "invalid"}:
            self._refuse(frame, fault)
            return
        if topic.startswith("inbox:"):
            self._on_inbox(frame)
            return
        answer = self._do(topic.removeprefix("session:"), event, payload, ref)
        if fault == "try_again_done":
            self._refuse(frame, "try_again")
        elif fault != "answer_lost":
            is_error = "code" in answer
            self.emit(frame[0], ref, topic, "phx_reply", {"status": "error" if is_error else "ok", "response": answer})
            if event == "phx_join" and not is_error:
                self._after_join(topic.removeprefix("session:"), payload)

    def _on_inbox(self, frame: list[Any]) -> None:
        _, ref, topic, event, payload = frame
        answer: dict[str, Any] = {}
        if event == "phx_leave":
            self.inbox_ref = None
        elif topic != f"inbox:{self._participant}":
            answer = {"code": "FORBIDDEN", "reason": "forbidden", "message": "its own inbox only", "field": "topic"}
        elif payload.get("limit", 1) > INBOX_LIMIT_MAX:
            answer = {"code": "INVALID", "reason": "invalid", "message": "1 to 100", "field": "limit"}
        elif not self._model.archived:
            answer = {"code": "NOT_FOUND", "reason": "no_archive", "message": "this ring has no archive"}
        else:
            self.inbox_ref, answer = ref, {"participant_id": self._participant}
        status = "error" if "code" in answer else "ok"
        self.emit(frame[0], ref, topic, "phx_reply", {"status": status, "response": answer})
        if event == "phx_join" and status == "ok":
            self.push_inbox("sessions", self._model.inbox(limit=payload.get("limit", INBOX_LIMIT_MAX)))

    def push_inbox(self, event: str, payload: dict[str, Any]) -> None:
        """Push to the inbox of this socket if it is joined."""
        if self.inbox_ref is not None:
            self.emit(self.inbox_ref, None, f"inbox:{self._participant}", event, payload)

    def _do(self, session_id: str, event: str, payload: dict[str, Any], ref: str) -> dict[str, Any]:
        log = self._model.log(session_id)
        match event:
            case "phx_join":
                if payload.get("cursor", 0) > log.last_seq:
                    return {
                        "code": "INVALID",
                        "reason": "cursor_ahead",
                        "message": "cursor is ahead",
                        "field": "cursor",
                        "last_seq": log.last_seq,
                    }
                self.joins.pop(session_id, None)
                self._join_ref = ref
                return {
                    "session_id": session_id, "epoch": 1, "last_seq": log.last_seq, "earliest_seq": log.earliest_seq,
                }  # fmt: skip
            case "append":
                drafts = payload.get("messages", [payload])
                acks = self._model.append(
                    session_id, drafts, sender=self._participant, expected_seq=payload.get("expected_seq")
                )
                if isinstance(acks, dict):
                    return acks
                return {"messages": acks} if "messages" in payload else acks[0]
            case "replay":
                return self._model.page(session_id, payload.get("after", 0), payload.get("limit", 100))
            case "mark_read":
                return {"last_read_seq": payload["seq"]}
            case "phx_leave":
                self.joins.pop(session_id, None)
                return {}
            case _:
                return {"code": "INVALID", "reason": "unknown_event", "message": event, "field": "event"}

    def _after_join(self, session_id: str, payload: dict[str, Any]) -> None:
        log = self._model.log(session_id)
        last_seq = log.last_seq
        cursor = payload.get("cursor", last_seq)
        if "tail" in payload:
            cursor = max(log.earliest_seq - 1, last_seq - payload["tail"])
        self.joins[session_id] = (self._join_ref, cursor)
        if cursor + 1 < log.earliest_seq and cursor < last_seq:
            self._push(session_id, "gap", gap_body(log, cursor + 1))
            cursor = log.earliest_seq - 1
        while cursor < last_seq:
            page = log.messages[cursor : min(last_seq, cursor + REPLAY_PAGE)]
            self._push(session_id, "messages", {"messages": page})
            cursor += len(page)
        self._push(session_id, "caught_up", {"seq": cursor})

    def push_live(self, session_id: str, messages: list[dict[str, Any]]) -> None:
        """Publish to this socket if it has joined."""
        if session_id in self.joins:
            self._push(session_id, "messages", {"messages": messages})

    def push(self, session_id: str, event: str, payload: dict[str, Any]) -> None:
        """Push anything a test likes."""
        self._push(session_id, event, payload)

    def _push(self, session_id: str, event: str, payload: dict[str, Any]) -> None:
        self.emit(self.joins[session_id][0], None, f"session:{session_id}", event, payload)

    def _ok(self, frame: list[Any], response: dict[str, Any]) -> None:
        self.emit(frame[0], frame[1], frame[2], "phx_reply", {"status": "ok", "response": response})

    def _refuse(self, frame: list[Any], fault: str) -> None:
        body: dict[str, Any] = {
            "code": "TRY_AGAIN",
            "reason": "unavailable",
            "message": "not now",
            "retry_after_ms": 50,
        }
        if fault == "invalid":
            body = {"code": "INVALID", "reason": "invalid", "message": "no", "field": "content"}
        self.emit(frame[0], frame[1], frame[2], "phx_reply", {"status": "error", "response": body})

    def emit(self, join_ref: str | None, ref: str | None, topic: str, event: str, payload: dict[str, Any]) -> None:
        """Queue a frame to the client."""
        self.out.append(json.dumps([join_ref, ref, topic, event, payload]))
