"""`python -m fleetlm_gateway`: one gateway, configured by the environment only (docs/operations/configuration.md)."""

from __future__ import annotations

import gc
import os
import random
import sys
from typing import Final

import uvloop

from fleetlm_common.clock import SystemClock
from fleetlm_common.config import ConfigError, fail, load, secret_from_file
from fleetlm_common.controlurl import from_url
from fleetlm_common.logs import StreamLogger
from fleetlm_gateway.config import GatewayConfig
from fleetlm_gateway.process import PREFIX, GatewayProcess, Outside

EXIT_FAILED: Final = 74
"""A port cannot be had (EX_IOERR)."""
_GC_THRESHOLDS: Final = (50_000, 20, 50)
"""A full collection walks every socket's objects: with 10,000 of them that pauses for a tenth of a second. What lives
long is not garbage; cycles are made by connections that end, not by messages."""


async def _run(config: GatewayConfig, credential: bytes) -> int:
    clock = SystemClock()
    entropy = random.Random(os.urandom(32))
    control = from_url(
        config.control, variable=PREFIX + "CONTROL", env=os.environ, entropy=entropy, agent=f"fleetlm-{config.name}"
    )
    outside = Outside(
        control=control,
        clock=clock,
        entropy=entropy,
        log=StreamLogger(config.name, style=config.log_style, level=config.log_level, clock=clock),
        credential=credential,
    )
    try:
        return await GatewayProcess(config, outside).run()
    finally:
        await control.close()


def main() -> int:
    """Run until a signal or a failure.

    Returns:
        The exit status: 0 after a signal, 78 for a wrong configuration, 74 when a port cannot be had.
    """
    gc.set_threshold(*_GC_THRESHOLDS)
    gc.freeze()
    try:
        config = load(GatewayConfig, prefix=PREFIX, env=os.environ)
        credential = secret_from_file(config.credential_file, variable=PREFIX + "CREDENTIAL_FILE")
        return uvloop.run(_run(config, credential))
    except ConfigError as error:
        return fail(error, component="gateway")
    except OSError as error:
        sys.stderr.write(f"gateway: {error.filename or ''}: {error.strerror}\n")
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
