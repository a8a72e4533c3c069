"""A breadth-first checker of small models: every counterexample is a shortest one.

Promise: `check` visits every reachable state once; a verdict `ok` means that no state and no step breaks a property,
and that from every reachable state some schedule without further misfortune reaches a goal.
Must not be done here: anything about shards.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar

S = TypeVar("S", bound=Hashable)

STATES_MAX: Final = 2_000_000
"""A scope that is larger belongs into a run by hand."""


@dataclass(frozen=True, slots=True)
class Step(Generic[S]):
    """One step: what happens, the state after it, whether only misfortune takes it, the property that it breaks."""

    label: str
    state: S
    fault: bool = False
    broken: str | None = None


class Model(Protocol[S]):
    """What is checked."""

    def start(self) -> S:
        """The one initial state."""
        ...

    def steps(self, state: S, /) -> Iterable[Step[S]]:
        """Everything that can happen next."""
        ...

    def broken(self, state: S, /) -> str | None:
        """The property that this state breaks, None if it is sound."""
        ...

    def goal(self, state: S, /) -> bool:
        """Nothing is left to do."""
        ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """`broken` is None when the model is sound in its scope; else the labels of `trace` lead to the mistake."""

    states: int
    broken: str | None
    trace: tuple[str, ...]


class TooLarge(Exception):
    """The scope has more than `STATES_MAX` states."""


class _Search(Generic[S]):
    """States in the order of their discovery, and how each was reached."""

    def __init__(self, first: S) -> None:
        self.states: list[S] = [first]
        self._ids: dict[S, int] = {first: 0}
        self._parents = array("l", [-1])
        self._labels: list[str] = [""]
        self.forward: list[tuple[int, int]] = []
        """Steps that are no faults, from and to."""

    def reach(self, parent: int, step: Step[S]) -> None:
        """Note a step; a state that was known is not visited again."""
        ident = self._ids.get(step.state)
        if ident is None:
            if len(self.states) >= STATES_MAX:
                raise TooLarge(f"more than {STATES_MAX} states")
            ident = self._ids[step.state] = len(self.states)
            self.states.append(step.state)
            self._parents.append(parent)
            self._labels.append(step.label)
        if not step.fault:
            self.forward.append((parent, ident))

    def way_to(self, ident: int) -> list[str]:
        """Labels from the beginning."""
        labels: list[str] = []
        while ident > 0:
            labels.append(self._labels[ident])
            ident = self._parents[ident]
        return labels[::-1]


def check(model: Model[S]) -> Verdict:
    """Search everything.

    Raises:
        TooLarge: nothing can be said.
    """
    search = _Search(model.start())
    goals: list[int] = []
    at = 0
    while at < len(search.states):
        state = search.states[at]
        broken = model.broken(state)
        if broken is not None:
            return Verdict(len(search.states), broken, tuple(search.way_to(at)))
        if model.goal(state):
            goals.append(at)
        for step in model.steps(state):
            if step.broken is not None:
                return Verdict(len(search.states), step.broken, (*search.way_to(at), step.label))
            search.reach(at, step)
        at += 1
    stuck = next(_stuck(len(search.states), search.forward, goals), None)
    if stuck is None:
        return Verdict(len(search.states), None, ())
    return Verdict(len(search.states), "stuck", tuple(search.way_to(stuck)))


def _stuck(count: int, forward: list[tuple[int, int]], goals: list[int]) -> Iterator[int]:
    """States from which no goal can be reached without a fault, the first found first."""
    before: list[list[int]] = [[] for _ in range(count)]
    for one, two in forward:
        before[two].append(one)
    fine = bytearray(count)
    todo = list(goals)
    for goal in goals:
        fine[goal] = 1
    while todo:
        for one in before[todo.pop()]:
            if not fine[one]:
                fine[one] = 1
                todo.append(one)
    return (ident for ident in range(count) if not fine[ident])
