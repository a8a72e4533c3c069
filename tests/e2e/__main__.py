"""`python -m tests.e2e [pytest's arguments]`: pytest on a cluster (`ground.py`)."""

from __future__ import annotations

import sys

from tests.cluster import kind
from tests.cluster.say import ClusterError, say
from tests.e2e.ground import on_a_cluster


def main(arguments: list[str]) -> int:
    """The exit code of pytest, or 1."""
    try:
        left_out = kind.NOT_THERE if kind.asked() else ()
    except ClusterError as error:
        say(f"error: {error}")
        return 1
    if left_out:
        say(f"kind: left out, for its processes and StorageClasses are its own: {', '.join(left_out)}")
    ignored = [f"--ignore=tests/e2e/{name}" for name in left_out]
    return on_a_cluster([sys.executable, "-m", "pytest", "-q", "--tb=native", "tests/e2e", *ignored, *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
