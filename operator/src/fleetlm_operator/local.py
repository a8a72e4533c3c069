"""The controller over files: one process, an operations port, an orderly end.

Promise: it can be killed at any moment and started anywhere else; nothing but the control plane's files is its state.
Must not be done here: anything about rings (`controller.py`).
"""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from prometheus_client import CollectorRegistry

from fleetlm_common.clock import SystemClock
from fleetlm_common.config import ConfigError, host_port
from fleetlm_common.filecontrol import FileControlPlane
from fleetlm_common.logs import StreamLogger
from fleetlm_common.ops import OpsServer
from fleetlm_operator.config import PREFIX, ControllerConfig
from fleetlm_operator.controller import Controller
from fleetlm_operator.metrics import Metrics


async def run(config: ControllerConfig) -> None:
    """Look after the ring until SIGTERM or SIGINT.

    Raises:
        ConfigError: the control plane's address is none.
        OSError: the operations port cannot be listened on.
    """
    clock = SystemClock()
    log = StreamLogger("controller", style=config.log_style, level=config.log_level, clock=clock)
    registry = CollectorRegistry()
    if not config.control.startswith("file:/"):
        raise ConfigError(f"{PREFIX}CONTROL: {config.control!r} must be file:/absolute/folder")
    control = FileControlPlane(Path(config.control.removeprefix("file:")))
    controller = Controller(control, log=log, metrics=Metrics(registry), clock=clock)
    ops = OpsServer(registry=registry, ready=controller.health)
    stop = _stop_event()
    host, port = host_port(config.ops_listen, variable=PREFIX + "OPS_LISTEN")
    port = await ops.start(host, port)
    log.event("started", ops_port=port, control=config.control)
    work = asyncio.create_task(controller.run())
    ended = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({work, ended}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()  # it ends only by an error, which is a defect: fail loudly, the supervisor starts it again
        log.event("stopping")
    finally:
        for task in (work, ended):
            task.cancel()
        await asyncio.gather(work, ended, return_exceptions=True)
        await ops.stop()


def _stop_event() -> asyncio.Event:
    """Set by SIGTERM and SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop
