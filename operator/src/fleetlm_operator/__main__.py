"""`python -m fleetlm_operator [kubernetes]`: the controller over files, or the operator on Kubernetes.

Configured by the environment only (docs/operations/configuration.md).
"""

from __future__ import annotations

import os
import sys

import uvloop

from fleetlm_common.config import ConfigError, fail, load
from fleetlm_operator.config import OPERATOR_PREFIX, PREFIX, ControllerConfig, OperatorConfig


def main() -> int:
    """Run until a signal.

    Returns:
        The exit status: 78 if the configuration is wrong, 1 if the port is taken (it may come free: worth a retry).
    """
    arguments = sys.argv[1:]
    if arguments not in ([], ["kubernetes"]):
        sys.stderr.write(
            f"operator: unknown arguments {arguments}; none runs a ring over files, `kubernetes` the operator\n"
        )
        return 2
    on_kubernetes = bool(arguments)
    component, prefix = ("operator", OPERATOR_PREFIX) if on_kubernetes else ("controller", PREFIX)
    try:
        if on_kubernetes:
            from fleetlm_operator import cluster

            uvloop.run(cluster.run(load(OperatorConfig, prefix=prefix, env=os.environ)))
        else:
            from fleetlm_operator import local

            uvloop.run(local.run(load(ControllerConfig, prefix=prefix, env=os.environ)))
    except ConfigError as error:
        return fail(error, component=component)
    except OSError as error:
        sys.stderr.write(f"{component}: cannot listen on {prefix}OPS_LISTEN: {error.strerror}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
