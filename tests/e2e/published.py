"""The images' names as the chart asks for them, and the version that tests upgrade to."""

from __future__ import annotations

from typing import Final

import yaml

from tests.cluster import images, paths

UPGRADE: Final = "0.1.0-upgraded"
"""The same images by another tag: pods are replaced as in any upgrade."""
BAD: Final = "0.1.0-nowhere"
"""A tag that no node has."""

CLUSTER_GOES: Final = "E2E_CLUSTER_GOES"
"""Set when the cluster is taken down after the tests: nothing needs to be uninstalled from it one by one.

It does not begin as the product's variables do: those that the product does not know it refuses.
"""


def published(target: str, version: str | None = None) -> str:
    """What a ring that says nothing else, of this version, runs."""
    values = yaml.safe_load((paths.ROOT / "charts" / "fleetlm" / "values.yaml").read_text())
    return f"{values['image']['registry']}/fleetlm-{target}:{version or images.version()}"
