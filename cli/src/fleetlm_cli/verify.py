"""`fleetlm verify DIR`: check log files offline, one volume or every volume of an `up`.

Promise: reads only; each volume is reported, also when one of them cannot be read; status 6 when anything is wrong.
Must not be done here: the checks (`fleetlm_shard.verify`), repairs (only the owner repairs, when it boots).
"""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fleetlm_cli.exits import Exit, Failure
from fleetlm_cli.show import Printer, printable
from fleetlm_cli.target import JsonOption
from fleetlm_shard.verify import VerifyReport
from fleetlm_shard.verify import verify as verify_volume

_SHARD_FOLDER: Final = re.compile(r"shard-(\d+)")
_PROBLEMS_SHOWN_MAX: Final = 20
"""Of each volume, for people; `--json` has them all."""


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A shard's volume, or the folder of an `up`.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Check log files: every checksum, every sequence."""
    printer = Printer(as_json=as_json)
    reports: list[VerifyReport] = []
    for volume in volumes(folder):
        report = _verified(volume, quiet=as_json)
        reports.append(report)
        if as_json:
            printer.record({**asdict(report), "ok": report.ok})
        else:
            _show(printer, report)
    if not all(report.ok for report in reports):
        raise typer.Exit(Exit.DAMAGED)


def volumes(folder: Path) -> list[Path]:
    """The volumes in `folder`: itself, or its `shard-<n>`.

    Raises:
        Failure: there is none.
    """
    if (folder / "identity").exists() or (folder / "log").is_dir():
        return [folder]
    try:
        found = [(int(match[1]), entry) for entry in folder.iterdir() if (match := _SHARD_FOLDER.fullmatch(entry.name))]
    except OSError as error:
        raise Failure(f"{folder} cannot be read: {error.strerror}", status=Exit.USAGE) from error
    if not found:
        raise Failure(
            f"{folder} holds no volume: name a shard's folder (with `identity` and `log`) or the folder of an `up`",
            status=Exit.USAGE,
        )
    return [entry for _, entry in sorted(found)]


def _verified(volume: Path, *, quiet: bool) -> VerifyReport:
    """Check one volume, with a bar on a terminal.

    Raises:
        Failure: the folder cannot be read.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("segments"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(printable(str(volume)), total=None)
        try:
            return verify_volume(volume, progress=lambda done, total: bar.update(task, completed=done, total=total))
        except OSError as error:
            raise Failure(f"{error.filename or volume} cannot be read: {error.strerror}") from error


def _show(printer: Printer, report: VerifyReport) -> None:
    state = "ok" if report.ok else f"{len(report.problems)} problems"
    printer.line(
        f"{printable(report.folder)}: {state}; {report.messages} messages in {report.sessions} sessions,"
        f" {report.segments} segments, {report.checked_bytes} bytes checked"
    )
    if report.owner_alive:
        printer.line("  a process runs on it: its newest segment was left out (stop it to check everything)")
    if report.strays:
        printer.line(f"  {len(report.strays)} files are not part of the log (left as they are): {report.strays[0]} …")
    for problem in report.problems[:_PROBLEMS_SHOWN_MAX]:
        printer.line(f"  {printable(problem.path)}: {printable(problem.what)}")
    if len(report.problems) > _PROBLEMS_SHOWN_MAX:
        printer.line(f"  … and {len(report.problems) - _PROBLEMS_SHOWN_MAX} more (all with --json)")
