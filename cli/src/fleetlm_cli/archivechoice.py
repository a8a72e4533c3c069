"""Which archive an `up` has: none, a PostgreSQL of its own, or one that somebody else runs; remembered in its folder.

    DIR/archive.json   what was chosen     DIR/archive-url   the URL that shards read (0600)     DIR/postgres   its data

Promise: an archive that was chosen once stays until another is; a password never stands in a command line. Must not be
done here: starting PostgreSQL (`archivechild.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from urllib.parse import parse_qs, urlsplit

import msgspec

from fleetlm_cli.exits import Exit, Failure
from fleetlm_cli.folder import FILE_MODE, unusable
from fleetlm_cli.postgres import Postgres

CHOICE_FILE: Final = "archive.json"
URL_FILE: Final = "archive-url"
POSTGRES_FOLDER: Final = "postgres"
ARCHIVE_HELP: Final = (
    "embedded: a PostgreSQL of its own; none; file:/PATH: a file with the URL of yours; or a URL without a password. "
    "Without it as last time, at first embedded."
)


class ArchiveChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `up` archives to; `url_file` is what shards are told ("": nothing)."""

    kind: Literal["none", "embedded", "file"] = "none"
    url_file: str = ""


@dataclass(frozen=True)
class Wanted:
    """An option `--archive`, read: its kind, and the path or the URL that stood in it."""

    kind: Literal["none", "embedded", "file", "url"]
    value: str = ""


def parse(option: str) -> Wanted:
    """Read the option; nothing is written.

    Raises:
        Failure: it is none of those, a file that cannot be read, or a URL with a password.
    """
    if option == "none":
        return Wanted("none")
    if option == "embedded":
        return Wanted("embedded")
    if option.startswith("file:/"):
        path = option.removeprefix("file:")
        if not os.access(path, os.R_OK):
            raise Failure(f"--archive: {path} cannot be read", status=Exit.USAGE)
        return Wanted("file", path)
    try:
        parts = urlsplit(option)
    except ValueError as error:
        raise Failure(f"--archive {option}: {error}", status=Exit.USAGE) from error
    if parts.scheme not in ("postgresql", "postgres"):
        raise Failure(f"--archive {option}: must be embedded, none, file:/PATH or postgresql://…", status=Exit.USAGE)
    if parts.password is not None or "password" in parse_qs(parts.query):
        raise Failure(
            "--archive: a password does not belong into a command line; put the URL into a file and say file:/PATH",
            status=Exit.USAGE,
        )
    return Wanted("url", option)


def choose(folder: Path, wanted: Wanted | None) -> ArchiveChoice:
    """The archive of the `up` in `folder`: what is wanted now, else what was last time, else `embedded`; remembered.

    Raises:
        Failure: the folder cannot be used, or what it remembers.
    """
    try:
        if wanted is not None:
            chosen = _chosen(folder, wanted)
        elif (last := remembered(folder)) is not None:
            chosen = last
        else:
            chosen = _chosen(folder, Wanted("embedded"))
        if chosen.kind == "embedded":
            server = Postgres(folder / POSTGRES_FOLDER, log=folder / "logs" / "postgres.log")
            _write(folder / URL_FILE, server.dsn.encode() + b"\n")
        _write(folder / CHOICE_FILE, msgspec.json.encode(chosen) + b"\n")
    except OSError as error:
        raise unusable(folder, error) from error
    return chosen


def remembered(folder: Path) -> ArchiveChoice | None:
    """What the `up` in `folder` archives to; None: there has been no `up`.

    Raises:
        Failure: it cannot be read.
    """
    path = folder / CHOICE_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=ArchiveChoice)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unusable(folder, error) from error
    except msgspec.MsgspecError as error:
        raise Failure(f"{path} is damaged ({error}); say --archive anew") from error


def shown(chosen: ArchiveChoice) -> str:
    """For people."""
    match chosen.kind:
        case "none":
            return "none"
        case "embedded":
            return "a PostgreSQL of its own, on this machine"
        case "file":
            return f"the PostgreSQL whose URL stands in {chosen.url_file}"


def _chosen(folder: Path, wanted: Wanted) -> ArchiveChoice:
    own = str(folder / URL_FILE)
    match wanted.kind:
        case "none":
            return ArchiveChoice()
        case "embedded":
            return ArchiveChoice("embedded", own)
        case "file":
            return ArchiveChoice("file", wanted.value)
        case "url":
            _write(folder / URL_FILE, wanted.value.encode() + b"\n")
            return ArchiveChoice("file", own)


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
