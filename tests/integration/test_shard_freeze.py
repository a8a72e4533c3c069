"""Two real shard processes on one volume: the elder stopped, the younger taking over, the elder continued."""

from __future__ import annotations

import asyncio
import fcntl
import random
import signal
from pathlib import Path

import pytest

from fleetlm_common.errors import FleetError
from fleetlm_common.filecontrol import LOCK_FILE
from fleetlm_shard.process import EXIT_FAILED, EXIT_FENCED
from tests.support.eventually import eventually
from tests.support.rpcclient import RpcClient
from tests.support.shardprocess import ShardRing

SESSIONS = [f"session-{number}" for number in range(8)]
QUICK = {"TAKEOVER_AFTER_S": "1"}
NEVER = {"TAKEOVER_AFTER_S": "3600"}

Acked = dict[tuple[str, int], str]
"""(session, seq) → text, of each acknowledgement that reached a client, whenever it came and from whom."""


async def append_on(client: RpcClient, session: str, texts: str, acked: Acked) -> None:
    """Append until the shard is gone or refuses, one after the other."""
    number = 0
    while True:
        number += 1
        text = f"{texts}-{number}"
        try:
            [ack] = await client.append(session, text, key=f"{session}-{text}")
        except (ConnectionError, FleetError, TimeoutError):
            return
        assert (session, ack.seq) not in acked, "one seq was acknowledged twice"
        acked[session, ack.seq] = text


async def held(client: RpcClient) -> Acked:
    """Everything that this shard serves."""
    return {
        (session, int(str(message["seq"]))): str(message["content"])
        for session in SESSIONS
        for message in await client.read_all(session)
    }


def assert_holds(found: Acked, acked: Acked) -> None:
    """Nothing acknowledged is lost or changed."""
    wrong = {place: (text, found.get(place)) for place, text in acked.items() if found.get(place) != text}
    assert not wrong, f"acknowledged, then lost or changed: {wrong}"


@pytest.mark.parametrize("seed", range(4))
async def test_an_elder_frozen_under_load_acknowledges_nothing_more(tmp_path: Path, seed: int) -> None:
    """SIGSTOP amid appends, takeover, appends to the younger, SIGCONT: it exits fenced, each ack is in the log."""
    ring = ShardRing(tmp_path)
    acked: Acked = {}
    chance = random.Random(seed)
    async with ring.shard(env=NEVER) as elder:
        client = await elder.client()
        load = [asyncio.create_task(append_on(client, session, "elder", acked)) for session in SESSIONS]
        enough = chance.randrange(50, 1500)
        await eventually(lambda: len(acked) >= enough, "the elder acknowledges", timeout_s=30)
        elder.signal(signal.SIGSTOP)
        async with ring.process(env=QUICK) as younger:
            await younger.wait_reason("Ready")
            async with await younger.client() as other:
                assert_holds(await held(other), acked)
                for session in SESSIONS:
                    [ack] = await other.append(session, f"younger-{session}")
                    assert (session, ack.seq) not in acked
                    acked[session, ack.seq] = f"younger-{session}"
                elder.signal(signal.SIGCONT)
                assert await elder.ended() == EXIT_FENCED
                await asyncio.gather(*load)
                assert_holds(await held(other), acked)
            await younger.kill()
    async with ring.process(env=NEVER) as third:
        await third.wait_reason("Ready")
        async with await third.client() as again:
            assert_holds(await held(again), acked)


@pytest.mark.parametrize("mark", ["term-0000000002", "log/tmp-0000000002-1", "log/0000000002-0000000001.seg"])
async def test_an_elder_frozen_in_its_boot_never_serves(tmp_path: Path, mark: str) -> None:
    """Stopped when a file of its boot has appeared, continued after the younger has served: it ends."""
    ring = ShardRing(tmp_path)
    acked: Acked = {}
    async with ring.shard(env=NEVER) as first, await first.client() as client:
        for session in SESSIONS:
            [ack] = await client.append(session, "first")
            acked[session, ack.seq] = "first"
        await first.kill()
    volume = tmp_path / "shard-0"
    async with ring.process(env=NEVER) as elder:
        seen = volume / mark
        later = volume / "log/0000000002-0000000001.seg"
        # Never with the control folder's lock in its hand: nobody could announce anything while it sleeps.
        with (ring.control_folder / LOCK_FILE).open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            await eventually(lambda: seen.exists() or later.exists(), f"the boot makes {mark}", timeout_s=30)
            elder.signal(signal.SIGSTOP)
        async with ring.process(env=QUICK) as younger, asyncio.timeout(60):
            await younger.wait_reason("Ready")
            async with await younger.client() as other:
                for session in SESSIONS:
                    [ack] = await other.append(session, "younger")
                    acked[session, ack.seq] = "younger"
                elder.signal(signal.SIGCONT)
                # Failed: it met a temporary file of its own that the younger has cleared away before it looked.
                assert await elder.ended() in {EXIT_FENCED, EXIT_FAILED}
                assert await held(other) == acked
