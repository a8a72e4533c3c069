"""Many seeds: what is said of each, and several processes that share them.

Promise: each seed gives a row; one whose process died gives none, and is named as missing by whoever asked for it.
Must not be done here: a run (`world.py`), what people type (`__main__.py`).
"""

from __future__ import annotations

import queue
import subprocess
import sys
import threading
from collections.abc import Generator, Iterable
from contextlib import closing
from pathlib import Path
from typing import Final

import msgspec

from tests.sim.world import Outcome, run_seed

ROOT: Final = Path(__file__).parent.parent.parent
REPORTED_MAX: Final = 20
"""Violations and faults of a seed that are printed: the first ones tell."""


class Row(msgspec.Struct, frozen=True):
    """A seed's outcome in a line.

    Attributes:
        seed: which.
        digest: of its trace.
        kinds: of broken promises.
        faults: what nobody handled.
        figures: how much happened.
        report: for people, when it failed.
    """

    seed: int
    digest: str
    kinds: list[str]
    faults: list[str]
    figures: dict[str, int]
    report: str

    @property
    def failed(self) -> bool:
        """Whether the run broke a promise, or something in it that nobody handled."""
        return bool(self.kinds or self.faults)


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
    head += [f"  {each.kind}: {each.session} {each.text}" for each in outcome.violations[:REPORTED_MAX]]
    head += [f"  fault: {each}" for each in outcome.faults[:REPORTED_MAX]]
    return "\n".join([*head, *(f"    {line}" for line in outcome.trace.tail(lines))])


def run_here(seeds: Iterable[int], *, lines: int, trace_file: Path | None = None) -> Generator[Row]:
    """One seed after the other in this process.

    Args:
        seeds: which.
        lines: of a failed run's trace to report.
        trace_file: gets the whole trace of the newest run.
    """
    for seed in seeds:
        outcome = run_seed(seed)
        if trace_file is not None:
            trace_file.write_text("\n".join(outcome.trace.tail(1 << 40, without=frozenset())) + "\n")
        kinds: list[str] = sorted({each.kind for each in outcome.violations})
        words = report(outcome, lines=lines) if kinds or outcome.faults else ""
        yield Row(seed, outcome.digest, kinds, outcome.faults, outcome.figures, words)


def run_elsewhere(seeds: range, *, jobs: int, lines: int) -> Generator[Row]:
    """Several processes share the seeds: each takes every `jobs`th of them. Closing this ends them.

    A process whose reader is gone ends with its next row. Rows come as they are made; a process that dies is told by
    the rows that it leaves out.
    """
    said: queue.Queue[Row | None] = queue.Queue()
    children = [_start(seeds[number::jobs], lines) for number in range(min(jobs, len(seeds)))]
    for child in children:
        threading.Thread(target=_listen, args=(child, said), daemon=True).start()
    try:
        listening = len(children)
        while listening:
            row = said.get()
            if row is None:
                listening -= 1
            else:
                yield row
    finally:
        for child in children:
            child.terminate()
            child.wait()


def _start(seeds: range, lines: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.sim", "--json", "--trace", str(lines)]
    command += ["--first", str(seeds.start), "--seeds", str(len(seeds)), "--step", str(seeds.step)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)


def _listen(child: subprocess.Popen[bytes], said: queue.Queue[Row | None]) -> None:
    """On a thread: pass on what one process says, until it says nothing more."""
    assert child.stdout is not None
    try:
        with closing(child.stdout) as rows:
            for row in rows:
                said.put(msgspec.json.decode(row, type=Row))
    finally:
        said.put(None)
