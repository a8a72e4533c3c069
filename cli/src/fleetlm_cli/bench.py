"""`fleetlm bench append|e2e`: closed-loop numbers of a running system, or of one that it starts for the purpose.

    append   append → acknowledged (on disk)
    e2e      append → acknowledged and → delivered (to the writer's own socket, or to `--readers` others)

Promise: numbers come with what they were measured on and what each process used; the load generator is this process and
is listed with the others, for it shares the machine. Must not be done here: putting load on (`benchload.py`).
"""

from __future__ import annotations

import asyncio
import math
import os
import secrets
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Generator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from fleetlm_cli import benchhost, upfile
from fleetlm_cli.benchload import SIZE_BYTES_MIN, BenchError, Load, Outcome, put_on
from fleetlm_cli.benchwire import WireError
from fleetlm_cli.exits import Exit, Failure
from fleetlm_cli.show import Printer
from fleetlm_cli.target import JsonOption, UrlOption
from fleetlm_cli.upfile import Up
from fleetlm_client.address import parse
from fleetlm_common.limits import CONTENT_BYTES_MAX

UP_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 30.0

bench = typer.Typer(help="Measure: closed loop, latencies and rate.", no_args_is_help=True)

DataOption = Annotated[
    Path | None, typer.Option("--data", help="Folder of a running `up`; without it and --url one is started.")
]
ConnectionsOption = Annotated[int, typer.Option(min=1, max=10_000, help="Connections that append.")]
SessionsOption = Annotated[int, typer.Option(min=1, max=100_000, help="Sessions.")]
InFlightOption = Annotated[int, typer.Option(min=1, max=10_000, help="Unanswered appends of a connection.")]
SizeOption = Annotated[int, typer.Option(min=SIZE_BYTES_MIN, max=CONTENT_BYTES_MAX, help="Bytes of JSON content.")]
DurationOption = Annotated[float, typer.Option(min=0.1, max=86_400, help="Seconds measured.")]
WarmUpOption = Annotated[float, typer.Option(min=0, max=3_600, help="Seconds before, not measured.")]
ShardsOption = Annotated[int, typer.Option(min=1, max=64, help="Shards of the `up` that is started.")]


@bench.command()
def append(
    *,
    url: UrlOption = None,
    data: DataOption = None,
    connections: ConnectionsOption = 16,
    sessions: SessionsOption = 64,
    in_flight: InFlightOption = 16,
    size: SizeOption = 256,
    duration: DurationOption = 10.0,
    warm_up: WarmUpOption = 2.0,
    shards: ShardsOption = 3,
    as_json: JsonOption = False,
) -> None:
    """Append to acknowledged."""
    load = Load(
        connections=connections,
        sessions=sessions,
        in_flight=in_flight,
        size_bytes=size,
        duration_s=duration,
        warm_up_s=warm_up,
        readers=0,
        run_id=_run_id(),
    )
    _bench("append", load, url=url, data=data, shards=shards, as_json=as_json)


@bench.command()
def e2e(
    *,
    url: UrlOption = None,
    data: DataOption = None,
    connections: ConnectionsOption = 16,
    sessions: SessionsOption = 64,
    in_flight: InFlightOption = 16,
    readers: Annotated[
        int, typer.Option(min=0, max=1_000, help="Connections that read every session; 0: the writers read their own.")
    ] = 0,
    size: SizeOption = 256,
    duration: DurationOption = 10.0,
    warm_up: WarmUpOption = 2.0,
    shards: ShardsOption = 3,
    as_json: JsonOption = False,
) -> None:
    """Append to acknowledged and to delivered."""
    load = Load(
        connections=connections,
        sessions=sessions,
        in_flight=in_flight,
        size_bytes=size,
        duration_s=duration,
        warm_up_s=warm_up,
        readers=readers,
        run_id=_run_id(),
    )
    _bench("e2e", load, url=url, data=data, shards=shards, as_json=as_json)


def _run_id() -> str:
    """Sessions and keys of a run are its own."""
    return f"bench-{secrets.token_hex(4)}"


def _bench(name: str, load: Load, *, url: str | None, data: Path | None, shards: int, as_json: bool) -> None:
    """Find or start what is measured, measure, print."""
    if url is not None:
        report = _measured(name, load, websocket_url=parse(url).websocket, up=None, folder=Path(tempfile.gettempdir()))
    elif data is not None:
        up = upfile.find(data.absolute())
        report = _measured(name, load, websocket_url=up.websocket_url, up=up, folder=data.absolute())
    else:
        with tempfile.TemporaryDirectory(prefix="fleetlm-bench-") as folder, _own_up(Path(folder), shards) as up:
            report = _measured(name, load, websocket_url=up.websocket_url, up=up, folder=Path(folder))
    if as_json:
        Printer(as_json=True).record(report)
    else:
        _show(report)


