"""Inboxes of a real ring: right counts whoever owns a session, dies, or moves; over REST, socket, SDK, command."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

import fleetlm_client
from fleetlm_client import Client, Inbox, InboxPage, Settings
from tests.support.eventually import eventually
from tests.support.fleet import Fleet, fleet
from tests.support.upcommands import fleetlm

WAIT_S = 60.0
SESSIONS = 10
Shown = dict[str, tuple[int, int, int]]
"""Last seq, last read seq and unread of each session."""


class Truth:
    """Writes by REST, again until it is acknowledged, and remembers what Ann's inbox must show."""

    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self.url = url
        self.http = http
        self.random = random.Random(7)
        self.senders: dict[str, list[str]] = {}
        self.read: dict[str, int] = {}
        self.keys = 0

    async def step(self) -> None:
        """Somebody writes somewhere, or Ann reads."""
        name = f"s-{self.random.randrange(SESSIONS)}"
        senders = self.senders.setdefault(name, [])
        if senders and self.random.random() < 0.2:
            seq = self.random.randint(1, len(senders))
            body = await self._sent("PUT", f"{name}/read", "ann", {"seq": seq})
            self.read[name] = max(seq, self.read.get(name, 0))
            assert body["last_read_seq"] == self.read[name]
            return
        self.keys += 1
        sender = self.random.choice(["ann", "bob", "cid"])
        body = await self._sent("POST", f"{name}/messages", sender, {"content": 1, "idempotency_key": str(self.keys)})
        senders.append(sender)
        assert body["seq"] == len(senders)

    async def _sent(self, method: str, path: str, who: str, body: object) -> dict[str, Any]:
        async with asyncio.timeout(WAIT_S):
            while True:
                url = f"{self.url}/v1/sessions/{path}"
                async with self.http.request(method, url, json=body, headers={"X-Participant-Id": who}) as answer:
                    if answer.status < 300:
                        found: dict[str, Any] = await answer.json()
                        return found
                    assert answer.status in {429, 503}, await answer.text()
                await asyncio.sleep(0.05)

    def shown(self) -> Shown:
        """What Ann's inbox must show."""
        found: Shown = {}
        for name, senders in self.senders.items():
            read = self.read.get(name, 0)
            if "ann" in senders or read:
                found[name] = (len(senders), read, sum(sender != "ann" for sender in senders[read:]))
        return found


def entries(body: dict[str, Any]) -> Shown:
    """What a page shows."""
    return {each["session_id"]: (each["last_seq"], each["last_read_seq"], each["unread"]) for each in body["sessions"]}


class Socket:
    """Ann's socket: her inbox as its frames say."""

    def __init__(self) -> None:
        self.shown: Shown = {}

    async def run(self, running: Fleet, http: aiohttp.ClientSession) -> None:
        """Join and follow, until cancelled."""
        query = "vsn=2.0.0&participant_id=ann"
        async with http.ws_connect(f"{running.websocket_url}?{query}") as socket:
            while True:
                await socket.send_json(["1", "1", "inbox:ann", "phx_join", {}])
                async for frame in socket:
                    _, _, _, event, payload = msgspec.json.decode(frame.data)
                    if event == "sessions":
                        self.shown = entries(payload)
                    elif event == "session":
                        self.shown |= entries({"sessions": [payload]})
                    elif event == "phx_reply" and payload["status"] == "error":
                        assert payload["response"]["code"] in {"TRY_AGAIN", "NOT_FOUND"}, payload
                        break  # the archive's tables are not there yet
                await asyncio.sleep(0.1)


