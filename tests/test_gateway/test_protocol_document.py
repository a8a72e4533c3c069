"""docs/protocol.md says what is in force."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from fleetlm_common.errors import HTTP_STATUS
from fleetlm_common.limits import CLIENT_LIMITS
from fleetlm_gateway import closing

TEXT: Final = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()


def test_every_close_code_is_documented() -> None:
    """The table of close codes is `closing.ALL`, names and numbers."""
    rows = re.findall(r"^\| (\d{4}) \| `(\w+)` \|", TEXT, re.MULTILINE)
    assert [(int(code), name) for code, name in rows] == [(reason.code, reason.name) for reason in closing.ALL]


def test_every_limit_is_documented_with_its_value() -> None:
    """Each limit of every gateway stands in the document under its name, with its number."""
    section = TEXT.split("\n## Limits\n")[1].split("\n## ")[0]
    for name, value in CLIENT_LIMITS.items():
        row = next(line for line in section.splitlines() if line.startswith("|") and f"`{name}`" in line)
        shown = "2^53 − 1" if value == 2**53 - 1 else f"{value:,}"
        assert shown in row, (name, row)


def test_every_error_code_is_documented() -> None:
    """Each code stands in the table of errors with its HTTP status."""
    for code, status in HTTP_STATUS.items():
        assert re.search(rf"^\| `{code}` \| {status}\b", TEXT, re.MULTILINE), code
