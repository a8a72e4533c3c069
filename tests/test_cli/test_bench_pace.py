"""The clock of the open loop."""

from __future__ import annotations

import asyncio
import time

import pytest

from fleetlm_cli.benchpace import Pace


async def test_what_is_due_is_due_now_and_no_period_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each moment the newest that is due was due less than a period ago, and the next one is not due yet."""
    now_s = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now_s)
    pace = Pace(1000, tick=lambda: None)
    pace.start()
    pace.stop()
    for step in range(5000):
        now_s = 100.00031 + step * 0.000375
        due = pace.due()
        assert pace.due_at_s(due - 1) <= now_s < pace.due_at_s(due)


async def test_each_is_told_soon_after_it_is_due() -> None:
    """Told for each, in the loop; the generator is not late by a period of its own."""
    late: list[float] = []
    ended = asyncio.Event()

    def tick() -> None:
        late.extend(time.perf_counter() - pace.due_at_s(number) for number in range(len(late), pace.due()))
        if len(late) >= 40:
            ended.set()

    pace = Pace(200, tick=tick)
    pace.start()
    await asyncio.wait_for(ended.wait(), 30)
    pace.stop()
    assert sorted(late)[len(late) // 2] < 1 / 200, "half of them a period late"
