"""What a bench says: the report as one JSON object, and the same for people.

Promise: percentiles are nearest-rank, of everything that counts; nothing is rounded to look better. Must not be done
here: measuring.
"""

from __future__ import annotations

import math
from array import array
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from fleetlm_cli.benchload import Load, Outcome


def report(
    name: str, load: Load, outcome: Outcome, origin: dict[str, Any], used: list[dict[str, Any]], *, own_up: bool
) -> dict[str, Any]:
    """The report of a load."""
    seconds = outcome.measured_s
    cpu = [process["cpu_s"] for process in used]
    told: dict[str, Any] = {
        "bench": name,
        "loop": "open" if load.rate else "closed",
        "load": {
            "connections": load.connections,
            "sessions": load.sessions,
            "in_flight": load.in_flight,
            "size_bytes": load.size_bytes,
            "readers": load.readers,
            "rate": load.rate,
            "warm_up_s": load.warm_up_s,
        },
        "measured_s": round(seconds, 3),
        "acked": len(outcome.acks),
        "rate_per_s": round(sum(outcome.ticks.values()) / seconds, 1),
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
        told["delivered"] = len(outcome.deliveries)
        told["delivery_ms"] = percentiles(outcome.deliveries)
    if load.rate:
        told["offered_per_s"] = round(outcome.offered / seconds, 1)
        told["unsent"] = outcome.unsent
        told["late_ms"] = percentiles(outcome.late)
    return told


def percentiles(seconds: array[float]) -> dict[str, float] | None:
    """Milliseconds: the smallest value that so many percent do not exceed (nearest rank)."""
    if not seconds:
        return None
    ordered = sorted(seconds)

    def at(percent: float) -> float:
        return round(ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)] * 1000, 3)

    return {"p50": at(50), "p95": at(95), "p99": at(99), "max": at(100)}


def show(report: dict[str, Any]) -> None:
    """The report for people."""
    console = Console(highlight=False)
    load = report["load"]
    console.print(
        f"{report['bench']}, {report['loop']} loop: {load['connections']} connections, "
        + (f"{load['rate']:g} appends/s offered" if load["rate"] else f"{load['in_flight']} in flight each")
        + f", {load['sessions']} sessions, {load['size_bytes']} bytes, {report['measured_s']:g} s"
    )
    console.print(f"[bold]{report['rate_per_s']:,.0f}[/bold] appends/s acknowledged", end="")
    cpu = report["cpu_us_per_message"]
    console.print("" if cpu is None else f", {cpu:g} µs of CPU each (all processes)")
    table = Table("milliseconds", "p50", "p95", "p99", "max", box=None)
    for label, name in (("append → ack", "ack_ms"), ("append → delivery", "delivery_ms"), ("sent late by", "late_ms")):
        if report.get(name):
            table.add_row(label, *(f"{value:.2f}" for value in report[name].values()))
    console.print(table)
    if report["errors"] or report["unanswered"]:
        console.print(f"[red]refused: {report['errors']}, unanswered: {report['unanswered']}[/red]")
    show_processes(console, report)


def show_processes(console: Console, report: dict[str, Any]) -> None:
    """What each process used, and where the numbers come from."""
    origin = report["provenance"]
    used = Table("process", "CPU s", "RSS MiB", box=None)
    for process in report["processes"]:
        cpu_s = "?" if process["cpu_s"] is None else f"{process['cpu_s']:.2f}"
        used.add_row(process["name"], cpu_s, f"{process['rss_bytes'] / 2**20:.0f}")
    console.print(used)
    if "elsewhere" in report:
        gone = report["elsewhere"]
        console.print(
            f"CPU that went elsewhere: {gone['processes_s']:g} s other processes, {gone['steal_s']:g} s steal"
        )
    synced = origin["fdatasync"]
    console.print(
        f"{origin['cpu']} ({origin['cores']} cores), kernel {origin['kernel']}, Python {origin['python']}, uvloop"
        f" {origin['uvloop']}, commit {origin['commit']}, fdatasync p50 {synced['p50_ms'] if synced else '?'} ms",
        style="dim",
    )


def show_figures(console: Console, told: dict[str, Any]) -> None:
    """A report without a load: one line a figure."""
    for name, value in told.items():
        if name in {"provenance", "processes", "samples"}:
            continue
        console.print(f"{name.replace('_', ' ')}: [bold]{_figure(value)}[/bold]")
    show_processes(console, told)


def _figure(value: object) -> str:
    """A figure, or several with their names."""
    if isinstance(value, dict):
        return "  ".join(f"{name} {_figure(each)}" for name, each in cast("dict[str, object]", value).items())
    return f"{value:g}" if isinstance(value, float) else f"{value}"
