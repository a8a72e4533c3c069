"""`DIR/up.json`: what a running `fleetlm up` says of itself, for other commands, scripts and tests.

Promise: the file is replaced whole; it names ports and pids, never a secret; a clean end removes it. After an end that
was not clean the file may remain: `find` asks whether its writer still lives.
Must not be done here: starting or stopping anything.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

import msgspec

from fleetlm_cli.exits import Exit, Failure

UP_FILE: Final = "up.json"
ProcessKind = Literal["gateway", "shard", "controller", "archive"]


class UpProcess(msgspec.Struct, frozen=True, omit_defaults=True):
    """One child of `up`: gateways have a `url`, shards a `data` folder."""

    name: str
    kind: ProcessKind
    pid: int
    url: str | None = None
    ops_url: str | None = None
    data: str | None = None


class Up(msgspec.Struct, frozen=True):
    """A running `up`; `url` is gateway-0's."""

    pid: int
    url: str
    websocket_url: str
    processes: tuple[UpProcess, ...]

    def process(self, name: str) -> UpProcess:
        """The child of that name.

        Raises:
            KeyError: there is none.
        """
        for process in self.processes:
            if process.name == name:
                return process
        raise KeyError(name)


def write(folder: Path, up: Up) -> None:
    """Replace the file; whoever reads finds the old one or the new one."""
    temporary = folder / f"{UP_FILE}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(up), indent=1) + b"\n")
    temporary.replace(folder / UP_FILE)


def remove(folder: Path) -> None:
    """Remove the file (nobody runs here any more)."""
    (folder / UP_FILE).unlink(missing_ok=True)


def read(folder: Path) -> Up | None:
    """What the file says; None when there is none or it cannot be read."""
    try:
        return msgspec.json.decode((folder / UP_FILE).read_bytes(), type=Up)
    except (OSError, msgspec.DecodeError):
        return None


def find(folder: Path) -> Up:
    """The `up` that runs on `folder`.

    Raises:
        Failure: none does.
    """
    up = read(folder)
    if up is None or not lives(up.pid):
        raise Failure(
            f"no `fleetlm up` runs on {folder} (start one, or name a cluster with --url)", status=Exit.NOT_RUNNING
        )
    return up


def lives(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
