"""`fleetlm bench`: numbers of a running system, or of one that it starts for the purpose.

    append   append → acknowledged (on disk)
    e2e      append → acknowledged and → delivered (to the writer's own socket, or to `--readers` others)
    fanout   one append → the last of N sockets has it
    idle     what a socket that does nothing costs a gateway in memory
    replay   messages a second to readers who come back: from memory, and from disk after a restart
    boot     a log of a given size and number of sessions → everything is ready again

Promise: numbers come with what they were measured on and what each process used; the load generator is this process and
is listed with the others, for it shares the machine. Must not be done here: putting load on (`benchload.py`,
`benchsockets.py`, `benchvolume.py`).
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fleetlm_cli import benchhost, benchplot, benchreport, benchsockets, benchvolume
from fleetlm_cli.benchload import SIZE_BYTES_MIN, Load, Outcome, put_on
from fleetlm_cli.benchtarget import (
    DataOption,
    DurationOption,
    PlotOption,
    ShardsOption,
    System,
    many_files,
    run,
    system,
)
from fleetlm_cli.show import Printer
from fleetlm_cli.target import JsonOption, UrlOption
from fleetlm_common.limits import CONTENT_BYTES_MAX

bench = typer.Typer(help="Measure rate, latency, memory, boot.", no_args_is_help=True)

ConnectionsOption = Annotated[int, typer.Option(min=1, max=10_000, help="Connections that append.")]
SessionsOption = Annotated[int, typer.Option(min=1, max=100_000, help="Sessions.")]
InFlightOption = Annotated[int, typer.Option(min=1, max=10_000, help="Closed loop: unanswered appends each.")]
RateOption = Annotated[
    float, typer.Option(min=0, max=1_000_000, help="Open loop: appends a second that are due; 0: closed loop.")
]
SizeOption = Annotated[int, typer.Option(min=SIZE_BYTES_MIN, max=CONTENT_BYTES_MAX, help="Bytes of JSON content.")]
WarmUpOption = Annotated[float, typer.Option(min=0, max=3_600, help="Seconds before, not measured.")]
SocketsOption = Annotated[int, typer.Option("--sockets", min=1, max=60_000, help="Sockets.")]


@bench.command()
def append(
    *,
    url: UrlOption = None,
    data: DataOption = None,
    connections: ConnectionsOption = 16,
    sessions: SessionsOption = 64,
    in_flight: InFlightOption = 16,
    rate: RateOption = 0.0,
    size: SizeOption = 256,
    duration: DurationOption = 10.0,
    warm_up: WarmUpOption = 2.0,
    shards: ShardsOption = 3,
    plot: PlotOption = None,
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
        rate=rate,
        run_id=_run_id(),
    )
    _bench("append", load, url=url, data=data, shards=shards, plot=plot, as_json=as_json)


@bench.command()
def e2e(
    *,
    url: UrlOption = None,
    data: DataOption = None,
    connections: ConnectionsOption = 16,
    sessions: SessionsOption = 64,
    in_flight: InFlightOption = 16,
    rate: RateOption = 0.0,
    readers: Annotated[
        int, typer.Option(min=0, max=1_000, help="Connections that read every session; 0: the writers read their own.")
    ] = 0,
    size: SizeOption = 256,
    duration: DurationOption = 10.0,
    warm_up: WarmUpOption = 2.0,
    shards: ShardsOption = 3,
    plot: PlotOption = None,
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
        rate=rate,
        run_id=_run_id(),
    )
    _bench("e2e", load, url=url, data=data, shards=shards, plot=plot, as_json=as_json)


@bench.command()
def fanout(
    *,
    url: UrlOption = None,
    data: DataOption = None,
    sockets: SocketsOption = 1_000,
    appends: Annotated[int, typer.Option(min=1, max=100_000, help="Appends, one after the other.")] = 50,
    size: SizeOption = 256,
    shards: ShardsOption = 1,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """One append to the last of many sockets."""
    benchplot.check(plot)
    many_files()
    with system(url=url, data=data, shards=shards) as found:
        told = benchsockets.fanout(found, sockets=sockets, appends=appends, size_bytes=size, run_id=_run_id())
    _tell(told, plot=plot, as_json=as_json)


@bench.command()
def idle(
    *,
    url: UrlOption = None,
    data: DataOption = None,
    sockets: SocketsOption = 10_000,
    sessions: SessionsOption = 1_000,
    as_json: JsonOption = False,
) -> None:
    """Memory of sockets that do nothing."""
    many_files()
    with system(url=url, data=data, shards=1) as found:
        told = benchsockets.idle(found, sockets=sockets, sessions=sessions, run_id=_run_id())
    _tell(told, plot=None, as_json=as_json)


@bench.command()
def replay(
    *,
    hot_messages: Annotated[int, typer.Option(min=1, max=100_000, help="Messages of each hot session.")] = 100,
    messages: Annotated[int, typer.Option(min=1, max=10_000_000, help="Messages of each cold session.")] = 50_000,
    sessions: Annotated[int, typer.Option(min=1, max=256, help="Sessions, each read by one reader.")] = 4,
    size: SizeOption = 256,
    duration: DurationOption = 3.0,
    folder: Annotated[Path | None, typer.Option(help="Where the ring is made (a real disk).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Messages a second to readers who come back; starts a ring of its own."""
    plan = benchvolume.ReplayPlan(
        hot_messages=hot_messages, messages=messages, sessions=sessions, size_bytes=size, duration_s=duration
    )
    _tell(benchvolume.replay(plan, folder=folder, run_id=_run_id()), plot=None, as_json=as_json)


