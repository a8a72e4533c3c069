"""What a number was measured on: machine, versions, disk; and what it cost: CPU seconds and memory of each process.

Promise: read from `/proc` and `git`, nothing guessed: what cannot be known is null. Must not be done here: load.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

PROBE_WRITES: Final = 200
PROBE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Usage:
    """A process at one moment."""

    name: str
    pid: int
    cpu_s: float
    rss_bytes: int


def usage(processes: Iterable[tuple[str, int]]) -> dict[str, Usage]:
    """CPU and memory of processes (name, pid); those that are gone are left out."""
    found: dict[str, Usage] = {}
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    for name, pid in processes:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found[name] = Usage(name, pid, (int(fields[11]) + int(fields[12])) / ticks, int(fields[21]) * page)
    return found


def machine_cpu_s() -> tuple[float, float]:
    """CPU seconds of everything on this machine so far, and those that the hypervisor kept for others (steal)."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    user, nice, system, _idle, _wait, irq, softirq, steal = (field / os.sysconf("SC_CLK_TCK") for field in fields)
    return user + nice + system + irq + softirq, steal


def others(before: tuple[float, float], after: tuple[float, float], used: list[dict[str, Any]]) -> dict[str, float]:
    """CPU seconds that went elsewhere between two moments: to processes that are not listed, and to other guests."""
    own = sum(process["cpu_s"] or 0.0 for process in used)
    return {
        "processes_s": round(max(0.0, after[0] - before[0] - own), 2),
        "steal_s": round(after[1] - before[1], 2),
    }


def peak_rss_bytes(pid: int) -> int:
    """The most memory that a process ever had resident; 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def spent(before: dict[str, Usage], after: dict[str, Usage]) -> list[dict[str, Any]]:
    """What each process used between two moments; one that was restarted meanwhile has no CPU figure."""
    return [
        {
            "name": name,
            "cpu_s": round(now.cpu_s - before[name].cpu_s, 3) if _same(before.get(name), now) else None,
            "rss_bytes": now.rss_bytes,
        }
        for name, now in after.items()
    ]


def _same(before: Usage | None, now: Usage) -> bool:
    return before is not None and before.pid == now.pid


def provenance(folder: Path) -> dict[str, Any]:
    """Where a number comes from; `folder` is where the fsync probe writes."""
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "fleetlm": metadata.version("fleetlm"),
        "python": platform.python_version(),
        "uvloop": _version("uvloop"),
        "kernel": platform.release(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "fdatasync": fsync_probe(folder),
    }


def fsync_probe(folder: Path) -> dict[str, float] | None:
    """Milliseconds of 4 KiB written and synced into a prepared file; None when nothing can be written there."""
    path = folder / f".fsync-probe-{os.getpid()}"
    times: list[float] = []
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError:
        return None
    try:
        os.pwrite(descriptor, b"\0" * PROBE_BYTES * PROBE_WRITES, 0)
        os.fdatasync(descriptor)
        for at in range(PROBE_WRITES):
            begin = time.perf_counter()
            os.pwrite(descriptor, b"x" * PROBE_BYTES, at * PROBE_BYTES)
            os.fdatasync(descriptor)
            times.append((time.perf_counter() - begin) * 1000)
    except OSError:
        return None
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)
    times.sort()
    return {
        "p50_ms": round(times[len(times) // 2], 4),
        "p99_ms": round(times[int(len(times) * 0.99)], 4),
        "max_ms": round(times[-1], 4),
    }


def _commit() -> str | None:
    """The commit of the sources that run; with `+` when files differ from it."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return None if not commit else commit + ("+" if changed else "")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)  # noqa: S603 - fixed words
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
