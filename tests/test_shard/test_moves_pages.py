"""What a move brings in several answers: nothing is left out between two of them, whatever their sizes."""

from __future__ import annotations

import pytest

from fleetlm_common.limits import PAGE_BYTES_MAX
from fleetlm_shard import exporter, importer
from tests.support.movesrig import moves_rig, session_in
from tests.test_shard.test_moves_faults import whole

SLOT = 3
EARLY = [session_in(SLOT, number=number) for number in range(0, 12, 2)]
LATE = [session_in(SLOT, number=number) for number in range(1, 12, 2)]
ELSEWHERE = [session_in(5, number=number) for number in range(8)]


@pytest.mark.parametrize("states", [1, 2, 3, 500])
@pytest.mark.parametrize("names", [1, 2, 3, 512])
@pytest.mark.parametrize("page_bytes", [500, PAGE_BYTES_MAX])
async def test_a_pass_names_every_session(
    page_bytes: int, names: int, states: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some are in the checkpoint only, as after a boot, some in memory only: no page of the one hides the other."""
    monkeypatch.setattr(exporter, "PAGE_BYTES_MAX", page_bytes)
    monkeypatch.setattr(exporter, "SCAN_NAMES", names)
    monkeypatch.setattr(exporter, "SCAN_PAGE_NAMES", names)
    monkeypatch.setattr(importer, "STATES", states)
    async with moves_rig() as ring:
        async with await ring[0].client() as client:
            for session in [*EARLY, *ELSEWHERE]:
                await client.append(session, "early")
        assert await ring[0].shard.upkeep.checkpoint()
        await ring.restart(0)
        async with await ring[0].client() as client:
            for session in LATE:
                await client.append(session, "late")
        await ring.move([SLOT], 0, 1)
        assert ring[1].shard.moves.mismatches == 0
        for session in [*EARLY, *LATE]:
            await whole(ring, 1, session, 1)


@pytest.mark.parametrize(("limit", "value"), [("STATES_MAX", 2), ("PAGE_BYTES_MAX", 500)])
async def test_what_changed_comes_in_as_many_rounds_as_it_takes(
    limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full answer is not the last one: else count and sum would differ, and all would be asked for once more."""
    monkeypatch.setattr(exporter, limit, value)
    async with moves_rig() as ring, await ring[0].client() as client:
        move = await ring.begin([SLOT], 0, 1)
        await ring.says(move, "Ready")
        for session in [*EARLY, *LATE]:
            await client.append(session, "changed")
        await ring.seal(move)
        await ring.says(move, "Confirmed")
        assert ring[1].shard.moves.mismatches == 0
        await ring.commit(move)
        for session in [*EARLY, *LATE]:
            await whole(ring, 1, session, 1)
