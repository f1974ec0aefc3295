"""Power loss: what a disk may hold when the current goes, for each moment of a recorded story of storage operations.

A model of a file system after Pillai et al. (OSDI 2014): what was synced is there. Of the rest, each file may have lost all,
kept part or hold zeros, and each directory may have kept any subset of its changed names. `states` makes such disks.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from storage import Operation


@dataclass
class File:
    now: bytearray = field(default_factory=bytearray)
    synced: bytes = b""

    def crashed(self, how: str, draw: random.Random) -> bytes:
        """The content after the loss: synced, with none / some / all of the rest, or zeros in its place."""
        if bytes(self.now) == self.synced or how == "kept":
            return bytes(self.now)
        if not self.now.startswith(self.synced):  # a truncation is pending
            return self.synced
        rest = len(self.now) - len(self.synced)
        if how == "mixed":
            how = draw.choice(["lost", "part", "zeros"])
        return {
            "lost": self.synced,
            "part": bytes(self.now[: len(self.synced) + draw.randrange(rest)]),
            "zeros": self.synced + bytes(rest),
        }[how]


@dataclass
class Folder:
    now: dict[str, "File | Folder"] = field(default_factory=dict)
    synced: dict[str, "File | Folder"] = field(default_factory=dict)
    pending: list[tuple[str, str, str, "File | Folder | None"]] = field(default_factory=list)  # add / remove / rename

    def change(self, kind: str, name: str, to: str = "", node: "File | Folder | None" = None) -> None:
        self.pending.append((kind, name, to, node))
        _apply(self.now, kind, name, to, node)

    def crashed(self, how: str, draw: random.Random) -> dict[str, "File | Folder"]:
        """The names after the loss: those synced, and none / the first / any / all of the changes since."""
        if how == "mixed":
            how = draw.choice(["lost", "first", "any", "kept"])
        chosen = {
            "lost": [],
            "kept": self.pending,
            "first": self.pending[: draw.randint(0, len(self.pending))],
            "any": [change for change in self.pending if draw.random() < 0.5],
        }[how]
        names = dict(self.synced)
        for change in chosen:
            _apply(names, *change)
        return names


def _apply(names: dict[str, "File | Folder"], kind: str, name: str, to: str, node: "File | Folder | None") -> None:
    if kind == "add" and node is not None:
        names[name] = node
    else:
        names.pop(name, None)
        if kind == "rename" and node is not None:
            names[to] = node


class Disk:
    """The file system under `root`, as the operations left it."""

    def __init__(self, root: Path):
        self.root, self.top = str(root.resolve()), Folder()

    def _at(self, path: str) -> "tuple[Folder, str]":
        at, parts = self.top, path.removeprefix(self.root).strip("/").split("/")
        for part in parts[:-1]:
            inner = at.now[part]
            assert isinstance(inner, Folder)
            at = inner
        return at, parts[-1]

    def do(self, op: Operation) -> None:
        parent, name = self._at(op.path)
        node = parent.now.get(name) if name else self.top
        if op.kind == "open":
            if node is None:
                parent.change("add", name, node=File())
            elif isinstance(node, File) and op.size & os.O_TRUNC:
                node.now.clear()
        elif op.kind == "mkdir":
            parent.change("add", name, node=Folder())
        elif op.kind == "write":
            assert isinstance(node, File)
            node.now += op.data
        elif op.kind == "ftruncate":
            assert isinstance(node, File)
            del node.now[op.size :]
        elif op.kind == "fsync":
            if isinstance(node, File):
                node.synced = bytes(node.now)
            elif isinstance(node, Folder):
                node.synced, node.pending = dict(node.now), []
        elif op.kind == "link":
            other, to = self._at(op.to)
            other.change("add", to, node=node)
        elif op.kind == "rename":
            other, to = self._at(op.to)
            assert other is parent
            parent.change("rename", name, to, node)
        else:
            parent.change("remove", name)

    def write_to(self, folder: Path, files: str, names: str, draw: random.Random) -> None:
        """Make one legal disk after the loss, in a real folder."""

        def make(node: Folder, at: Path) -> None:
            at.mkdir()
            for name, inside in node.crashed(names, draw).items():
                if isinstance(inside, File):
                    (at / name).write_bytes(inside.crashed(files, draw))
                else:
                    make(inside, at / name)

        make(self.top, folder)


CASES = [(files, names) for files in ("lost", "part", "zeros", "kept") for names in ("lost", "first", "any", "kept")]


def states(root: Path, story: list[Operation], into: Path, seed: int = 0) -> Iterator[tuple[int, Path]]:
    """(operations done, a disk) for every moment of the story and every case, and two mixed ones."""
    disk, draw, number = Disk(root), random.Random(seed), 0
    for done in range(len(story) + 1):
        for files, names in [*CASES, ("mixed", "mixed"), ("mixed", "mixed")]:
            number += 1
            disk.write_to(into / str(number), files, names, draw)
            yield done, into / str(number)
        if done < len(story):
            disk.do(story[done])
