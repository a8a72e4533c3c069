"""What client commands print: lines for people, JSON lines for programs.

Promise: nothing that somebody else wrote reaches a terminal unescaped (a message may hold control sequences); each line
is flushed, so that a pipe sees it at once. Must not be done here: asking the system.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from fleetlm_client import Ack, CaughtUp, Draining, Event, Gap, InboxEntry, Message, ReadCursor, SessionInfo

_SENDER_STYLES = {"human": "bold cyan", "agent": "bold magenta", "system": "bold yellow"}


def printable(text: str) -> str:
    """`text` with everything that a terminal would obey escaped."""
    return "".join(char if char.isprintable() or char == "\t" else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return json.dumps(char)[1:-1] if ord(char) != 0x7F else "\\u007f"


def content_text(content: Any) -> str:
    """A message's content in one line: the text alone when it is only that."""
    if isinstance(content, dict) and set(content) == {"text"} and isinstance(content["text"], str):
        return printable(content["text"])
    return printable(msgspec.json.encode(content).decode())


def unread_text(entry: InboxEntry) -> str:
    """How many messages are unread; `1000+`: that many were counted, and there is more."""
    return f"{entry.unread}+" if entry.unread_more else str(entry.unread)


class Printer:
    """Writes lines to standard output.

    Args:
        as_json: JSON lines instead of lines for people.
    """

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._console = Console(highlight=False, soft_wrap=True)
        self._styled = sys.stdout.isatty() and not as_json

    def line(self, text: str | Text) -> None:
        """One line for people."""
        if self._styled:
            self._console.print(text)
        else:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()

    def record(self, values: dict[str, Any]) -> None:
        """One JSON line."""
        sys.stdout.write(msgspec.json.encode(values).decode() + "\n")
        sys.stdout.flush()

    def ack(self, session: str, ack: Ack) -> None:
        """A message is on disk."""
        if self._as_json:
            self.record({"session_id": session, **msgspec.to_builtins(ack)})
            return
        again = " (was appended before with this key)" if ack.deduped else ""
        self.line(f"{printable(session)} #{ack.seq}{again}")

    def session(self, session: SessionInfo) -> None:
        """A session; four columns parted by tabs when it is not JSON."""
        if self._as_json:
            self.record(msgspec.to_builtins(session))
            return
        columns = (printable(session.session_id), session.last_seq, session.earliest_seq, session.inserted_at)
        self.line("\t".join(map(str, columns)))

    def entry(self, entry: InboxEntry) -> None:
        """A session of an inbox; four columns parted by tabs when it is not JSON."""
        if self._as_json:
            self.record(msgspec.to_builtins(entry))
            return
        columns = (printable(entry.session_id), unread_text(entry), entry.last_seq, entry.active_at)
        self.line("\t".join(map(str, columns)))

    def event(self, event: Event) -> None:
        """What a reader got."""
        if self._as_json:
            self.record({"event": _name(event), **msgspec.to_builtins(event)})
            return
        text = _text(event)
        if text is not None:
            self.line(text)


def _name(event: Event) -> str:
    """`caught_up` for `CaughtUp`."""
    name = type(event).__name__
    return "".join(f"_{char.lower()}" if char.isupper() else char for char in name).removeprefix("_")


def _text(event: Event) -> Text | None:
    """A line for people; None for what only programs want to know."""
    match event:
        case Message():
            sender = Text(printable(event.sender_id), style=_SENDER_STYLES.get(event.sender_kind, "bold"))
            kind = "" if event.kind == "message" else f" [{printable(event.kind)}]"
            return Text.assemble((f"{event.seq:>6}  ", "dim"), sender, (kind, "dim"), ": ", content_text(event.content))
        case Gap():
            first, last = event.from_seq, event.next_seq - 1
            missing = f"message {first}" if first == last else f"messages {first}–{last}"
            return Text(f"  !!!   gap: {missing} cannot be had ({printable(event.reason)})", style="bold red")
        case ReadCursor():
            return Text(f"        {printable(event.participant_id)} has read up to {event.last_read_seq}", style="dim")
        case CaughtUp() | Draining():
            return None
        case _:
            return Text("        connected again", style="dim")
