"""More sessions than slots, in some of the runs in which slots move; mostly with small pages of a move.

Promise: a move brings several sessions, with one request and with many, and is cut off between pages; writers of
several sessions meet in what is sealed. Chance is its own: other runs stay the same. Must not be done here: faults.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Generator
from typing import Final
from unittest.mock import patch

from fleetlm_shard import exporter, importer

CROWDED: Final = 0.3
"""Part of the runs in which slots move."""


class Crowd:
    """What is asked for in a crowded run.

    Args:
        rng: chance of its own.

    Attributes:
        slots: of the ring.
        sessions: how many.
        page: messages that a move brings with one request; 0: as many as the product asks for.
    """

    def __init__(self, rng: random.Random) -> None:
        self.slots = rng.choice((1, 2, 2, 3, 4))
        self.sessions = rng.randrange(4, 16)
        self.page = rng.choice((0, 0, 2, 6, 20))

    @contextlib.contextmanager
    def small_pages(self) -> Generator[None]:
        """Pages of moves are small meanwhile: of messages, of states, of changes, of names in a checkpoint."""
        if not self.page:
            yield
            return
        with (
            patch.multiple(importer, PAGE_MESSAGES=self.page, STATES=3),
            patch.multiple(exporter, STATES_MAX=3, SCAN_NAMES=2, SCAN_PAGE_NAMES=4),
        ):
            yield