@bench.command()
def boot(
    *,
    mib: Annotated[int, typer.Option(min=1, max=1_000_000, help="Log written before, about.")] = 1024,
    sessions: Annotated[int, typer.Option(min=1, max=10_000_000, help="Sessions in it.")] = 100_000,
    boots: Annotated[int, typer.Option(min=1, max=100, help="Boots, each after SIGKILL of everything.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where the ring is made (a real disk).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time until everything is ready again after SIGKILL; starts a ring of its own."""
    told = benchvolume.boot(mib=mib, sessions=sessions, boots=boots, folder=folder, run_id=_run_id())
    _tell(told, plot=None, as_json=as_json)


def _run_id() -> str:
    """Sessions and keys of a run are its own."""
    return f"bench-{secrets.token_hex(4)}"


def _bench(
    name: str, load: Load, *, url: str | None, data: Path | None, shards: int, plot: Path | None, as_json: bool
) -> None:
    """Find or start what is measured, measure, print."""
    benchplot.check(plot)
    many_files()
    with system(url=url, data=data, shards=shards) as found:
        told, outcome = _measured(name, load, found)
    if plot is not None:
        benchplot.draw_load(plot, told, outcome)
    if as_json:
        Printer(as_json=True).record(told)
    else:
        benchreport.show(told)


def _tell(told: dict[str, Any], *, plot: Path | None, as_json: bool) -> None:
    """Print a report whose figures speak for themselves; `samples` are for the picture and for programs."""
    if plot is not None:
        benchplot.draw_samples(plot, told)
    if as_json:
        Printer(as_json=True).record(told)
    else:
        benchreport.show_figures(Console(highlight=False), told)


def _measured(name: str, load: Load, found: System) -> tuple[dict[str, Any], Outcome]:
    """The report of one run.

    Raises:
        Failure: the load could not be put on.
    """
    processes = [("load", os.getpid()), *found.processes()]
    origin = benchhost.provenance(found.folder)
    moments: list[dict[str, benchhost.Usage]] = []

    machine: list[tuple[float, float]] = []

    def look() -> None:
        moments.append(benchhost.usage(processes))
        machine.append(benchhost.machine_cpu_s())

    outcome = run(found.websocket_url, put_on(found.websocket_url, load, on_begin=look, on_end=look))
    used = benchhost.spent(*moments[:2])
    told = benchreport.report(name, load, outcome, origin, used, own_up=found.up is not None)
    # Numbers of a machine that did other work meanwhile are to be known by it.
    told["elsewhere"] = benchhost.others(machine[0], machine[1], used)
    return told, outcome
