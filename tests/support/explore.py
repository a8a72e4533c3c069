"""Every interleaving of a few processes on one simulated volume, at single file operations, on the product's own code.

How: a process is a function of its disk. Its state is the list of answers it has got so far, for it is deterministic;
to let it take one step, it is run from its start on those answers, then one operation is done for real, then it is
stopped at its next one. No threads, no timing. States that were seen (volume and answers) are not visited again.
Promise: exhaustive within the scope given, or `AssertionError` when a scope is larger than its limit. Two reductions
keep scopes small, and both are the caller's word: `private` operations (nobody else can notice them or change their
answer) are not interleaved, only stopped at; `keeps` and `Machine.forget` say which answers no longer matter.
Must not be done here: knowing what is explored; the caller's `check` sees each state once.

What a process wants the check to know it says by `machine.note(...)`; a note belongs to the operation before it.
A process that is frozen is one that is not chosen: all states in which it stands still are among those visited.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Coroutine, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar

from tests.support.simdisk import SimDisk, SimFile, SimVolume

if TYPE_CHECKING:
    from fleetlm_shard.disk import Disk, File

T = TypeVar("T")


class _Pause(BaseException):
    """The process has no answer for its next operation yet."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """The answer of `create` and `open` without the volume in it, for each state has its own volume."""

    fd: int
    path: str
    writable: bool


@dataclass(frozen=True, slots=True)
class _Raised:
    """The answer was an `OSError` of that number."""

    code: int
    path: str


Answer = Hashable
FORGOTTEN: Final = "nothing of it matters any more"
"""What `keeps` returns for an answer that the process has no trace of left."""


class Machine:
    """What a process under exploration sees: disk, clock, sleep, and a place to say what it has done."""

    def __init__(
        self,
        volume: SimVolume,
        name: str,
        answers: tuple[Answer, ...] = (),
        *,
        fail_with: int | None = None,
        alone: bool = False,
    ) -> None:
        self.volume = volume
        self.name = name
        self.answers = list(answers)
        self.labels: list[str] = []
        self.notes: list[Hashable] = []
        self.disk = _ReplayDisk(self)
        self.last_op = ""
        self.next_op = ""
        self.forgotten: tuple[int, Hashable] = (0, None)
        self._real = SimDisk(volume, name)
        self._fail_with = fail_with
        self._alone = alone
        self._known = len(answers)
        self._at = 0
        self._paused = False
        self._now_s = 0.0

    def note(self, what: Hashable) -> None:
        """Tell the check."""
        if not self._paused:
            self.notes.append(what)

    def forget(self, summary: Hashable) -> None:
        """All that this process still knows of what came before is `summary`."""
        if not self._paused:
            self.forgotten = (self._at, summary)

    def monotonic_s(self) -> float:
        """This process's own time: only its sleeping moves it."""
        return self._now_s

    def now_ms(self) -> int:
        """The same in milliseconds."""
        return int(self._now_s * 1000)

    def now_us(self) -> int:
        """The same in microseconds."""
        return int(self._now_s * 1_000_000)

    async def sleep(self, seconds: float) -> None:
        """Others may or may not move meanwhile: every operation is a point where they may."""
        self._now_s += seconds

    @property
    def is_paused(self) -> bool:
        """It is being unwound: the process stands still before an operation, this is not an exit."""
        return self._paused

    def do(self, label: str, call: Callable[[SimDisk], Answer]) -> Answer:
        """One operation: the known answer, or for real once, or stop here."""
        if self._paused or (self._at > self._known and not self._alone):
            if not self._paused:
                self._paused, self.next_op = True, label
            raise _Pause
        if self._at >= self._known:
            self.last_op = label
            self.answers.append(self._ask(call))
        self._at += 1
        self.labels.append(label)
        answer = self.answers[self._at - 1]
        if isinstance(answer, _Raised):
            raise OSError(answer.code, os.strerror(answer.code), answer.path)
        return answer

    def _ask(self, call: Callable[[SimDisk], Answer]) -> Answer:
        if self._fail_with is not None:
            return _Raised(self._fail_with, "")
        try:
            return call(self._real)
        except OSError as error:
            return _Raised(error.errno or errno.EIO, str(error.filename))


