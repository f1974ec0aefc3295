"""The disk under test: every storage operation of a run seen, made to fail, or made the last one before a kill.

The engine writes through the functions of `os`. `Watch` puts itself in their place and calls `before(operation)` ahead of
each one that touches a folder. Files written by other libraries (save_pretrained) are seen when they are synced.
"""

import errno
import hashlib
import os
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.interrupt import TOGETHER

REAL = {
    name: getattr(os, name)
    for name in ("open", "write", "fsync", "link", "rename", "replace", "mkdir", "unlink", "rmdir", "ftruncate")
}


@dataclass
class Operation:
    """One change of the disk, about to happen."""

    number: int
    kind: str  # open (for writing), write, fsync, link, rename, mkdir, unlink, rmdir, ftruncate
    path: str
    to: str = ""  # of a rename or a link
    data: bytes = b""  # of a write
    size: int = 0  # of an ftruncate; the flags of an open


class Watch:
    """While installed, each storage operation under `folder` is counted and shown to `before`."""

    def __init__(self, folder: Path, before: Callable[[Operation], None]):
        self.folder, self.before, self.count = str(folder.resolve()), before, 0

    def install(self) -> "Watch":
        for name in REAL:
            setattr(os, name, getattr(self, "_" + name))
        return self

    def remove(self) -> None:
        for name, function in REAL.items():
            setattr(os, name, function)

    def _seen(self, kind: str, path: Any, **more: Any) -> None:
        where = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.path.abspath(os.fspath(path))
        if where == self.folder or where.startswith(self.folder + "/"):
            number, self.count = self.count, self.count + 1
            self.before(Operation(number, kind, where, **more))

    def _open(self, path: Any, flags: int, mode: int = 0o777, **more: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._seen("open", path, size=flags)
        return int(REAL["open"](path, flags, mode, **more))

    def _write(self, descriptor: int, data: Any) -> int:
        self._seen("write", descriptor, data=bytes(data))
        return int(REAL["write"](descriptor, data))

    def _fsync(self, descriptor: int) -> None:
        self._seen("fsync", descriptor)
        REAL["fsync"](descriptor)

    def _link(self, path: Any, to: Any, **more: Any) -> None:
        self._seen("link", path, to=os.path.abspath(os.fspath(to)))
        REAL["link"](path, to, **more)

    def _rename(self, path: Any, to: Any, **more: Any) -> None:
        self._seen("rename", path, to=os.path.abspath(os.fspath(to)))
        REAL["rename"](path, to, **more)

    _replace = _rename

    def _mkdir(self, path: Any, *more: Any, **named: Any) -> None:
        if not os.path.isdir(path):  # makedirs tries what is there
            self._seen("mkdir", path)
        REAL["mkdir"](path, *more, **named)

    def _unlink(self, path: Any, **more: Any) -> None:
        self._seen("unlink", path)
        REAL["unlink"](path, **more)

    def _rmdir(self, path: Any, **more: Any) -> None:
        self._seen("rmdir", path)
        REAL["rmdir"](path, **more)

    def _ftruncate(self, descriptor: int, size: int) -> None:
        self._seen("ftruncate", descriptor, size=size)
        REAL["ftruncate"](descriptor, size)


def do(what: str, operation: Operation | None = None) -> None:
    """What a plan asks for: a signal to this process, an error of the disk, or half a write and then the end."""
    if what in ("EIO", "ENOSPC"):
        number = getattr(errno, what)
        raise OSError(number, os.strerror(number))
    if what == "half":
        assert operation
        descriptor = REAL["open"](operation.path, os.O_WRONLY | os.O_APPEND)
        REAL["write"](descriptor, operation.data[: len(operation.data) // 2])
        what = "SIGKILL"
    for name in what.split("+"):
        if name.startswith("stuck:"):  # within one call of C code that lasts a minute, somebody else sends the signal
            send = f"sleep {TOGETHER + 0.2}; kill -{name[9:]} {os.getpid()}"
            subprocess.Popen(["sh", "-c", send])
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**8)
        else:
            os.kill(os.getpid(), getattr(signal, name))
