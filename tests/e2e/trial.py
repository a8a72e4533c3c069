"""A ring on a real Kubernetes is scaled, restarted, upgraded, drained again and again under load; then the judgement.

    python -m tests.e2e.trial --repeat 10 [--kills] [--only scale,drain] [--seed N] [--record FILE]
    python -m tests.e2e.trial --table FILE …

`make moves` on a cluster. Each operation is what a person does with kubectl, under writers that retry and readers; with
`--kills` source and target of its moves, the leading operator and gateways get SIGKILL meanwhile (`fire.py`).

Promise: status 1 and the facts for any broken promise (what `tests/support/history.py` finds, a gap, an answer other
than TRY_AGAIN, a container that ended by itself, a volume that `fleetlm verify` does not like) and for an operation
that does not end. A line of JSON a run, then the table.
Must not be done here: judging, knowing how operations are asked for (`operations.py`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from fleetlm_shard.verify import verify
from tests.cluster import images, kind
from tests.e2e import operations
from tests.e2e.fire import Kill, under_fire
from tests.e2e.ground import on_a_cluster
from tests.e2e.install import OPERATOR_NAMESPACE, a_namespace, install_operator, remove_everything
from tests.e2e.kubectl import kubectl, listed, run_now
from tests.e2e.published import CLUSTER_GOES, UPGRADE
from tests.e2e.rings import Ring, nothing_ended_by_itself, volume
from tests.e2e.traffic import Traffic, reported
from tests.support.load import LoadPlan, Report, append_ms

STEP_S_MAX: Final = 240.0
"""One step of an operation (one number of shards, one node, one pod, one whole upgrade) ends within it, kills and a
busy machine included."""
NODES: Final = ("node1", "node2", "node3")
SHARDS_MIN: Final = 3
SHARDS_MAX: Final = 5
HERE: Final = "--in-the-clients-network"

Operation = Callable[[Ring, Traffic], Awaitable[None]]


async def scale(ring: Ring, traffic: Traffic) -> None:
    """3 → 5 → 2 → 3."""
    for replicas in (SHARDS_MAX, 2, 3):
        await operations.scaled(ring, replicas, within_s=STEP_S_MAX)
        await traffic.progress()


async def restart(ring: Ring, traffic: Traffic) -> None:
    """Each shard's pod, then each gateway's."""
    await operations.restarted(ring, within_s=STEP_S_MAX)


async def upgrade(ring: Ring, traffic: Traffic) -> None:
    """Shards on their volumes, then gateways."""
    await operations.upgraded(ring, await _other_version(ring), strategy="InPlace", within_s=STEP_S_MAX)


async def handover(ring: Ring, traffic: Traffic) -> None:
    """Shards after they gave their slots away, then gateways."""
    await operations.upgraded(ring, await _other_version(ring), within_s=STEP_S_MAX)


async def drain(ring: Ring, traffic: Traffic) -> None:
    """Each node in turn."""
    for node in NODES:
        await operations.drained(ring, node, within_s=STEP_S_MAX)
        await traffic.progress()


async def _other_version(ring: Ring) -> str:
    return UPGRADE if await operations.version_of(ring) == images.version() else images.version()


OPERATIONS: Final[dict[str, Operation]] = {
    "scale": scale,
    "restart": restart,
    "upgrade": upgrade,
    "handover": handover,
    "drain": drain,
}
COLUMNS: Final = (
    "operation",
    "runs",
    "acknowledged",
    "broken promises",
    "longest append of a run: least, median, most",
    "p99 of the runs, median",
    "seconds, median",
)
TITLES: Final = {
    "scale": "scale 3 → 5 → 2 → 3",
    "restart": "each of 3 shards, then of 2 gateways: `kubectl delete pod`",
    "upgrade": "upgrade of 3 shards and 2 gateways, in place",
    "handover": "upgrade of 3 shards and 2 gateways, `Handover`",
    "drain": "each of 3 nodes drained in turn",
}


async def trial_run(ring: Ring, name: str, *, kills: bool, seed: int) -> dict[str, Any]:
    """One operation under load; what is to be told of it, `broken` among it.

    Raises:
        AssertionError: the operation did not end, or nothing went on; with evidence.
    """
    await ring.ready(timeout_s=STEP_S_MAX)
    began_at = await operations.epoch(ring)
    fired: list[Kill] = []
    took_s = 0.0

    async def script(traffic: Traffic) -> None:
        nonlocal took_s
        begin_s = time.monotonic()
        if kills:
            async with under_fire(ring, random.Random(f"{seed}-{name}"), fired):
                await OPERATIONS[name](ring, traffic)
        else:
            await OPERATIONS[name](ring, traffic)
        await ring.ready(timeout_s=STEP_S_MAX)
        took_s = time.monotonic() - begin_s

    plan = LoadPlan(seed=seed, name=name, sessions=8, writers=6, readers=4, write_pause_s=0.03)
    traffic = Traffic(plan, await ring.url(), script)
    report = await reported(ring, f"{name}, seed {seed}", traffic)
    return {
        "operation": name,
        "kills": kills,
        **json.loads(report.as_json()),
        "operation_s": round(took_s, 1),
        "killed": dict(Counter[str](kill.role for kill in fired)),
        "fired": [f"{kill.at_s - traffic.begin_s:.1f} s {kill.role} {kill.pod}" for kill in fired],
        "append_ms": append_ms(report.took_s),
        "epochs": await operations.epoch(ring) - began_at,
        "broken": [*broken_promises(report), *await _ended_by_themselves(ring)],
    }


def broken_promises(report: Report) -> list[str]:
    """What clients saw that nobody may see."""
    said = [f"{found.kind} {found.session}: {found.text}" for found in report.violations]
    said += [f"clients were told {code} {count} times" for code, count in report.refused.items()]
    return [*said, f"readers were told {report.gaps} gaps"] if report.gaps else said


async def _ended_by_themselves(ring: Ring) -> list[str]:
    operators = await listed(OPERATOR_NAMESPACE, "pods", "app.kubernetes.io/component=operator")
    try:
        await nothing_ended_by_itself(ring, others=operators)
    except AssertionError as error:
        return [str(error)]
    return []


async def _volumes(ring: Ring) -> list[str]:
    """Delete the ring and look at what its volumes hold."""
    claims = await listed(ring.namespace, "pvc", f"fleetlm.io/ring={ring.name}")
    ordinals = sorted(int(claim["metadata"]["name"].rpartition("-")[2]) for claim in claims)
    assert len(ordinals) >= SHARDS_MIN, f"volumes of shards {ordinals}"
    folders = {ordinal: await volume(ring, ordinal) / "volume" for ordinal in ordinals}
    await ring.delete()
    await kubectl("wait", "pods", "--all", "-n", ring.namespace, "--for=delete", "--timeout=90s")
    found = {ordinal: (await asyncio.to_thread(verify, folder)).problems for ordinal, folder in folders.items()}
    return [f"volume of shard-{ordinal}: {one.path}: {one.what}" for ordinal, each in found.items() for one in each]


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row for each operation with and without kills."""
    rows = [
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
    ]
    for kills in (False, True):
        for name, title in TITLES.items():
            these = [run for run in runs if run["operation"] == name and run["kills"] == kills]
            if these:
                rows.append(_row(title, these, kills=kills))
    return "\n".join(rows)


