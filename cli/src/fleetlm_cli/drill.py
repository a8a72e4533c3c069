"""`fleetlm drill`: do to a ring what will happen to it one day, under a workload, and say whether the promises held.

Promise: says what it will do and asks first; what it changed (shards, a cordoned node) it puts back, also when it is
interrupted or fails; status 1 when a promise was broken or an append took longer than `--stall-max`. Must not be done
here: judging (`drillload.py`), or how a ring is touched (`drillring.py`).
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer

from fleetlm_cli.drillload import Broken, DrillLoad, Stalls, judge, stalls
from fleetlm_cli.drillring import DrillRing, KubernetesRing, LocalRing, until
from fleetlm_cli.exits import Exit, Failure
from fleetlm_cli.show import Printer, printable
from fleetlm_cli.target import DATA_DEFAULT, DataOption, JsonOption, UrlOption, failure
from fleetlm_client import FleetError
from fleetlm_common.ring import SHARDS_MAX

WELL_FIRST_S: Final = 10.0
"""A ring that is not well by then is in trouble already: no drill."""
SHOWN_MAX: Final = 10
"""Broken promises of each kind in the table; `--json` has all."""

drill = typer.Typer(no_args_is_help=True, help="Rehearse trouble on a ring, under a workload that is judged.")

KubernetesOption = Annotated[
    str | None, typer.Option("--kubernetes", help="NAMESPACE/RING: a ShardRing, through kubectl; needs --url.")
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
StallOption = Annotated[float, typer.Option("--stall-max", min=0, help="Seconds an append may take at the most.")]
QuietOption = Annotated[float, typer.Option("--quiet", min=0.5, max=600, help="Seconds of baseline, before and after.")]
SessionsOption = Annotated[int, typer.Option("--sessions", min=1, max=200, help="Sessions of the workload.")]
TimeoutOption = Annotated[float, typer.Option("--timeout", min=1, help="Seconds until the ring is well again.")]

Deed = Callable[[], Awaitable[None]]


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a drill found."""

    drill: str
    held: bool
    sessions: str
    """Prefix of the workload's sessions; they stay."""
    took_s: float
    """From the deed until the ring was well again."""
    quiet: Stalls
    during: Stalls
    stall_max_s: float
    try_again: int
    broken: Broken


@dataclass(frozen=True, slots=True)
class Plan:
    """How a drill runs, whatever it does."""

    name: str
    stall_max_s: float
    quiet_s: float
    sessions: int
    timeout_s: float
    yes: bool
    as_json: bool


