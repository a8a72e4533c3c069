"""Configuration: one frozen struct per component, read once from environment variables, unknown keys refused.

Promise: a component starts with every field known, in range and explained, or does not start and says which variable
is wrong. Must not be done here: defaults (they stand in each component's struct, with unit and reason).
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

C = TypeVar("C", bound=msgspec.Struct)


class ConfigError(Exception):
    """The environment does not make a configuration; the text names the variable and what to do."""


def load(kind: type[C], *, prefix: str, env: Mapping[str, str]) -> C:
    """Read `kind` from variables `prefix` + FIELD in upper case.

    Args:
        kind: a frozen struct; its `__post_init__` may raise ValueError to refuse a combination.
        prefix: for example `FLEETLM_SHARD_`.
        env: usually `os.environ`.

    Raises:
        ConfigError: a variable with the prefix that is no field, a missing one, or a value out of range.
    """
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    given = {name[len(prefix) :].lower(): value for name, value in env.items() if name.startswith(prefix)}
    unknown = sorted(set(given) - set(fields))
    if unknown:
        names = ", ".join(prefix + name.upper() for name in unknown)
        nearest = difflib.get_close_matches(unknown[0], sorted(fields), n=3, cutoff=0.5)
        meant = f"nearest are {', '.join(prefix + name.upper() for name in nearest)}" if nearest else "unset it"
        raise ConfigError(f"unknown variable {names}; {meant} (all are in docs/operations/configuration.md)")
    missing = sorted(name for name, field in fields.items() if field.required and name not in given)
    if missing:
        raise ConfigError("missing variable " + ", ".join(prefix + name.upper() for name in missing))
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(_named(str(error), prefix)) from error


def _named(text: str, prefix: str) -> str:
    """Put the variable's name in place of msgspec's path, for example `at $.port`."""
    what, found, path = text.partition(" - at `$.")
    return f"{prefix}{path.rstrip('`').upper()}: {what}" if found else text


def secret_from_file(path: str, *, variable: str) -> bytes:
    """Read a secret; surrounding white space does not count.

    Raises:
        ConfigError: no such file, not readable, or empty; names the variable, never the content.
    """
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{variable}: cannot read {path}: {error.strerror}") from error
    if not secret:
        raise ConfigError(f"{variable}: {path} is empty")
    return secret


def host_port(value: str, *, variable: str) -> tuple[str, int]:
    """Split `host:port` (IPv6 hosts in brackets).

    Raises:
        ConfigError: not of that form; names the variable.
    """
    host, colon, port = value.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{variable}: {value!r} is not host:port")
    return host.removeprefix("[").removesuffix("]"), int(port)


def fail(error: Exception, *, component: str) -> int:
    """Say on standard error why a component does not start; returns the exit status for it (78, EX_CONFIG)."""
    sys.stderr.write(f"{component}: {error}\n")
    return 78
