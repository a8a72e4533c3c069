"""A process to supervise: an operations port, a journal of what happened to it, and the bad manners that a test wants.

Runs as a script with the standard library only, so that it starts quickly. Environment: FAKE_NAME, FAKE_PORT,
FAKE_JOURNAL (a file that gets a line `NAME EVENT PID` each time), FAKE_MANNERS (a file whose words say how to be):

    die        end with status 7 before being ready        unready    never become ready
    refuse     end with status 78                          deaf       ignore SIGTERM
    slow       take a moment to end after SIGTERM          noisy      log a warning, an info and a plain line
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType

NAME = os.environ.get("FAKE_NAME", "")
SLOW_S = 0.3


def journal(event: str) -> None:
    """One line in one write: several processes share the file."""
    descriptor = os.open(os.environ["FAKE_JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, f"{NAME} {event} {os.getpid()}\n".encode())
    os.close(descriptor)


class Ops(http.server.BaseHTTPRequestHandler):
    """`/health/ready`."""

    ready = True

    def do_GET(self) -> None:  # the name is the standard library's
        """Answer as a component does."""
        body = json.dumps({"ok": self.ready, "reason": "Ready" if self.ready else "Sulking", "message": "so it is"})
        self.send_response(200 if self.ready else 503)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name is the standard library's
        """Say nothing."""


def main() -> None:
    """Live as told."""
    manners = set(Path(os.environ["FAKE_MANNERS"]).read_text().split())
    journal("start")
    if "noisy" in manners:
        lines = [{"level": level, "event": f"{level}_event", "at": "now", "n": 1} for level in ("warning", "info")]
        sys.stderr.write("".join(json.dumps(line) + "\n" for line in lines) + "a plain line\n")
    for word, status in (("die", 7), ("refuse", 78)):
        if word in manners:
            sys.stderr.write(f"I {word} because of the test\n")
            sys.exit(status)
    Ops.ready = "unready" not in manners
    server = http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["FAKE_PORT"])), Ops)
    ended = threading.Event()

    def end(number: int, frame: FrameType | None) -> None:
        journal("term")
        if "deaf" not in manners:
            ended.set()

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    ended.wait()
    if "slow" in manners:
        threading.Event().wait(SLOW_S)
    journal("end")


if __name__ == "__main__":
    main()
