"""`python -m fleetlm_operator`: the controller over files, configured by the environment only."""

from __future__ import annotations

import os
import sys

import uvloop

from fleetlm_common.config import ConfigError, fail, load
from fleetlm_operator.config import PREFIX, ControllerConfig
from fleetlm_operator.local import run


def main() -> int:
    """Run until a signal.

    Returns:
        The exit status: 78 if the configuration is wrong, 1 if the port is taken (it may come free: worth a retry).
    """
    try:
        uvloop.run(run(load(ControllerConfig, prefix=PREFIX, env=os.environ)))
    except ConfigError as error:
        return fail(error, component="controller")
    except OSError as error:
        sys.stderr.write(f"controller: cannot listen on {PREFIX}OPS_LISTEN: {error.strerror}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
