"""Helm 3 and Helm 4 as commands, and the chart.

Programs come from `tests.cluster`. Every run has a home of its own: no repositories, plugins or caches of a person.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from fleetlm_common.kubeapi import Object
from tests.cluster import paths
from tests.cluster.binaries import PROGRAMS, build

CHART: Final = Path(__file__).resolve().parents[2] / "charts" / "fleetlm"
HELMS: Final = ("helm", "helm3")
"""`helm` is version 4."""
KUBERNETES: Final = paths.KUBERNETES.removeprefix("v")
"""What templates are rendered for: a Helm built from its module believes in one of long ago."""
COMMAND_S: Final = 120.0
"""Longest command; a busy machine of two cores needs seconds."""


class HelmError(Exception):
    """What Helm said when it did not do it."""


def helm(program: str, *arguments: str, env: Mapping[str, str] | None = None) -> str:
    """Run it; returns what it printed.

    Raises:
        HelmError: it failed.
    """
    assert program in HELMS
    build([each for each in PROGRAMS if each.name == program])
    with tempfile.TemporaryDirectory() as home:
        places = {f"HELM_{kind}_HOME": home for kind in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(
            [str(paths.BINARIES / program), *arguments],
            env={**os.environ, **places, **(env or {})},
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
    if done.returncode:
        raise HelmError(done.stdout + done.stderr)
    return done.stdout


def rendered(program: str, *arguments: str, release: str = "fleetlm", namespace: str = "system") -> list[Object]:
    """What `helm template` makes of the chart, without the custom resources."""
    text = helm(
        program, "template", release, str(CHART), "--namespace", namespace, "--kube-version", KUBERNETES, *arguments
    )
    found: list[dict[str, Any]] = [each for each in yaml.safe_load_all(text) if each]
    return [each for each in found if each["kind"] != "CustomResourceDefinition"]