def _row(title: str, these: Sequence[dict[str, Any]], *, kills: bool) -> str:
    longest = sorted(run["append_ms"]["max"] for run in these)
    p99 = statistics.median(run["append_ms"]["p99"] for run in these)
    seconds = statistics.median(run["operation_s"] for run in these)
    who = sum((Counter[str](run["killed"]) for run in these), Counter[str]())
    said = ", ".join(f"{count} {role}" for role, count in sorted(who.items()))
    stalls = f"{longest[0]:,.0f}, {statistics.median(longest):,.0f}, {longest[-1]:,.0f} ms"
    return (
        f"| {title}{f', with kills ({said})' if kills else ''} | {len(these)} | {sum(run['acked'] for run in these):,}"
        f" | {sum(len(run['broken']) for run in these)} | {stalls} | {p99:,.0f} ms | {seconds:.0f} |"
    )


async def _series(ring: Ring, given: argparse.Namespace, told: Callable[[dict[str, Any]], None]) -> list[str]:
    """All runs on one ring, judged one by one; what is broken in the end."""
    broken: list[str] = []
    await ring.apply({"version": images.version(), "replicas": 3})
    await ring.ready()
    for seed in range(given.seed, given.seed + given.repeat):
        for name in given.only.split(","):
            sys.stderr.write(f"{name}, seed {seed}{', with kills' if given.kills else ''}\n")
            outcome = await trial_run(ring, name, kills=given.kills, seed=seed)
            told(outcome)
            broken += outcome["broken"]
    return broken if kind.asked() else [*broken, *await _volumes(ring)]


def _here(given: argparse.Namespace) -> int:
    """In the client's network: operator, namespace, ring, runs, away with it all."""
    runs: list[dict[str, Any]] = []

    def told(outcome: dict[str, Any]) -> None:
        runs.append(outcome)
        line = json.dumps(outcome, ensure_ascii=False)
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        if given.record is not None:
            with given.record.open("a") as record:
                record.write(f"{line}\n")

    remove_everything()
    install_operator()
    if given.kills:  # one leads, the other one stands by
        run_now("kubectl", "scale", "deployment/fleetlm-operator", "-n", OPERATOR_NAMESPACE, "--replicas=2")
        run_now("kubectl", "rollout", "status", "deployment", "-n", OPERATOR_NAMESPACE, "--timeout=60s")
    with a_namespace("trial") as namespace:
        try:
            broken = asyncio.run(_series(Ring(namespace), given, told))
        except AssertionError as error:
            sys.stdout.write(f"did not end: {error}\n")
            broken = ["did not end"]
    sys.stdout.write(f"{table(runs)}\n")
    for promise in broken:
        sys.stdout.write(f"BROKEN {promise}\n")
    if not os.environ.get(CLUSTER_GOES):
        remove_everything()
    return 1 if broken else 0


def _read(files: Iterable[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def main(arguments: list[str]) -> int:
    """By hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--kills", action="store_true", help="SIGKILL at random steps as well")
    parser.add_argument("--only", default=",".join(OPERATIONS), help="operations, by commas")
    parser.add_argument("--seed", type=int, default=None, help="of the first run; random when not given")
    parser.add_argument("--record", type=Path, default=None, help="append each run's line to this file")
    parser.add_argument("--table", type=Path, nargs="+", default=None, help="only print the table of such files")
    parser.add_argument(HERE, dest="here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.only.split(",")) - set(OPERATIONS))
    if unknown:
        parser.error(f"no operation {', '.join(unknown)}; there are {', '.join(OPERATIONS)}")
    if given.table is not None:
        sys.stdout.write(f"{table(_read(given.table))}\n")
        return 0
    if given.here:
        return _here(given)
    first = random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed
    line = [sys.executable, "-m", "tests.e2e.trial", HERE, f"--repeat={given.repeat}", f"--only={given.only}"]
    line += [f"--seed={first}", *(["--kills"] if given.kills else [])]
    return on_a_cluster(line + ([f"--record={given.record.absolute()}"] if given.record is not None else []))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
