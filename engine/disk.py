"""Writing so that it lasts, and saying what is wrong when the disk refuses.

    write(file)       content, fsync                                   a file that survives a power loss
    replace(file)     hidden file, fsync, rename, fsync of the folder  the old content or the new one, never a mixture
    whole(folder)     hidden folder, fsync, rename, fsync of its parent    the same for a folder of files

Why each step: writing fills the kernel's memory, and only fsync makes it last. A name belongs to its directory, so the
directory is synced as well. A rename is atomic: who reads sees before or after. When fsync fails, the kernel may drop
what it could not write and report the next fsync as good; so it is never tried again, the file goes and the error stays.

Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014; Rebello et al., "Can Applications Recover from fsync
Failures?", ATC 2020.
"""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.errors import RunError

Content = bytes | Iterable[bytes | memoryview]
CHUNK = 8 << 20  # bytes written between two looks of Python at its signals
NEW, TRASH = ".new.", ".trash."  # how the names of half-made and half-deleted things begin


class DiskError(RunError):
    """The disk refused a write: path, cause, bytes needed and free."""


@contextlib.contextmanager
def refusing(path: Path, needed: int) -> Iterator[None]:
    """Turn an I/O error of the block, which writes `needed` bytes at or under `path`, into DiskError."""
    try:
        yield
    except OSError as error:
        raise _error(Path(error.filename or path), error.strerror or str(error), needed) from error
    except Exception as error:  # safetensors and tokenizers are Rust: their I/O errors are known by this text alone
        if isinstance(error, RunError) or not re.search(r"\(os error \d+\)", str(error)):
            raise
        raise _error(path, str(error), needed) from error


def _error(path: Path, cause: str, needed: int) -> DiskError:
    return DiskError(f"{path}: cannot be written: {cause}; {needed:,} bytes needed, {free(path):,} free")


def free(path: Path) -> int:
    """Bytes that this process may still write on the file system of `path`, which need not exist yet."""
    path = path.absolute()
    facts = os.statvfs(next(p for p in (path, *path.parents) if p.exists()))
    return facts.f_bavail * facts.f_frsize


def require(folder: Path, needed: int) -> None:
    """Raise the error of a full disk before the first byte of `needed` is written."""
    if free(folder) < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def put(descriptor: int, content: Content) -> str:
    """Write all of `content` in chunks; returns its sha256."""
    digest = hashlib.sha256()
    for part in (content,) if isinstance(content, bytes) else gathered(content):
        rest = memoryview(part)
        while rest:
            done = os.write(descriptor, rest[:CHUNK])
            digest.update(rest[:done])
            rest = rest[done:]
    return digest.hexdigest()


def gathered(parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview | bytearray]:
    """The same bytes in fewer parts: small ones are put together up to a chunk."""
    held = bytearray()
    for part in parts:
        if held and len(held) + len(part) > CHUNK:
            yield held
            held = bytearray()
        if len(part) < CHUNK:
            held += part
        else:
            yield part
    if held:
        yield held


def sync_file(descriptor: int) -> None:
    os.fsync(descriptor)


def sync_path(path: Path) -> None:
    """fsync a file that another library has written."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_file(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make the names in a directory last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """fsync everything in `folder`, for files that other libraries have written."""
    for path in sorted(folder.rglob("*")):
        (sync_directory if path.is_dir() else sync_path)(path)


def write(path: Path, content: Content) -> str:
    """A file with `content`, bytes or parts one after the other, synced; returns its sha256. OSError names the path."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            digest = put(descriptor, content)
            sync_file(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        error.filename = str(path)
        raise
    return digest


def link(source: Path, name: Path) -> bool:
    """A second name for a file that is synced and that nobody writes to again; False if this file system has none."""
    try:
        os.link(source, name)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            return False
        raise
    return True


def replace(path: Path, content: bytes) -> None:
    """Put `content` in the place of `path`, whole or not at all. Raises DiskError."""
    hidden = path.with_name(NEW + path.name)
    with refusing(path, len(content)):
        try:
            write(hidden, content)
            os.rename(hidden, path)
            sync_directory(path.parent)
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                os.unlink(hidden)
            raise


@contextlib.contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A hidden folder to fill; at the end of the block it takes the place of `folder`. Files in it must be synced by then."""
    hidden, trash = folder.with_name(NEW + folder.name), folder.with_name(TRASH + folder.name)
    delete(hidden)
    delete(trash)
    os.mkdir(hidden)
    try:
        yield hidden
        sync_directory(hidden)
        if folder.exists():
            sync_directory(folder.parent)  # the new one must last before the old one leaves; see tidy()
            os.rename(folder, trash)
        os.rename(hidden, folder)
        sync_directory(folder.parent)
    except Exception:
        with contextlib.suppress(OSError):  # the first error is the one to tell; tidy() takes what is left
            tidy(folder.parent)
        raise
    delete(trash)


def make(folder: Path) -> None:
    """mkdir -p that lasts: the parent of each new folder is synced."""
    for path in reversed((folder, *folder.parents)):
        if not path.exists():
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.mkdir(path)
            sync_directory(path.parent)


def remove(folder: Path) -> None:
    """Delete a folder; a crash on the way leaves it whole or hidden, never in part under its name."""
    trash = folder.with_name(TRASH + folder.name)
    delete(trash)
    os.rename(folder, trash)
    delete(trash)


def delete(path: Path) -> None:
    """Delete a file or a folder, if it is there; links are not followed."""
    if path.is_dir() and not path.is_symlink():
        for inside in sorted(path.iterdir()):
            delete(inside)
        os.rmdir(path)
    elif path.exists() or path.is_symlink():
        os.unlink(path)


def tidy(folder: Path) -> None:
    """Clear up after a process that was killed: end an exchange that whole() had begun, delete what else is hidden."""
    for path in sorted(folder.glob(NEW + "*")):
        final, trash = (folder / (start + path.name.removeprefix(NEW)) for start in ("", TRASH))
        if trash.exists() and not final.exists():  # between its two renames: the new one is whole and synced
            os.rename(path, final)
            sync_directory(folder)
        delete(path)
    for path in sorted(folder.glob(TRASH + "*")):
        delete(path)
