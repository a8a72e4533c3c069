"""The real shard process: what it says survives its death, and what it refuses it says why."""

from __future__ import annotations

import signal
from pathlib import Path

from tests.support.rpcclient import RpcClient
from tests.support.shardprocess import ShardRing


async def test_an_acknowledged_message_survives_sigkill(tmp_path: Path) -> None:
    """Acks, seqs, ids and bytes are the same after a crash; a retry with the same key gets the first answer."""
    ring = ShardRing(tmp_path)
    async with ring.shard() as shard, await shard.client() as client:
        first = await client.append("s", "one", "two")
        assert [(ack.seq, ack.deduped) for ack in first] == [(1, False), (2, False)]
        before = await client.read("s", after=0)
        stream = await client.subscribe("s", after=1)
        assert await stream.next() == (2, [await _message(client, "s", 2)])
        await shard.kill()
    async with ring.shard() as shard, await shard.client() as client:
        after = await client.read("s", after=0)
        assert after.messages == before.messages
        again = await client.append("s", "one", "two")
        assert [(ack.seq, ack.id, ack.inserted_at, ack.deduped) for ack in again] == [
            (ack.seq, ack.id, ack.inserted_at, True) for ack in first
        ]
        assert (await client.info("s")).last_seq == 2
        shard.signal(signal.SIGTERM)
        assert await shard.ended() == 0


async def _message(client: RpcClient, session: str, seq: int) -> dict[str, object]:
    return (await client.read_all(session, after=seq - 1))[0]
