"""What a bench measures: a running system, or one that it starts for the purpose and ends again.

Promise: a system that was started here has ended when the context ends. Must not be done here: load.
"""

from __future__ import annotations

import asyncio
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer

from fleetlm_cli import upfile
from fleetlm_cli.benchload import BenchError
from fleetlm_cli.benchwire import WireError
from fleetlm_cli.exits import Exit, Failure
from fleetlm_cli.upfile import Up
from fleetlm_client.address import parse

UP_TIMEOUT_S: Final = 120.0
STOP_TIMEOUT_S: Final = 30.0
T = TypeVar("T")

DataOption = Annotated[
    Path | None, typer.Option("--data", help="Folder of a running `up`; without it and --url one is started.")
]
DurationOption = Annotated[float, typer.Option(min=0.1, max=86_400, help="Seconds measured.")]
ShardsOption = Annotated[int, typer.Option(min=1, max=64, help="Shards of the `up` that is started.")]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", help="Draw a picture (PNG) there; needs the extra `fleetlm[plot]`.")
]


@dataclass(frozen=True, slots=True)
class System:
    """What is measured; `up` is None when only its address is known."""

    websocket_url: str
    up: Up | None
    folder: Path

    def processes(self, kind: str | None = None) -> list[tuple[str, int]]:
        """Names and pids (of one kind)."""
        found = () if self.up is None else self.up.processes
        return [(process.name, process.pid) for process in found if kind in {None, process.kind}]


@contextmanager
def system(*, url: str | None, data: Path | None, shards: int) -> Generator[System]:
    """The one that is named, else one for this run only.

    Raises:
        Failure: nothing runs there, or it did not come up.
    """
    if url is not None:
        yield System(parse(url).websocket, None, Path(tempfile.gettempdir()))
    elif data is not None:
        up = upfile.find(data.absolute())
        yield System(up.websocket_url, up, data.absolute())
    else:
        with tempfile.TemporaryDirectory(prefix="fleetlm-bench-") as made, own_up(Path(made), shards=shards) as up:
            yield System(up.websocket_url, up, Path(made))


def many_files() -> None:
    """Raise this process's limit of open files as far as it may be; what it starts inherits it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def loop_factory() -> Any:
    """uvloop's, if there is one."""
    if find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


@contextmanager
def own_up(folder: Path, *, shards: int, end: signal.Signals = signal.SIGTERM) -> Generator[Up]:
    """A FleetLM for this run only.

    Raises:
        Failure: it did not come up; with what it printed.
    """
    data = folder / "ring"
    output = folder / "up.out"
    command = [
        sys.executable,
        "-m",
        "fleetlm_cli.main",
        "up",
        "--data",
        str(data),
        "--port",
        "0",
        "--shards",
        str(shards),
        "--archive",
        "none",
    ]
    with output.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)  # noqa: S603 - our own
    try:
        end_s = time.monotonic() + UP_TIMEOUT_S
        # An `up` that was killed left its file behind: only the word of this one counts.
        while (up := upfile.read(data)) is None or up.pid != process.pid:
            if process.poll() is not None or time.monotonic() > end_s:
                raise Failure(f"`fleetlm up` did not come up:\n{output.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        yield up
    finally:
        process.send_signal(end)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def run(address: str, work: Coroutine[Any, Any, T]) -> T:
    """Run a bench's work to its end, on uvloop if there is one.

    Raises:
        Failure: the load could not be put on.
        typer.Exit: Ctrl-C.
    """
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(work)
    except (BenchError, WireError) as error:
        raise Failure(f"bench: {error}") from error
    except OSError as error:
        raise Failure(f"{address} cannot be reached: {error.strerror or error}", status=Exit.NOT_RUNNING) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(Exit.INTERRUPTED) from error
