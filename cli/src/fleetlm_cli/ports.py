"""Which ports the processes of one `up` listen on: chosen once, remembered in the folder.

Promise: a port survives a child's restart and a later `up`; the port that clients know (gateway-0's) never changes
without being asked to. Must not be done here: listening.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec

from fleetlm_cli.exits import Failure

HOST: Final = "127.0.0.1"
PORT_DEFAULT: Final = 4000
"""gateway-0's when nobody says otherwise."""
PORTS_FILE: Final = "ports.json"
FREE_PORTS: Final = range(20_000, 32_000)
"""Below what systems give to outgoing connections (Linux: 32768 and up): one of those could take the port of a child
between its death and its next start."""
TRIES_MAX: Final = 200
"""Random tries for a free port; so many failures mean that something else is wrong."""


def is_free(port: int) -> bool:
    """Whether a server could listen on `port` now (connections that linger do not count)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
            probe.listen(1)
        except OSError:
            return False
    return True


def client_port(
    *, wanted: int | None, remembered: int | None, entropy: random.Random, free: Callable[[int], bool] = is_free
) -> int:
    """The port that clients know.

    Args:
        wanted: what the user asked for: None for the remembered one or 4000, 0 for any.
        remembered: what it was last time.
        entropy: for a free port.
        free: whether a port can be had.

    Raises:
        Failure: it is taken (another one only if any is welcome).
    """
    if wanted == 0:
        return remembered if remembered is not None and free(remembered) else _any(set(), entropy=entropy, free=free)
    port = wanted or remembered or PORT_DEFAULT
    if not free(port):
        raise Failure(f"port {port} is taken by another program; choose one with --port (0 takes a free one)")
    return port


def choose(
    names: Iterable[str],
    *,
    chosen: dict[str, int],
    remembered: dict[str, int],
    entropy: random.Random,
    free: Callable[[int], bool] = is_free,
) -> dict[str, int]:
    """A port for each of `names` besides those in `chosen`: what it was last time if that is free."""
    chosen = dict(chosen)
    for name in names:
        if name not in chosen:
            taken = set(chosen.values())
            known = remembered.get(name)
            good = known is not None and known not in taken and free(known)
            chosen[name] = known if good and known is not None else _any(taken, entropy=entropy, free=free)
    return chosen


def _any(taken: set[int], *, entropy: random.Random, free: Callable[[int], bool]) -> int:
    for _ in range(TRIES_MAX):
        port = entropy.choice(FREE_PORTS)
        if port not in taken and free(port):
            return port
    raise Failure(f"found no free port between {FREE_PORTS.start} and {FREE_PORTS.stop}")


def load(folder: Path) -> dict[str, int]:
    """What an earlier `up` chose; nothing if that cannot be read (ports are a convenience)."""
    try:
        return msgspec.json.decode((folder / PORTS_FILE).read_bytes(), type=dict[str, int])
    except (OSError, msgspec.DecodeError):
        return {}


def save(folder: Path, ports: dict[str, int]) -> None:
    """Remember `ports`, and those of processes that do not run this time."""
    temporary = folder / f"{PORTS_FILE}.tmp"
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode({**load(folder), **ports}), indent=1) + b"\n")
    temporary.replace(folder / PORTS_FILE)
