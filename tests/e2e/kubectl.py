"""kubectl and helm as their users run them, from the client's network; and waiting for what they show.

Promise: what a command said when it failed is in the error; every wait has a deadline and says what it waited for.
Must not be done here: knowing FleetLM, or how the cluster is made.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

Json = dict[str, Any]

TIMEOUT_S: Final = 120.0
POLL_S: Final = 0.4
"""Between two looks by a program that costs 50 ms of a processor."""


class CommandError(Exception):
    """A command failed; the text is its own."""


def run_now(*command: object, stdin: str | None = None, timeout_s: float = TIMEOUT_S) -> str:
    """Run to the end; its output.

    Raises:
        CommandError: it failed or took too long.
    """
    line = [str(word) for word in command]
    try:
        done = subprocess.run(line, input=stdin, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        raise CommandError(f"{' '.join(line)}: not done after {timeout_s:g} s") from error
    if done.returncode:
        raise CommandError(f"{' '.join(line)}: exit {done.returncode}: {done.stderr.strip()} {done.stdout.strip()}")
    return done.stdout


async def run(*command: object, stdin: str | None = None, timeout_s: float = TIMEOUT_S) -> str:
    """The same beside a loop whose clients go on."""
    return await asyncio.to_thread(run_now, *command, stdin=stdin, timeout_s=timeout_s)


async def kubectl(*arguments: object, stdin: str | None = None, timeout_s: float = TIMEOUT_S) -> str:
    """One kubectl command."""
    return await run("kubectl", *arguments, stdin=stdin, timeout_s=timeout_s)


async def get(namespace: str, kind: str, name: str) -> Json:
    """One object."""
    found: Json = json.loads(await kubectl("get", kind, name, "-n", namespace, "-o", "json"))
    return found


async def listed(namespace: str, kind: str, selector: str = "") -> list[Json]:
    """The objects of a kind that have the labels."""
    text = await kubectl("get", kind, "-n", namespace, "-l", selector, "-o", "json")
    found: list[Json] = json.loads(text)["items"]
    return found


async def until(what: str, holds: Callable[[], Awaitable[bool]], *, timeout_s: float = 90.0) -> float:
    """Wait for what commands show; one that fails counts as no.

    Returns:
        Seconds that passed.

    Raises:
        AssertionError: not in time; carries the last failure.
    """
    begin_s = time.monotonic()
    last: Exception | None = None
    while time.monotonic() - begin_s < timeout_s:
        try:
            if await holds():
                return time.monotonic() - begin_s
        except (CommandError, KeyError, IndexError) as error:
            last = error
        await asyncio.sleep(POLL_S)
    raise AssertionError(f"not within {timeout_s:g} s: {what}" + (f"; last: {last}" if last else ""))
