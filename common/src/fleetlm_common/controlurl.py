"""Which control plane a setting names: `file:/absolute/folder` or `kubernetes:NAMESPACE/RING`.

Promise: one reading of the setting for every component. Nothing is asked of the world here: a folder that is not there
or an API server that does not answer shows when it is used. The client of Kubernetes is imported only where it is used:
it costs a second of CPU and 26 MiB, and `fleetlm up` starts many processes. Must not be done here: anything else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fleetlm_common.config import ConfigError
from fleetlm_common.filecontrol import FileControlPlane

if TYPE_CHECKING:
    import random

    from fleetlm_common.control import ControlPlane

FORMS: Final = "file:/absolute/folder or kubernetes:NAMESPACE/RING"
_FILE = re.compile(r"file:(/(?!/).*)", re.DOTALL)
_KUBERNETES = re.compile(r"kubernetes:([a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?)/([a-z](?:[-a-z0-9]{0,61}[a-z0-9])?)")


def checked(value: str, *, variable: str) -> str:
    """Return `value` if it names a control plane.

    Raises:
        ConfigError: it does not; names the variable.
    """
    if not _FILE.fullmatch(value) and not _KUBERNETES.fullmatch(value):
        raise ConfigError(f"{variable}: {value!r} must be {FORMS}")
    return value


def from_url(value: str, *, variable: str, env: Mapping[str, str], entropy: random.Random, agent: str) -> ControlPlane:
    """The control plane that `value` names.

    Args:
        value: the setting.
        variable: its name, for errors.
        env: where the way to the API server is found: the pod's own, or `KUBECONFIG`.
        entropy: for jitter.
        agent: who asks, for the API server's log.

    Raises:
        ConfigError: it names none; names the variable.
    """
    checked(value, variable=variable)
    if (folder := _FILE.fullmatch(value)) is not None:
        return FileControlPlane(Path(folder[1]))
    from fleetlm_common.kubeapi import KubeApi
    from fleetlm_common.kubecontrol import KubernetesControlPlane

    found = _KUBERNETES.fullmatch(value)
    assert found is not None
    return KubernetesControlPlane(
        found[1], found[2], connect=lambda: KubeApi.connect(env, agent=agent), entropy=entropy
    )
