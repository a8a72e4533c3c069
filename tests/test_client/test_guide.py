"""docs/client.md says what works: every example in it is run."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from tests.support.phoenix_server import phoenix_server

GUIDE = Path(__file__).parents[2] / "docs" / "client.md"


async def test_every_example_of_the_guide_runs() -> None:
    """The Python blocks, in their order, against a model of a gateway."""
    blocks = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), flags=re.MULTILINE | re.DOTALL)
    names = re.findall(r"^async def (\w+)\(url: str\)", "\n".join(blocks), flags=re.MULTILINE)
    assert len(names) == len(blocks) >= 5
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, str(GUIDE), "exec"), namespace)
    async with phoenix_server() as server:
        for name in names:
            example: Callable[[str], Awaitable[None]] = namespace[name]
            async with asyncio.timeout(10):
                await example(server.url)
        log = server.model.log("demo")
        assert [message["content"]["text"] for message in log.messages] == ["hi", "by REST", "I can wait"]
        assert server.model.log("orders").last_seq == 103
