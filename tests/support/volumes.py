"""Taking a volume in simulated time, for tests of the fence. Must not be done here: judging."""

from __future__ import annotations

from collections.abc import Callable

from fleetlm_common.ids import ShardName
from fleetlm_common.logs import Level, Value
from fleetlm_shard.disk import Disk
from fleetlm_shard.volume import Volume, take_volume
from fleetlm_shard.volume_types import Identity
from tests.support.explore import drive

OURS = Identity(ring_uid="ring-1", shard=ShardName("shard-0"), volume_id="volume-1")


class Time:
    """A clock that only sleeping moves; `meanwhile` is what others do during a sleep."""

    def __init__(self, meanwhile: Callable[[float], None] = lambda now_s: None, *, rate: float = 1.0) -> None:
        self.now_s = 0.0
        self.meanwhile = meanwhile
        self.rate = rate

    def monotonic_s(self) -> float:
        return self.now_s

    def now_ms(self) -> int:
        return 0

    def now_us(self) -> int:
        return 0

    async def sleep(self, seconds: float) -> None:
        self.now_s += seconds * self.rate
        assert self.now_s < 1000, "waited for ever"
        self.meanwhile(self.now_s)


class Events:
    """Remembers events."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def event(self, name: str, /, *, level: Level = "info", **values: Value) -> None:
        self.names.append(name)


def take(
    disk: Disk,
    boot_id: str,
    *,
    identity: Identity = OURS,
    time: Time | None = None,
    log: Events | None = None,
    takeover_after_s: float = 10.0,
    pod_uid: str | None = None,
) -> Volume:
    """`take_volume` to its end, in simulated time."""
    time = time or Time()
    return drive(
        take_volume(
            disk,
            identity=identity,
            pod_uid=f"pod-{boot_id}" if pod_uid is None else pod_uid,
            boot_id=boot_id,
            clock=time,
            sleep=time.sleep,
            log=log,
            takeover_after_s=takeover_after_s,
        )
    )
