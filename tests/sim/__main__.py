"""`python -m tests.sim`: run seeds, say which failed and how to replay them (`make sim SEED=17`, docs/simulator.md)."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Final

import msgspec

from tests.sim.seeds import Row, run_elsewhere, run_here

TOLD_EVERY: Final = 1000
"""Seeds after which a long run says how far it is."""


class Sum:
    """What all seeds gave together.

    Args:
        seeds: that were asked for.
    """

    def __init__(self, seeds: range) -> None:
        self.missing = dict.fromkeys(seeds)
        self.bad: list[int] = []
        self._figures = Counter[str]()
        self._count = len(seeds)
        self._began_s = time.monotonic()

    def add(self, row: Row) -> None:
        """A seed is done."""
        del self.missing[row.seed]
        self._figures.update(row.figures)
        if row.failed:
            self.bad.append(row.seed)

    @property
    def is_at_a_mark(self) -> bool:
        """Whether it is time to say how far it is."""
        return bool(self.missing) and (self._count - len(self.missing)) % TOLD_EVERY == 0

    def __str__(self) -> str:
        """For people."""
        words = ", ".join(f"{count} {name}" for name, count in self._figures.items())
        took_s, done = time.monotonic() - self._began_s, self._count - len(self.missing)
        return f"{done} seeds, {len(self.bad)} failed {sorted(self.bad)[:50]}; {took_s:.1f} s; {words}"


def main() -> int:
    """Returns 1 when a seed failed, 2 when one gave no result."""
    options = _options()
    if options.seed is not None:
        seeds = range(options.seed, options.seed + 1)
    else:
        seeds = range(options.first, options.first + options.seeds * options.step, options.step)
    if options.jobs > 1:
        rows = run_elsewhere(seeds, jobs=options.jobs, lines=options.trace)
    else:
        rows = run_here(seeds, lines=options.trace, trace_file=options.write_trace)
    total = Sum(seeds)
    with closing(rows):
        for row in rows:
            total.add(row)
            if options.json:
                _say(msgspec.json.encode(row).decode())
            elif row.failed:
                _say(row.report)
            elif total.is_at_a_mark:
                _say(f"so far: {total}")
            if row.failed and options.stop:
                break
    if not options.json:
        _say(str(total))
    if total.missing and not (total.bad and options.stop):
        sys.stderr.write(f"NO RESULT of {len(total.missing)} seeds, whose process died: {list(total.missing)[:50]}\n")
        return 2
    return 1 if total.bad else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first of them")
    parser.add_argument("--step", type=int, default=1, help="from one to the next")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share them")
    parser.add_argument("--trace", type=int, default=40, help="lines of a failed run's trace to print")
    parser.add_argument("--write-trace", type=Path, help="write the whole trace of the last seed to a file")
    parser.add_argument("--stop", action="store_true", help="stop at the first that fails")
    parser.add_argument("--json", action="store_true", help="a line for each seed: digest, violations, figures, report")
    options = parser.parse_args()
    if options.jobs > 1 and options.write_trace:
        parser.error("--write-trace is for one process")
    return options


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
