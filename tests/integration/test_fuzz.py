"""Fuzzing in every `make test`: kept seeds and a thousand cases; `make fuzz N=100000` is the long one."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Final

import aiohttp
import pytest
from yarl import URL

from tests.fuzz import wsclient
from tests.fuzz.mutate import Mutator
from tests.fuzz.run import Fuzz, Report, fuzz_run, fuzzed

KEPT: Final = [(1, "shard", 29), (1, "phoenix", 0), (20261125, "rest", 5_000)]
"""Seed, surface and number of cases that found something (docs/testing.md says what), and of some that did not."""


@pytest.mark.timeout(180)
async def test_malformed_input_is_answered_and_harms_nobody(tmp_path: Path) -> None:
    """A thousand cases at every entrance: an answer or a close code each, no crash, no leak, no harm beside."""
    report = await fuzz_run(1_000, 7, tmp_path)
    assert report.wrong == [], report.as_json()
    assert report.friend_messages > 20


@pytest.mark.timeout(120)
async def test_kept_cases_and_ids_of_every_byte(tmp_path: Path) -> None:
    """What found a mistake once finds none; ids of every legal byte name one session over WebSocket and REST."""
    report = Report(0)
    async with fuzzed(tmp_path, report) as fuzz:
        for seed, surface, number in KEPT:
            report.seed = seed
            await fuzz.cases(surface, range(number, number + 1))
        await _ids(fuzz)
    assert report.wrong == []


async def _ids(fuzz: Fuzz) -> None:
    """Each byte that UTF-8 can begin with or hold, in ids of up to 128 bytes."""
    every = [chr(code) for code in range(0x800)] + ["\ud7ff", "\ue000", "\uffff", "\U00010000", "\U0010ffff"]
    ids: list[str] = []
    for char in every:
        if not ids or len((ids[-1] + char).encode()) > 128:
            ids.append("")
        ids[-1] += char
    async with aiohttp.ClientSession(headers={"X-Participant-Id": "ids"}) as http:
        for name in ids:
            path = "".join(f"%{byte:02X}" for byte in name.encode())
            url = f"{fuzz.fleet.url}/v1/sessions/{path}"

            target = URL(f"{url}/messages", encoded=True)
            async with http.post(target, json={"content": name}) as answer:
                assert answer.status == 201, (name, await answer.text())
            async with http.get(target) as answer:
                [message] = (await answer.json())["messages"]
            assert message["session_id"] == name
            assert message["content"] == name


def test_a_seed_makes_the_same_bytes() -> None:
    """A number says everything about a case: it can be run again."""
    value = {"content": {"a": [1, "x"]}, "kind": "message"}
    first = [Mutator(random.Random(f"s-{at}")).json(value) for at in range(200)]
    assert first == [Mutator(random.Random(f"s-{at}")).json(value) for at in range(200)]
    assert len(set(first)) > 50


async def test_the_fuzzers_own_client_refuses_a_bad_server() -> None:
    """Masked, fragmented, reserved: the judge of the server's frames sees each."""
    for frame in (b"\x81\x85\0\0\0\0hello", b"\x01\x01x", b"\xc1\x01x", b"\x82\x01x", b"\x81\x7e\x00"):
        reader = asyncio.StreamReader()
        reader.feed_data(frame)
        reader.feed_eof()
        with pytest.raises(wsclient.BadServer):
            await wsclient.Socket(reader, None).frame()  # type: ignore[arg-type]  # nothing is written
