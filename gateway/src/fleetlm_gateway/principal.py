"""Who speaks: the one seam where a request gets its principal.

Today the client declares itself: the query of the socket's URL (`participant_id`, `participant_kind`) or the headers
`X-Participant-Id` and `X-Participant-Kind` of a REST request. Tokens come here and nowhere else.

Promise: a `Principal` that exists has a checked id and one of the three kinds. Must not be done here: what a principal
may do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, unquote_to_bytes

from fleetlm_common.errors import Invalid, Unauthenticated
from fleetlm_common.ids import ParticipantId, checked_id
from fleetlm_gateway.jsontext import encode

KINDS: Final = ("human", "agent", "system")
KIND_DEFAULT: Final = "human"
"""Of a participant that does not say: agents and systems are written by people who can say so."""
QUERY_FIELDS_MAX: Final = 32
"""Of a URL; more is no client of ours."""
ID_HEADER: Final = "X-Participant-Id"
KIND_HEADER: Final = "X-Participant-Kind"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who speaks; `fragment` is the beginning of each of its messages: `"sender_id":…,"sender_kind":…,`."""

    id: ParticipantId
    kind: str
    fragment: bytes


def principal(participant_id: str | None, participant_kind: str | None) -> Principal:
    """Check what somebody says of itself.

    Raises:
        Unauthenticated: no id.
        Invalid: an id or kind that cannot be one; names the field.
    """
    if participant_id is None:
        raise Unauthenticated(
            f"say who you are: participant_id in the socket's URL, or the header {ID_HEADER}", field="participant_id"
        )
    checked = ParticipantId(checked_id(participant_id, "participant_id"))
    kind = KIND_DEFAULT if participant_kind is None else participant_kind
    if kind not in KINDS:
        raise Invalid(f"participant_kind must be one of {', '.join(KINDS)}", field="participant_kind")
    return Principal(checked, kind, b'"sender_id":%b,"sender_kind":"%b",' % (encode(checked), kind.encode()))


def query_fields(raw_query: str) -> dict[str, str]:
    """The fields of a URL's query.

    Raises:
        Invalid: not percent-encoded UTF-8, a field twice, or too many of them.
    """
    try:
        pairs = parse_qsl(raw_query, keep_blank_values=True, errors="strict", max_num_fields=QUERY_FIELDS_MAX)
    except ValueError as error:
        raise Invalid(
            f"the query is not percent-encoded UTF-8 of at most {QUERY_FIELDS_MAX} fields", field="query"
        ) from error
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise Invalid(f"{twice[:100]} is given twice", reason="repeated_field", field=twice[:100])
    return fields


def of_socket(fields: Mapping[str, str]) -> Principal:
    """The principal of a socket, from the query of its URL.

    Raises:
        Unauthenticated: nobody is named.
        Invalid: what is named cannot be; names the field.
    """
    return principal(fields.get("participant_id"), fields.get("participant_kind"))


def of_request(headers: Mapping[str, str]) -> Principal:
    """The principal of a REST request, from its headers; the id is percent-encoded where it is not plain ASCII.

    Raises:
        Unauthenticated: nobody is named.
        Invalid: what is named cannot be; names the field.
    """
    declared = headers.get(ID_HEADER)
    return principal(None if declared is None else _percent_decoded(declared), headers.get(KIND_HEADER))


def _percent_decoded(value: str) -> str:
    try:
        return unquote_to_bytes(value.encode("utf-8", "surrogateescape")).decode()
    except UnicodeDecodeError as error:
        raise Invalid(f"{ID_HEADER} is not percent-encoded UTF-8", field="participant_id") from error
