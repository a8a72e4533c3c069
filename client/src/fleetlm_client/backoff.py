"""Waits between tries: full jitter under a bound that doubles up to a cap.

Promise: many clients that failed at one moment come back spread over the bound; a time told by the server is a lower
limit. Must not be done here: sleeping.
"""

from __future__ import annotations

import random

DOUBLINGS_MAX = 32
"""Beyond it the bound is the cap in any sane setting; keeps the power small."""


class Backoff:
    """Counts failures in a row.

    Args:
        base_s: bound of the first wait.
        cap_s: largest bound.
        entropy: where the jitter comes from.
    """

    __slots__ = ("_base_s", "_cap_s", "_entropy", "_failures")

    def __init__(self, *, base_s: float, cap_s: float, entropy: random.Random) -> None:
        self._base_s = base_s
        self._cap_s = cap_s
        self._entropy = entropy
        self._failures = 0

    def reset(self) -> None:
        """A try went well."""
        self._failures = 0

    def next_s(self, at_least_s: float = 0.0) -> float:
        """Seconds to wait after one more failure, never less than `at_least_s` (the jitter comes on top)."""
        bound_s = min(self._cap_s, self._base_s * 2 ** min(self._failures, DOUBLINGS_MAX))
        self._failures += 1
        return at_least_s + self._entropy.uniform(0, bound_s)