@drill.command()
def rolling_restart(
    *,
    handover: Annotated[
        bool | None,
        typer.Option(
            "--handover/--in-place", help="Local rings: others own a shard's slots first, or it is waited for."
        ),
    ] = None,
    data: DataOption = DATA_DEFAULT,
    kubernetes: KubernetesOption = None,
    url: UrlOption = None,
    stall_max: StallOption = 30.0,
    quiet: QuietOption = 5.0,
    sessions: SessionsOption = 8,
    timeout_s: TimeoutOption = 600.0,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Restart every shard, one after the other."""
    ring = _ring(data, kubernetes, url)
    if handover is not None and kubernetes is not None:
        words = (
            "on Kubernetes a pod that is asked to end hands its slots over by itself: leave --handover/--in-place out"
        )
        raise Failure(words, status=Exit.USAGE)
    how = "in place" if handover is False else "its slots on others meanwhile"
    plan = Plan("rolling-restart", stall_max, quiet, sessions, timeout_s, yes, as_json)
    _drill(plan, ring, f"restart every shard, {how}", lambda: ring.restart(handover=handover, timeout_s=timeout_s))


@drill.command()
def kill_shard(
    *,
    data: DataOption = DATA_DEFAULT,
    kubernetes: KubernetesOption = None,
    url: UrlOption = None,
    stall_max: StallOption = 30.0,
    quiet: QuietOption = 5.0,
    sessions: SessionsOption = 8,
    timeout_s: TimeoutOption = 600.0,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Kill a shard without warning."""
    plan = Plan("kill-shard", stall_max, quiet, sessions, timeout_s, yes, as_json)
    _kill(plan, _ring(data, kubernetes, url), "shard")


@drill.command()
def kill_gateway(
    *,
    data: DataOption = DATA_DEFAULT,
    kubernetes: KubernetesOption = None,
    url: UrlOption = None,
    stall_max: StallOption = 30.0,
    quiet: QuietOption = 5.0,
    sessions: SessionsOption = 8,
    timeout_s: TimeoutOption = 600.0,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Kill a gateway without warning."""
    plan = Plan("kill-gateway", stall_max, quiet, sessions, timeout_s, yes, as_json)
    _kill(plan, _ring(data, kubernetes, url), "gateway")


def _kill(plan: Plan, ring: DrillRing, component: str) -> None:
    async def deed() -> None:
        _say(f"killed {await ring.kill(component)}")

    _drill(plan, ring, f"kill the first {component} without warning", deed)


@drill.command()
def scale(
    count: Annotated[int, typer.Argument(min=1, max=SHARDS_MAX, help="Shards meanwhile.")],
    *,
    data: DataOption = DATA_DEFAULT,
    kubernetes: KubernetesOption = None,
    url: UrlOption = None,
    stall_max: StallOption = 15.0,
    quiet: QuietOption = 5.0,
    sessions: SessionsOption = 8,
    timeout_s: TimeoutOption = 600.0,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Change the number of shards, and back."""
    ring = _ring(data, kubernetes, url)
    before = asyncio.run(ring.shards())
    if before == count:
        raise Failure(f"the ring has {count} shards already", status=Exit.USAGE)

    async def deed() -> None:
        async with _put_back(f"scaling back to {before} shards", lambda: ring.scale(before)):
            await ring.scale(count)
            await until(f"the ring is well with {count} shards", ring.is_well, timeout_s=timeout_s)

    plan = Plan("scale", stall_max, quiet, sessions, timeout_s, yes, as_json)
    _drill(plan, ring, f"scale from {before} to {count} shards, and back", deed)


@drill.command()
def drain_node(
    node: Annotated[str, typer.Argument(help="A node of the cluster.")],
    *,
    kubernetes: KubernetesOption = None,
    url: UrlOption = None,
    stall_max: StallOption = 120.0,
    quiet: QuietOption = 5.0,
    sessions: SessionsOption = 8,
    timeout_s: TimeoutOption = 600.0,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Drain a node of the cluster, and let pods come back to it."""
    if kubernetes is None:
        raise Failure("a node is drained on Kubernetes: give --kubernetes NAMESPACE/RING and --url", status=Exit.USAGE)
    ring = _kubernetes(kubernetes, url)
    if not asyncio.run(ring.schedulable(node)):
        raise Failure(f"{node} is cordoned already; whoever did that may be working on it")

    async def deed() -> None:
        async with _put_back(f"uncordoning {node}", lambda: ring.uncordon(node)):
            await ring.drain(node, timeout_s=timeout_s)

    plan = Plan("drain-node", stall_max, quiet, sessions, timeout_s, yes, as_json)
    _drill(plan, ring, f"drain {node} (everything on it has to go, not only this ring), then uncordon it", deed)


def _ring(data: Path, kubernetes: str | None, url: str | None) -> DrillRing:
    if kubernetes is None:
        return LocalRing(data.absolute())
    return _kubernetes(kubernetes, url)


def _kubernetes(kubernetes: str, url: str | None) -> KubernetesRing:
    namespace, _, name = kubernetes.partition("/")
    if not namespace or not name or "/" in name or url is None:
        raise Failure("--kubernetes wants NAMESPACE/RING, and --url a gateway of it", status=Exit.USAGE)
    return KubernetesRing(namespace, name, url)


def _say(text: str) -> None:
    """Progress goes to standard error: standard output is the verdict's."""
    sys.stderr.write(f"{printable(text)}\n")


@asynccontextmanager
async def _put_back(what: str, undo: Deed) -> AsyncGenerator[None]:
    try:
        yield
    finally:  # also when interrupted: nobody shall find a ring changed by a drill
        _say(what)
        await undo()


def _drill(plan: Plan, ring: DrillRing, what: str, deed: Deed) -> None:
    if not plan.yes:
        if not sys.stdin.isatty():
            raise Failure(f"this would {what}; say --yes where nobody can be asked", status=Exit.USAGE)
        typer.confirm(f"This will {what}, while {plan.sessions} sessions are written to. Go on?", abort=True, err=True)
    _say(f"{plan.name}: {what}")
    try:
        verdict = asyncio.run(_run(plan, ring, deed))
    except FleetError as error:
        raise failure(error) from error
    except (KeyboardInterrupt, asyncio.CancelledError) as error:
        _say("interrupted; no verdict")
        raise typer.Exit(Exit.INTERRUPTED) from error
    _tell(verdict, as_json=plan.as_json)
    if not verdict.held:
        raise typer.Exit(Exit.FAILED)


async def _run(plan: Plan, ring: DrillRing, deed: Deed) -> Verdict:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    await until("the ring is well before the drill", ring.is_well, timeout_s=WELL_FIRST_S)
    prefix = f"drill-{secrets.token_hex(4)}"
    load = DrillLoad(await ring.urls(), prefix, plan.sessions)
    try:
        await load.begin()
        await asyncio.sleep(plan.quiet_s)
        began_s = time.monotonic()
        await deed()
        await until("the ring is well again", ring.is_well, timeout_s=plan.timeout_s)
        took_s = time.monotonic() - began_s
        _say(f"the ring is well again after {took_s:.1f} s")
        await asyncio.sleep(plan.quiet_s)
        await load.end()
    finally:
        await load.close()
    broken = judge(load.saw)
    during = stalls([took for at, took in load.took if at >= began_s])
    return Verdict(
        drill=plan.name,
        held=not broken.any and during.appends > 0 and during.max_ms <= plan.stall_max_s * 1000,
        sessions=prefix,
        took_s=round(took_s, 1),
        quiet=stalls([took for at, took in load.took if at < began_s]),
        during=during,
        stall_max_s=plan.stall_max_s,
        try_again=load.try_again,
        broken=broken,
    )


def _tell(verdict: Verdict, *, as_json: bool) -> None:
    printer = Printer(as_json=as_json)
    if as_json:
        printer.record(msgspec.to_builtins(verdict))
        return
    printer.line(f"{'':8}{'appends':>9}{'p50 ms':>10}{'p99 ms':>10}{'max ms':>10}")
    for name, one in (("quiet", verdict.quiet), ("drill", verdict.during)):
        printer.line(f"{name:8}{one.appends:9}{one.p50_ms:10.1f}{one.p99_ms:10.1f}{one.max_ms:10.1f}")
    broken = verdict.broken
    for kind, found in msgspec.to_builtins(broken).items():
        printer.line(f"{kind}: {len(found)}")
        for sentence in found[:SHOWN_MAX]:
            printer.line(f"  {printable(sentence)}")
    printer.line(f"TRY_AGAIN that the SDK did not hide: {verdict.try_again}")
    late = verdict.during.max_ms > verdict.stall_max_s * 1000
    if late:
        printer.line(f"an append took longer than {verdict.stall_max_s:g} s (--stall-max)")
    word = "held" if verdict.held else "BROKEN" if broken.any else "held, but it took too long"
    printer.line(f"{verdict.drill}: promises {word}; well again after {verdict.took_s:g} s ({verdict.sessions}-*)")
