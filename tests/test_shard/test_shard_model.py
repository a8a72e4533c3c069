"""Random histories against a model: asked anything in any order, over reboots, a shard answers what the model does."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest

from fleetlm_common import rpc
from fleetlm_common.control import RingSpec
from fleetlm_common.errors import Invalid
from tests.support.memorycontrol import MemoryControlPlane
from tests.support.rpcclient import RpcClient, fragment
from tests.support.shardrig import SLOTS, Rig, RigClock, shard_rig
from tests.support.simdisk import SimVolume

STEPS = 160
SESSIONS = ["a", "b", "ü"]
TEXTS = ["one", "two", "three"]


@dataclass
class Known:
    """What a session must be."""

    messages: list[str] = field(default_factory=list[str])
    keys: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])
    cursors: dict[str, int] = field(default_factory=dict[str, int])


class World:
    """A shard, its model, and what may happen to both."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.volume = SimVolume()
        self.clock = RigClock()
        self.control = MemoryControlPlane(RingSpec(uid="ring-1", slots=SLOTS, shards=1))
        self.known = {name: Known() for name in SESSIONS}
        self.lives = 0
        self.stack = AsyncExitStack()
        self.rig: Rig
        self.client: RpcClient

    async def boot(self) -> None:
        """A new process on the volume; the one before ended without a word."""
        await self.stack.aclose()
        self.stack = AsyncExitStack()
        self.lives += 1
        self.rig = await self.stack.enter_async_context(
            shard_rig(
                self.volume,
                clock=self.clock,
                control=self.control,
                process=f"life-{self.lives}",
                hot_bytes_max=1024 * 1024,
            )
        )
        self.client = await self.stack.enter_async_context(await self.rig.client())

    async def append(self) -> None:
        """Some entries: new keys, old keys, right and wrong contents and `expected_seq`."""
        name = self.chance.choice(SESSIONS)
        known = self.known[name]
        entries: list[rpc.Entry] = []
        for _ in range(self.chance.randint(1, 3)):
            keys = self.chance.sample([f"k{number}" for number in range(40)], self.chance.randint(1, 3))
            drafts = [rpc.Draft(key, fragment(self.chance.choice(TEXTS))) for key in keys]
            near = len(known.messages) + self.chance.randint(-1, 2)
            entries.append(rpc.Entry(drafts, near if self.chance.random() < 0.3 else None))
        results = await self.client.append_entries(name, *entries)
        assert len(results) == len(entries)
        refusals: list[rpc.EntryResult] = []
        for entry, result in zip(entries, results, strict=True):
            self.judge(known, entry, result, refusals)
        for result in refusals:
            assert result.error is not None
            assert result.error.last_seq == len(known.messages)

    def judge(self, known: Known, entry: rpc.Entry, result: rpc.EntryResult, refusals: list[rpc.EntryResult]) -> None:
        """Compare one entry's result with what must have happened, and make it so in the model."""
        texts = [draft.fragment.decode() for draft in entry.drafts]
        hits = [known.keys.get(draft.key) for draft in entry.drafts]
        if any(hit is not None and hit[1] != text for hit, text in zip(hits, texts, strict=True)):
            assert result.error is not None
            assert result.error.code == "IDEMPOTENCY_CONFLICT"
            return
        if None in hits and entry.expected_seq is not None and entry.expected_seq != len(known.messages):
            assert result.error is not None
            assert result.error.code == "CONFLICT"
            refusals.append(result)
            return
        assert result.error is None
        for draft, text, hit, ack in zip(entry.drafts, texts, hits, result.acks, strict=True):
            if hit is None:
                known.messages.append(text)
                known.keys[draft.key] = (len(known.messages), text)
                assert (ack.seq, ack.deduped) == (len(known.messages), False)
            else:
                assert (ack.seq, ack.deduped) == (hit[0], True)

    async def mark_read(self) -> None:
        """Forward, backward, beyond."""
        name = self.chance.choice(SESSIONS)
        known = self.known[name]
        who, seq = self.chance.choice(["x", "y"]), self.chance.randint(0, len(known.messages) + 1)
        if seq > len(known.messages):
            with pytest.raises(Invalid) as refused:
                await self.client.mark_read(name, who, seq)
            assert refused.value.last_seq == len(known.messages)
            return
        known.cursors[who] = max(known.cursors.get(who, 0), seq)
        assert await self.client.mark_read(name, who, seq) == known.cursors[who]

    async def read(self) -> None:
        """A page somewhere."""
        name = self.chance.choice(SESSIONS)
        last_seq = len(self.known[name].messages)
        after, limit = self.chance.randint(0, last_seq), self.chance.randint(1, 20)
        page = await self.client.read(name, after=after, limit=limit)
        assert (page.gap, page.last_seq) == (None, last_seq)
        assert page.first_seq == after + 1
        assert len(page.messages) == min(limit, last_seq - after)

    async def upkeep(self) -> None:
        """A checkpoint, an eviction of everything that may leave."""
        if self.chance.random() < 0.5:
            assert await self.rig.shard.upkeep.checkpoint()
        for number in range(20):
            await self.client.info(f"filler-{self.chance.randint(0, 10_000)}-{number}")
        self.rig.shard.memory.sessions._bytes_max = 0
        self.rig.shard.memory.sessions.evict()
        self.rig.shard.memory.sessions._bytes_max = 1024 * 1024
        self.clock.advance(0.5)

    async def check(self) -> None:
        """All of it."""
        for name, known in self.known.items():
            messages = await self.client.read_all(name)
            assert [message["seq"] for message in messages] == list(range(1, len(known.messages) + 1))
            texts = [fragment(str(message["content"])).decode() for message in messages]
            assert texts == known.messages
            for who, seq in known.cursors.items():
                assert await self.client.mark_read(name, who, 0) == seq


@pytest.mark.parametrize("seed", range(6))
async def test_random_histories(seed: int) -> None:
    """Appends, retries, conflicts, marks, pages, checkpoints, evictions and sudden ends, in any order."""
    world = World(seed)
    await world.boot()
    steps = [world.append] * 8 + [world.mark_read] * 3 + [world.read] * 3 + [world.upkeep] * 2 + [world.boot]
    for _ in range(STEPS):
        await world.chance.choice(steps)()
    await world.check()
    await world.boot()
    await world.check()
    await world.stack.aclose()
