"""Which members are left out of the map because people say that they are dead for good. Pure.

    the word is about nobody (any more)             nothing
    the map or the spec still needs the member      refused, and it is said (`fleetlm_common.forgetting`)
    it is seen to run                               refused, and it is said
    it said something new within ANSWER_S           it has that long to say that it serves nothing, and leaves as all do
    it said nothing                                 forgotten

Promise: without people's word for this very volume nobody is forgotten, however silent; who is forgotten owns nothing,
so a wrong word costs a member and no message. Must not be done here: guessing who is dead without being told.
"""

from __future__ import annotations

from typing import Final

import msgspec

from fleetlm_common.control import Forgotten, ShardEndpoint, View
from fleetlm_common.forgetting import is_stale, refusal
from fleetlm_common.ids import ShardName
from fleetlm_common.ring import Member, RingMap
from fleetlm_operator.mapsteps import Forget
from fleetlm_operator.memory import Memory
from fleetlm_operator.moving import is_bound

ANSWER_S: Final = 20.0
"""A shard that runs announces within a second what it made of the newest map. One whose API server is away looks again
within 5 s, and its write may take 10 s; twenty seconds without a new word are no answer."""


class Forgetting(msgspec.Struct, frozen=True, kw_only=True):
    """The decision."""

    steps: tuple[Forget, ...]
    refused: tuple[str, ...]
    """Words that are not acted on, each with why, in a sentence."""
    memory: Memory
    again_s: float | None
    """Time alone changes something so soon."""


def forget(view: View, ring: RingMap, memory: Memory, now_s: float) -> Forgetting:
    """Decide about every word that is about a member."""
    about = [word for word in view.spec.forgotten if not is_stale(view, word)]
    refused = {word: why for word in about if (why := refusal(view, word) or _seen(view, word))}
    heard = {word: _heard(view, ring, word.shard) for word in about if word not in refused}
    memory = memory.listening({word.shard: said for word, said in heard.items()}, now_s)
    left_s = {word: memory.silences[word.shard].since_s + ANSWER_S - now_s for word in heard}
    waiting = {word: pause_s for word, pause_s in left_s.items() if pause_s > 0}
    kept = {**refused, **dict.fromkeys(waiting, f"it has {ANSWER_S:g} s to answer")}
    return Forgetting(
        steps=tuple(Forget(Member(word.shard, word.volume_id)) for word in left_s if word not in waiting),
        refused=tuple(f"{word.shard} is not forgotten: {kept[word]}" for word in about if word in kept),
        memory=memory,
        again_s=min(waiting.values(), default=None),
    )


def forgotten_volume(view: View, name: ShardName) -> str | None:
    """The volume with which a shard would join although people had it forgotten."""
    said = view.shards.get(name)
    known = said is not None and Forgotten(name, said.volume_id) in view.spec.forgotten
    return said.volume_id if said is not None and known else None


def _seen(view: View, word: Forgotten) -> str:
    return "it runs and is ready: it leaves by itself" if word.shard in view.alive else ""


def _heard(view: View, ring: RingMap, shard: ShardName) -> ShardEndpoint | None:
    """The member's last word; that of another volume is not its own."""
    return view.shards[shard] if is_bound(view, ring, shard) else None
