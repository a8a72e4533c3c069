"""A process that takes a volume and holds it: the fence of the shard without the rest of it, for tests with signals.

    python -m tests.integration.volume_holder FOLDER BOOT_ID TAKEOVER_AFTER_S

Prints `waiting`, `took N`, then keeps its term; exit status 0: asked to leave, 3: fenced, 4: the disk failed.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from fleetlm_common.clock import SystemClock
from fleetlm_common.ids import ShardName
from fleetlm_shard.disk import OsDisk
from fleetlm_shard.volume import keep_term, take_volume
from fleetlm_shard.volume_types import Fenced, Identity, VolumeError

LEFT, FENCED, FAILED = 0, 3, 4
BEAT_S = 0.05


def say(line: str) -> None:
    """To the test."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def hold(folder: Path, boot_id: str, takeover_after_s: float) -> int:
    """Take and keep; the exit status."""
    say("waiting")
    try:
        volume = await take_volume(
            OsDisk(folder),
            identity=Identity(ring_uid="ring", shard=ShardName("shard-0"), volume_id=boot_id),
            pod_uid=boot_id,
            boot_id=boot_id,
            clock=SystemClock(),
            sleep=asyncio.sleep,
            takeover_after_s=takeover_after_s,
        )
        say(f"took {volume.term} {volume.volume_id}")
        await keep_term(volume, sleep=asyncio.sleep, period_s=BEAT_S)
    except Fenced:
        return FENCED
    except VolumeError as error:
        say(str(error))
        return FAILED
    volume.close()
    return LEFT


if __name__ == "__main__":
    raise SystemExit(asyncio.run(hold(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))))
