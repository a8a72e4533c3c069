"""What decoding bytes from outside may raise; for the `except` at each border where they come in.

Promise: whatever bytes a peer or a file holds, a typed msgspec decoder raises one of these or nothing. Text that is not
UTF-8 is Python's own `UnicodeDecodeError`, no msgspec error, and what is nested too deeply is a `RecursionError`: a
border that named msgspec's errors only let a frame end its whole connection.
"""

from __future__ import annotations

from typing import Final

import msgspec

UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""Every way in which bytes cannot be read."""
