"""A wall clock that jumps, for some processes only: a library that is loaded before theirs (`clockstep.c`)."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_suffix(".c")


class ClockStep:
    """Started with `env`, a process sees the machine's time plus what was last set.

    Args:
        folder: for the library and the file that it reads.

    Raises:
        CalledProcessError: there is no C compiler.
    """

    def __init__(self, folder: Path) -> None:
        library, self._file = folder / "clockstep.so", folder / "clockstep"
        self._file.write_bytes(bytes(8))
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(_SOURCE)], check=True)
        self.env = {"LD_PRELOAD": str(library), "CLOCKSTEP_FILE": str(self._file)}

    def set(self, step_s: int) -> None:
        """From now on their clock is that far from the machine's."""
        with self._file.open("r+b") as file:
            file.write(struct.pack("@l", step_s))
