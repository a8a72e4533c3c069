"""The scopes that take minutes: `python -m tests.model`."""

from __future__ import annotations

import sys

from tests.model.archived import Archived, ArchiveRules
from tests.model.checker import check
from tests.model.moves import Moves, Rules, Scope

SCOPES = {
    "2 keys, 2 moves, a crash": Scope(keys=2, moves=2, aborts=1, crashes=1),
    "2 keys, a second container": Scope(keys=2, moves=1, aborts=0, crashes=0, seconds=1),
    "2 keys, a second container, an abort": Scope(keys=2, moves=1, aborts=1, crashes=0, seconds=1),
    "expected_seq, a second container": Scope(keys=2, moves=1, aborts=0, crashes=0, seconds=1, expected=0),
    "expected_seq, two moves, a crash": Scope(keys=2, moves=2, aborts=0, crashes=1, expected=1),
    "3 shards": Scope(keys=1, moves=2, aborts=1, crashes=1, shards=3),
}
ARCHIVED = {
    "archive, two moves, an abort": Scope(keys=1, moves=2, aborts=1, crashes=0),
    "archive, 2 keys, a crash": Scope(keys=2, moves=1, aborts=0, crashes=1),
    "archive, a second container": Scope(keys=1, moves=1, aborts=0, crashes=0, seconds=1),
}


def main() -> int:
    """Check each; 1 if one is not sound."""
    failed = 0
    models = {name: Moves(scope, Rules()) for name, scope in SCOPES.items()}
    models.update((name, Archived(scope, ArchiveRules())) for name, scope in ARCHIVED.items())
    for name, model in models.items():
        verdict = check(model)
        failed += verdict.broken is not None
        sys.stdout.write(f"{name}: {verdict.states:,} states, {verdict.broken or 'sound'}\n")
        sys.stdout.writelines(f"    {label}\n" for label in verdict.trace)
        sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
