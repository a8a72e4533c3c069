"""Settings of a gateway, from variables `FLEETLM_GATEWAY_<FIELD>`; docs/operations/configuration.md lists them.

Promise: a gateway starts with every setting known and in range, or says which variable is wrong and does not start.
Must not be done here: reading secrets (`process.py` does, from the file named here).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from fleetlm_common.config import ConfigError, host_port
from fleetlm_common.limits import FRAME_BYTES_MAX

Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
Millis = Annotated[int, msgspec.Meta(ge=0, le=3_600_000)]
PositiveMillis = Annotated[int, msgspec.Meta(ge=1, le=3_600_000)]
Bytes = Annotated[int, msgspec.Meta(ge=FRAME_BYTES_MAX, le=1 << 30)]


class GatewayConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a gateway may be told. Each field is the variable of its name in upper case."""

    control: str
    """The control plane: `file:/absolute/folder` or `kubernetes:NAMESPACE/RING`."""
    credential_file: str
    """File with the secret that shards ask gateways for; never the secret itself."""
    name: str = "gateway-0"
    """This gateway in logs and at the shards."""
    listen: str = "127.0.0.1:4000"
    """Where clients connect, host:port; port 0 takes a free one. Loopback unless told: exposing is a decision."""
    ops_listen: str = "127.0.0.1:4001"
    """Where health and metrics are."""
    origins: str = ""
    """Web origins (besides the gateway's own) that browsers may come from: `https://app.example`, by commas, or `*`."""
    sockets: Count = 10_000
    """Open WebSockets; one more is answered 503. Some 10 KiB each when idle."""
    topics_per_socket: Count = 256
    """Joined topics of one socket: each is a place in a session."""
    requests_per_socket: Count = 1024
    """Requests of one socket under way; one more is answered TRY_AGAIN overloaded."""
    request_bytes_per_socket: Bytes = 4 * 1024 * 1024
    """Their bytes together, which are held until the answer."""
    frames_per_second: Count = 5_000
    """Of one socket, on average; more are answered TRY_AGAIN overloaded, and too many of those close it."""
    frames_burst: Count = 10_000
    """How many may come at once."""
    write_buffer_bytes: Bytes = 512 * 1024
    """Sent to one socket and not yet taken by its network; above it nothing is sent or read until it drained."""
    stall_ms: PositiveMillis = 10_000
    """A socket with a full buffer that takes nothing for so long is closed (4002)."""
    lag_ms: PositiveMillis = 60_000
    """A socket whose buffer stays full for so long, although it takes a little, is closed (4002)."""
    heartbeat_timeout_ms: PositiveMillis = 60_000
    """A socket that sends nothing for so long is closed (4001); phoenix clients beat every 30 s."""
    drain_window_ms: Millis = 10_000
    """After SIGTERM sockets close at random moments within it, so that clients do not return all at once."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Events below it are not written."""
    log_style: Literal["json", "text", "auto"] = "auto"
    """`auto`: text on a terminal, JSON lines elsewhere."""

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not self.name or not self.name.isascii() or not self.name.replace("-", "").isalnum():
            raise ValueError("FLEETLM_GATEWAY_NAME: letters, digits and dashes")
        for variable, value in (("LISTEN", self.listen), ("OPS_LISTEN", self.ops_listen)):
            try:
                host_port(value, variable=f"FLEETLM_GATEWAY_{variable}")
            except ConfigError as error:
                raise ValueError(str(error)) from error
        for origin in self.allowed_origins:
            if origin != "*" and ("://" not in origin or origin.endswith("/")):
                raise ValueError(f"FLEETLM_GATEWAY_ORIGINS: {origin!r} is not an origin such as https://app.example")

    @property
    def allowed_origins(self) -> frozenset[str]:
        """The origins of `origins`, in lower case."""
        return frozenset(part.strip().lower() for part in self.origins.split(",") if part.strip())
