"""Seeds that run with every `make test`, and what keeps the simulator itself honest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.__main__ import failed, report
from tests.sim.plants import PLANTS, SEEDS_MAX, Plant, find
from tests.sim.world import run_seed

SEEDS = 200
PART = 10
ROOT = Path(__file__).parent.parent.parent
COMPARED = (3, 8, 13)
"""Seeds with several processes of every kind, deaths and freezes."""


@pytest.mark.parametrize("first", range(1, SEEDS + 1, PART))
def test_seeds_keep_every_promise(first: int) -> None:
    """Promises 1 and 2 of the design hold under every fault that these seeds bring, and afterwards everything heals."""
    bad = [outcome for seed in range(first, first + PART) if failed(outcome := run_seed(seed))]
    assert not bad, "\n".join(report(outcome, lines=30) for outcome in bad)


def test_a_seed_gives_the_same_trace_twice() -> None:
    """A run is a function of its seed: in this process, and in others with other hashes and addresses."""
    here = [run_seed(seed).trace.lines for seed in COMPARED]
    again = [run_seed(seed).trace.lines for seed in COMPARED]
    for seed, left, right in zip(COMPARED, here, again, strict=True):
        assert left == right, f"seed {seed} differs from itself at line {_first_difference(left, right)}"
    for hash_seed in ("1", "4242"):
        digests = [_digest_elsewhere(seed, hash_seed) for seed in COMPARED]
        assert digests == [run_seed(seed).digest for seed in COMPARED], f"with PYTHONHASHSEED={hash_seed}"


def _first_difference(left: list[tuple[float, str, str, str]], right: list[tuple[float, str, str, str]]) -> object:
    pairs = zip(left, right, strict=False)
    return next(((n, *pair) for n, pair in enumerate(pairs) if pair[0] != pair[1]), "the end")


def _digest_elsewhere(seed: int, hash_seed: str) -> str:
    command = [sys.executable, "-m", "tests.sim", "--seed", str(seed), "--json"]
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
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
