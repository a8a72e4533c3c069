"""append, tail, sessions, inbox and verify as people and scripts run them: real processes, a model of a gateway."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.phoenix_server import PhoenixServer, phoenix_server


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that ran to its end."""

    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        """JSON lines of standard output."""
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
async def server() -> AsyncGenerator[PhoenixServer]:
    async with phoenix_server() as running:
        yield running


async def start(*arguments: str, url: str | None = None) -> asyncio.subprocess.Process:
    """Start `fleetlm`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLEETLM_")}
    if url is not None:
        env["FLEETLM_URL"] = url
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fleetlm_cli.main", *arguments,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=env,
    )  # fmt: skip


async def fleetlm(*arguments: str, url: str | None = None, stdin: str = "") -> Ended:
    """Run `fleetlm` to its end."""
    process = await start(*arguments, url=url)
    async with asyncio.timeout(30):
        out, err = await process.communicate(stdin.encode())
    assert process.returncode is not None
    return Ended(process.returncode, out.decode(), err.decode())


async def test_append_then_tail(server: PhoenixServer) -> None:
    """A conversation of two commands, for people and for programs."""
    done = await fleetlm("append", "s", "hello", "--as", "alice", "--kind", "chat", url=server.url)
    assert (done.status, done.out) == (0, "s #1\n")
    done = await fleetlm("append", "s", "[1]", "--json-content", "--key", "k", "--json", url=server.url)
    assert done.lines[0]["seq"] == 2
    done = await fleetlm("append", "s", "[1]", "--json-content", "--key", "k", url=server.url)
    assert done.out == "s #2 (was appended before with this key)\n"
    read = await fleetlm("tail", "s", "--after", "0", "--no-follow", url=server.url)
    assert (read.status, read.out) == (0, "     1  alice [chat]: hello\n     2  cli: [1]\n")
    read = await fleetlm("tail", "s", "--last", "1", "--no-follow", "--json", url=server.url)
    assert [line["event"] for line in read.lines] == ["message", "caught_up"]
    assert read.lines[0]["content"] == [1]


async def test_lines_of_standard_input_keep_their_order(server: PhoenixServer) -> None:
    """One message a line; running it again with the same key makes no second copy."""
    text = "".join(f"line {number}\n" for number in range(1_500))
    for deduped in (False, True):
        done = await fleetlm("append", "s", "-", "--key", "import", "--json", url=server.url, stdin=text)
        assert done.status == 0, done.err
        assert [(line["seq"], line["deduped"]) for line in done.lines] == [(seq, deduped) for seq in range(1, 1_501)]
    contents = [message["content"]["text"] for message in server.model.log("s").messages]
    assert contents == text.splitlines()


async def test_refusals_have_their_statuses_and_say_what_to_do(server: PhoenixServer, tmp_path: Path) -> None:
    """2 usage, 3 not running, 4 refused, 5 unknown."""
    done = await fleetlm("append", "s", "x", "--expected-seq", "7", url=server.url)
    assert (done.status, done.out) == (4, "")
    assert "CONFLICT" in done.err
    assert "last_seq 0" in done.err
    done = await fleetlm("append", "s", "{", "--json-content", url=server.url)
    assert done.status == 2
    assert "not JSON" in done.err
    done = await fleetlm("append", "s", "x", "--data", str(tmp_path))
    assert done.status == 3
    assert "--url" in done.err
    done = await fleetlm("append", "s", "x", "--timeout", "0.3", url="http://127.0.0.1:1")
    assert done.status == 3
    assert "fleetlm up" in done.err
    server.fault = lambda event: "silence" if event == "append" else "none"
    done = await fleetlm("append", "s", "x", "--timeout", "0.5", "--key", "mine", url=server.url)
    assert done.status == 5
    assert "--key mine" in done.err
    assert "Traceback" not in done.err


async def test_tail_follows_through_a_lost_connection_and_ends_at_ctrl_c(server: PhoenixServer) -> None:
    """Each message once; Ctrl-C ends without a traceback, with status 130."""
    server.model.add("s", ["a"])
    process = await start("tail", "s", "--after", "0", url=server.url)
    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.timeout(30):
        assert await process.stdout.readline() == b'     1  server: "a"\n'
        await server.cut()
        server.model.add("s", ["b"])
        lines = [await process.stdout.readline(), await process.stdout.readline()]
        assert lines == [b"        connected again\n", b'     2  server: "b"\n']
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        assert await process.stderr.read() == b""


async def test_a_closed_pipe_ends_quietly(server: PhoenixServer) -> None:
    """`fleetlm tail | head -1`: no traceback."""
    server.model.add("s", list(range(20_000)))
    process = await start("tail", "s", "--after", "0", "--no-follow", url=server.url)
    assert process.stdout is not None
    assert process.stderr is not None
    async with asyncio.timeout(30):
        await process.stdout.readline()
        process.stdout._transport.close()  # type: ignore[attr-defined]
        await process.wait()
        assert b"Traceback" not in await process.stderr.read()


async def test_gaps_are_printed_and_can_fail_the_command(server: PhoenixServer) -> None:
    """Said in words, and status 6 when asked for."""
    server.model.add("s", ["a", "b", "c"])
    server.model.trim("s", 3)
    read = await fleetlm("tail", "s", "--after", "0", "--no-follow", url=server.url)
    assert read.status == 0
    assert "gap: messages 1–2 cannot be had (trimmed)" in read.out
    read = await fleetlm("tail", "s", "--after", "0", "--no-follow", "--fail-on-gap", "--json", url=server.url)
    assert read.status == 6
    assert (read.lines[0]["event"], read.lines[0]["next_seq"]) == ("gap", 3)


async def test_nothing_that_others_wrote_reaches_the_terminal_unescaped(server: PhoenixServer) -> None:
    """Escape sequences in content, sender and session are shown, not obeyed."""
    server.model.append("s", [{"content": {"text": "\x1b[31mred\nnext"}}], sender="e\x1bvil", expected_seq=None)
    read = await fleetlm("tail", "s", "--after", "0", "--no-follow", url=server.url)
    assert "\x1b" not in read.out
    assert "\\u001b[31mred\\nnext" in read.out


async def test_limit_ends_tail(server: PhoenixServer) -> None:
    """After so many messages, without waiting for more."""
    server.model.add("s", list(range(9)))
    read = await fleetlm("tail", "s", "--after", "2", "--limit", "3", "--json", url=server.url)
    assert [line["seq"] for line in read.lines] == [3, 4, 5]


async def test_sessions_are_listed(server: PhoenixServer) -> None:
    """Tabs in a pipe, JSON lines when asked for."""
    for name in ("b", "a", "c\x1b"):
        server.model.add(name, [1])
    listed = await fleetlm("sessions", url=server.url)
    assert listed.out.splitlines()[0] == "a\t1\t1\t2026-01-01T00:00:00Z"
    assert "\x1b" not in listed.out
    listed = await fleetlm("sessions", "--json", "--limit", "2", url=server.url)
    assert [line["session_id"] for line in listed.lines] == ["a", "b"]


async def test_an_inbox_is_listed(server: PhoenixServer) -> None:
    """Of whom is named, first or by `--as`; tabs in a pipe, JSON lines when asked for."""
    for name in ("a\x1b", "b", "c"):
        server.model.add(name, [1, 2])
    listed = await fleetlm("inbox", "ann", url=server.url)
    assert listed.out == "".join(f"{name}\t2\t2\t2026-01-01T00:00:00Z\n" for name in ("a\\u001b", "b", "c"))
    listed = await fleetlm("inbox", "--as", "ann", "--json", "--limit", "1", url=server.url)
    assert [(line["session_id"], line["unread"]) for line in listed.lines] == [("a\x1b", 2)]
    assert [headers["X-Participant-Id"] for headers in server.rest.headers] == ["ann"] * 3


async def test_an_inbox_is_followed_through_a_lost_connection_and_ends_at_ctrl_c(server: PhoenixServer) -> None:
    """The listing's lines, then one for each session that changes, none twice; Ctrl-C ends with status 130."""
    server.model.add("a\x1b", [1])
    server.model.add("b", [1])
    process = await start("inbox", "ann", "--follow", url=server.url)
    assert process.stdout is not None
    assert process.stderr is not None

    async def columns(lines: int) -> list[list[bytes]]:
        assert process.stdout is not None
        return [(await process.stdout.readline()).split(b"\t")[:3] for _ in range(lines)]

    async with asyncio.timeout(30):
        assert await columns(2) == [[b"a\\u001b", b"1", b"1"], [b"b", b"1", b"1"]]
        await server.add("b", [2])
        assert await columns(1) == [[b"b", b"2", b"2"]]
        server.model.mark_read("b", 2)  # and nobody is told of it
        server.model.add("c", [1])
        await server.cut()
        assert await columns(2) == [[b"b", b"0", b"2"], [b"c", b"1", b"1"]]
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
        assert await process.stdout.read() == b""
        assert await process.stderr.read() == b""


