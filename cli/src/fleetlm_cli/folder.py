"""The folder of one `fleetlm up`: taken by a lock, made private, checked before anything is written.

    control/     spec, ring map, announcements, status      up.lock    held by the running `up`; its pid
    shard-<n>/   one volume each                            up.json    only while it runs
    logs/        one file a process                         ports.json, credential

Promise: one `up` a folder; a folder that is somebody else's is not touched; errors are words about the folder.
Must not be done here: anything inside `control/` (filecontrol) or a volume (the shard).
"""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fleetlm_cli import upfile
from fleetlm_cli.exits import Exit, Failure

FOLDER_MODE: Final = 0o700
FILE_MODE: Final = 0o600
LOCK_FILE: Final = "up.lock"
CREDENTIAL_BYTES: Final = 32
OLD_CHILDREN_WAIT_S: Final = 5.0
"""Children of a killed `up` are killed by the kernel in the same moment; they need that long only when it swaps."""
_POLL_S: Final = 0.02


@contextmanager
def held(folder: Path) -> Generator[None]:
    """Make `folder` if need be and hold it; nobody else runs on it meanwhile.

    Raises:
        Failure: another `up` holds it, it is not FleetLM's, or it cannot be written.
    """
    _refuse_foreign(folder)
    try:
        folder.mkdir(mode=FOLDER_MODE, parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, FILE_MODE)
    except OSError as error:
        raise unusable(folder, error) from error
    try:
        _lock(folder, descriptor)
        _wait_for_old_children(folder)
        yield
    finally:
        os.close(descriptor)


def _lock(folder: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
        raise Failure(
            f"another `fleetlm up` (pid {holder}) runs on {folder}; stop it, or choose another folder with --data"
        ) from error
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except OSError as error:
        raise unusable(folder, error) from error


def _refuse_foreign(folder: Path) -> None:
    """A folder with files in it that are not ours was meant to be another one."""
    try:
        names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set[str]()
    except OSError as error:
        raise unusable(folder, error) from error
    if names and not names & {"control", LOCK_FILE}:
        raise Failure(
            f"{folder} holds other files and no FleetLM ring; choose an empty or a new folder with --data",
            status=Exit.USAGE,
        )


def _wait_for_old_children(folder: Path) -> None:
    """An `up.json` here was left by an `up` that was killed: its children may be dying this moment."""
    old = upfile.read(folder)
    deadline_s = time.monotonic() + OLD_CHILDREN_WAIT_S
    while old is not None and time.monotonic() < deadline_s and any(upfile.lives(it.pid) for it in old.processes):
        time.sleep(_POLL_S)
    try:
        upfile.remove(folder)
    except OSError as error:
        raise unusable(folder, error) from error


def make_credential(path: Path) -> None:
    """What gateways must present to shards: made once, read by its owner only."""
    if path.exists():
        return
    temporary = path.with_name(path.name + ".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_hex(CREDENTIAL_BYTES).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def unusable(folder: Path, error: OSError) -> Failure:
    """The file system's refusal in words."""
    return Failure(f"cannot use the folder {folder}: {error.strerror or error}; choose another one with --data")
