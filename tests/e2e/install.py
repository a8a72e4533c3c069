"""The operator and namespaces for runs on a cluster, and taking away what runs left, also dead ones.

Promise: only what carries our label is removed. Must not be done here: rings.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from tests.cluster import paths
from tests.e2e.kubectl import CommandError, run_now

LABEL: Final = "fleetlm.io/e2e=test"
"""On every namespace that runs make."""
OPERATOR_NAMESPACE: Final = "fleetlm"
_numbers = itertools.count(1)


def readme_lines() -> list[str]:
    """The commands of the README's Kubernetes section, as they stand there."""
    text = (paths.ROOT / "README.md").read_text()
    section = text.partition("## On Kubernetes\n")[2].partition("\n## ")[0]
    return [line.strip() for line in section.splitlines() if line.startswith("    ")]


def remove_everything() -> None:
    """Whatever runs, or the README's lines, left in the cluster; what is somebody else's is not touched.

    Raises:
        CommandError: the operator's namespace is somebody else's.
    """
    ours = run_now("kubectl", "get", "namespaces", "-l", LABEL, "-o", "name")
    every = run_now("kubectl", "get", "namespaces", "-o", "name")
    place = f"namespace/{OPERATOR_NAMESPACE}"
    if place in every and place not in ours:
        raise CommandError(f"{place} in the cluster that is up is not the tests': delete it, or `make cluster-down`")
    if place in ours and run_now("helm", "list", "-q", "-n", OPERATOR_NAMESPACE).strip():
        run_now("helm", "uninstall", "fleetlm", "-n", OPERATOR_NAMESPACE, "--wait")
    run_now("kubectl", "delete", "namespace", "-l", LABEL, "--timeout=120s")
    run_now("kubectl", "delete", "crd", "--ignore-not-found", "shardrings.fleetlm.io", "ringmaps.fleetlm.io")


def install_operator() -> None:
    """By the README's first line as it stands there."""
    try:
        run_now("bash", "-ec", readme_lines()[0], timeout_s=120)
    finally:  # what an installation that failed left is the tests', too
        run_now("kubectl", "label", "namespace", OPERATOR_NAMESPACE, LABEL, "--overwrite")
    run_now("kubectl", "rollout", "status", "deployment", "-n", OPERATOR_NAMESPACE, "--timeout=60s")


@contextmanager
def a_namespace(wish: str) -> Generator[str]:
    """A namespace under the restricted standard, deleted at the end."""
    short = re.sub(r"[^a-z0-9]+", "-", wish.lower().removeprefix("test_"))[:30].strip("-")
    name = f"e2e-{next(_numbers)}-{short}"
    run_now("kubectl", "create", "namespace", name)
    run_now("kubectl", "label", "namespace", name, LABEL, "pod-security.kubernetes.io/enforce=restricted")
    try:
        yield name
    finally:
        run_now("kubectl", "delete", "namespace", name, "--wait=false")
