"""What a client may append, byte by byte, and what it is told when it may not."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlm_common.errors import Invalid, Rejected, TooLarge
from fleetlm_gateway.drafts import Keys, Parsed, parse
from fleetlm_gateway.jsontext import depth
from fleetlm_gateway.principal import principal

ALICE = principal("alice", "agent")


def parsed(payload: bytes | str, key: str | None = None) -> Parsed:
    data = payload.encode() if isinstance(payload, str) else payload
    return parse(data, sender=ALICE, keys=Keys("boot"), key=key)


def message(payload: str) -> dict[str, object]:
    """The one message that `payload` makes, decoded."""
    (draft,) = parsed(payload).drafts
    found: dict[str, object] = json.loads(b"{" + draft.fragment + b"}")
    return found


def refused(payload: bytes | str, key: str | None = None) -> Rejected:
    with pytest.raises(Rejected) as caught:
        parsed(payload, key)
    return caught.value


def test_fragment_says_sender_kind_content_and_metadata() -> None:
    """A fragment is exactly the five fields that are compared when a key comes twice, with documented defaults."""
    assert message('{"content": {"text": "hi"}}') == {
        "sender_id": "alice",
        "sender_kind": "agent",
        "kind": "message",
        "content": {"text": "hi"},
        "metadata": None,
    }
    assert message('{"content":null,"kind":"typing","metadata":{"a":1}}')["kind"] == "typing"


def test_content_is_kept_verbatim_but_for_white_space() -> None:
    """Spelling and order of names, numbers and strings stay; the same content gives the same bytes however spaced."""
    spaced = '{ "content" : {"b": 1.50, "a": [1E5, -0.0, "x \\u00e9 \\/ é"],\n "b": 2} }'
    tight = '{"content":{"b":1.50,"a":[1E5,-0.0,"x \\u00e9 \\/ é"],"b":2}}'
    first, second = parsed(spaced).drafts[0].fragment, parsed(tight).drafts[0].fragment
    assert first == second
    assert '"content":{"b":1.50,"a":[1E5,-0.0,"x \\u00e9 \\/ é"],"b":2},'.encode() in first


def test_nul_is_content_like_any_other() -> None:
    """An escaped NUL is legal JSON that every client reads: kept."""
    assert message('{"content":"a\\u0000b"}')["content"] == "a\0b"


@pytest.mark.parametrize(
    ("payload", "field", "reason"),
    [
        ("", "payload", "malformed_json"),
        ("[]", "payload", "invalid"),
        ("7", "payload", "invalid"),
        ("{}", "content", "missing_field"),
        ('{"contend":1}', "contend", "unknown_field"),
        ('{"content":1,"content":2}', "content", "repeated_field"),
        ('{"content":1,"k\\u0069nd":"a","kind":"b"}', "kind", "repeated_field"),
        ('{"content":1,"expected_seq":1,"expected_seq":2}', "expected_seq", "repeated_field"),
        ('{"content":NaN}', "payload", "malformed_json"),
        ('{"content":Infinity}', "payload", "malformed_json"),
        ('{"content":01}', "payload", "malformed_json"),
        ('{"content":"\\ud800"}', "payload", "malformed_json"),
        ('{"content":"\\udc00 \\ud800 "}', "payload", "malformed_json"),
        (b'{"content":"\xff"}', "content", "unreadable"),
        (b'{"content":"\xed\xa0\x80"}', "content", "unreadable"),
        ('{"content":"a\nb"}', "payload", "malformed_json"),
        ('{"content":1e400}', "content", "unreadable"),
        ('{"content":%s}' % ("9" * 5000), "content", "unreadable"),
        ('{{"content":{}1{}}}'.format("[" * 65, "]" * 65), "content", "too_deep"),
        ('{{"content":{}1{}}}'.format('{"a":' * 65, "}" * 65), "content", "too_deep"),
        ('{"content":%s}' % ("[" * 100_000), "payload", "too_deep"),
        ('{"content":1,"metadata":[]}', "metadata", "invalid"),
        ('{"content":1,"metadata":"x"}', "metadata", "invalid"),
        ('{"content":1,"metadata":{"a":1e999}}', "metadata", "unreadable"),
        ('{"content":1,"kind":""}', "kind", "invalid"),
        ('{"content":1,"kind":"%s"}' % ("k" * 65), "kind", "invalid"),
        ('{"content":1,"kind":5}', "kind", "invalid"),
        ('{"content":1,"idempotency_key":""}', "idempotency_key", "invalid"),
        ('{"content":1,"idempotency_key":"%s"}' % ("é" * 65), "idempotency_key", "invalid"),
        ('{"content":1,"idempotency_key":7}', "idempotency_key", "invalid"),
        ('{"content":1,"expected_seq":-1}', "expected_seq", "invalid"),
        ('{"content":1,"expected_seq":9007199254740992}', "expected_seq", "invalid"),
        ('{"content":1,"expected_seq":1.5}', "expected_seq", "invalid"),
        ('{"content":1,"expected_seq":true}', "expected_seq", "invalid"),
        ('{"content":1,"expected_seq":%s}' % ("9" * 5000), "expected_seq", "invalid"),
        ('{"messages":[]}', "messages", "invalid"),
        ('{"messages":{}}', "messages", "invalid"),
        ('{"messages":[1]}', "messages[0]", "invalid"),
        ('{"messages":[{"content":1},{}]}', "messages[1].content", "missing_field"),
        ('{"messages":[{"content":1,"x":2}]}', "messages[0].x", "unknown_field"),
        ('{"messages":[{"content":1,"content":2}]}', "messages[0].content", "repeated_field"),
        ('{"messages":[{"content":1,"expected_seq":2}]}', "messages[0].expected_seq", "unknown_field"),
        ('{"messages":[{"content":1}],"messages":[{"content":2}]}', "messages", "repeated_field"),
        ('{"messages":[{"content":1}],"content":1}', "content", "invalid"),
        ('{"messages":[{"content":1}],"kind":"a"}', "kind", "invalid"),
        ('{"messages":[{"content":1}],"metadata":{}}', "metadata", "invalid"),
        ('{"messages":[{"content":1}],"idempotency_key":"k"}', "idempotency_key", "invalid"),
        (
            '{"messages":[{"content":1,"idempotency_key":"k"},{"content":2,"idempotency_key":"k"}]}',
            "messages[1].idempotency_key",
            "key_reused",
        ),
    ],
)
def test_refusal_names_the_field(payload: bytes | str, field: str, reason: str) -> None:
    """What cannot be appended is INVALID with the field and a stable reason; nothing of a batch is kept."""
    error = refused(payload)
    assert isinstance(error, Invalid)
    assert (error.field, error.reason) == (field, reason)


@pytest.mark.parametrize(
    ("payload", "field", "limit"),
    [
        ('{"content":"%s"}' % ("x" * 65535), "content", 65536),
        ('{"content":1,"metadata":{"a":"%s"}}' % ("x" * 8192), "metadata", 8192),
        ('{{"messages":[{}]}}'.format(",".join(['{"content":1}'] * 101)), "messages", 100),
        ('{"messages":[{"content":1},{"content":"%s"}]}' % ("x" * 65535), "messages[1].content", 65536),
    ],
)
def test_too_large_names_field_and_limit(payload: str, field: str, limit: int) -> None:
    """What is larger than a limit is TOO_LARGE with the field and the limit."""
    error = refused(payload)
    assert isinstance(error, TooLarge)
    assert (error.field, error.limit) == (field, limit)


def test_limits_themselves_are_allowed() -> None:
    """Content of exactly 64 KiB, 64 levels, a batch of exactly 100 and a kind of 64 bytes pass."""
    for payload in (
        f'{{"content":"{"x" * 65534}","kind":"{"k" * 64}"}}',
        f'{{"content":{"[" * 64}1{"]" * 64}}}',
        f'{{"content":"{"[" * 500}"}}',
    ):
        assert len(parsed(payload).drafts) == 1
    hundred = ",".join(['{"content":1}'] * 100)
    assert len(parsed(f'{{"messages":[{hundred}]}}').drafts) == 100


def test_nulls_are_absent_fields() -> None:
    """Clients that write null for what they do not give are understood."""
    found = parsed(
        '{"content":1,"kind":null,"metadata":null,"idempotency_key":null,"expected_seq":null,"messages":null}'
    )
    assert (found.expected_seq, found.batch) == (None, False)


def test_keys_are_made_when_absent_and_kept_when_given() -> None:
    """A message without a key gets one that no other has; a given one is kept; the REST header counts as given."""
    keys = Keys("boot")
    made = {parse(b'{"content":1}', sender=ALICE, keys=keys).drafts[0].key for _ in range(100)}
    assert len(made) == 100
    assert parsed('{"content":1,"idempotency_key":"mine"}').drafts[0].key == "mine"
    assert parsed('{"content":1}', key="header").drafts[0].key == "header"
    assert refused('{"content":1,"idempotency_key":"mine"}', key="header").field == "idempotency_key"
    assert refused('{"messages":[{"content":1}]}', key="header").field == "idempotency_key"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=20,
)


@given(
    content=json_values, metadata=st.none() | st.dictionaries(st.text(), json_values, max_size=3), spaces=st.booleans()
)
def test_any_json_comes_back_equal(content: object, metadata: object, spaces: bool) -> None:
    """Whatever JSON value is appended, the fragment holds an equal one, and the same bytes with or without spaces."""
    body = {"content": content, "metadata": metadata}
    tight = msgspec.json.encode(body)
    text = msgspec.json.format(tight, indent=2) if spaces else tight
    fragment = parsed(text).drafts[0].fragment
    assert fragment == parsed(tight).drafts[0].fragment
    found = msgspec.json.decode(b"{" + fragment + b"}")
    assert msgspec.json.encode([found["content"], found["metadata"]]) == msgspec.json.encode([content, metadata])


@given(json_values)
def test_depth_is_the_depth_of_the_value(value: object) -> None:
    """The scan for depth agrees with a walk through the decoded value, brackets inside strings or not."""

    def walk(found: object) -> int:
        if isinstance(found, dict):
            return 1 + max(map(walk, found.values()), default=0)
        return 1 + max(map(walk, found), default=0) if isinstance(found, list) else 0

    assert depth(msgspec.json.encode(value)) == walk(value)


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: b'{"content":' + text.encode() + b"}"))
def test_any_bytes_are_parsed_or_refused(payload: bytes) -> None:
    """No bytes make anything but drafts that are valid JSON, or a refusal."""
    try:
        found = parsed(payload)
    except Rejected:
        return
    for draft in found.drafts:
        json.loads(b"{" + draft.fragment + b"}")
