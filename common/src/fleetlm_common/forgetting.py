"""Why a ring keeps a member that people say is dead for good. Pure; controllers and the command ask the same question.

    the word names another volume than the map binds the member to     refused
    the member is asked for                                            refused
    it owns slots, or a move names it                                  refused: what it has is nowhere else
    it answers                                                         refused, by who can tell (`docs/moves.md`)

Promise: a word is about one volume of one shard, so it is spent once that member is gone: the same volume does not join
again while the word stands, and another volume is not meant. Must not be done here: deciding whether it answers.
"""

from __future__ import annotations

from fleetlm_common.control import Forgotten, View, shard_names
from fleetlm_common.ids import ShardName
from fleetlm_common.ring import RingMap


def is_asked_for(view: View, shard: ShardName) -> bool:
    """Whether people want this shard in the ring."""
    return shard in shard_names(view.spec)


def is_stale(view: View, word: Forgotten) -> bool:
    """Whether there is nothing left that the word could be about: it was acted on, or the shard has another volume."""
    member = None if view.map is None else view.map.member(word.shard)
    return member is None or (member.volume_id != word.volume_id and is_asked_for(view, word.shard))


def refusal(view: View, word: Forgotten) -> str:
    """Why the ring, as it is asked for and as the map has it, does not let the member go; "" when it may go."""
    ring_map = view.map
    member = None if ring_map is None else ring_map.member(word.shard)
    if ring_map is None or member is None:
        return "it is no member of the ring"
    if member.volume_id != word.volume_id:
        return f"the ring map binds it to volume {member.volume_id}, not to {word.volume_id}"
    if is_asked_for(view, word.shard):
        return f"the ring asks for {view.spec.shards} shards, and it is one of them: ask for fewer first"
    return _needed(ring_map, word.shard)


def _needed(ring_map: RingMap, shard: ShardName) -> str:
    owned = len(ring_map.slots_of(shard))
    if owned:
        return f"it owns {'1 slot' if owned == 1 else f'{owned} slots'}, and their messages are on its volume"
    named = [move.id for move in ring_map.moves if shard in (move.source, move.target)]
    return f"move {named[0]} names it" if named else ""
