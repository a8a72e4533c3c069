"""What got slower: `python -m tests.bench.check [--rounds N]`, statuses 0 (nothing beyond the tolerance) and 1.

The stored ratios (`docs/perf/ratios.json`) set the shard's appends beside those of Redis measured in the same rounds,
so that a slower machine slows both sides and cancels. Promise: what is said to be worse is worse by more than the
tolerance in the median of the rounds; the tolerance is what this class of machine was seen to vary by without any
change. `--store` writes the ratios of this run as the new ones. Must not be run on a machine that does other work.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from tests.bench.peers import run
from tests.bench.peerservers import Missing

STORED: Final = Path(__file__).resolve().parents[2] / "docs" / "perf" / "ratios.json"
TOLERANCE: Final = 0.35
"""A ratio may fall by that share: two runs of one commit on a shared two-core machine differed by a quarter."""


class Stored(msgspec.Struct, frozen=True):
    """Ratios shard/Redis by shape, and of which commit."""

    commit: str
    ratios: dict[str, float]


def worse(stored: dict[str, float], now: dict[str, float], *, tolerance: float) -> list[str]:
    """A sentence for each ratio that fell beyond the tolerance, or that is not measured any more."""
    said: list[str] = []
    for name, before in stored.items():
        after = now.get(name)
        if after is None:
            said.append(f"{name}: stored as {before:g}, not measured now")
        elif after < before * (1 - tolerance):
            said.append(f"{name}: {after:g} times Redis, was {before:g} ({after / before - 1:+.0%})")
    return said


async def measured(folder: Path, *, rounds: int, seconds: float) -> Stored:
    """The ratios of this commit now."""
    report = await run(folder, names=["shard", "redis"], rounds=rounds, seconds=seconds)
    ratios = {shape: found["shard_ratio"]["redis"] for shape, found in report["summary"].items()}
    return Stored(str(report["provenance"]["commit"]), ratios)


def main() -> None:
    """Run, compare, say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--tolerance", type=float, default=TOLERANCE)
    parser.add_argument("--store", action="store_true", help="write what is measured as the new ratios")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="check-") as made:
        try:
            now = uvloop.run(measured(Path(made), rounds=options.rounds, seconds=options.seconds))
        except Missing as error:
            sys.stderr.write(f"bench-check: {error}\n")
            sys.exit(1)
    for name, ratio in now.ratios.items():
        sys.stdout.write(f"{name}: {ratio:g} times Redis\n")
    if options.store:
        STORED.write_bytes(msgspec.json.format(msgspec.json.encode(now)) + b"\n")
        return
    stored = msgspec.json.decode(STORED.read_bytes(), type=Stored)
    found = worse(stored.ratios, now.ratios, tolerance=options.tolerance)
    for sentence in found:
        sys.stderr.write(f"bench-check: worse than {stored.commit}: {sentence}\n")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
