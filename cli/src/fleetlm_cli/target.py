"""Which FleetLM a command talks to, as whom, and how its refusals become exit statuses.

`--url`, else `FLEETLM_URL`, else the `up` that runs on `--data`. Promise: every client command understands the same
options, and the same trouble ends in the same status with a next step in words. Must not be done here: any command.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

import fleetlm_client
from fleetlm_cli import upfile
from fleetlm_cli.exits import Exit, Failure
from fleetlm_client import Client, FleetError, NotReachable, NotSent, OutcomeUnknown, Rejected, Rest, Settings, TryAgain
from fleetlm_client.events import SenderKind

T = TypeVar("T")

UrlOption = Annotated[
    str | None,
    typer.Option("--url", envvar="FLEETLM_URL", help="A gateway, for example http://127.0.0.1:4000."),
]
DataOption = Annotated[
    Path, typer.Option("--data", help="Folder of a running `fleetlm up`, used when no URL is given.")
]
AsOption = Annotated[
    str, typer.Option("--as", envvar="FLEETLM_PARTICIPANT", help="Who speaks or reads (participant id).")
]
AsKindOption = Annotated[SenderKind, typer.Option("--as-kind", help="What speaks.")]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line, for programs.")]
DATA_DEFAULT = Path(".fleetlm")
AS_DEFAULT = "cli"


@dataclass(frozen=True, slots=True)
class Target:
    """Where, and as whom."""

    url: str
    participant_id: str
    participant_kind: SenderKind

    def client(self, settings: Settings | None = None) -> Client:
        """An SDK client; enter it."""
        return fleetlm_client.connect(
            self.url,
            participant_id=self.participant_id,
            participant_kind=self.participant_kind,
            settings=settings,
        )

    def rest(self) -> AbstractAsyncContextManager[Rest]:
        """REST without a socket; enter it."""
        return fleetlm_client.connect_rest(
            self.url, participant_id=self.participant_id, participant_kind=self.participant_kind
        )


def resolve(url: str | None, data: Path) -> str:
    """The address to use.

    Raises:
        Failure: none is given and no `up` runs on `data`.
    """
    return url or upfile.find(data.absolute()).url


def target(*, url: str | None, data: Path, participant: str = AS_DEFAULT, kind: SenderKind = "human") -> Target:
    """Where and as whom.

    Raises:
        Failure: nothing runs there.
    """
    return Target(resolve(url, data), participant, kind)


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's work to its end.

    Raises:
        Failure: what the system answered, in words, with its status.
        typer.Exit: Ctrl-C.
    """
    try:
        return asyncio.run(work)
    except FleetError as error:
        raise failure(error) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(Exit.INTERRUPTED) from error


def failure(error: FleetError) -> Failure:
    """A refusal in words: what happened, and what to do next."""
    if isinstance(error, NotReachable):
        return Failure(
            f"{error.message} (is it running? `fleetlm up` starts one here, --url names another)",
            status=Exit.NOT_RUNNING,
        )
    if isinstance(error, OutcomeUnknown):
        keys = " ".join(f"--key {key}" for key in error.keys[:1])
        return Failure(f"{error.message}; the same command with {keys} is safe to repeat", status=Exit.TRY_AGAIN)
    if isinstance(error, NotSent | TryAgain):
        return Failure(f"{error.code}: {error.message}; try again", status=Exit.TRY_AGAIN)
    if isinstance(error, Rejected):
        details = [
            f"{name} {value}" for name in ("field", "limit", "last_seq") if (value := getattr(error, name)) is not None
        ]
        told = f" ({', '.join(details)})" if details else ""
        return Failure(f"{error.code} {error.reason}: {error.message}{told}", status=Exit.REFUSED)
    return Failure(f"{error.code}: {error.message}", status=Exit.FAILED)
