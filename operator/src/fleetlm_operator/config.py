"""Settings: `FLEETLM_CONTROLLER_<FIELD>` of the controller over files, `FLEETLM_OPERATOR_<FIELD>` of the operator.

Read once; docs/operations/configuration.md shows them. Promise: the process starts with every field known and in range,
or does not start and says which variable is wrong. Must not be done here: reading files or the environment
(`__main__` does).
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from fleetlm_common.config import host_port

PREFIX: Final = "FLEETLM_CONTROLLER_"
OPERATOR_PREFIX: Final = "FLEETLM_OPERATOR_"


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


class OperatorConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The Kubernetes operator's settings; each with its default and reason."""

    pod_name: Annotated[str, Meta(min_length=1, max_length=253)]
    """Who leads, in the Lease: different for each replica."""
    pod_namespace: Annotated[str, Meta(min_length=1, max_length=63)]
    """Where the Lease is, and who may reach operations ports through NetworkPolicies."""
    namespaces: str = ""
    """Namespaces to look after, by commas; empty: all of them."""
    image_registry: str = ""
    """Host and path before `/fleetlm-shard`, for rings that do not say."""
    version: str = ""
    """Version of new rings that do not say; empty: the operator's own."""
    lease_name: Annotated[str, Meta(min_length=1, max_length=253)] = "fleetlm-operator"
    """Operators that share it take turns."""
    deployment: Annotated[str, Meta(max_length=253)] = ""
    """The operator's own Deployment: the Lease is deleted with it; empty: it stays."""
    ops_listen: str = "0.0.0.0:4200"
    """host:port for health and metrics."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Events below it are dropped."""
    log_style: Literal["json", "text", "auto"] = "auto"
    """How events look; `auto`: text on a terminal, else JSON."""

    def __post_init__(self) -> None:
        """Refuse what cannot be listened on."""
        host_port(self.ops_listen, variable=OPERATOR_PREFIX + "OPS_LISTEN")

    @property
    def only(self) -> tuple[str, ...]:
        """The namespaces of `namespaces`."""
        return tuple(part.strip() for part in self.namespaces.split(",") if part.strip())
