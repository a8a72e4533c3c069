"""Fence and log together: the elder frozen before every file operation of its boot and of its appends.

At that operation the younger takes the volume by silence, boots the log, appends and is durable; then the elder goes on
as if nothing had happened. What it acknowledged is in the younger's log; what it writes now is never read by anybody.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

from fleetlm_shard.lanes import inline_lanes
from fleetlm_shard.log import Durable, Log
from fleetlm_shard.log_types import LogStopped
from fleetlm_shard.records import Message
from fleetlm_shard.recovery import LogBoot
from fleetlm_shard.volume import take_volume
from fleetlm_shard.volume_types import Fenced
from tests.support.faults import Op
from tests.support.logkit import SMALL, message
from tests.support.simdisk import SimDisk, SimVolume
from tests.support.volumes import OURS, Time


@dataclass
class Life:
    """What one process read at its boot and acknowledged afterwards: messages in order."""

    term: int = 0
    read: list[Message] = field(default_factory=list[Message])
    acked: list[Message] = field(default_factory=list[Message])
    ended: str = ""


async def live(disk: SimDisk, life: Life, texts: list[str]) -> None:
    """Boot, append one message a text, exit; everything that a process does, in its order."""
    time = Time()
    try:
        volume = await take_volume(
            disk, identity=OURS, pod_uid=disk.name, boot_id=disk.name, clock=time, sleep=time.sleep
        )
        life.term = volume.term
        boot = LogBoot.open(disk, volume, SMALL, entropy=random.Random(volume.term))
        life.read = [record for _, record in boot.replay() if isinstance(record, Message)]
        await append_all(boot, life, texts)
    except (Fenced, LogStopped, OSError) as error:  # OSError: the younger has cleared its temporary files away
        life.ended = type(error).__name__
        return
    life.ended = "returned"


async def append_all(boot: LogBoot, life: Life, texts: list[str]) -> None:
    """Append each text after the one before is durable."""
    loop = asyncio.get_running_loop()
    stopped: list[BaseException] = []

    def on_durable(entries: list[Durable]) -> None:
        life.acked += [record for _, record, _ in entries if isinstance(record, Message)]

    log = Log(boot.cut(), lanes=inline_lanes(loop), loop=loop, on_durable=on_durable, on_stopped=stopped.append)
    log.start()
    for number, text in enumerate(texts, len(life.read) + 1):
        log.append(message("s", number, text=text), None)
        while log.stats.queued_records and not stopped:
            await log.look()
    await log.close()


def run_in_thread(disk: SimDisk, texts: list[str]) -> Life:
    """A life while another process of this thread's loop stands still."""
    life = Life()
    thread = threading.Thread(target=lambda: asyncio.run(live(disk, life, texts)))
    thread.start()
    thread.join()
    disk.kill()
    return life


@dataclass
class Freeze:
    """At the elder's nth operation the whole life of the younger takes place."""

    world: SimVolume
    at: int
    seen: int = 0
    where: str = ""
    younger: Life = field(default_factory=Life)

    def __call__(self, op: Op) -> None:
        """Hook of the volume."""
        if op.process != "elder":
            return
        self.seen += 1
        if self.seen == self.at:
            self.where = f"{op.name} {op.path}"
            self.younger = run_in_thread(self.world.process("younger"), ["young"] * 3)


def judge(where: str, lives: list[Life], last: Life) -> None:
    """Nothing shown is lost; nothing that was written after the cut is read."""
    served = sorted((life for life in lives if life.acked), key=lambda life: life.term)
    for life, heir in pairwise([*served, last]):
        shown = [each.json for each in life.read + life.acked]
        assert [each.json for each in heir.read][: len(shown)] == shown, f"{where}: {life.term} is not in {heir.term}"
    assert served[-1].ended == "returned", where
    assert last.read == served[-1].read + served[-1].acked, f"{where}: somebody's late writes were read"


def test_an_elder_frozen_at_every_operation_of_its_life() -> None:
    """Boot, appends, rotations: wherever it stood still, it ends, unless it takes a later term; nothing is lost."""
    ends: Counter[str] = Counter()
    at = 0
    while True:
        at += 1
        world = SimVolume(split_writes=True)
        assert run_in_thread(world.process("first"), ["first"] * 2).ended == "returned"
        elder, freeze = Life(), Freeze(world, at)
        world.hooks.append(freeze)
        asyncio.run(live(world.process("elder"), elder, ["old" * 500] * 12))
        if not freeze.where:
            break
        assert freeze.younger.ended == "returned", freeze.where
        assert len(freeze.younger.acked) == 3, freeze.where
        judge(freeze.where, [elder, freeze.younger], run_in_thread(world.process("third"), []))
        if elder.term < freeze.younger.term:
            assert elder.ended != "returned" or len(elder.acked) == 12, f"{freeze.where}: it served on"
        ends[elder.ended] += 1
    assert at > 100
    assert set(ends) <= {"Fenced", "LogStopped", "FileNotFoundError", "returned"}
    assert ends["Fenced"] > 10
    assert ends["LogStopped"] > 50
