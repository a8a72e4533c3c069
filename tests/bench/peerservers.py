"""The peers' servers, each started for one run on a folder of the same file system, on loopback.

Every one is told to have an append on disk before it answers: Redis `appendfsync always`, PostgreSQL `fsync` and
`synchronous_commit` on (its defaults), NATS JetStream `sync_interval: always`, the shard `fsync` always (its default).
Everything else is each server's default, except what would write for other reasons (Redis snapshots and rewrites).

Promise: no server outlives the context; `held` asks the server itself how many messages it has. Must not be done here:
load.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import psutil

from fleetlm_common import rpc
from fleetlm_common.rpc import Kind
from tests.bench.peerwire import NatsWire, PostgresWire, RedisWire, ShardWire, Wire
from tests.support.shardprocess import ShardRing

READY_S: Final = 30.0
POLL_S: Final = 0.05
NATS: Final = Path(__file__).resolve().parents[2] / ".cache" / "peers" / "nats-server"
"""Where `make bench-peers-setup` puts it."""
POSTGRES_USER: Final = "postgres"
"""PostgreSQL refuses to run as root; started by root it runs as this user."""
MISSING: Final = (
    "{what} is not installed. `make bench-peers-setup` installs what is needed: redis-server and postgresql from"
    " Debian's packages (root), nats-server by `go install` (Debian's is too old to know `sync_interval: always`)"
)


class Missing(Exception):
    """A server cannot be started here; the text says what to do."""


@dataclass(slots=True)
class Server:
    """A running server."""

    name: str
    version: str
    port: int
    pid: int
    wire: Callable[[str], Wire]
    held: Callable[[], Awaitable[int]]

    def cpu_s(self) -> float:
        """User and system seconds of it and its children so far."""
        root = psutil.Process(self.pid)
        total = 0.0
        for process in [root, *root.children(recursive=True)]:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        # Children that ended and were waited for (backends of connections that are closed).
        ended = root.cpu_times()
        return total + ended.children_user + ended.children_system


@asynccontextmanager
async def servers(folder: Path, names: list[str]) -> AsyncGenerator[dict[str, Server]]:
    """All of them.

    Raises:
        Missing: a program is not there.
    """
    starts = {"shard": _shard, "redis": _redis, "postgres": _postgres, "nats": _nats}
    async with AsyncExitStack() as stack:
        running: dict[str, Server] = {}
        for name in names:
            own = folder / name
            own.mkdir()
            running[name] = await stack.enter_async_context(starts[name](own))
        yield running


@asynccontextmanager
async def _shard(folder: Path) -> AsyncGenerator[Server]:
    ring = ShardRing(folder, slots=256)
    async with ring.shard(env={"SEGMENT_BYTES": str(64 << 20), "LOG_LEVEL": "info"}) as shard:
        hello = await shard.hello()

        async def held() -> int:
            async with await shard.client() as client:
                total, after = 0, ""
                while True:
                    kind, payload = await client.request(Kind.LIST, rpc.encode(rpc.List(after, 1000)))
                    assert kind == Kind.LISTED, payload
                    page = msgspec.msgpack.decode(payload, type=rpc.Listed)
                    if not page.sessions:
                        return total
                    total += sum(info.last_seq for _, info in page.sessions)
                    after = page.sessions[-1][0]

        yield Server(
            "shard", "this commit", await shard.port(), shard.pid, lambda name: ShardWire(name, hello=hello), held
        )


@asynccontextmanager
async def _redis(folder: Path) -> AsyncGenerator[Server]:
    program, port = _program("redis-server"), _free_port()
    options = {
        "bind": "127.0.0.1", "port": str(port), "dir": str(folder), "appendonly": "yes", "appendfsync": "always",
        "auto-aof-rewrite-percentage": "0", "save": "", "daemonize": "no",
    }  # fmt: skip
    command = [program]
    for key, value in options.items():
        command += [f"--{key}", value]
    async with _process(command, folder / "out") as process:
        await _listening(port, process, folder / "out")

        async def held() -> int:
            keys = (await _redis_ask(port, b"KEYS *\r\n")).split(b"\r\n")[2::2]
            asked = b"".join(b"XLEN %b\r\n" % key for key in keys if key)
            answers = await _redis_ask(port, asked) if asked else b""
            return sum(int(line[1:]) for line in answers.split(b"\r\n") if line.startswith(b":"))

        version = await _output([program, "--version"])
        yield Server("redis", version, port, process.pid, RedisWire, held)


async def _redis_ask(port: int, commands: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(commands + b"QUIT\r\n")
    answer = await asyncio.wait_for(reader.read(-1), READY_S)
    writer.close()
    return answer


@asynccontextmanager
async def _postgres(folder: Path) -> AsyncGenerator[Server]:
    user = POSTGRES_USER if os.geteuid() == 0 else None
    name = user or psutil.Process().username()
    if user:
        shutil.chown(folder, user)
    data, port, bin_folder = folder / "data", _free_port(), _postgres_bin()
    await _output(
        [str(bin_folder / "initdb"), "-D", str(data), "-A", "trust", "-U", name, "-E", "UTF8", "--no-locale"], user=user
    )
    options = {
        "listen_addresses": "127.0.0.1", "port": str(port), "unix_socket_directories": "",
        "fsync": "on", "synchronous_commit": "on", "max_connections": "150",
    }  # fmt: skip
    command = [str(bin_folder / "postgres"), "-D", str(data)]
    for key, value in options.items():
        command += ["-c", f"{key}={value}"]

    async def ask(sql: str) -> str:
        psql = [str(bin_folder / "psql"), "-h", "127.0.0.1", "-p", str(port), "-U", name, "-d", "postgres"]
        return await _output([*psql, "-qAtX", "-v", "ON_ERROR_STOP=1", "-c", sql])

    async with _process(command, folder / "out", user=user) as process:
        await _listening(port, process, folder / "out")
        async with asyncio.timeout(READY_S):
            while True:
                try:
                    await ask("SELECT 1")
                    break
                except Missing:  # it listens before it is ready
                    await asyncio.sleep(POLL_S)
        await ask("CREATE TABLE messages (id bigserial PRIMARY KEY, session text NOT NULL, body text NOT NULL)")

        async def held() -> int:
            return int(await ask("SELECT count(*) FROM messages"))

        def wire(label: str) -> Wire:
            return PostgresWire(label, user=name, database="postgres")

        yield Server("postgres", await _output([command[0], "--version"]), port, process.pid, wire, held)


@asynccontextmanager
async def _nats(folder: Path) -> AsyncGenerator[Server]:
    if not NATS.exists():
        raise Missing(MISSING.format(what=str(NATS)))
    port, config = _free_port(), folder / "nats.conf"
    config.write_text(
        f'listen: "127.0.0.1:{port}"\njetstream {{ store_dir: "{folder / "store"}", sync_interval: always }}\n'
    )
    async with _process([str(NATS), "-c", str(config)], folder / "out") as process:
        await _listening(port, process, folder / "out")
        made = await _nats_ask(
            port, "STREAM.CREATE.S", b'{"name":"S","subjects":["s.*"],"storage":"file","retention":"limits"}'
        )
        assert b'"error"' not in made, made

        async def held() -> int:
            answer = await _nats_ask(port, "STREAM.INFO.S", b"")
            return int(answer.partition(b'"messages":')[2].split(b",")[0])

        yield Server("nats", await _output([str(NATS), "--version"]), port, process.pid, NatsWire, held)


async def _nats_ask(port: int, verb: str, body: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b'CONNECT {"verbose":false}\r\nSUB _INBOX.ask 1\r\nPUB $JS.API.%b _INBOX.ask %d\r\n' % (
        verb.encode(),
        len(body),
    )
    writer.write(head + body + b"\r\n")
    async with asyncio.timeout(READY_S):
        while not (line := await reader.readline()).startswith(b"MSG"):
            assert line, "nats-server closed the connection"
        answer = await reader.readexactly(int(line.split()[-1]))
    writer.close()
    return answer


@asynccontextmanager
async def _process(
    command: list[str], output: Path, *, user: str | None = None
) -> AsyncGenerator[asyncio.subprocess.Process]:
    with output.open("wb") as sink:
        process = await asyncio.create_subprocess_exec(
            *_as_user(user), *command, stdin=asyncio.subprocess.DEVNULL, stdout=sink, stderr=sink, cwd=output.parent
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), READY_S)
        except TimeoutError:
            process.kill()
            await process.wait()


def _as_user(user: str | None) -> list[str]:
    """The words before a command that is to run as somebody else (uvloop's subprocesses know no `user`)."""
    return [] if user is None else ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", "--"]


async def _listening(port: int, process: asyncio.subprocess.Process, output: Path) -> None:
    async with asyncio.timeout(READY_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                if process.returncode is not None:
                    raise Missing(f"the server ended at once; {output} says why") from None
                await asyncio.sleep(POLL_S)
            else:
                writer.close()
                return


async def _output(command: list[str], *, user: str | None = None) -> str:
    process = await asyncio.create_subprocess_exec(
        *_as_user(user), *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd="/"
    )
    out, _ = await process.communicate()
    if process.returncode:
        raise Missing(f"{command[0]} ended with {process.returncode}:\n{out.decode(errors='replace')}")
    return out.decode().strip()


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Missing(MISSING.format(what=name))
    return found


def _postgres_bin() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not found or not (found[-1] / "initdb").exists():
        raise Missing(MISSING.format(what="postgresql"))
    return found[-1]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
