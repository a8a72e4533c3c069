"""What aiohttp wants to log, as our events: nobody outside may fill a gateway's log with tracebacks.

aiohttp logs each request that is no HTTP as an error with a traceback, in text, with the client's bytes in it; whoever
can connect could so write what it likes, as much as it likes, into a log of JSON lines.

Promise: what a client did wrong is one event of level `debug`; what is our fault is `http_fault`, an error. Nothing of
it goes to Python's root logger. Must not be done here: answering.
"""

from __future__ import annotations

import logging

from aiohttp.http_exceptions import HttpProcessingError

from fleetlm_common.logs import Logger

_WHY_CHARS_MAX = 200
"""Of a parser's complaint, which holds some of the client's bytes."""


class _Events(logging.Handler):
    """Makes an event of each record."""

    def __init__(self, log: Logger) -> None:
        super().__init__(logging.DEBUG)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        """Logging's call."""
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            self._log.event("http_malformed", level="debug", why=" ".join(str(error).split())[:_WHY_CHARS_MAX])
        elif record.levelno >= logging.WARNING:
            kind = "" if error is None else type(error).__name__
            self._log.event("http_fault", level="error", error=kind, message=record.getMessage())


def http_logger(log: Logger) -> logging.Logger:
    """A logger for aiohttp's server, known to nobody else."""
    logger = logging.Logger("fleetlm_gateway.http", logging.WARNING)  # noqa: LOG001  no global: it holds our log
    logger.addHandler(_Events(log))
    return logger
