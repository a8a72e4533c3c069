"""The environment of the command: a variable that looks like one of ours and is none is refused.

Promise: `FLEETLM_ULR=…` or `FLEETLM_SHRD_FSYNC=…` ends a command in words before it does anything; what processes read
(`FLEETLM_SHARD_…`) passes, they check it themselves. Must not be done here: reading values.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

from fleetlm_cli.exits import Exit, Failure

PREFIX: Final = "FLEETLM_"
COMPONENTS: Final = ("SHARD", "GATEWAY", "CONTROLLER", "OPERATOR")
"""Parts with variables of their own."""


def check(names: Iterable[str], *, known: Iterable[str]) -> None:
    """Refuse what nobody reads.

    Args:
        names: of the environment.
        known: variables that options of this command are read from.

    Raises:
        Failure: names the variables, and what was probably meant.
    """
    passed = tuple(f"{PREFIX}{component}_" for component in COMPONENTS)
    readable = set(known)
    unknown = sorted(
        name for name in names if name.startswith(PREFIX) and name not in readable and not name.startswith(passed)
    )
    if not unknown:
        return
    meant = difflib.get_close_matches(unknown[0], [*sorted(readable), *passed], n=1)
    hint = f"did you mean {meant[0]}{'…' if meant[0] in passed else ''}?" if meant else "unset it"
    raise Failure(f"unknown variable {', '.join(unknown)}: {hint}", status=Exit.CONFIG)
