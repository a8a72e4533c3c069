"""Settings of the gateway and their document."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from fleetlm_common.config import ConfigError, load
from fleetlm_gateway.config import GatewayConfig

DOCUMENT = Path(__file__).parents[2] / "docs" / "operations" / "configuration.md"
PREFIX = "FLEETLM_GATEWAY_"
LEAST = {PREFIX + "CONTROL": "file:/x", PREFIX + "CREDENTIAL_FILE": "/y"}


def test_document_lists_every_variable_with_its_default() -> None:
    """docs/operations/configuration.md names each variable of the gateway with the default that is in force."""
    section = DOCUMENT.read_text().split("## Gateway\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(FLEETLM_GATEWAY_\w+)` \| ([^|]+) \|", section, re.MULTILINE))
    expected: dict[str, str] = {}
    for field in msgspec.structs.fields(GatewayConfig):
        default = "required" if field.required else (str(field.default) or "empty")
        expected[PREFIX + field.name.upper()] = f"`{default}`" if _is_word(default) else default
    assert rows == expected


def _is_word(default: str) -> bool:
    return not default.isdigit() and default not in ("required", "empty")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SOCKETS", "0"),
        ("WRITE_BUFFER_BYTES", "1000"),
        ("REQUEST_BYTES_PER_SOCKET", "1000"),
        ("HEARTBEAT_TIMEOUT_MS", "0"),
        ("DRAIN_WINDOW_MS", "-1"),
        ("LISTEN", "nowhere"),
        ("OPS_LISTEN", "127.0.0.1:99999"),
        ("ORIGINS", "https://app.example/"),
        ("NAME", ""),
        ("LOG_STYLE", "xml"),
        ("UNKNOWN", "1"),
    ],
)
def test_impossible_settings_are_refused_by_name(name: str, value: str) -> None:
    """A value that cannot be stops the start and names its variable."""
    with pytest.raises(ConfigError, match=PREFIX + name):
        load(GatewayConfig, prefix=PREFIX, env={**LEAST, PREFIX + name: value})


def test_least_configuration_listens_on_loopback_only() -> None:
    """With only what is required nothing is exposed."""
    config = load(GatewayConfig, prefix=PREFIX, env=LEAST)
    assert config.listen.startswith("127.0.0.1:")
    assert config.ops_listen.startswith("127.0.0.1:")
    assert config.allowed_origins == frozenset()
