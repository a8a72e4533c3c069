"""A member that is dead for good leaves by people's word, for its volume only, and only if nothing needs it."""

from __future__ import annotations

import msgspec
import pytest

from fleetlm_common.control import Forgotten
from fleetlm_common.forgetting import refusal
from fleetlm_common.ring import RingMap
from fleetlm_operator.forgetting import ANSWER_S
from fleetlm_operator.mapsteps import Forget, Leave
from fleetlm_operator.memory import LOOKS_APART_S_MAX
from fleetlm_operator.planning import Decision
from tests.test_operator.playedring import PlayedController, PlayedRing
from tests.test_operator.test_moving import name, ring_of, step, the_map, until

VOLUME = "volume of shard-2"
WORD = Forgotten(name(2), VOLUME)
WAITED_OUT_S = ANSWER_S + 6.0
"""Its time runs from the first look; looks lie three seconds apart."""
KEPT = "shard-2 is not forgotten: "


def dead() -> tuple[PlayedRing, PlayedController]:
    """A ring that was asked for two shards; the third gave everything away and died before it could say so."""
    ring, controller = ring_of(3)
    ring.ask(shards=2)
    until(ring, controller, lambda found: not found.slots_of(name(2)) and not found.moves)
    ring.shards[name(2)].stop()
    return ring, controller


def look(ring: PlayedRing, controller: PlayedController, *, later_s: float = 0.0) -> Decision:
    """Time passes, everybody acts, the controller looks and does what it came to."""
    ring.now_s += later_s
    for shard in ring.shards.values():
        shard.act()
    decision = controller.look()
    assert controller.act()
    return decision


def looks(ring: PlayedRing, controller: PlayedController, seconds: float, *, every_s: float = 3.0) -> list[Decision]:
    """Looks for so long, as often as controllers do while something is under way."""
    return [look(ring, controller, later_s=every_s) for _ in range(int(seconds / every_s))]


def is_member(ring_map: RingMap) -> bool:
    """Of shard-2."""
    return ring_map.member(name(2)) is not None


def test_without_a_word_a_dead_member_is_waited_for() -> None:
    """However long: silence alone changes nothing."""
    ring, controller = dead()
    said = looks(ring, controller, 3600.0, every_s=30.0)
    assert is_member(the_map(ring))
    assert "waiting for shard-2 to say that it serves nothing any more" in said[-1].sentence


def test_a_dead_member_is_forgotten_by_peoples_word() -> None:
    """After the time that it has to answer; then the ring is steady, and only that member is gone."""
    ring, controller = dead()
    ring.ask(forgotten=(WORD,))
    first = look(ring, controller)
    assert first.not_forgotten == (f"{KEPT}it has 20 s to answer",)
    assert first.sentence.endswith(first.not_forgotten[0])
    assert first.again_s == ANSWER_S
    before = the_map(ring)
    said = looks(ring, controller, ANSWER_S - 3.0)
    assert the_map(ring) == before
    assert said[-1].again_s is not None
    last = look(ring, controller, later_s=said[-1].again_s)
    assert [str(each) for each in last.steps] == [f"forgot shard-2 and its volume {VOLUME}"]
    assert f"forgot shard-2 and its volume {VOLUME} (epoch {before.epoch + 1}, 24 slots on 2" in last.sentence
    assert the_map(ring).ranges == before.ranges
    assert [member.name for member in the_map(ring).members] == ["shard-0", "shard-1"]
    assert look(ring, controller).sentence == f"steady at epoch {before.epoch + 1}, 24 slots on 2 shards, all ready"


def test_a_word_for_another_volume_is_refused() -> None:
    """It names exactly what the map binds the member to, or nothing happens."""
    ring, controller = dead()
    ring.ask(forgotten=(Forgotten(name(2), "another"), Forgotten(name(1), VOLUME)))
    said = looks(ring, controller, 60.0)
    assert is_member(the_map(ring))
    assert said[-1].not_forgotten == (f"{KEPT}the ring map binds it to volume {VOLUME}, not to another",)
    assert said[-1].sentence.endswith(said[-1].not_forgotten[0])


def test_a_member_that_is_asked_for_is_not_forgotten() -> None:
    """Dead or not: the ring is told to have it."""
    ring, controller = ring_of(3)
    ring.shards[name(2)].stop()
    ring.ask(forgotten=(WORD,))
    said = looks(ring, controller, 60.0)
    assert is_member(the_map(ring))
    assert said[-1].not_forgotten == (f"{KEPT}the ring asks for 3 shards, and it is one of them: ask for fewer first",)


def test_a_member_that_owns_slots_is_not_forgotten() -> None:
    """They are nowhere else: it died before it gave them away."""
    ring, controller = ring_of(3)
    ring.shards[name(2)].stop()
    ring.ask(shards=2, forgotten=(WORD,))
    said = looks(ring, controller, 60.0)
    assert the_map(ring).slots_of(name(2)).keys() == {16, 17, 18, 19, 20, 21, 22, 23}
    assert said[-1].not_forgotten == (f"{KEPT}it owns 8 slots, and their messages are on its volume",)


def test_a_member_that_a_move_names_is_not_forgotten() -> None:
    """Its source may be sealed, its target may hold the only copy: the move is ended first."""
    ring, controller = ring_of(3)
    ring.ask(shards=2)
    until(ring, controller, lambda found: bool(found.moves))
    view = msgspec.structs.replace(ring.view(), spec=msgspec.structs.replace(ring.spec, forgotten=(WORD,)))
    assert refusal(view, WORD) == "it owns 8 slots, and their messages are on its volume"
    ring, controller = ring_of(2)
    ring.ask(shards=3)
    until(ring, controller, lambda found: bool(found.moves))
    ring.shards[name(2)].stop()
    ring.ask(shards=2, forgotten=(WORD,))
    assert refusal(ring.view(), WORD) == f"move {the_map(ring).moves[0].id} names it"
    move = the_map(ring).moves[0]
    assert look(ring, controller).not_forgotten == (f"{KEPT}move {move.id} names it",)
    assert is_member(the_map(ring)), "with this map the move is aborted"


