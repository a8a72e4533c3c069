"""`python -m fleetlm_shard`: one shard, configured by the environment only (docs/operations/configuration.md)."""

from __future__ import annotations

import gc
import os
import random
import sys
from functools import partial
from pathlib import Path
from typing import Final

import uvloop

from fleetlm_common.clock import SystemClock
from fleetlm_common.config import ConfigError, fail, load, secret_from_file
from fleetlm_common.controlurl import from_url
from fleetlm_common.logs import StreamLogger
from fleetlm_shard.config import PREFIX, ShardConfig
from fleetlm_shard.disk import FOLDER_MODE, OsDisk
from fleetlm_shard.lanes import thread_lanes
from fleetlm_shard.process import EXIT_FAILED, Outside, ShardProcess

READERS: Final = 2
"""Threads that read messages back."""
GC_THRESHOLD: Final = 50_000
"""Objects between two collections of the youngest generation: some thousand appends, which leave no cycles."""


async def _run(config: ShardConfig, secret: bytes) -> int:
    clock = SystemClock()
    entropy = random.Random(os.urandom(32))
    control = from_url(
        config.control, variable=PREFIX + "CONTROL", env=os.environ, entropy=entropy, agent=f"fleetlm-{config.name}"
    )
    outside = Outside(
        disk=OsDisk(Path(config.data)),
        control=control,
        clock=clock,
        entropy=entropy,
        events=StreamLogger(config.name, style=config.log_style, level=config.log_level, clock=clock),
        secret=secret,
        new_volume_id=os.urandom(16).hex(),
        boot_id=os.urandom(8).hex(),
        archive_dsn=f"file:{config.archive_url_file}" if config.archive_url_file else "",
        lanes=partial(thread_lanes, readers=READERS),
        exit_now=os._exit,
    )
    try:
        return await ShardProcess(config, outside).run()
    finally:
        await control.close()


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(mode=FOLDER_MODE, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{PREFIX}DATA: cannot make {path}: {error.strerror}") from error


def main() -> int:
    """Run until a signal or a failure.

    Returns:
        The exit status: 0 after a signal, 78 for a wrong configuration, 74 when a disk or port fails, 70 when fenced,
        75 when a younger process asked for the volume.
    """
    try:
        config = load(ShardConfig, prefix=PREFIX, env=os.environ)
        secret = secret_from_file(config.credential_file, variable=PREFIX + "CREDENTIAL_FILE")
        _make_folder(Path(config.data))
        # Measured: with the defaults a third of the append path is spent looking for cycles that are not there.
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD, 20, 50)
        return uvloop.run(_run(config, secret))
    except ConfigError as error:
        return fail(error, component="shard")
    except OSError as error:
        sys.stderr.write(f"shard: cannot listen on {PREFIX}OPS_LISTEN: {error.strerror}\n")
        return EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
