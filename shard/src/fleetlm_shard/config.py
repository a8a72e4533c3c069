"""Settings of a shard: `FLEETLM_SHARD_<FIELD>`, read once; docs/operations/configuration.md shows them.

Promise: a shard starts with every field known and in range, or does not start and says which variable is wrong.
Must not be done here: reading files or the environment (`__main__` does).
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from fleetlm_common.config import host_port
from fleetlm_common.controlurl import checked
from fleetlm_shard.keys import KEY_AGE_S_MIN
from fleetlm_shard.log_types import LogConfig

PREFIX: Final = "FLEETLM_SHARD_"
_MIB: Final = 1024 * 1024

Bytes = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]


class ShardConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A shard's settings; each with its unit, default and reason."""

    name: Annotated[str, Meta(pattern="^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
    """The shard's stable name, for example `shard-0`."""
    data: Annotated[str, Meta(min_length=1)]
    """Folder of the volume; made (0700) if its parent exists."""
    listen: str
    """host:port for gateways; port 0 takes a free one."""
    ops_listen: str
    """host:port for health, metrics and the admin API."""
    control: str
    """Where the ring map is: `file:/folder` or `kubernetes:NAMESPACE/RING`."""
    credential_file: str
    """File whose content gateways must present; never the secret itself: process lists show environments."""
    advertise_host: str = ""
    """Host that gateways connect to; empty: the one of `listen`. A pod listens on 0.0.0.0 and says its own name."""
    pod_uid: Annotated[str, Meta(max_length=128)] = ""
    """The pod's uid: only a container restarted in the same pod may use the map that it stored itself."""
    fsync: Literal["always", "interval", "never"] = "always"
    """`always`: acknowledge after fdatasync. `interval`: a machine's crash loses up to the interval. `never`: tests."""
    fsync_interval_ms: Annotated[int, Meta(ge=1, le=10_000)] = 100
    """Milliseconds between syncs with `interval`."""
    segment_bytes: Annotated[int, Meta(ge=4 * _MIB, le=1024 * _MIB)] = 64 * _MIB
    """Length of a log segment: retention deletes whole ones, a checkpoint comes with each."""
    queue_bytes_max: Annotated[int, Meta(ge=_MIB)] = 32 * _MIB
    """Appended and not yet durable; past it `TRY_AGAIN overloaded`."""
    hot_bytes_max: Annotated[int, Meta(ge=_MIB)] = 256 * _MIB
    """Memory for the newest messages and the state of sessions."""
    keys_window_s: Annotated[float, Meta(ge=KEY_AGE_S_MIN, le=86_400)] = 900.0
    """How long a key is remembered, in seconds."""
    keys_max: Positive = 100_000
    """Keys remembered when older ones may go (docs/adr/0003-key-window.md)."""
    keys_hard_max: Positive = 2_000_000
    """Keys remembered at all, about 400 bytes each; past it `TRY_AGAIN overloaded`."""
    retention_bytes: Bytes = 0
    """Delete the oldest segments beyond this size of the log; 0: never."""
    retention_age_s: Annotated[float, Meta(ge=0)] = 0.0
    """Delete segments whose newest message is older; 0: never."""
    archive_url_file: str = ""
    """File with the PostgreSQL URL of the archive, read at each connection (it may hold a password); empty: none."""
    archive_retention_s: Annotated[float, Meta(ge=0)] = 0.0
    """Delete whole weeks from the archive that ended so many seconds ago; 0: never. The least of any shard counts."""
    checkpoint_bytes: Positive = 64 * _MIB
    """Make a checkpoint when the log has grown by this: bounds what a boot reads."""
    checkpoint_sessions: Positive = 50_000
    """Make a checkpoint when so many sessions have changed: they cannot leave memory before."""
    takeover_after_s: Annotated[float, Meta(ge=1)] = 10.0
    """Take a held volume when its owner's heartbeat has stood still for so long, in seconds."""
    disk_reserve_bytes: Bytes = 64 * _MIB
    """Free space that appends never use; past it `TRY_AGAIN disk_full`."""
    connections_max: Annotated[int, Meta(ge=1, le=10_000)] = 256
    """Gateways' connections at once."""
    requests_max: Positive = 16_384
    """Requests in flight on one connection; past it `TRY_AGAIN overloaded`."""
    clean_after_s: Annotated[float, Meta(ge=0)] = 60.0
    """How long a copy of a slot that has moved away (or of a move that was aborted) stays, in seconds."""
    handover_s: Annotated[float, Meta(ge=0)] = 0.0
    """At SIGTERM: seconds that it serves on while other shards take its slots, if a controller lets them; 0: none."""
    drain_s: Annotated[float, Meta(ge=0)] = 5.0
    """At SIGTERM: seconds that the batch in flight and its answers may take before the shard ends anyway."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Events below it are dropped."""
    log_style: Literal["json", "text", "auto"] = "auto"
    """How events look; `auto`: text on a terminal, else JSON."""

    def __post_init__(self) -> None:
        """Refuse what cannot work together."""
        host_port(self.listen, variable=PREFIX + "LISTEN")
        host_port(self.ops_listen, variable=PREFIX + "OPS_LISTEN")
        if self.keys_max > self.keys_hard_max:
            raise ValueError("KEYS_MAX is greater than KEYS_HARD_MAX")
        checked(self.control, variable=PREFIX + "CONTROL")

    def log_config(self) -> LogConfig:
        """The part that the log asks for."""
        return LogConfig(
            segment_bytes=self.segment_bytes,
            queue_bytes_max=self.queue_bytes_max,
            reserve_bytes=self.disk_reserve_bytes,
            fsync=self.fsync,
            fsync_interval_ms=self.fsync_interval_ms,
        )
