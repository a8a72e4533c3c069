"""A process without memory ends; one with another mistake goes on."""

from __future__ import annotations

import asyncio

import pytest

from fleetlm_common.outofmemory import end_when_out_of_memory


@pytest.mark.parametrize(("error", "ended"), [(MemoryError(), [74]), (ValueError("x"), [])])
async def test_only_a_lack_of_memory_ends_the_process(error: Exception, ended: list[int]) -> None:
    """Whatever callback it comes from, before the next one runs."""
    statuses: list[int] = []
    order: list[str] = []
    loop = asyncio.get_running_loop()

    def fails() -> None:
        raise error

    def end(status: int) -> None:
        statuses.append(status)
        order.append("end")

    end_when_out_of_memory(loop, status=74, end=end)
    loop.call_soon(fails)
    loop.call_soon(order.append, "next")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert statuses == ended
    assert order == (["end", "next"] if ended else ["next"])
