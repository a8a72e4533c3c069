"""A short kill run in every `make test`; the long one is `python -m tests.integration.kills --kills 300`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.kills import Plan, kill_run


@pytest.mark.timeout(180)
async def test_nothing_acknowledged_is_lost_whatever_is_killed(tmp_path: Path) -> None:
    """A dozen SIGKILLs, and SIGSTOPs, of shards, gateways and controller under load: no violation of any kind."""
    plan = Plan(kills=12, seed=20261123, pause_s=0.4, sessions=4, writers=4, readers=3)
    report = await kill_run(plan, tmp_path)
    assert report.violations == [], report.as_json()
    assert sum(report.killed.values()) >= 12, report.as_json()
    assert report.figures["acked"] > 100, report.as_json()
    assert report.gaps == 0, report.as_json()
