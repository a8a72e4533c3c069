"""Kubernetes quantities as whole bytes. Pure.

Promise: `1Gi`, `1.5G`, `512` mean what they mean to Kubernetes; a fraction of a byte is rounded up, like there.
Must not be done here: quantities of anything but bytes (`500m` of CPU is passed on as it was written).
"""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal
from types import MappingProxyType
from typing import Final

_SUFFIXES: Final = MappingProxyType(
    {"": 1}
    | {f"{letter}i": 1024**power for power, letter in enumerate("KMGTPE", 1)}
    | {letter: 1000**power for power, letter in enumerate("kMGTPE", 1)}
)
_SHAPE: Final = re.compile(r"(\d+(?:\.\d+)?)([A-Za-z]{0,2})")


def bytes_of(quantity: str) -> int:
    """The number of bytes.

    Raises:
        ValueError: not a quantity of bytes.
    """
    found = _SHAPE.fullmatch(quantity)
    if found is None or found[2] not in _SUFFIXES:
        raise ValueError(f"{quantity!r} is not a quantity of bytes such as 10Gi")
    return int((Decimal(found[1]) * _SUFFIXES[found[2]]).to_integral_value(ROUND_CEILING))
