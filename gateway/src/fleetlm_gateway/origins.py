"""Which web pages may talk to this gateway: the check of the header `Origin`, and the answers that browsers ask for.

Promise: a request that a browser sends for a page of another origin is refused unless that origin is allowed; requests
without `Origin` (no browser) pass. A page of the gateway's own host is allowed.
Must not be done here: who speaks (`principal.py`); an origin is no proof of anybody.
"""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from fleetlm_common.errors import Forbidden


def check(headers: Mapping[str, str], *, allowed: frozenset[str]) -> str | None:
    """Return the request's origin when it is another one than the gateway's own and allowed; None: nothing to say.

    Raises:
        Forbidden: not allowed.
    """
    origin = headers.get("Origin")
    if origin is None or _host(origin) == headers.get("Host", "").lower():
        return None
    if "*" in allowed or origin.lower() in allowed:
        return origin
    raise Forbidden("pages of this origin may not talk to this gateway", reason="origin", field="origin")


def _host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def cors(origin: str) -> dict[str, str]:
    """What lets a page of `origin` read an answer."""
    return {
        "Access-Control-Allow-Origin": origin,
        "Vary": "Origin",
        "Access-Control-Expose-Headers": "Retry-After, Location",
    }


def preflight(origin: str) -> dict[str, str]:
    """The answer to a browser's question before the request."""
    return {
        **cors(origin),
        "Access-Control-Allow-Methods": "GET, POST, PUT",
        "Access-Control-Allow-Headers": "Content-Type, Idempotency-Key, X-Participant-Id, X-Participant-Kind",
        "Access-Control-Max-Age": "600",
    }
