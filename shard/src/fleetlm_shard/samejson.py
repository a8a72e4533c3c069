"""Whether two message fragments say the same, when their bytes differ: key order and white space do not matter.

Promise: equal as JSON values (RFC 8259): objects by members, arrays by order, strings by characters, numbers by value;
`true` is not 1. Must not be done here: loading the stored message.
"""

from __future__ import annotations

from typing import Final

import msgspec

from fleetlm_common.decoding import UNREADABLE

COMPARED_FIELDS: Final = ("sender_id", "sender_kind", "kind", "content", "metadata")
"""What must be equal for a dedupe (design §5)."""


def same_fragment(stored_json: bytes, fragment: bytes) -> bool:
    """Compare a stored message with a new message's fragment (its members without braces).

    A stored message that does not parse proves nothing: it counts as different.
    """
    try:
        stored: object = msgspec.json.decode(stored_json)
        fresh: object = msgspec.json.decode(b"{%b}" % fragment)
    except UNREADABLE:
        return False
    if not isinstance(stored, dict) or not isinstance(fresh, dict):
        return False
    return all(_same(stored.get(name), fresh.get(name)) for name in COMPARED_FIELDS)


def same_value(one: bytes, two: bytes) -> bool:
    """Compare two JSON texts."""
    if one == two:
        return True
    try:
        return _same(msgspec.json.decode(one), msgspec.json.decode(two))
    except UNREADABLE:
        return False


def _same(one: object, two: object) -> bool:
    """Equal as JSON values; Python alone would say that `true` is 1. Depth is bounded by `JSON_DEPTH_MAX`."""
    if isinstance(one, bool) or isinstance(two, bool):
        return one is two
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_same(value, two[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(two, list):
        return len(one) == len(two) and all(_same(left, right) for left, right in zip(one, two, strict=True))
    return one == two