async def test_following_an_inbox_is_refused_in_words(server: PhoenixServer) -> None:
    """A limit that the server does not have, a ring without an archive: status 4, and the field."""
    done = await fleetlm("inbox", "ann", "--follow", "--limit", "101", url=server.url)
    assert (done.status, done.out) == (4, "")
    assert "(field limit)" in done.err
    server.model.archived = False
    done = await fleetlm("inbox", "ann", "--follow", url=server.url)
    assert (done.status, done.out) == (4, "")
    assert "NOT_FOUND no_archive" in done.err


async def test_verify_of_no_volume_is_usage(tmp_path: Path) -> None:
    """Words, and status 2."""
    done = await fleetlm("verify", str(tmp_path))
    assert done.status == 2
    assert "holds no volume" in done.err
    done = await fleetlm("verify", str(tmp_path / "nothing"))
    assert done.status == 2


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("FLEETLM_ULR", "unknown variable FLEETLM_ULR: did you mean FLEETLM_URL?"),
        ("FLEETLM_SHRD_FSYNC", "unknown variable FLEETLM_SHRD_FSYNC: did you mean FLEETLM_SHARD_…?"),
        ("FLEETLM_X", "unknown variable FLEETLM_X: "),
    ],
)
async def test_a_variable_that_nobody_reads_is_refused(variable: str, words: str, tmp_path: Path) -> None:
    """Status 78 before anything is done or made; a misspelt setting is not a setting left out."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("FLEETLM_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fleetlm_cli.main", "up", "--data", str(tmp_path / "ring"), "--port", "0",
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env={**env, variable: "1"},
    )  # fmt: skip
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert (process.returncode, out) == (78, b"")
    assert words in err.decode()
    assert not (tmp_path / "ring").exists()
