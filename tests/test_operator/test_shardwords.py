"""Asking shards how they are: over real sockets, with shards that hang, lie, redirect and are gone."""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

import pytest
from aiohttp import web

from fleetlm_common.kubenames import SHARD_OPS_PORT
from fleetlm_operator.observed import Meta, Pod, PodStatus, ShardWord
from fleetlm_operator.shardwords import ASKED_MAX, WORD_BYTES_MAX, WORDS_S, ShardWords

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
_addresses = (f"127.{200 + os.getpid() % 50}.{number // 250}.{1 + number % 250}" for number in itertools.count())


@asynccontextmanager
async def shard(answer: Answer) -> AsyncGenerator[Pod]:
    """A pod whose operations port answers so."""
    app = web.Application()
    app.add_routes([web.get("/health/ready", answer), web.get("/elsewhere", says(ok=True, reason="Elsewhere"))])
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    address = next(_addresses)
    await web.TCPSite(runner, address, SHARD_OPS_PORT).start()
    try:
        yield Pod(metadata=Meta(), status=PodStatus(pod_ip=address))
    finally:
        await runner.cleanup()


@contextmanager
def frozen() -> Generator[Pod]:
    """A pod whose kernel takes connections and whose process answers none."""
    address = next(_addresses)
    with socket.create_server((address, SHARD_OPS_PORT)):
        yield Pod(metadata=Meta(), status=PodStatus(pod_ip=address))


def says(*, ok: bool, reason: str) -> Answer:
    """What a shard's operations port does."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.json_response({"ok": ok, "reason": reason, "message": "m"}, status=200 if ok else 503)

    return answer


async def redirects(request: web.Request) -> web.StreamResponse:
    """Sends whoever asks somewhere else."""
    raise web.HTTPFound("/elsewhere")


async def babbles(request: web.Request) -> web.StreamResponse:
    """More than a word."""
    return web.json_response({"ok": True, "reason": "x" * 2 * WORD_BYTES_MAX})


async def is_no_shard(request: web.Request) -> web.StreamResponse:
    """Another program at that address."""
    return web.Response(text="<html>")


async def test_what_shards_say_is_heard() -> None:
    """Ready or not, by ordinal; a pod that has no address yet is not asked."""
    async with AsyncExitStack() as stack:
        words = await stack.enter_async_context(ShardWords())
        well = await stack.enter_async_context(shard(says(ok=True, reason="Ready")))
        full = await stack.enter_async_context(shard(says(ok=False, reason="DiskFull")))
        heard = await words.ask({0: well, 1: Pod(metadata=Meta()), 2: full})
    assert heard == {
        0: ShardWord(ok=True, reason="Ready", message="m"),
        2: ShardWord(ok=False, reason="DiskFull", message="m"),
    }


@pytest.mark.parametrize("answer", [redirects, babbles, is_no_shard], ids=lambda each: each.__name__)
async def test_who_says_no_word_is_left_out(answer: Answer) -> None:
    """And the others are heard."""
    async with AsyncExitStack() as stack:
        words = await stack.enter_async_context(ShardWords())
        well = await stack.enter_async_context(shard(says(ok=True, reason="Ready")))
        odd = await stack.enter_async_context(shard(answer))
        gone = Pod(metadata=Meta(), status=PodStatus(pod_ip=next(_addresses)))
        assert set(await words.ask({0: odd, 1: well, 2: gone})) == {1}


async def test_silence_costs_one_deadline_however_many_are_silent() -> None:
    """More than are asked at once: all of them together are given up after the time of one."""
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        words = await stack.enter_async_context(ShardWords())
        well = await stack.enter_async_context(shard(says(ok=True, reason="Ready")))
        silent = {number: stack.enter_context(frozen()) for number in range(1, 8 * ASKED_MAX)}
        begun_s = loop.time()
        heard = await words.ask({0: well, **silent})
        took_s = loop.time() - begun_s
    assert set(heard) == {0}
    assert took_s < 6 * WORDS_S
