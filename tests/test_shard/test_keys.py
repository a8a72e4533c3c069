"""The idempotency window: what it remembers, for how long, and that it never forgets a key that may be retried."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetlm_shard.keys import EVICTED_MARKS_MAX, KEY_AGE_S_MIN, MARK_KEYS_MAX, KeyWindow, KnownKey
from fleetlm_shard.rebuild import LogTime
from fleetlm_shard.records import Message

HASH = bytes(16)
IDENT = "0190c1c2-0000-7000-8000-000000000000"


def add(window: KeyWindow, key: str, *, at_s: float, pos: int = 0, seq: int = 1) -> None:
    window.add(Message(0, "s", seq, int(at_s * 1e6), key, HASH, b""), IDENT, pos, at_s)


def restore(window: KeyWindow, key: str, *, at_s: float, pos: int = 0) -> None:
    window.restore("s", key, KnownKey(1, 1, HASH, IDENT), pos=pos, at_s=at_s)


def booted(window: KeyWindow, walls_us: Iterable[int], *, now_s: float) -> KeyWindow:
    """It read messages of these times, `k0` at position 0 first, and that was over at `now_s`."""
    log_time = LogTime()
    for number, wall_us in enumerate(walls_us):
        restore(window, f"k{number}", at_s=log_time.at(wall_us), pos=number)
    window.restored(log_s=log_time.now_s, now_s=now_s)
    return window


def evict_all(window: KeyWindow, now_s: float) -> None:
    while window.evict(now_s):
        pass


def test_a_key_gives_back_what_was_put_in() -> None:
    """Seq, time, hash and id come back; another session's key of that name is unknown."""
    window = KeyWindow(window_s=900, soft_max=10, hard_max=10)
    add(window, "k", at_s=1.0, seq=7)
    assert window.get("s", "k") == KnownKey(7, 1_000_000, HASH, IDENT)
    assert window.get("t", "k") is None


def test_keys_leave_after_the_window_and_not_before() -> None:
    """Age decides when there is room."""
    window = KeyWindow(window_s=900, soft_max=10, hard_max=10)
    add(window, "k", at_s=0.0)
    evict_all(window, 899.0)
    assert window.get("s", "k") is not None
    evict_all(window, 901.0)
    assert window.get("s", "k") is None


def test_too_many_keys_leave_only_when_they_are_old_enough() -> None:
    """Past the soft bound the oldest go, but none that is younger than a request's deadline and margin."""
    window = KeyWindow(window_s=900, soft_max=1, hard_max=100)
    for number in range(5):
        add(window, str(number), at_s=float(number))
    evict_all(window, KEY_AGE_S_MIN)
    assert len(window) == 5
    evict_all(window, KEY_AGE_S_MIN + 2.5)
    assert [window.get("s", str(number)) is not None for number in range(5)] == [False, False, False, True, True]


def test_the_hard_bound_is_told() -> None:
    """`room` is what the sequencer asks before it takes new keys."""
    window = KeyWindow(window_s=900, soft_max=1, hard_max=2)
    add(window, "a", at_s=0.0)
    assert (window.room(), window.full) == (1, False)
    add(window, "b", at_s=0.0)
    assert (window.room(), window.full) == (0, True)


def test_from_pos_is_the_position_of_the_oldest_key() -> None:
    """A boot that reads from there knows every key; an empty window begins at the log's end."""
    window = KeyWindow(window_s=900, soft_max=10, hard_max=10)
    assert window.from_pos(500) == 500
    add(window, "a", at_s=0.0, pos=100)
    add(window, "b", at_s=0.01, pos=200)
    add(window, "c", at_s=5.0, pos=300)
    assert window.from_pos(500) == 100
    evict_all(window, 902.0)
    assert (window.get("s", "c") is not None, window.from_pos(500)) == (True, 300)
    assert window.from_pos(250) == 250


def test_restore_keeps_the_newest_use_of_a_key() -> None:
    """A key that was evicted and used again stands for its second message; its age is that of the second."""
    window = KeyWindow(window_s=900, soft_max=10, hard_max=10)
    window.restore("s", "k", KnownKey(1, 1, HASH, IDENT), pos=0, at_s=0.0)
    window.restore("s", "k", KnownKey(9, 2, HASH, IDENT), pos=50, at_s=700.0)
    window.restored(log_s=800.0, now_s=1000.0)
    assert len(window) == 1
    evict_all(window, 1200.0)
    found = window.get("s", "k")
    assert found is not None
    assert found.seq == 9
    evict_all(window, 1900.0)
    assert len(window) == 0


