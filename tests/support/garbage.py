"""Objects of ours that only the collector could free: made with each message, they cost a pause again and again."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def left_to_the_collector() -> Generator[Counter[str]]:
    """Counts instances of our own classes that became unreachable inside and are still there; filled at the end."""
    found: Counter[str] = Counter()
    flags = gc.get_debug()
    gc.collect()
    gc.disable()
    try:
        yield found
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        names = (f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage)
        found.update(name for name in names if name.startswith("fleetlm_"))
    finally:
        gc.set_debug(flags)
        gc.garbage.clear()
        gc.enable()
