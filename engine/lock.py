"""One owner: a run folder belongs to one process at a time, and the kernel forgets a dead owner at once.

The lock is flock(2) on FOLDER/.lock; its content (pid, host, start) only tells others who holds it. A file that exists
is no lock, so nothing stale has to be broken after a crash.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path

from engine.errors import RunError

NAME = ".lock"


class Lock:
    """A held lock; `release` gives it back, as does the end of the process."""

    def __init__(self, folder: Path, descriptor: int):
        self.folder, self.descriptor = folder, descriptor

    def release(self, *, forget: bool = False) -> None:
        """Give the folder back; with `forget` the lock file goes as well."""
        if forget:
            (self.folder / NAME).unlink(missing_ok=True)  # before it is free: who waits sees another file and tries again
        os.close(self.descriptor)


def take(folder: Path) -> Lock:
    """Own `folder`, or RunError at once that names who does. Raises OSError where no lock file can be made."""
    path = folder / NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                os.close(descriptor)
                raise RunError(
                    f"{folder}: another run owns this folder: {_owner(path)}; wait for it, or name another --out"
                ) from error
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                os.close(descriptor)
                raise
            print(
                f"warning: {folder}: this file system has no locks ({error.strerror}): start no second run here", file=sys.stderr
            )
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)  # its last owner unlinked it after we had opened it: that lock excludes nobody
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(owner).encode())
    return Lock(folder, descriptor)


def _owner(path: Path) -> str:
    """Who holds the lock; a new owner needs a moment to write it down."""
    for _ in range(25):
        time.sleep(0.02)
        with contextlib.suppress(OSError, ValueError, KeyError):  # not written yet: look again
            owner = json.loads(path.read_text("utf-8"))
            return f"pid {owner['pid']} on {owner['host']}, started {owner['started']}"
    return "a process that has not given its name"
