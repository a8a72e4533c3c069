"""Runs as a script between `up` and each child: ties the child's life to its parent's, then becomes the child.

    python child.py signal PARENT_PID ARGUMENT…   Linux: the kernel kills this process when its parent dies
    python child.py pipe   PARENT_PID ARGUMENT…   elsewhere: standard input is a pipe from the parent; its end ends us

ARGUMENTs are the interpreter's, for example `-m fleetlm_shard`.

Promise: there is no moment in which the parent can die and the child stay, also when the parent is killed by SIGKILL.
Must not be done here: importing anything but the standard library (this runs without site-packages), or any work.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1
"""From <linux/prctl.h>; the setting survives exec."""


def main(arguments: list[str]) -> None:
    """Bind, then become the child."""
    how, parent, *rest = arguments
    if how == "signal":
        _die_with_parent(int(parent))
        os.execv(sys.executable, [sys.executable, "-P", *rest])  # noqa: S606  # no shell is wanted
    _die_with_pipe()
    _become(rest)


def _die_with_parent(parent_pid: int) -> None:
    """Ask the kernel first and look second: a parent that died before the first was told is noticed by the second."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def _die_with_pipe() -> None:
    """The parent alone holds the other end and never writes; reading ends when it is gone, for whatever reason."""

    def watch() -> None:
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _become(arguments: list[str]) -> None:
    """Do what the interpreter does with these arguments; exec would end the watching thread."""
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
