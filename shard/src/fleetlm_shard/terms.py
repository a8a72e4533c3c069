"""Taking the next term of a volume: outlive or outwait its owner, then claim by `link`.

Place: under `volume.py`. Promise (design §6, "Taking the volume"; each rule was needed by the model): a term has one
owner for ever, however many processes try at once and wherever any of them was frozen; when `take_term` returns, the
term is durable and every elder that looks from now on finds itself fenced.
Must not be done here: renaming anything, writing into another process's file, removing a term file.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

from fleetlm_common.clock import Clock
from fleetlm_common.ids import Term
from fleetlm_common.logs import Logger
from fleetlm_shard.disk import Disk, File
from fleetlm_shard.volume_types import (
    HEARTBEAT_BYTES,
    HEARTBEAT_OFFSET,
    LOG_FOLDER,
    Identity,
    TermPaper,
    decode_paper,
    highest_term,
    leave_path,
    term_file,
    term_names,
    term_path,
)

Sleep = Callable[[float], Awaitable[None]]

POLL_S: Final = 0.1
"""How often a taker looks whether the owner has gone: a tenth of a second is lost at most in a handover."""


async def take_term(
    disk: Disk,
    *,
    identity: Identity,
    pod_uid: str,
    boot_id: str,
    clock: Clock,
    sleep: Sleep,
    log: Logger,
    takeover_after_s: float,
) -> tuple[Term, File]:
    """Become the owner of the highest term.

    Waits without bound while a living owner beats and does not leave. Cancel-safe: what is left behind is a request
    that holds (the owner leaves, nobody has taken its place yet) and at most a temporary name.

    Returns:
        The term and its file, locked; the lock is this process's sign of life and must live as long as it.

    Raises:
        OSError: whatever the disk answered.
    """
    while True:
        elder = find_highest_term(disk)
        if not await _elder_is_gone(
            disk, elder, pod_uid=pod_uid, clock=clock, sleep=sleep, log=log, takeover_after_s=takeover_after_s
        ):
            continue
        paper = TermPaper(
            term=Term(elder + 1),
            ring_uid=identity.ring_uid,
            shard=identity.shard,
            volume_id=identity.volume_id,
            pod_uid=pod_uid,
            boot_id=boot_id,
        )
        file = _claim(disk, paper)
        if file is not None:
            return paper.term, file
        log.event("term_lost_race", term=paper.term)


def find_highest_term(disk: Disk) -> Term:
    """The highest term of term files, stored maps and the log's files."""
    try:
        log_names = disk.listdir(LOG_FOLDER)
    except FileNotFoundError:
        log_names = []
    return highest_term(disk.listdir(""), log_names)


async def _elder_is_gone(
    disk: Disk,
    elder: Term,
    *,
    pod_uid: str,
    clock: Clock,
    sleep: Sleep,
    log: Logger,
    takeover_after_s: float,
) -> bool:
    """Wait for the owner of `elder` to leave or fall silent; False if a younger term appeared meanwhile."""
    try:
        file = disk.open(term_path(elder), writable=True)  # NFS grants an exclusive lock to writers only
    except FileNotFoundError:
        return True  # the first boot, or a term that only the log still names: nobody can hold a file that is not there
    try:
        if file.try_lock():
            return True
        log.event("volume_held", level="warning", term=elder, takeover_after_s=takeover_after_s)
        if _is_replaced_by(disk, elder, pod_uid):
            log.event("pod_replaced", level="warning", term=elder)
        else:
            _ask_to_leave(disk, elder)
        return await _outwait(disk, elder, file, clock=clock, sleep=sleep, log=log, takeover_after_s=takeover_after_s)
    finally:
        file.close()


def _is_replaced_by(disk: Disk, owner: Term, pod_uid: str) -> bool:
    """Whether the owner's pod came to this volume after ours, so that our pod is on its way out and must not ask.

    A kubelet that was frozen may restart a container of a pod that was replaced long ago: asked by it, the shard that
    serves would end. Pods have no order of their own; the first term of each gives it. Uids of pods never come back.
    """
    owner_pod = _pod_of(disk, term_path(owner))
    if not pod_uid or not owner_pod or owner_pod == pod_uid:
        return False
    for name in term_names(disk.listdir("")):
        pod = _pod_of(disk, name)
        if pod in {owner_pod, pod_uid}:
            return pod == pod_uid
    return False


def _pod_of(disk: Disk, name: str) -> str:
    """The pod that a term's file names; empty if none, or if a bit of it flipped (it then says nothing)."""
    file = disk.open(name)
    try:
        data = file.pread(HEARTBEAT_OFFSET, 0)
    finally:
        file.close()
    try:
        return decode_paper(data.rstrip(b"\0"), TermPaper).pod_uid
    except ValueError:
        return ""


def _ask_to_leave(disk: Disk, elder: Term) -> None:
    """Put the request beside the term's file; it need not be durable, a power loss answers it."""
    try:
        disk.create(leave_path(elder)).close()
    except FileExistsError:
        return  # somebody asked before us


async def _outwait(
    disk: Disk, elder: Term, file: File, *, clock: Clock, sleep: Sleep, log: Logger, takeover_after_s: float
) -> bool:
    beat = file.pread(HEARTBEAT_BYTES, HEARTBEAT_OFFSET)
    silent_s = 0.0
    looked_s = clock.monotonic_s()
    while silent_s < takeover_after_s:
        await sleep(POLL_S)
        if disk.exists(term_path(elder + 1)):
            return False
        if file.try_lock():
            return True
        now_s = clock.monotonic_s()
        # Time in which this process itself stood still says nothing about the owner.
        silent_s += min(now_s - looked_s, 10 * POLL_S)
        looked_s = now_s
        latest = file.pread(HEARTBEAT_BYTES, HEARTBEAT_OFFSET)
        if latest != beat:  # any change is a sign of life, a half-written one too
            beat, silent_s = latest, 0.0
    log.event("volume_taken_from_silent_owner", level="warning", term=elder, silent_s=round(silent_s, 1))
    return True


def _claim(disk: Disk, paper: TermPaper) -> File | None:
    """Make the term's file appear under its name in one step; None if somebody else was quicker."""
    temporary = f"tmp-{term_path(paper.term)}-{paper.boot_id}"
    file = disk.create(temporary)
    try:
        # Locked and written before it has its name: nobody ever sees a term without an owner.
        locked = file.try_lock()
        assert locked, "nobody else can have a file open that has no name they know"
        file.pwrite(term_file(paper), 0)
        file.sync()
        try:
            disk.link(temporary, term_path(paper.term))
        except (FileExistsError, FileNotFoundError):  # not found: the winner has cleared our temporary name away
            file.close()
            _remove(disk, temporary)
            return None
        # The term is durable before the log is read: a record must not outlive the fence that it was written under.
        disk.sync_folder("")
        _remove(disk, temporary)
    except BaseException:
        file.close()
        raise
    return file


def _remove(disk: Disk, path: str) -> None:
    try:
        disk.unlink(path)
    except FileNotFoundError:
        return
