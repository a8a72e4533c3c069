"""The cluster's long-lived processes: started into a host's network, recorded on disk, stopped by record.

A record holds pid *and* start time: after a crash the same pid may be somebody else's, and then it is left alone.
Records keep the command too, so that another Python process (the tests) stops, freezes and restarts what `make cluster`
started.
Must not be done here: finding processes by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from tests.cluster import kind, paths
from tests.cluster.say import ClusterError
from tests.cluster.waiting import until

STOP_TIMEOUT_S: Final = 10.0
LOG_TAIL_LINES: Final = 30
FOLDER: Final = paths.RUN / "processes"
LOGS: Final = paths.RUN / "logs"
_started_here: Final[list[subprocess.Popen[bytes]]] = []
"""Kept from the garbage collector, which would warn of a process that still runs: these outlive this one on purpose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process as recorded: `host` is the network that it runs in, `order` its place in the order of starts."""

    name: str
    host: str
    command: list[str]
    pid: int
    started: str
    order: int


def in_host(host: str, *command: object) -> list[str]:
    """The command line that runs `command` in `host`'s network.

    nsenter and not `ip netns exec`, for the latter mounts a fresh /sys, where kubelet finds no cgroups.
    """
    if host == "client" and kind.asked():
        return kind.in_client(*command)
    return ["nsenter", f"--net=/run/netns/{paths.PREFIX}{host}", *map(str, command)]


def run(*command: object, host: str | None = None, stdin: str | None = None, timeout_s: float = 120.0) -> str:
    """Runs a command to its end and returns what it printed.

    Raises:
        ClusterError: it failed or took too long; carries its own words.
    """
    line = in_host(host, *command) if host else [str(part) for part in command]
    try:
        done = subprocess.run(line, input=stdin, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{' '.join(line)}: not done after {timeout_s:.0f} s") from error
    if done.returncode:
        raise ClusterError(f"{' '.join(line)}: exit {done.returncode}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def start(name: str, host: str, *command: object, env: dict[str, str] | None = None) -> Process:
    """Starts a process in a session of its own, its output in `LOGS/<name>.log`, and records it."""
    LOGS.mkdir(parents=True, exist_ok=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    line = in_host(host, *command)
    with (LOGS / f"{name}.log").open("ab") as log:
        child = subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=os.environ | (env or {})
        )
    _started_here.append(child)
    made = Process(
        name=name,
        host=host,
        command=[str(part) for part in command],
        pid=child.pid,
        started=_started(child.pid) or "",
        order=len(records()),
    )
    whole = FOLDER / f"{name}.json.new"  # nodes start at once, each in a thread that reads the others' records
    whole.write_text(json.dumps(asdict(made)))
    whole.rename(FOLDER / f"{name}.json")
    return made


def records() -> list[Process]:
    """Everything ever recorded for this cluster, dead or alive, in order of first start."""
    found = [Process(**json.loads(each.read_text())) for each in FOLDER.glob("*.json")] if FOLDER.exists() else []
    return sorted(found, key=lambda process: process.order)


def record(name: str) -> Process:
    """The record of `name`.

    Raises:
        ClusterError: there is none.
    """
    for process in records():
        if process.name == name:
            return process
    raise ClusterError(f"no process {name}; there are {', '.join(p.name for p in records()) or 'none'}")


def alive(process: Process) -> bool:
    """Whether that very process runs: a zombie does not, and a stranger with its pid is not it."""
    return _started(process.pid) == process.started != ""


def send(process: Process, number: signal.Signals) -> None:
    """Sends a signal, to that very process or to nobody."""
    if alive(process):
        os.kill(process.pid, number)


def stop(process: Process, *, kill: bool = False) -> None:
    """Ends a process: asked first unless `kill`, killed when it does not listen; returns when it has ended."""
    send(process, signal.SIGKILL if kill else signal.SIGTERM)
    send(process, signal.SIGCONT)
    try:
        until(f"{process.name} ends", lambda: not _alive_after_reap(process), timeout_s=STOP_TIMEOUT_S)
    except ClusterError:
        send(process, signal.SIGKILL)
        until(f"{process.name} is killed", lambda: not _alive_after_reap(process), timeout_s=STOP_TIMEOUT_S)


def again(name: str) -> Process:
    """Starts a recorded process once more with the command that it had; one that still runs is left as it is."""
    old = record(name)
    if alive(old):
        return old
    made = start(name, old.host, *old.command)
    kept = replace(made, order=old.order)
    (FOLDER / f"{name}.json").write_text(json.dumps(asdict(kept)))
    return kept


def must_live(*names: str) -> None:
    """Raises when one of `names` has died, with the end of its log.

    Raises:
        ClusterError: as said.
    """
    for name in names:
        process = record(name)
        if not _alive_after_reap(process):
            raise ClusterError(f"{name} (pid {process.pid}) has ended; the end of its log:\n{tail(name)}")


def tail(name: str, lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a process's log."""
    log = LOGS / f"{name}.log"
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"


def _started(pid: int) -> str | None:
    """The start time of a living process in clock ticks since boot; None when there is none or only a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def _alive_after_reap(process: Process) -> bool:
    with contextlib.suppress(ChildProcessError):  # another process's child: init reaps it
        os.waitpid(process.pid, os.WNOHANG)
    return alive(process)