class _ReplayFile:
    """`File` whose answers are remembered."""

    def __init__(self, machine: Machine, opened: _Opened) -> None:
        self._machine = machine
        self._opened = opened

    def _do(self, name: str, call: Callable[[SimFile], Answer]) -> Any:
        opened, machine = self._opened, self._machine
        return machine.do(
            f"{name} {opened.path}",
            lambda disk: call(SimFile(disk.volume, (disk.name, opened.fd), opened.path, writable=opened.writable)),
        )

    def pread(self, size_bytes: int, offset: int) -> bytes:
        """See `File`."""
        return bytes(self._do("pread", lambda file: file.pread(size_bytes, offset)))

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """See `File`."""
        kept = bytes(data)
        self._do("pwrite", lambda file: file.pwrite(kept, offset))

    def sync(self) -> None:
        """See `File`."""
        self._do("sync", lambda file: file.sync())

    def size(self) -> int:
        """See `File`."""
        return int(self._do("size", lambda file: file.size()))

    def stored_bytes(self) -> int:
        """See `File`."""
        return int(self._do("stored_bytes", lambda file: file.stored_bytes()))

    def view(self) -> memoryview:
        """See `File`; a snapshot."""
        return memoryview(self._do("view", lambda file: bytes(file.view())))

    def try_lock(self) -> bool:
        """See `File`."""
        return bool(self._do("try_lock", lambda file: file.try_lock()))

    def close(self) -> None:
        """See `File`; a process that is being unwound closes nothing."""
        if not self._machine.is_paused:
            self._do("close", lambda file: file.close())


