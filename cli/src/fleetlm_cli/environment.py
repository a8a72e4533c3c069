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

OPTIONS: Final = frozenset({"FLEETLM_URL", "FLEETLM_PARTICIPANT", "FLEETLM_ARCHIVE_URL_FILE"})
"""What the options of all commands are read from: a list, so that no command waits for the imports of all."""


def check(names: Iterable[str]) -> None:
    """Refuse what nobody reads.

    Args:
        names: of the environment.

    Raises:
        Failure: names the variables, and what was probably meant.
    """
    passed = tuple(f"{PREFIX}{component}_" for component in COMPONENTS)
    unknown = sorted(
        name for name in names if name.startswith(PREFIX) and name not in OPTIONS and not name.startswith(passed)
    )
    if not unknown:
        return
    meant = difflib.get_close_matches(unknown[0], [*sorted(OPTIONS), *passed], n=1)
    hint = f"did you mean {meant[0]}{'…' if meant[0] in passed else ''}?" if meant else "unset it"
    raise Failure(f"unknown variable {', '.join(unknown)}: {hint}", status=Exit.CONFIG)
