"""JSON that clients send: what is accepted, brought to one compact form without parsing it into objects for keeps.

Accepted is what every client can read back: UTF-8, no control characters in strings, no lone surrogates (many parsers
refuse a whole frame because of one, so that one message would take its neighbours down), numbers that a double or a
big integer of usual parsers holds (no `1e400`, no integers of thousands of digits), no NaN or Infinity, at most
`JSON_DEPTH_MAX` levels. Kept is the text itself: order and spelling of names, numbers and strings stay as they were,
only white space between tokens goes. Names that occur twice in an object inside `content` or `metadata` are kept, too.

Promise: no recursion of ours and no work on text beyond its size; a refusal names the field.
Must not be done here: knowing which fields there are (`payloads.py`, `drafts.py`).
"""

from __future__ import annotations

import json
import re
from itertools import accumulate
from typing import Final, TypeVar

import msgspec

from fleetlm_common.errors import Invalid
from fleetlm_common.limits import JSON_DEPTH_MAX

_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_OTHERS: Final = bytes(set(range(256)) - set(b"[]{}"))
_STEPS: Final = bytes.maketrans(b"[{]}", b"\x02\x02\x00\x00")
_UNKNOWN: Final = "Object contains unknown field `"
_MISSING: Final = "Object missing required field `"
_NAME_CHARS_MAX: Final = 100
"""Of a client's own words in an answer: enough to recognise them."""

T = TypeVar("T")

encode: Final = msgspec.json.Encoder().encode
"""A value as compact JSON."""


def compact(text: bytes, field: str) -> bytes:
    """`text` without the white space between its tokens.

    Raises:
        Invalid: not JSON, or nested so deeply that no parser could follow; names `field`.
    """
    try:
        return msgspec.json.format(text, indent=-1)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(text, error, field) from error
    except RecursionError as error:
        raise _too_deep(field) from error


def check_value(text: bytes, field: str) -> None:
    """Refuse a value that some client could not read back.

    Raises:
        Invalid: nested deeper than `JSON_DEPTH_MAX`, a lone surrogate, a number out of range; names `field`.
    """
    if text.count(b"[") + text.count(b"{") > JSON_DEPTH_MAX and depth(text) > JSON_DEPTH_MAX:
        raise _too_deep(field)
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Invalid(
            f"{field} is JSON that not every client can read: {error}", reason="unreadable", field=field
        ) from error


def depth(text: bytes) -> int:
    """How deeply arrays and objects of valid JSON are nested; a scan, so that depth itself costs no stack."""
    steps = _STRING.sub(b"", text).translate(_STEPS, _OTHERS)
    return max(accumulate(steps, lambda level, step: level + step - 1, initial=0))


def decode_fields(decoder: msgspec.json.Decoder[T], text: bytes, *, where: str = "") -> T:
    """Decode an object of known fields.

    Args:
        decoder: of a struct that forbids unknown fields.
        text: the object.
        where: what stands before a field's name in a refusal, for example `messages[3].`.

    Raises:
        Invalid: not JSON, not an object, an unknown field, a value of the wrong type or out of range; names the field.
    """
    try:
        return decoder.decode(text)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), where) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _malformed(text, error, where.rstrip(".") or "payload") from error
    except RecursionError as error:
        raise _too_deep(where.rstrip(".") or "payload") from error


def repeated_name(text: bytes) -> str | None:
    """The first name that occurs twice in the outermost object of valid JSON (slow: for what looks odd only)."""
    names: list[str] = []

    def outermost_comes_last(pairs: list[tuple[str, object]]) -> None:
        names[:] = [name for name, _ in pairs]

    json.loads(text, object_pairs_hook=outermost_comes_last, parse_int=len, parse_float=len)
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _refusal(text: str, where: str) -> Invalid:
    """Say msgspec's refusal in our words, the field named."""
    if text.startswith(_UNKNOWN):
        name = text[len(_UNKNOWN) :].rpartition("`")[0][:_NAME_CHARS_MAX]
        return Invalid(f"unknown field {where}{name}", reason="unknown_field", field=where + name)
    if text.startswith(_MISSING):
        name = where + text[len(_MISSING) :].partition("`")[0]
        return Invalid(f"{name} is missing", reason="missing_field", field=name)
    what, found, path = text.rpartition(" - at `$")
    if not found:
        name = where.rstrip(".") or "payload"
        return Invalid(f"{name}: {_lower(text)}", field=name)
    name = where + path.rstrip("`").lstrip(".")
    return Invalid(f"{name}: {_lower(what)}", field=name)


def _malformed(text: bytes, error: Exception, field: str) -> Invalid:
    hint = "; a surrogate escape (\\ud800 to \\udfff) must be one of a pair" if b"\\ud" in text.lower() else ""
    return Invalid(f"{field} is not valid JSON: {error}{hint}", reason="malformed_json", field=field)


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _too_deep(field: str) -> Invalid:
    return Invalid(
        f"{field} is nested deeper than {JSON_DEPTH_MAX} levels", reason="too_deep", field=field, limit=JSON_DEPTH_MAX
    )
