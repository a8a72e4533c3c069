"""A component starts with every setting known and in range, or says which variable is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest

from fleetlm_common.config import ConfigError, host_port, load, secret_from_file


class Example(msgspec.Struct, frozen=True):
    """A component's configuration."""

    name: str
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 4000
    fsync: Literal["always", "never"] = "always"


def test_strings_become_values() -> None:
    """Environment variables are strings; fields have types; variables of others are left alone."""
    env = {"X_NAME": "one", "X_PORT": "41", "Y_PORT": "9", "PATH": "/bin"}
    assert load(Example, prefix="X_", env=env) == Example("one", 41)


@pytest.mark.parametrize(
    ("env", "complaint"),
    [
        ({}, "missing variable X_NAME"),
        ({"X_NAME": "one", "X_PROT": "1"}, "unknown variable X_PROT; nearest are X_PORT"),
        ({"X_NAME": "one", "X_Q": "1"}, "unknown variable X_Q; unset it"),
        ({"X_NAME": "one", "X_PORT": "many"}, "X_PORT: "),
        ({"X_NAME": "one", "X_PORT": "70000"}, "X_PORT: .*65535"),
        ({"X_NAME": "one", "X_FSYNC": "sometimes"}, "X_FSYNC: "),
    ],
)
def test_a_wrong_environment_is_named(env: dict[str, str], complaint: str) -> None:
    """Unknown, missing and out-of-range variables are refused by name: unknown keys ignored is a known mistake."""
    with pytest.raises(ConfigError, match=complaint):
        load(Example, prefix="X_", env=env)


@pytest.mark.parametrize(("text", "pair"), [("127.0.0.1:0", ("127.0.0.1", 0)), ("[::1]:41", ("::1", 41))])
def test_host_port(text: str, pair: tuple[str, int]) -> None:
    """IPv4 and bracketed IPv6."""
    assert host_port(text, variable="X_LISTEN") == pair


@pytest.mark.parametrize("text", ["", "localhost", ":1", "h:", "h:-1", "h:99999", "h:1x"])
def test_host_port_refuses(text: str) -> None:
    """Anything else names the variable."""
    with pytest.raises(ConfigError, match="X_LISTEN"):
        host_port(text, variable="X_LISTEN")


def test_secrets_come_from_files(tmp_path: Path) -> None:
    """White space around does not count; an absent or empty file is named, its content never."""
    path = tmp_path / "secret"
    with pytest.raises(ConfigError, match="X_FILE"):
        secret_from_file(str(path), variable="X_FILE")
    path.write_bytes(b" \n")
    with pytest.raises(ConfigError, match="empty"):
        secret_from_file(str(path), variable="X_FILE")
    path.write_bytes(b"s3cret\n")
    assert secret_from_file(str(path), variable="X_FILE") == b"s3cret"
