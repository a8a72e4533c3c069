"""Control groups: one top group a node and hierarchy, so that what a node leaves behind is found and removed.

Both layouts are handled: version 1 (a hierarchy for each controller; what was run here) and version 2 (one; not run).
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Final

from tests.cluster import paths

ROOT: Final = Path("/sys/fs/cgroup")
CONTROLLERS: Final = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids")


def make(node: str) -> None:
    """Makes the node's top group in every hierarchy."""
    name = f"{paths.PREFIX}{node}"
    if _is_unified():
        _enable(ROOT)
        (ROOT / name).mkdir(exist_ok=True)
        _enable(ROOT / name)
        return
    for hierarchy in _hierarchies():
        (hierarchy / name).mkdir(exist_ok=True)
        for setting in ("cpuset.cpus", "cpuset.mems"):  # a new cpuset is empty, and nothing runs in an empty one
            if (hierarchy / setting).exists():
                (hierarchy / name / setting).write_text((hierarchy / setting).read_text())


def kill_all() -> None:
    """Kills every process of every group of ours: containers and what they started."""
    for top in _tops():
        for group in [top, *(path for path in top.rglob("*") if path.is_dir())]:
            _thaw(group)
            for pid in _pids(group):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue


def members() -> set[int]:
    """Pids of processes in our groups."""
    return {pid for top in _tops() for group in [top, *top.rglob("*")] if group.is_dir() for pid in _pids(group)}


def remove() -> list[str]:
    """Removes our groups, deepest first; returns what could not be removed."""
    left: list[str] = []
    for top in _tops():
        below = sorted((path for path in top.rglob("*") if path.is_dir()), key=lambda path: -len(path.parts))
        for group in [*below, top]:
            try:
                group.rmdir()
            except OSError as error:
                left.append(f"{group}: {error}")
    return left


def _is_unified() -> bool:
    return (ROOT / "cgroup.controllers").exists()


def _hierarchies() -> list[Path]:
    return [path for path in ROOT.iterdir() if path.is_dir() and not path.is_symlink()]


def _tops() -> list[Path]:
    places = [ROOT] if _is_unified() else _hierarchies()
    return [found for place in places for found in place.glob(f"{paths.PREFIX}*") if found.is_dir()]


def _enable(group: Path) -> None:
    have = (group / "cgroup.controllers").read_text().split()
    (group / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in CONTROLLERS if name in have))


def _thaw(group: Path) -> None:
    """A frozen process takes no SIGKILL before it is thawed (version 1)."""
    for file, word in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
        if (group / file).exists():
            (group / file).write_text(word)


def _pids(group: Path) -> list[int]:
    try:
        return [int(pid) for pid in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []
