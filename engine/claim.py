"""One owner, one recipe: what a run folder is before anything is written to it.

    not there, or empty                        new: it is made and owned
    a run of this recipe, finished             finished: its result is told again, nothing is done
    a run of this recipe, not finished         begun: it goes on with --resume
    a run of another recipe, or other files    refused, with what differs

A folder counts as begun once recipe.yaml stands in it: that is the last file that a start writes.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine import disk, distributed, lock, runs, trust
from engine.errors import InputError, RunError
from engine.recipe import Recipe, load
from engine.watch import read_log

GOES_ON = {("train", "epochs"), ("train", "max_steps"), ("early_stopping", "patience")}  # may change when a run goes on
IDLE = {("checkpoint", "keep"), ("data", "cache"), ("train", "cache_limit")}  # never change the result
STARTED = {lock.NAME, "environment.json", "layers", "tokenizer.json"}  # what a start that was killed leaves


@dataclass
class Claim:
    """An owned run folder; `folder` is None for a run that gets its stamp once its recipe, data and model are known to be good."""

    recipe: Recipe
    folder: Path | None
    state: Literal["new", "begun", "finished"]
    held: lock.Lock | None = None

    def begin(self) -> Path:
        """The folder to write to; a new one is made and owned if none was named."""
        if self.folder is None:
            if distributed.rank() == 0:
                self.folder = runs.create(self.recipe)
                self.held = lock.take(self.folder)
            self.folder = distributed.from_first(self.folder)
        return self.folder


@contextlib.contextmanager
def own(recipe: Recipe, out: str | None, resume: bool) -> Iterator[Claim]:
    """Own the run folder for the block. Raises InputError (used for something else) or RunError (owned by another process).

    Of several processes that train together rank 0 owns it, and tells the others what it is.
    """
    if recipe.tune.start:
        from engine import adapters  # imports torch

        recipe = adapters.started(recipe)
    if distributed.rank() == 0:
        with _own(recipe, out, resume) as mine:
            distributed.from_first((mine.folder, mine.state))
            yield mine
    else:
        told: tuple[Path | None, Literal["new", "begun", "finished"]] = distributed.from_first(None)
        yield Claim(recipe, *told)


@contextlib.contextmanager
def _own(recipe: Recipe, out: str | None, resume: bool) -> Iterator[Claim]:
    if resume:
        folder = runs.locate(out or str(recipe.home.run or Path("runs") / recipe.name))
    elif out:
        folder = Path(out)
        if folder.exists() and not folder.is_dir():
            raise InputError(f"--out {out}: it is a file; name another folder")
    else:
        mine = Claim(recipe, None, "new")
        try:
            yield mine
        finally:
            if mine.held:
                mine.held.release()
        return
    made, known = not folder.exists(), (folder / lock.NAME).exists()
    try:
        with disk.refusing(folder, 0):
            disk.make(folder)
            held = lock.take(folder)
    except disk.DiskError as error:
        raise RunError(f"{error}; nothing was begun, and what is there is as it was") from error
    accepted = False
    try:
        state = _state(recipe, folder, resume, known)
        accepted = True
        yield Claim(recipe, folder, state, held)
    finally:
        empty = {path.name for path in folder.iterdir()} == {lock.NAME}
        held.release(forget=empty or not (accepted or known))
        if empty and made:
            with contextlib.suppress(OSError):  # another process has taken it meanwhile
                folder.rmdir()


def _state(recipe: Recipe, folder: Path, resume: bool, known: bool) -> Literal["new", "begun", "finished"]:
    """What the owned folder holds; `known`: a run was in it before. InputError if this recipe may not go on in it."""
    if not (folder / "recipe.yaml").exists():
        inside = {p.name for p in folder.iterdir() if not p.name.startswith((disk.NEW, disk.TRASH))}
        if inside - (STARTED if known else {lock.NAME}):
            raise InputError(f"--out {folder}: it exists and is not empty; name another folder, or go on with --resume")
        return "new"
    found = changes(load(str(folder / "recipe.yaml"), code=_code(recipe, folder)).resolved(), recipe.resolved())
    finished = any(record["event"] == "finished" for record in read_log(folder / "log.jsonl"))
    if finished and not found.keys() - IDLE:
        return "finished"
    other = [line for key, line in found.items() if key not in GOES_ON | IDLE]
    if other:
        held = "--resume needs the recipe that this run was begun with" if resume else "it holds a run of another recipe"
        way = f"\nTo go on with the run as it was begun: make resume RUN={folder}" if not finished else ""
        raise InputError(f"{folder}: {held}; it differs in\n  " + "\n  ".join(other) + way)
    if not resume:
        raise InputError(
            f"--out {folder}: it exists and is not empty: a run of this recipe; go on with --resume, or name another folder"
        )
    return "begun"


def _code(recipe: Recipe, folder: Path) -> Callable[[str], str]:
    """What to load for a method of the user's own that the folder's recipe names: the file of the recipe that was given."""

    def code(spec: str) -> str:
        if spec != recipe.tune.method:
            raise InputError(f"{folder}: it holds a run of another recipe; it differs in\n  tune.method: {spec} -> {recipe.tune.method}")
        own, name = recipe.code(spec), spec.rpartition(":")[2]
        return f"{trust.source(own, recipe.folders)}:{name}" if own.rpartition(":")[0].endswith(".py") else own

    return code


def changes(then: dict[str, Any], now: dict[str, Any]) -> dict[tuple[str, ...], str]:
    """(group, key) -> "group.key: then -> now" for all that differs between two resolved recipes."""
    found: dict[tuple[str, ...], str] = {}
    for group in dict.fromkeys([*then, *now]):
        a, b = then.get(group), now.get(group)
        if isinstance(a, dict) and isinstance(b, dict):
            keys = [k for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)]
            found |= {(group, k): f"{group}.{k}: {_said(a.get(k))} -> {_said(b.get(k))}" for k in keys}
        elif a != b:
            found[(group,)] = f"{group}: {_said(a)} -> {_said(b)}"
    return found


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