@pytest.mark.timeout(240)
async def test_an_inbox_is_right_whoever_dies_or_moves(tmp_path: Path) -> None:
    """A shard and the database are killed, slots move: at the end the counts are those of what was acknowledged."""
    async with (
        fleet(tmp_path / "ring", shards=2, slots=16, archive="embedded") as running,
        aiohttp.ClientSession() as http,
    ):
        truth, socket = Truth(running.url, http), Socket()
        following = asyncio.create_task(socket.run(running, http))
        for number in range(160):
            if number == 40:
                running.kill("shard-0")
            if number == 80:
                running.kill("archive")
            if number == 120:
                scaled = await asyncio.to_thread(fleetlm, "shards", "scale", "3", "--data", str(running.data))
                assert scaled.returncode == 0, scaled.stdout + scaled.stderr
            await truth.step()
        wanted = truth.shown()
        assert len(wanted) > SESSIONS // 2

        async def shown() -> Shown:
            url = f"{running.url}/v1/participants/ann/inbox"
            async with http.get(url, headers={"X-Participant-Id": "ann"}) as answer:
                return entries(await answer.json()) if answer.status == 200 else {}

        async with asyncio.timeout(WAIT_S):
            while await shown() != wanted or socket.shown != wanted:
                assert not following.done(), following.exception()
                await asyncio.sleep(0.05)
        async with http.get(f"{running.url}/v1/sessions?participant_id=ann") as answer:
            listed = await answer.json()
        assert [each["session_id"] for each in listed["sessions"]] == sorted(wanted)
        assert {each["session_id"]: each["last_seq"] for each in listed["sessions"]} == {
            name: seqs[0] for name, seqs in wanted.items()
        }
        following.cancel()
        command = ("inbox", "--as", "ann", "--url", running.url)
        told = await asyncio.to_thread(fleetlm, *command, "--json")
        lines = [msgspec.json.decode(line) for line in told.stdout.splitlines()]
        assert entries({"sessions": lines}) == wanted
        assert [line["active_at"] for line in lines] == sorted((line["active_at"] for line in lines), reverse=True)
        piped = await asyncio.to_thread(fleetlm, *command, "--limit", "1")
        assert piped.stdout.split("\t")[:2] == [lines[0]["session_id"], str(lines[0]["unread"])]


class Command:
    """`fleetlm inbox --follow` of Ann: her inbox as its lines say."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.shown: Shown = {}

    async def read(self) -> None:
        """Every line until it ends."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            told = entries({"sessions": [msgspec.json.decode(line)]})
            assert not told.items() <= self.shown.items(), f"told twice: {told}"
            self.shown |= told


@asynccontextmanager
async def command(url: str) -> AsyncGenerator[Command]:
    """Run it; at the end Ctrl-C ends it without a word."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fleetlm_cli.main", "inbox", "ann", "--follow", "--json", "--url", url,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    running = Command(process)
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(running.read())
            yield running
            process.send_signal(signal.SIGINT)
        async with asyncio.timeout(WAIT_S):
            assert process.stderr is not None
            assert await process.stderr.read() == b""
            assert await process.wait() == 130
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class Sdk:
    """The SDK's iterator over Ann's inbox."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.shown: Shown = {}
        self.pages = 0

    async def read(self, inbox: Inbox) -> None:
        """Every update until it is left."""
        async for update in inbox:
            if isinstance(update, InboxPage):
                self.pages += 1
                self.shown = entries(msgspec.to_builtins(update))
            else:
                self.shown |= entries({"sessions": [msgspec.to_builtins(update)]})


@asynccontextmanager
async def sdk(url: str) -> AsyncGenerator[Sdk]:
    """Follow with it."""
    async with (
        asyncio.TaskGroup() as tasks,
        fleetlm_client.connect(url, participant_id="ann") as client,
        client.inbox() as inbox,
    ):
        running = Sdk(client)
        tasks.create_task(running.read(inbox))
        yield running


@pytest.mark.timeout(240)
async def test_an_inbox_is_followed_while_its_gateway_restarts(tmp_path: Path) -> None:
    """SDK and command: it drains and is killed while others write elsewhere, and nothing acknowledged stays untold."""
    async with (
        fleet(tmp_path / "ring", shards=1, slots=16, gateways=2, archive="embedded") as running,
        aiohttp.ClientSession() as http,
    ):
        url = running.up.process("gateway-1").url
        assert url is not None
        truth = Truth(url, http)

        patient = Settings(call_deadline_s=WAIT_S)
        async with fleetlm_client.connect_rest(url, participant_id="ann", settings=patient) as rest:
            await rest.inbox_page()  # the archive's tables are there
        async with sdk(running.url) as by_sdk, command(running.url) as by_command:

            async def told(what: str) -> None:
                wanted = truth.shown()
                await eventually(lambda: by_sdk.shown == by_command.shown == wanted, f"told {what}", timeout_s=WAIT_S)

            for number in (signal.SIGTERM, signal.SIGKILL):
                for _ in range(30):
                    await truth.step()
                await told(f"before {number.name}")
                running.kill("gateway-0", number)
                for _ in range(30):
                    await truth.step()
                await told(f"after {number.name}")
                await running.wait_ready("gateway-0")
            assert by_sdk.client.connections == by_sdk.pages == 3
