"""The file of the frozen cache: numbers, then what they are; checked when it is found, the least used go first.

    KEY.states     (1 + tokens, H) in float32 or bfloat16, row 0 zeros | 256 bytes of JSON: sha256, shape, type

The name is a hash of all that the numbers depend on, so a file is never wrong, only unused. It appears whole or not at
all: it is written under a hidden name, synced and renamed. It is mapped into memory, not read: what a batch does not ask
for stays on the disk, and processes that map the same file share its pages.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine import disk

TRAILER = 256  # bytes
ENDING = ".states"
ABANDONED = 3600  # seconds since the last write after which a hidden file belongs to nobody
RESERVE = 1 << 30  # bytes of the disk that are left to checkpoints
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def size(rows: int, hidden: int, kind: str) -> int:
    """Bytes of a file of `rows` states of `hidden` numbers."""
    return rows * hidden * TYPES[kind].itemsize + TRAILER


def content(tensor: Tensor) -> Any:
    """The bytes of a tensor of any type, as a flat array of uint8."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def find(path: Path, rows: int, hidden: int, kind: str, *, check: bool = True) -> Tensor | None:
    """The states in `path`, (rows, hidden), mapped; None where there is no such file, or not a whole one. Marks it as used."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size(rows, hidden, kind):
                return None
            about = _about(rows, hidden, kind, _digest(file) if check else "")
            noted = json.loads(file.read(TRAILER) if check else b"{}")
        if check and noted != about:
            return None
        os.utime(path)
    except (OSError, ValueError):
        return None
    flat = torch.from_file(str(path), shared=False, size=rows * hidden, dtype=TYPES[kind])
    return flat.view(rows, hidden)


def write(path: Path, rows: int, hidden: int, kind: str, parts: Iterable[Tensor]) -> None:
    """A file of the states that `parts` give in order, each (n, hidden). Raises disk.DiskError; leaves nothing behind then."""
    hidden_path = path.with_name(f".{path.name}.{os.getpid()}")
    digest, written = hashlib.sha256(), 0
    with disk.refusing(path, size(rows, hidden, kind)):
        disk.make(path.parent)
        try:
            with hidden_path.open("wb") as file:
                for part in parts:
                    numbers = content(part.to(TYPES[kind]))
                    file.write(numbers)
                    digest.update(numbers)
                    written += len(part)
                assert written == rows, f"{written} states where {rows} were announced"
                about = json.dumps(_about(rows, hidden, kind, digest.hexdigest())).encode()
                file.write(about.ljust(TRAILER))
                file.flush()
                disk.sync_file(file.fileno())
            hidden_path.rename(path)
            disk.sync_directory(path.parent)
        finally:
            hidden_path.unlink(missing_ok=True)


def make_room(folder: Path, needed: int, limit: int) -> str:
    """Delete the files that were not used for longest until `needed` bytes more are within `limit`; why that fails, or ""."""
    if needed > limit:
        return f"{needed / 1e6:,.0f} MB are needed and train.cache_limit allows {limit / 1e6:,.0f} MB"
    held = []
    for path in folder.glob(f"*{ENDING}*") if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            facts = path.stat()
            if not path.name.startswith("."):
                held.append((facts.st_mtime, facts.st_size, path))
            elif time.time() - facts.st_mtime > ABANDONED:
                path.unlink()
    total = sum(bytes_ for _, bytes_, _ in held)
    for _, bytes_, path in sorted(held):
        if total + needed <= limit:
            break
        path.unlink(missing_ok=True)  # who has it mapped keeps it until the end
        total -= bytes_
    free = disk.free(folder)
    if free < needed + RESERVE:
        return f"{needed / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free, and {RESERVE / 1e6:,.0f} MB of them stay free"
    return ""


def _about(rows: int, hidden: int, kind: str, sha256: str) -> dict[str, Any]:
    return {"sha256": sha256, "rows": rows, "hidden": hidden, "type": kind}


def _digest(file: Any) -> str:
    """sha256 of all but the trailer, at which the file is left."""
    digest, rest = hashlib.sha256(), os.fstat(file.fileno()).st_size - TRAILER
    while rest:
        piece = file.read(min(rest, disk.CHUNK))
        digest.update(piece)
        rest -= len(piece)
    return digest.hexdigest()
