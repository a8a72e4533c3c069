"""`python -m tests.sim`: run seeds, say which failed and how to replay them (`make sim SEED=17`, docs/simulator.md)."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from tests.sim.world import Outcome, run_seed


def failed(outcome: Outcome) -> bool:
    """Whether the run broke a promise, or something in it that nobody handled."""
    return bool(outcome.violations or outcome.faults)


def commit() -> str:
    """What is checked out, with a mark when files differ from it."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def report(outcome: Outcome, *, lines: int) -> str:
    """A failed run for people."""
    head = [f"seed {outcome.seed} FAILED at commit {commit()}; replay: make sim SEED={outcome.seed}"]
    head += [f"  {each.kind}: {each.session} {each.text}" for each in outcome.violations[:20]]
    head += [f"  fault: {each}" for each in outcome.faults[:20]]
    return "\n".join([*head, *(f"    {line}" for line in outcome.trace.tail(lines))])


def main() -> int:
    """Returns 1 when a seed failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--trace", type=int, default=40, help="lines of a failed run's trace to print")
    parser.add_argument("--write-trace", type=Path, help="write the whole trace of the last seed to a file")
    parser.add_argument("--stop", action="store_true", help="stop at the first that fails")
    parser.add_argument("--json", action="store_true", help="a line for each seed: digest and violations")
    options = parser.parse_args()
    seeds = [options.seed] if options.seed is not None else range(options.first, options.first + options.seeds)
    began_s, bad, total = time.monotonic(), [], dict[str, int]()
    for seed in seeds:
        outcome = run_seed(seed)
        for name, count in outcome.figures.items():
            total[name] = total.get(name, 0) + count
        if options.json:
            kinds = sorted({each.kind for each in outcome.violations})
            row = {"seed": seed, "digest": outcome.digest, "kinds": kinds, "faults": outcome.faults}
            sys.stdout.write(json.dumps(row) + "\n")
        if failed(outcome):
            bad.append(seed)
            if not options.json:
                sys.stdout.write(report(outcome, lines=options.trace) + "\n")
        if options.write_trace:
            options.write_trace.write_text("\n".join(outcome.trace.tail(1 << 40, without=frozenset())) + "\n")
        sys.stdout.flush()
        if bad and options.stop:
            break
    if not options.json:
        words = ", ".join(f"{count} {name}" for name, count in total.items())
        took_s = time.monotonic() - began_s
        sys.stdout.write(f"{len(seeds)} seeds, {len(bad)} failed {bad[:50]}; {took_s:.1f} s; {words}\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