def test_clocks_that_are_set_forget_no_key_at_boot() -> None:
    """Ages at boot are the log's own: a step of the wall clock counts a little, one back nothing."""
    log_time = LogTime()
    assert [log_time.at(int(at_s * 1e6)) for at_s in (5000, 5001.5, 8600, 3, 4)] == [0.0, 1.5, 11.5, 11.5, 12.5]
    walls_us = [at_s * 1_000_000 for at_s in (100, 101, 3700, 7300)]
    window = booted(KeyWindow(window_s=30, soft_max=10, hard_max=10), walls_us, now_s=50_000.0)
    evict_all(window, 50_000.0)
    assert window.get("s", "k0") is not None
    assert window.from_pos(9) == 0
    evict_all(window, 50_031.0)
    assert len(window) == 0


def test_what_was_read_at_boot_stays_until_it_is_old_by_our_own_time() -> None:
    """A clock that was set twice, a boot: a key that was new stays for as long as its request may be sent again."""
    walls_us = [at_s * 1_000_000 for at_s in (100, 3700, 7300, 7301)]
    window = booted(KeyWindow(window_s=KEY_AGE_S_MIN, soft_max=10, hard_max=10), walls_us, now_s=50.0)
    evict_all(window, 50.0 + KEY_AGE_S_MIN)
    assert (len(window), window.from_pos(9)) == (4, 0)
    evict_all(window, 50.1 + KEY_AGE_S_MIN)
    assert [window.knows("s", f"k{number}") for number in range(4)] == [False, False, False, True]


def test_a_boot_that_reads_too_many_keys_keeps_the_newest() -> None:
    """Those beyond the soft bound go when they look older than the window, those beyond the hard one at any rate."""
    window = KeyWindow(window_s=30, soft_max=3, hard_max=5)
    for number in range(8):
        restore(window, str(number), at_s=float(number))
    assert [window.knows("s", str(number)) for number in range(8)] == [False] * 3 + [True] * 5
    for number in range(8, 12):
        restore(window, str(number), at_s=number + 40.0)
    assert len(window) == 4


def test_what_seems_to_be_of_one_moment_goes_in_small_pieces() -> None:
    """What a move brought is of one moment to a boot, however much it is."""
    count = (EVICTED_MARKS_MAX + 1) * MARK_KEYS_MAX
    window = KeyWindow(window_s=900, soft_max=count, hard_max=count)
    for number in range(count):
        restore(window, str(number), at_s=0.0)
    window.restored(log_s=0.0, now_s=0.0)
    assert window.from_pos(count) == 0
    assert window.evict(1000.0) == EVICTED_MARKS_MAX * MARK_KEYS_MAX


@given(
    records=st.lists(
        st.tuples(st.floats(0, 4), st.sampled_from((0.0, 0.0, 0.0, 3600.0, -3600.0)), st.booleans()), max_size=60
    )
)
def test_no_young_key_is_forgotten_over_boots(records: list[tuple[float, float, bool]]) -> None:
    """However often the clock is set and the process boots: a key that was written 15 s ago or less is known."""
    now_s, wall_s = 0.0, 1e9
    log: list[tuple[float, int]] = []

    def boot() -> KeyWindow:
        """As after a crash: what the window was at the last checkpoint is read, here all of it."""
        window = KeyWindow(window_s=KEY_AGE_S_MIN, soft_max=60, hard_max=60)
        return booted(window, (wall_us for _, wall_us in log), now_s=now_s)

    window = boot()
    for wait_s, step_s, boots in records:
        now_s, wall_s = now_s + wait_s, wall_s + wait_s + step_s
        if boots:
            window = boot()
        add(window, f"k{len(log)}", at_s=now_s)
        log.append((now_s, int(wall_s * 1e6)))
        evict_all(window, now_s)
        for number, (at_s, _) in enumerate(log):
            assert now_s - at_s > KEY_AGE_S_MIN or window.knows("s", f"k{number}")


def test_an_eviction_is_a_small_piece_of_work() -> None:
    """One call drops a few tenths of a second of keys at most."""
    window = KeyWindow(window_s=900, soft_max=10_000, hard_max=10_000)
    for number in range(100):
        add(window, str(number), at_s=float(number))
    assert window.evict(5000.0) == EVICTED_MARKS_MAX


@given(st.lists(st.tuples(st.integers(0, 20), st.floats(0, 8)), max_size=60))
@pytest.mark.filterwarnings("ignore")
def test_no_young_key_is_ever_forgotten(steps: list[tuple[int, float]]) -> None:
    """Whatever the arrivals and evictions: a key that is younger than deadline plus margin is known."""
    window = KeyWindow(window_s=30, soft_max=3, hard_max=1000)
    now_s = 0.0
    entered: dict[str, float] = {}
    for number, wait_s in steps:
        now_s += wait_s
        window.evict(now_s)
        key = str(number)
        if window.get("s", key) is None:
            add(window, key, at_s=now_s)
            entered[key] = now_s
        for known, at_s in entered.items():
            if now_s - at_s < KEY_AGE_S_MIN:
                assert window.get("s", known) is not None
