"""What every test run has: Ctrl-C that works in processes that tests start.

A run in the background of a shell inherits SIGINT as ignored, and so would every command that a test interrupts.
Must not be done here: fixtures; they stand where they are used, or in `support/`.
"""

from __future__ import annotations

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
