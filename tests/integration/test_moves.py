"""Slots move while a ring is used: nothing is lost, doubled or missed. By hand, again and again: `make moves N=10`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration import moves
from tests.support.load import clean


@pytest.mark.timeout(300)
async def test_scale_up_and_down_under_load(tmp_path: Path) -> None:
    """3 → 5 → 2 shards: no violation, no refusal but TRY_AGAIN, every operation ends."""
    outcome = await moves.moves_run(tmp_path, moves.scale, kills=False, seed=1)
    clean(outcome.report)


@pytest.mark.timeout(300)
async def test_a_change_of_mind_at_any_step_with_kills(tmp_path: Path) -> None:
    """Up, down, up before any of it ended, while source, target, gateways and controller are killed."""
    outcome = await moves.moves_run(tmp_path, moves.mind, kills=True, seed=2)
    clean(outcome.report)
    assert outcome.report.killed.total() > 0


@pytest.mark.timeout(300)
async def test_everything_is_killed_at_once_in_mid_move(tmp_path: Path) -> None:
    """`up` with all its children, while a move copies and while one is sealed: started again, each move ends, clean."""
    outcome = await moves.moves_run(tmp_path, moves.crash, kills=False, seed=5)
    clean(outcome.report)
    assert outcome.report.killed["everything"] >= 2


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["scale", "pin", "handover"])
async def test_kills_at_random_steps(tmp_path: Path, name: str) -> None:
    """Each operation ends and its history is clean whoever dies."""
    clean((await moves.moves_run(tmp_path, moves.OPERATIONS[name], kills=True, seed=3)).report)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["mind", "pin", "handover"])
async def test_every_operation_under_load(tmp_path: Path, name: str) -> None:
    """Without kills as well."""
    clean((await moves.moves_run(tmp_path, moves.OPERATIONS[name], kills=False, seed=4)).report)
