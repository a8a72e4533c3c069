"""Settings of the controller: `FLEETLM_CONTROLLER_<FIELD>`, read once; docs/operations/configuration.md shows them.

Promise: the controller starts with every field known and in range, or does not start and says which variable is wrong.
Must not be done here: reading files or the environment (`__main__` does).
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from fleetlm_common.config import host_port

PREFIX: Final = "FLEETLM_CONTROLLER_"


class ControllerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The controller's settings; each with its default and reason."""

    control: Annotated[str, Meta(min_length=1)]
    """Where spec and ring map are: `file:/folder`."""
    ops_listen: str
    """host:port for health and metrics; port 0 takes a free one."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Events below it are dropped."""
    log_style: Literal["json", "text", "auto"] = "auto"
    """How events look; `auto`: text on a terminal, else JSON."""

    def __post_init__(self) -> None:
        """Refuse what cannot be listened on."""
        host_port(self.ops_listen, variable=PREFIX + "OPS_LISTEN")
