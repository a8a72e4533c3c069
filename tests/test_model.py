"""The rules of docs/moves.md and docs/archive.md hold in every interleaving of a small scope; each has its reason.

A larger scope by hand: `python -m tests.model`.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.model.archived import Archived, ArchiveRules
from tests.model.checker import check
from tests.model.moves import Moves, Rules, Scope

ONE = Scope(keys=1, moves=2, aborts=1, crashes=1)
CALM = Scope(keys=1, moves=2, aborts=1, crashes=0)
KEYS = Scope(keys=2, moves=1, aborts=0, crashes=1)
TWO = Scope(keys=1, moves=1, aborts=0, crashes=0, seconds=1)
STILL = Scope(keys=2, moves=0, aborts=0, crashes=0, seconds=1, expected=0)
ALONE = Scope(keys=1, moves=1, aborts=0, crashes=0, expected=0)
EMPTY = Scope(keys=2, moves=1, aborts=1, crashes=1, expected=0)
BEHIND = Scope(keys=2, moves=1, aborts=1, crashes=1, expected=1)

SOUND: dict[str, tuple[Scope, dict[str, Any]]] = {
    "two moves, an abort, a crash": (ONE, {}),
    "two keys": (KEYS, {}),
    "a second container starts, also while the first still boots": (TWO, {}),
    "expected_seq, two containers": (STILL, {}),
    "expected_seq 0, a move, an abort, a crash": (EMPTY, {}),
    "expected_seq 1, a move, an abort, a crash": (BEHIND, {}),
    "no look for one's own confirmation: a second lock, the others hold": (ONE, {"marker": False}),
}
MISTAKES: dict[str, tuple[Scope, dict[str, Any], str]] = {
    "no look before an answer": (TWO, {"look": False}, "S4"),
    "a boot trusts the page cache": (KEYS, {"boot_sync": False}, "S1"),
    "a sealed source boots unsealed": (ONE, {"boot_sealed": False}, "S4"),
    "a boot goes by an older map than its volume": (ONE, {"stale_boot": True, "floor": False}, "S4"),
    "the map and the log are read before the term is durable": (TWO, {"term_first": False}, "S4"),
    "a sealed source unseals itself": (CALM, {"self_unseal": True}, "S4"),
    "what is not durable is copied": (KEYS, {"copy_shown": False}, "P"),
    "keys stay behind": (KEYS, {"keys_travel": False}, "S3"),
    "a confirmation that is not durable": (KEYS, {"confirm_durable": False}, "S1"),
    "a confirmation of another move": (CALM, {"confirm_keyed": False}, "S1"),
    "a target confirms before the source sealed": (KEYS, {"seal_before_confirm": False}, "S4"),
    "a target serves before the commit": (KEYS, {"serve_on_confirm": True}, "S1"),
    "a commit that is no compare-and-swap": (CALM, {"cas": False}, "S4"),
    "a clean-up that does not look at the map": (CALM, {"clean_keyed": False}, "S1"),
    "a dedupe hit that does not wait": (KEYS, {"dedupe_waits": False}, "S1"),
    "CONFLICT without a look": (STILL, {"conflict_looks": False}, "A2"),
    "CONFLICT that rests on what is not durable": (EMPTY, {"conflict_looks": False}, "A2"),
    "expected_seq before dedupe": (STILL, {"dedupe_first": False}, "A2"),
    "expected_seq when keys stayed behind": (ALONE, {"keys_travel": False}, "A2"),
    "expected_seq against what is durable only": (STILL, {"expects_queued": False}, "E"),
    "expected_seq without what a move brought": (EMPTY, {"expects_imported": False}, "E"),
}


@pytest.mark.parametrize("name", SOUND)
def test_the_rules_hold(name: str) -> None:
    """Nothing shown is lost, repeated or taken back, one process at most can acknowledge, and every move can end."""
    scope, rules = SOUND[name]
    verdict = check(Moves(scope, Rules(**rules)))
    assert verdict.broken is None, "\n".join(verdict.trace)


@pytest.mark.parametrize("name", MISTAKES)
def test_each_rule_is_needed(name: str) -> None:
    """Without the rule there is a counterexample: the model can see the mistake."""
    scope, rules, broken = MISTAKES[name]
    assert check(Moves(scope, Rules(**rules))).broken == broken


AWAY = Scope(keys=1, moves=1, aborts=0, crashes=0)
DYING = Scope(keys=1, moves=1, aborts=0, crashes=1)
BACK = Scope(keys=1, moves=2, aborts=0, crashes=0)
ABORTED = Scope(keys=2, moves=1, aborts=1, crashes=0)
MORE = Scope(keys=2, moves=1, aborts=0, crashes=0)
ELDER = Scope(keys=2, moves=0, aborts=0, crashes=0, seconds=1)

ARCHIVED: dict[str, tuple[Scope, dict[str, Any]]] = {
    "a move, a crash": (DYING, {}),
    "there and back": (BACK, {}),
    "two keys, a move, an abort": (ABORTED, {}),
    "an elder archives and trims late": (ELDER, {}),
    "positions without fence, rows without comparison, an elder: second locks, the others hold": (
        ELDER,
        {"position_fenced": False, "compared": False},
    ),
}
ARCHIVE_MISTAKES: dict[str, tuple[Scope, dict[str, Any], str]] = {
    "an elder archives what was cut": (ELDER, {"archive_looked": False}, "S1"),
    "what a move brought is not archived at its target": (AWAY, {"archive_imports": False}, "S1"),
    "the position moves before its rows": (AWAY, {"position_with_rows": False}, "S1"),
    "a target trims by the source's position": (MORE, {"position_own": False}, "S1"),
    "retention drops what is not archived": (AWAY, {"trim_archived": False}, "S1"),
    "the target does not know what the source trimmed": (AWAY, {"holes_travel": False}, "S1"),
}


@pytest.mark.parametrize("name", ARCHIVED)
def test_the_rules_of_the_archive_hold(name: str) -> None:
    """What was shown is in its owner's log or in the archive, one message under a seq, and all of it can come there."""
    scope, rules = ARCHIVED[name]
    verdict = check(Archived(scope, ArchiveRules(**rules)))
    assert verdict.broken is None, "\n".join(verdict.trace)


@pytest.mark.parametrize("name", ARCHIVE_MISTAKES)
def test_each_rule_of_the_archive_is_needed(name: str) -> None:
    """Without the rule there is a counterexample."""
    scope, rules, broken = ARCHIVE_MISTAKES[name]
    assert check(Archived(scope, ArchiveRules(**rules))).broken == broken
