"""Where a FleetLM is: one address in any form that people paste, and what is made of it. Pure.

Promise: `http://host:4000`, `ws://host:4000`, `…/socket/websocket`, `host:4000` all mean the same place.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit, urlunsplit

from fleetlm_common.errors import Invalid

SOCKET_PATH = "/socket/websocket"
_SCHEMES = {"http": "http", "ws": "http", "https": "https", "wss": "https"}


@dataclass(frozen=True, slots=True)
class Address:
    """A base URL such as `http://host:4000` (a path in front of the API is kept)."""

    base: str

    @property
    def websocket(self) -> str:
        """Where sockets are opened."""
        return "ws" + self.base.removeprefix("http") + SOCKET_PATH

    def socket_url(self, *, participant_id: str, participant_kind: str) -> str:
        """The WebSocket URL of a participant."""
        query = {"vsn": "2.0.0", "participant_id": participant_id, "participant_kind": participant_kind}
        return f"{self.websocket}?{urlencode(query)}"


def parse(url: str) -> Address:
    """Understand an address.

    Raises:
        Invalid: not an address; names the field `url`.
    """
    if "://" not in url:
        url = f"http://{url}"
    try:
        parts = urlsplit(url)
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError as error:
        raise Invalid(f"url {url!r} is not an address: {error}", field="url") from error
    scheme = _SCHEMES.get(parts.scheme)
    if scheme is None or not parts.hostname or not port_is_valid:
        raise Invalid(f"url {url!r} is not an address like http://127.0.0.1:4000", field="url")
    path = parts.path.rstrip("/").removesuffix(SOCKET_PATH).removesuffix("/socket").removesuffix("/v1").rstrip("/")
    return Address(urlunsplit((scheme, parts.netloc, path, "", "")))
