"""fdatasync without a thread: the kernel syncs (Linux AIO, `IOCB_CMD_FDSYNC`) and an eventfd wakes the event loop.

A thread costs the log two hand-overs of the interpreter a round, and its reader two more context switches; ADR 11 has
the figures. Promise: `done` is called in the loop, once for each `start` that said yes, with what an fdatasync of the
file would have said. Where a process may not or cannot do this (another system, a seccomp filter, a file system without
it) `open_kernel_sync` or `start` says no, nothing was begun, and a thread does it. Must not be done here: writing.
"""

from __future__ import annotations

import ctypes
import os
import platform
import select
import struct
import sys
from typing import TYPE_CHECKING, Any, Final

from fleetlm_shard.disk import OsFile

if TYPE_CHECKING:
    import asyncio

    from fleetlm_shard.disk import File
    from fleetlm_shard.lanes import Synced

_NUMBERS: Final = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}
"""Of io_setup, io_destroy, io_getevents, io_submit: no library of every system has them."""
_FDSYNC: Final = 3
_TO_EVENTFD: Final = 1
# struct iocb of linux/aio_abi.h, little-endian: data, key, rw_flags, opcode, reqprio, fd, buf, nbytes, offset,
# reserved, flags, resfd.
_IOCB: Final = struct.Struct("<QIiHhIQQqQII")
# struct io_event: data, obj, res, res2.
_EVENT: Final = struct.Struct("<QQqq")


def open_kernel_sync(loop: asyncio.AbstractEventLoop) -> KernelSync | None:
    """One, if this process may have it."""
    numbers = _NUMBERS.get(platform.machine())
    if sys.platform != "linux" or sys.byteorder != "little" or numbers is None:
        return None
    try:
        return KernelSync(loop, numbers)
    except OSError:
        return None


class KernelSync:
    """Syncs one file at a time.

    Args:
        loop: where `done` is called.
        numbers: of the system calls, as `_NUMBERS`.

    Raises:
        OSError: the kernel or a filter in front of it refuses.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, numbers: tuple[int, int, int, int]) -> None:
        self._loop = loop
        setup, self._destroy, self._getevents, self._submit = numbers
        # The calls of a round never wait, so they keep the interpreter: not to give it away is what this is there for.
        self._call: Any = ctypes.PyDLL(None, use_errno=True).syscall
        self._call.restype = ctypes.c_long
        context = ctypes.c_ulong(0)
        if self._call(ctypes.c_long(setup), ctypes.c_long(1), ctypes.byref(context)) != 0:
            raise _error(ctypes.get_errno())
        self._context = ctypes.c_ulong(context.value)
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._iocb = ctypes.create_string_buffer(_IOCB.size)
        self._iocbs = (ctypes.c_void_p * 1)(ctypes.addressof(self._iocb))
        self._event = ctypes.create_string_buffer(_EVENT.size)
        self._one, self._none = ctypes.c_long(1), ctypes.c_long(0)
        self._done: Synced | None = None
        loop.add_reader(self._eventfd, self._ready)

    def start(self, file: File, done: Synced) -> bool:
        """Begin to sync; False: nothing was begun, `done` will not be called."""
        if not isinstance(file, OsFile):
            return False
        assert self._done is None, "one at a time"
        _IOCB.pack_into(self._iocb, 0, 0, 0, 0, _FDSYNC, 0, file.fileno(), 0, 0, 0, 0, _TO_EVENTFD, self._eventfd)
        if self._call(ctypes.c_long(self._submit), self._context, self._one, self._iocbs) != 1:
            return False
        self._done = done
        return True

    def _ready(self) -> None:
        try:
            os.eventfd_read(self._eventfd)
        except BlockingIOError:
            return
        found = self._call(
            ctypes.c_long(self._getevents), self._context, self._none, self._one, self._event, ctypes.c_void_p(None)
        )
        if found != 1:
            return
        done, self._done = self._done, None
        assert done is not None, "an answer to nothing"
        _, _, result, _ = _EVENT.unpack_from(self._event)
        done(_error(-result) if result < 0 else None)

    def close(self) -> None:
        """Release everything; a sync that is under way is waited for, blocking, and said."""
        while self._done is not None:
            select.select([self._eventfd], [], [])
            self._ready()
        self._loop.remove_reader(self._eventfd)
        self._call(ctypes.c_long(self._destroy), self._context)
        os.close(self._eventfd)


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
