"""Seeds that run with every `make test`, and what keeps the simulator itself honest."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.sim.loop import SimLoop, SimProcess
from tests.sim.plants import PLANTS, SEEDS_MAX, Plant, find, plant_into
from tests.sim.seeds import run_here
from tests.sim.world import World, run_seed

SEEDS = 500
PART = 10
ROOT = Path(__file__).parent.parent.parent
COMPARED = (3, 8, 13, 26, 143)
"""Seeds with several processes of every kind, deaths and freezes; a gateway that leaves; moves that end together."""
ENDED = (1, 5, 9)
"""Seeds in which shards refuse while they leave, writers freeze inside a batch, and logs stop."""


@pytest.mark.parametrize("first", range(1, SEEDS + 1, PART))
def test_seeds_keep_every_promise(first: int) -> None:
    """Promises 1 and 2 of the design hold under every fault that these seeds bring, and afterwards everything heals."""
    bad = [row.report for row in run_here(range(first, first + PART), lines=30) if row.failed]
    assert not bad, "\n".join(bad)


def test_nothing_is_left_of_a_world() -> None:
    """However many seeds a process runs, it needs the memory of one: what is kept of a run does not hold its world."""
    kept = [run_seed(seed) for seed in ENDED]
    # Without another collection: what a run leaves to one is never found, because the next run does not look at it.
    left = [each for each in gc.get_objects() if type(each) in {World, SimLoop, SimProcess}]
    assert not left, f"{len(left)} objects of {len(kept)} runs are left: {left[:10]}"


def test_a_seed_gives_the_same_trace_twice() -> None:
    """A run is a function of its seed: in this process, and in others with other hashes and addresses."""
    here = [run_seed(seed).trace.lines for seed in COMPARED]
    again = [run_seed(seed).trace.lines for seed in COMPARED]
    for seed, left, right in zip(COMPARED, here, again, strict=True):
        assert left == right, f"seed {seed} differs from itself at line {_first_difference(left, right)}"
    for elsewhere in ({"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "4242", "PYTHONMALLOC": "malloc"}):
        digests = [_digest_elsewhere(seed, elsewhere) for seed in COMPARED]
        assert digests == [run_seed(seed).digest for seed in COMPARED], f"with {elsewhere}"


def _first_difference(left: list[tuple[float, str, str, str]], right: list[tuple[float, str, str, str]]) -> object:
    pairs = zip(left, right, strict=False)
    return next(((n, *pair) for n, pair in enumerate(pairs) if pair[0] != pair[1]), "the end")


def _digest_elsewhere(seed: int, settings: dict[str, str]) -> str:
    command = [sys.executable, "-m", "tests.sim", "--seed", str(seed), "--json"]
    environment = {**os.environ, **settings}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    return str(json.loads(done.stdout)["digest"])


@pytest.mark.parametrize("plant", [plant for plant in PLANTS if plant.cheap], ids=lambda plant: plant.name)
def test_a_planted_mistake_is_found(plant: Plant) -> None:
    """The simulator and its judge notice each of these mistakes; `make plants` looks for all of them."""
    assert find(plant, first=1, seeds=SEEDS_MAX), f"not found within {SEEDS_MAX} seeds"


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_a_plant_fits_the_source(plant: Plant) -> None:
    """Each plant's text stands in the source once."""
    plant.check()


def _run_together(*arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """`make sim JOBS=2`."""
    command = [sys.executable, "-m", "tests.sim", "--jobs", "2", *arguments]
    environment: dict[str, str] = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_processes_share_the_seeds() -> None:
    """Several processes run each seed once, as one would; their figures are added up."""
    done = _run_together("--first", "3", "--seeds", "5", "--json")
    rows = sorted((json.loads(line) for line in done.stdout.splitlines()), key=_seed)
    assert [(row["seed"], row["digest"]) for row in rows] == [(seed, run_seed(seed).digest) for seed in range(3, 8)]
    assert (done.returncode, done.stderr) == (0, "")
    words = _run_together("--first", "3", "--seeds", "5").stdout
    assert words.startswith("5 seeds, 0 failed []; ")
    for name in ("messages", "events"):
        assert f", {sum(row['figures'][name] for row in rows)} {name}," in words


def _seed(row: dict[str, Any]) -> int:
    return int(row["seed"])


def test_a_failure_in_another_process_says_how_to_replay_it(tmp_path: Path) -> None:
    """Whichever process meets it, a seed that fails is reported whole, and fails the command."""
    plant = next(plant for plant in PLANTS if plant.name == "caught_up is said again")
    done = _run_together("--seeds", "2", path=plant_into(tmp_path, plant))
    assert done.returncode == 1
    assert "replay: make sim SEED=1\n  caught_up: " in done.stdout


def test_seeds_without_a_result_are_named(tmp_path: Path) -> None:
    """A process that dies does not make its seeds pass."""
    plant = next(plant for plant in PLANTS if plant.name == "caught_up is said again")
    death = replace(plant, new=f"            raise SystemExit(0)\n{plant.new}")
    done = _run_together("--seeds", "2", path=plant_into(tmp_path, death))
    assert done.returncode == 2
    assert "NO RESULT of 2 seeds, whose process died: [1, 2]" in done.stderr