def _measured(name: str, load: Load, *, websocket_url: str, up: Up | None, folder: Path) -> dict[str, Any]:
    """The report of one run.

    Raises:
        Failure: the load could not be put on.
    """
    processes = [("load", os.getpid())]
    if up is not None:
        processes += [(process.name, process.pid) for process in up.processes]
    origin = benchhost.provenance(folder)
    moments: list[dict[str, benchhost.Usage]] = []

    def look() -> None:
        moments.append(benchhost.usage(processes))

    async def work() -> Outcome:
        return await put_on(websocket_url, load, on_begin=look, on_end=look)

    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            outcome = runner.run(work())
    except (BenchError, WireError) as error:
        raise Failure(f"bench: {error}") from error
    except OSError as error:
        raise Failure(
            f"{websocket_url} cannot be reached: {error.strerror or error}", status=Exit.NOT_RUNNING
        ) from error
    except KeyboardInterrupt as error:
        raise typer.Exit(Exit.INTERRUPTED) from error
    return _report(name, load, outcome, origin, benchhost.spent(*moments[:2]), own_up=up is not None)


def _report(
    name: str, load: Load, outcome: Outcome, origin: dict[str, Any], used: list[dict[str, Any]], *, own_up: bool
) -> dict[str, Any]:
    seconds = outcome.measured_s
    cpu = [process["cpu_s"] for process in used]
    report: dict[str, Any] = {
        "bench": name,
        "loop": "closed",
        "load": {
            "connections": load.connections,
            "sessions": load.sessions,
            "in_flight": load.in_flight,
            "size_bytes": load.size_bytes,
            "readers": load.readers,
            "warm_up_s": load.warm_up_s,
        },
        "measured_s": round(seconds, 3),
        "acked": len(outcome.acks),
        "rate_per_s": round(len(outcome.acks) / seconds, 1),
        "ack_ms": percentiles(outcome.acks),
        "errors": dict(outcome.errors),
        "unanswered": outcome.unanswered,
        "processes": used,
        "cpu_us_per_message": (
            round(sum(cpu) * 1e6 / len(outcome.acks), 1) if outcome.acks and own_up and None not in cpu else None
        ),
        "provenance": origin,
    }
    if name == "e2e":
        report["delivered"] = len(outcome.deliveries)
        report["delivery_ms"] = percentiles(outcome.deliveries)
    return report


def percentiles(seconds: array[float]) -> dict[str, float] | None:
    """Milliseconds: the smallest value that so many percent do not exceed (nearest rank)."""
    if not seconds:
        return None
    ordered = sorted(seconds)

    def at(percent: float) -> float:
        return round(ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] * 1000, 3)

    return {"p50": at(50), "p95": at(95), "p99": at(99), "max": at(100)}


def _loop_factory() -> Any:
    """uvloop's, if there is one."""
    if find_spec("uvloop") is None:
        return None
    import uvloop

    return uvloop.new_event_loop


@contextmanager
def _own_up(folder: Path, shards: int) -> Generator[Up]:
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
    ]
    with output.open("wb") as sink:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)  # noqa: S603 - our own
    try:
        end_s = time.monotonic() + UP_TIMEOUT_S
        while (up := upfile.read(data)) is None:
            if process.poll() is not None or time.monotonic() > end_s:
                raise Failure(f"`fleetlm up` did not come up:\n{output.read_text(errors='replace')[-2000:]}")
            time.sleep(0.02)
        yield up
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _show(report: dict[str, Any]) -> None:
    """The report for people."""
    console = Console(highlight=False)
    origin, load = report["provenance"], report["load"]
    console.print(
        f"{report['bench']}, closed loop: {load['connections']} connections × {load['in_flight']} in flight,"
        f" {load['sessions']} sessions, {load['size_bytes']} bytes, {report['measured_s']:g} s"
    )
    console.print(f"[bold]{report['rate_per_s']:,.0f}[/bold] appends/s acknowledged", end="")
    cpu = report["cpu_us_per_message"]
    console.print("" if cpu is None else f", {cpu:g} µs of CPU each (all processes)")
    table = Table("milliseconds", "p50", "p95", "p99", "max", box=None)
    for label, name in (("append → ack", "ack_ms"), ("append → delivery", "delivery_ms")):
        if report.get(name):
            table.add_row(label, *(f"{value:.2f}" for value in report[name].values()))
    console.print(table)
    used = Table("process", "CPU s", "RSS MiB", box=None)
    for process in report["processes"]:
        cpu_s = "?" if process["cpu_s"] is None else f"{process['cpu_s']:.2f}"
        used.add_row(process["name"], cpu_s, f"{process['rss_bytes'] / 2**20:.0f}")
    console.print(used)
    if report["errors"] or report["unanswered"]:
        console.print(f"[red]refused: {report['errors']}, unanswered: {report['unanswered']}[/red]")
    synced = origin["fdatasync"]
    console.print(
        f"{origin['cpu']} ({origin['cores']} cores), kernel {origin['kernel']}, Python {origin['python']}, uvloop"
        f" {origin['uvloop']}, commit {origin['commit']}, fdatasync p50 {synced['p50_ms'] if synced else '?'} ms",
        style="dim",
    )
