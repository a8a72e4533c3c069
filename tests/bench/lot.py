"""Everything that `fleetlm bench` measures, one after the other in rounds: `python -m tests.bench.lot [--rounds N]`.

Promise: a command of the product as people run it, its own JSON kept whole; figures are medians over the rounds. Must
not be used as a correctness test.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec

from tests.support.fleet import fleet

FIGURES: Final = {
    "e2e": ("rate_per_s", "delivery_ms.p50", "delivery_ms.p99", "cpu_us_per_message"),
    "open": ("rate_per_s", "delivery_ms.p50", "delivery_ms.p99", "late_ms.p50"),
    "fanout": ("last_ms.p50", "last_ms.p99", "first_ms.p50"),
    "idle": ("kib_a_socket_opened", "kib_a_socket_joined", "opened_per_s"),
    "replay": ("shard_hot_per_s", "shard_cold_per_s", "socket_hot_per_s", "socket_cold_per_s"),
    "boot": ("ready_s", "empty_ready_s", "log_s"),
}
"""What is said of each; the rest stands in the JSON."""


def plans(seconds: float, *, sockets: int, mib: int, sessions: int) -> dict[str, list[str]]:
    """The command lines, by name."""
    timed = ["--duration", str(seconds), "--warm-up", "0.5"]
    return {
        "e2e": ["e2e", "--connections", "16", "--in-flight", "32", "--sessions", "64", *timed],
        "open": ["e2e", "--connections", "16", "--sessions", "64", "--rate", "5000", *timed],
        "fanout": ["fanout", "--sockets", "1000", "--appends", "30"],
        "idle": ["idle", "--sockets", str(sockets)],
        "replay": ["replay", "--messages", "20000", "--duration", "1"],
        "boot": ["boot", "--mib", str(mib), "--sessions", str(sessions), "--boots", "3"],
    }


RUNNING: Final = ("e2e", "open", "fanout")
"""Those that share one `up`; the others start their own: memory and boot want a fresh one."""


async def one(arguments: list[str], *, data: Path | None) -> dict[str, Any]:
    """One command's report.

    Raises:
        SystemExit: it failed.
    """
    where = [] if data is None else ["--data", str(data)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fleetlm_cli.main", "bench", *arguments, *where, "--json", stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    if process.returncode:
        raise SystemExit(process.returncode)
    return msgspec.json.decode(out, type=dict[str, Any])


async def run(folder: Path, chosen: dict[str, list[str]], *, rounds: int) -> dict[str, Any]:
    """All reports, by name."""
    reports: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    shared = [name for name in chosen if name in RUNNING]
    if shared:
        async with fleet(folder / "ring", shards=1) as running:
            for _ in range(rounds):
                for name in shared:
                    reports[name].append(await one(chosen[name], data=running.data))
            await running.stop()
    for name, arguments in chosen.items():
        if name not in RUNNING:
            reports[name].append(await one(arguments, data=None))
    medians = {name: figures(name, found) for name, found in reports.items()}
    return {"rounds": rounds, "medians": medians, "reports": reports}


def figures(name: str, reports: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of what is said."""
    return {path: round(median(_at(report, path) for report in reports), 3) for path in FIGURES[name]}


def _at(report: dict[str, Any], path: str) -> float:
    value: Any = report
    for part in path.split("."):
        value = value[part]
    return float(value)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--sockets", type=int, default=1_000, help="idle ones")
    parser.add_argument("--mib", type=int, default=64, help="log to boot from")
    parser.add_argument("--sessions", type=int, default=5_000, help="in that log")
    parser.add_argument("--only", nargs="+", choices=list(FIGURES), default=list(FIGURES))
    parser.add_argument("--json", type=Path, default=None, help="write everything there")
    options = parser.parse_args()
    every = plans(options.seconds, sockets=options.sockets, mib=options.mib, sessions=options.sessions)
    chosen = {name: every[name] for name in options.only}
    with tempfile.TemporaryDirectory(prefix="lot-", dir="/var/tmp") as made:
        report = asyncio.run(run(Path(made), chosen, rounds=options.rounds))
    for name, found in report["medians"].items():
        sys.stdout.write(f"{name:<8}" + "  ".join(f"{path} {value:,g}" for path, value in found.items()) + "\n")
    if options.json is not None:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")


if __name__ == "__main__":
    main()