class _ReplayDisk:
    """`Disk` whose answers are remembered."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def _file(self, label: str, path: str, call: Callable[[SimDisk], SimFile], *, writable: bool) -> _ReplayFile:
        def act(disk: SimDisk) -> Answer:
            return _Opened(call(disk).fd, path, writable)

        opened = self._machine.do(f"{label} {path}", act)
        assert isinstance(opened, _Opened)
        return _ReplayFile(self._machine, opened)

    def listdir(self, folder: str) -> list[str]:
        """See `Disk`."""
        names = self._machine.do(f"listdir {folder}", lambda disk: tuple(disk.listdir(folder)))
        assert isinstance(names, tuple)
        return list(names)

    def exists(self, path: str) -> bool:
        """See `Disk`."""
        return bool(self._machine.do(f"exists {path}", lambda disk: disk.exists(path)))

    def create(self, path: str) -> _ReplayFile:
        """See `Disk`."""
        return self._file("create", path, lambda disk: disk.create(path), writable=True)

    def open(self, path: str, *, writable: bool = False) -> _ReplayFile:
        """See `Disk`."""
        return self._file("open", path, lambda disk: disk.open(path, writable=writable), writable=writable)

    def link(self, source: str, target: str) -> None:
        """See `Disk`."""
        self._machine.do(f"link {target}", lambda disk: disk.link(source, target))

    def replace(self, source: str, target: str) -> None:
        """See `Disk`."""
        self._machine.do(f"replace {target}", lambda disk: disk.replace(source, target))

    def unlink(self, path: str) -> None:
        """See `Disk`."""
        self._machine.do(f"unlink {path}", lambda disk: disk.unlink(path))

    def mkdir(self, folder: str) -> None:
        """See `Disk`."""
        self._machine.do(f"mkdir {folder}", lambda disk: disk.mkdir(folder))

    def sync_folder(self, folder: str) -> None:
        """See `Disk`."""
        self._machine.do(f"sync_folder {folder}", lambda disk: disk.sync_folder(folder))

    def free_bytes(self) -> int:
        """See `Disk`."""
        free = self._machine.do("free_bytes", lambda disk: disk.free_bytes())
        assert isinstance(free, int)
        return free


if TYPE_CHECKING:
    _disk: type[Disk] = _ReplayDisk
    _file: type[File] = _ReplayFile

Script = Callable[[Machine], object]
"""A process: takes its machine, does everything through `machine.disk`, returns or raises when it exits."""


@dataclass(frozen=True, slots=True)
class Process:
    """One process in one state: what it was told, what it has said, whether and how it has ended."""

    name: str
    script: Script
    answers: tuple[Answer, ...] = ()
    notes: tuple[Hashable, ...] = ()
    ended: str = ""
    """"" while it runs; "returned", "killed", or the name of the exception that it ended by."""
    next_op: str = ""
    knows: Hashable = ()
    """What of the answers still matters to it."""

    @property
    def running(self) -> bool:
        """It has a next step."""
        return not self.ended


@dataclass(slots=True)
class State:
    """One state; `trace` is how it was reached first."""

    volume: SimVolume
    processes: tuple[Process, ...]
    kills: int = 0
    errors: int = 0
    trace: tuple[str, ...] = ()
    moved: int | None = None
    """Who moved last."""
    switches: int = 0
    """How often somebody else moved although who had moved last could go on."""

    def cost(self, at: int) -> int:
        """Switches that it costs to let process `at` move."""
        return int(self.moved is not None and self.moved != at and self.processes[self.moved].running)

    def key(self, *, with_switches: bool) -> Hashable:
        """Equal for states from which the same can happen and in which the same was said."""
        said = tuple((each.knows, each.notes, each.ended, each.next_op) for each in self.processes)
        order = (self.moved, self.switches) if with_switches else None
        return hash((self.volume.fingerprint(), said)), self.kills, self.errors, order


def _nothing_private(label: str) -> bool:
    return not label


def _keeps_all(label: str, answer: Answer, since: Sequence[str]) -> Answer:
    return answer


@dataclass(slots=True)
class Explorer:
    """Visits every state.

    Args:
        check: called once a state; raises AssertionError.
        kills: how many processes may be killed, at any point.
        errors: how many operations may answer `error_code` instead of being done.
        limit: states beyond which the scope is refused as too large.
    """

    check: Callable[[State], None]
    kills: int = 0
    errors: int = 0
    error_code: int = errno.EIO
    switches: int | None = None
    """None: all interleavings. Else only those in which a process is stopped so often that could have gone on."""
    alike: bool = False
    """The scripts are the same: of the orders in which they begin, one stands for all."""
    limit: int = 100_000
    private: Callable[[str], bool] = _nothing_private
    keeps: Callable[[str, Answer, Sequence[str]], Answer] = _keeps_all
    """Given an operation, its answer and the operations done since: what the process still knows of the answer."""
    visited: int = field(default=0, init=False)
    ends: set[tuple[str, ...]] = field(default_factory=set[tuple[str, ...]], init=False)

    def run(self, volume: SimVolume, scripts: dict[str, Script]) -> None:
        """Explore from `volume` with one process a script; raises with the trace when the check does."""
        first = State(volume, tuple(Process(name, script) for name, script in scripts.items()))
        seen = {first.key(with_switches=self.switches is not None)}
        todo = [first]
        while todo:
            state = todo.pop()
            self.visited += 1
            assert self.visited <= self.limit, f"more than {self.limit} states: take a smaller scope"
            try:
                self.check(state)
            except AssertionError as error:
                raise AssertionError(f"{error}\n" + "\n".join(state.trace)) from error
            if not any(each.running for each in state.processes):
                self.ends.add(tuple(each.ended for each in state.processes))
            for after in self._steps(state):
                key = after.key(with_switches=self.switches is not None)
                if key not in seen:
                    seen.add(key)
                    todo.append(after)

    def _steps(self, state: State) -> Iterator[State]:
        running = [at for at, process in enumerate(state.processes) if process.running]
        alone = next((at for at in running if self.private(state.processes[at].next_op)), None)
        for at in running if alone is None else [alone]:
            if self.switches is not None and state.switches + state.cost(at) > self.switches:
                continue
            if self.alike and at and not state.processes[at].answers and not state.processes[at - 1].answers:
                continue
            yield self._step(state, at)
            if state.errors < self.errors:
                yield self._step(state, at, fail_with=self.error_code)
            if state.kills < self.kills:
                yield _killed(state, at)

    def _step(self, state: State, at: int, *, fail_with: int | None = None) -> State:
        process = state.processes[at]
        machine = Machine(state.volume.copy(), process.name, process.answers, fail_with=fail_with)
        ended = _run(machine, process.script)
        start, summary = machine.forgotten
        labels = machine.labels
        kept = (self.keeps(labels[n], machine.answers[n], labels[n + 1 :]) for n in range(start, len(labels)))
        known = tuple(answer for answer in kept if answer is not FORGOTTEN)
        after = replace(
            process,
            answers=tuple(machine.answers),
            notes=tuple(machine.notes),
            ended=ended,
            next_op=machine.next_op,
            knows=(summary, known),
        )
        label = f"{process.name}: {machine.last_op}"
        label += (" FAILS" if fail_with else "") + (f" → {ended}" if ended else "")
        return _changed(state, machine.volume, at, after, label, errors=1 if fail_with else 0)


def run_alone(volume: SimVolume, name: str, script: Script) -> Process:
    """Run one process to its end on `volume` itself, nobody else moving."""
    machine = Machine(volume, name, alone=True)
    ended = _run(machine, script)
    return Process(name, script, tuple(machine.answers), tuple(machine.notes), ended)


def _run(machine: Machine, script: Script) -> str:
    """How the process ended; "" if it stands before its next operation."""
    ended = "returned"
    try:
        script(machine)
    except _Pause:
        return ""
    except Exception as error:  # noqa: BLE001  whatever ends a process is for the check to judge
        ended = type(error).__name__
    machine.volume.kill(machine.name)
    return ended


def _killed(state: State, at: int) -> State:
    process = state.processes[at]
    volume = state.volume.copy()
    volume.kill(process.name)
    return _changed(state, volume, at, replace(process, ended="killed"), f"{process.name} is killed", kills=1)


def _changed(
    state: State, volume: SimVolume, at: int, process: Process, label: str, *, kills: int = 0, errors: int = 0
) -> State:
    return State(
        volume,
        (*state.processes[:at], process, *state.processes[at + 1 :]),
        kills=state.kills + kills,
        errors=state.errors + errors,
        trace=(*state.trace, label),
        moved=at,
        switches=state.switches + state.cost(at),
    )


def drive(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never really waits."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        value: T = stop.value
        return value
    finally:
        coroutine.close()
    raise AssertionError("the coroutine waits for something that is not simulated")