def test_a_member_that_is_seen_to_run_is_not_forgotten() -> None:
    """On Kubernetes its pod is Ready: it only cannot announce anything."""
    ring, controller = dead()
    ring.alive = (name(2),)
    ring.ask(forgotten=(WORD,))
    said = looks(ring, controller, 60.0)
    assert said[-1].not_forgotten == (f"{KEPT}it runs and is ready: it leaves by itself",)
    ring.alive = ()
    assert look(ring, controller).not_forgotten == (f"{KEPT}it has 20 s to answer",), "counted from now"


def test_a_member_that_answers_leaves_by_itself() -> None:
    """People were wrong: it comes back within its time, and leaves as every other."""
    ring, controller = dead()
    ring.ask(forgotten=(WORD,))
    looks(ring, controller, ANSWER_S - 3.0)
    ring.shards[name(2)].start()
    last = look(ring, controller)
    assert last.steps == (Leave(name(2)),)
    assert not is_member(the_map(ring))


def test_every_new_word_is_an_answer() -> None:
    """A shard that boots, and says so, has its time anew."""
    ring, controller = dead()
    ring.ask(forgotten=(WORD,))
    for term in range(2, 6):
        looks(ring, controller, ANSWER_S - 3.0)
        said = ring.announcements[name(2)]
        ring.announcements[name(2)] = msgspec.structs.replace(said, term=term)
    assert is_member(the_map(ring))
    assert any(isinstance(each, Forget) for said in looks(ring, controller, WAITED_OUT_S) for each in said.steps)


def test_who_could_not_be_heard_has_his_time_anew() -> None:
    """The control plane was away for the controller too, or another controller begins: only listening counts."""
    ring, controller = dead()
    ring.ask(forgotten=(WORD,))
    for _ in range(5):
        looks(ring, controller, ANSWER_S - 3.0)
        assert look(ring, controller, later_s=LOOKS_APART_S_MAX + 1.0).new_map is None
    looks(ring, controller, ANSWER_S - 3.0)
    controller.crash()
    assert look(ring, controller, later_s=3.0).new_map is None
    assert is_member(the_map(ring))
    looks(ring, controller, WAITED_OUT_S)
    assert not is_member(the_map(ring))


@pytest.mark.parametrize("spoke", [True, False])
def test_another_volume_does_not_answer_for_it(*, spoke: bool) -> None:
    """Its volume is gone and a process boots on empty ones, or it never announced anything: it is forgotten."""
    ring, controller = dead()
    ring.announcements.pop(name(2))
    ring.ask(forgotten=(WORD,))
    for _ in range(int(WAITED_OUT_S / 3.0)):
        if spoke:
            ring.shards[name(2)].renew()
        look(ring, controller, later_s=3.0)
    assert not is_member(the_map(ring))


def forgotten() -> tuple[PlayedRing, PlayedController]:
    """A ring that forgot shard-2."""
    ring, controller = dead()
    ring.ask(forgotten=(WORD,))
    looks(ring, controller, WAITED_OUT_S)
    assert not is_member(the_map(ring))
    return ring, controller


def test_the_shard_comes_again_with_an_empty_volume() -> None:
    """The word stands and means nothing any more: not even when that shard leaves, or is asked for."""
    ring, controller = forgotten()
    ring.shards[name(2)].renew()
    ring.ask(shards=3)
    ring.settle([controller])
    assert the_map(ring).member(name(2)) is not None
    assert len(the_map(ring).slots_of(name(2))) == 8
    assert look(ring, controller).sentence == f"steady at epoch {the_map(ring).epoch}, 24 slots on 3 shards, all ready"
    ring.ask(shards=2)
    ring.settle([controller])
    assert not is_member(the_map(ring))


def test_the_forgotten_volume_does_not_join_until_the_word_is_taken_back() -> None:
    """It is said; the others go on; taken back, it is a shard that joins, and its slots come from others."""
    ring, controller = forgotten()
    ring.ask(shards=4)
    ring.shards[name(2)].start()
    looks(ring, controller, 120.0)
    assert [member.name for member in the_map(ring).members] == ["shard-0", "shard-1", "shard-3"]
    last = look(ring, controller)
    assert last.reason == "Held"
    assert last.sentence.startswith(
        f"held: shard-2 announces volume {VOLUME}, which people had the ring forget; give it an empty volume, "
        "or take the word back"
    )
    ring.ask(forgotten=())
    ring.settle([controller])
    assert len(the_map(ring).slots_of(name(2))) == 6


def test_one_that_thaws_changes_nothing() -> None:
    """It owns nothing by any map since; what it says is about no member."""
    ring, controller = forgotten()
    before = the_map(ring)
    ring.shards[name(2)].start()
    said = looks(ring, controller, 60.0)
    assert the_map(ring) == before
    assert {each.sentence for each in said} == {f"steady at epoch {before.epoch}, 24 slots on 2 shards, all ready"}


def test_stale_words_are_harmless() -> None:
    """About nobody, about a volume that was replaced, about a shard that never was: nothing happens or is said."""
    ring, controller = ring_of(3)
    before = step(ring, controller)
    words = (Forgotten(name(9), "any"), Forgotten(name(1), "an earlier one"), Forgotten(name(0), VOLUME))
    ring.ask(forgotten=words)
    said = looks(ring, controller, 60.0)
    assert {each.sentence for each in said} == {before}
    assert all(not each.not_forgotten for each in said)
