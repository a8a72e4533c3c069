"""`fleetlm archive`: look whether the archive has what the logs have, and delete what is old.

Promise: `verify` reads only; `prune` deletes whole weeks, after asking. The database's URL comes from a file, for
command lines can be read by others. Must not be done here: the comparison (`fleetlm_shard.archive.compare`).
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import asyncpg
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fleetlm_cli.archivechoice import remembered
from fleetlm_cli.exits import Exit, Failure
from fleetlm_cli.show import Printer, printable
from fleetlm_cli.target import DATA_DEFAULT, JsonOption
from fleetlm_cli.verify import volumes
from fleetlm_shard.archive.compare import Comparison, compare
from fleetlm_shard.archive.pruning import prune as prune_weeks
from fleetlm_shard.log_types import LogUnreadable

_SHOWN_MAX: Final = 20
_AGE: Final = re.compile(r"(\d+)([dwy])")
_DAYS: Final = {"d": 1, "w": 7, "y": 365}

archive = typer.Typer(
    no_args_is_help=True, help="The archive in PostgreSQL: compare it with the logs, delete what is old."
)

UrlFileOption = Annotated[
    Path | None,
    typer.Option(
        "--url-file",
        envvar="FLEETLM_ARCHIVE_URL_FILE",
        help="File with the database's URL.",
        show_default="what that `up` archives to",
    ),
]


@archive.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A shard's volume, or the folder of an `up`.")],
    *,
    url_file: UrlFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare each log with the archive, message by message, up to where the archive has come."""
    dsn = _dsn(url_file, folder)
    printer = Printer(as_json=as_json)
    ok = True
    for volume in volumes(folder):
        found = _compared(volume, dsn, quiet=as_json)
        ok = ok and found.ok
        if as_json:
            printer.record({**asdict(found), "ok": found.ok})
        else:
            _show(printer, found)
    if not ok:
        raise typer.Exit(Exit.DAMAGED)


@archive.command()
def prune(
    *,
    older_than: Annotated[str, typer.Option(help="For example 90d, 26w, 2y.")],
    url_file: UrlFileOption = None,
    data: Annotated[Path, typer.Option("--data", help="Folder of an `up`, without --url-file.")] = DATA_DEFAULT,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete messages of the weeks that ended longer ago; their readers get a gap."""
    matched = _AGE.fullmatch(older_than)
    if matched is None:
        raise Failure(
            f"--older-than {older_than!r} must be a number with d, w or y, for example 90d", status=Exit.USAGE
        )
    dsn = _dsn(url_file, data)
    now_us, age_us = time.time_ns() // 1000, int(matched[1]) * _DAYS[matched[2]] * 86_400_000_000
    day = f"{datetime.fromtimestamp((now_us - age_us) / 1e6, UTC):%Y-%m-%d}"
    if not yes:
        typer.confirm(f"Delete every archived week that ended before {day}?", abort=True)
    try:
        gone = asyncio.run(prune_weeks(dsn, age_us=age_us, now_us=now_us))
    except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise _away(error) from error
    typer.echo(f"deleted {len(gone)} weeks that ended before {day}")


def _dsn(url_file: Path | None, data: Path) -> str:
    """The URL in the file, else that of the `up` in `data`."""
    if url_file is None:
        chosen = remembered(data)
        if chosen is None or not chosen.url_file:
            raise Failure(f"{data} is no `up` with an archive; say --url-file", status=Exit.USAGE)
        url_file = Path(chosen.url_file)
    try:
        return url_file.read_text().strip()
    except OSError as error:
        raise Failure(f"the archive's URL: {url_file} cannot be read: {error.strerror}", status=Exit.USAGE) from error


def _away(error: Exception) -> Failure:
    return Failure(f"the archive cannot be used: {type(error).__name__}: {error}", status=Exit.NOT_RUNNING)


def _compared(volume: Path, dsn: str, *, quiet: bool) -> Comparison:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f} %"))
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(printable(str(volume)), total=None)
        try:
            return asyncio.run(
                compare(volume, dsn, progress=lambda done, total: bar.update(task, completed=done, total=total))
            )
        except LogUnreadable as error:
            return Comparison(str(volume), problem=str(error))
        except (OSError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
            raise _away(error) from error


def _show(printer: Printer, found: Comparison) -> None:
    state = "ok" if found.ok else "not ok"
    printer.line(f"{printable(found.folder)}: {state}; {found.checked} messages compared, archived up to {found.pos}")
    known = {"quarantined": found.quarantined, "in halted slots": found.halted, "pruned": found.pruned}
    for what, count in known.items():
        if count:
            printer.line(f"  {count} {what}")
    if found.problem:
        printer.line(f"  {printable(found.problem)}")
    for what, places in (("missing", found.missing), ("different", found.different)):
        for session, seq in places[:_SHOWN_MAX]:
            printer.line(f"  {what}: {printable(session)} {seq}")
        if len(places) > _SHOWN_MAX:
            printer.line(f"  … and {len(places) - _SHOWN_MAX} more {what} (all with --json)")
