"""Whose code runs: a layer or a method that a recipe names as "file.py:Class" or "package.module:Class".

    finetune RECIPE          you named the recipe: the code that it names is run
    RUN/recipe.yaml          a run folder may come from anyone, and so may every file in it. RUN/layers/ holds a copy of the
                             code, its sha256, and the place that it was copied from:

        copy changed since training                             refused
        copied from a file of this machine, outside the run,
        that is still the same, byte for byte                   run: the recipe's own file
        a layer of this engine, the same byte for byte          run
        anything else                                           said, and run with --allow-code alone

To find a file is not to run it: a package is looked up without importing it.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from engine import find
from engine.errors import InputError

TABLE = Path("layers", "swap.json")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def source(spec: str, folders: tuple[Path, ...] = ()) -> Path | None:
    """The file that defines the class "file.py:Class" or "package.module:Class" here, found without running anything."""
    name = spec.rpartition(":")[0]
    if name.endswith(".py"):
        return find.locate(name, folders)
    top, *rest = name.split(".")
    try:
        found = importlib.util.find_spec(top)  # of a name without a dot: nothing is imported
        path = top
        for part in rest:
            path = f"{path}.{part}"
            found = PathFinder.find_spec(path, found.submodule_search_locations) if found else None
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found and found.origin else None


def code_of(folder: Path, *, allow: bool = False) -> Callable[[str], str]:
    """spec -> what to load for it: as it stands, or, where `folder` is a run, what of that run's code may run here."""
    guarded = is_run(folder)
    return lambda spec: _of_run(folder, spec, allow) if guarded and ":" in spec else spec


def is_run(folder: Path) -> bool:
    """Whether a recipe in this folder is the record of a run."""
    return any((folder / name).exists() for name in ("environment.json", TABLE))


def table(folder: Path) -> dict[str, Any]:
    """The run's table of its own code: the swap entries, and for each spec the copy's name, its sha256 and where it came from."""
    try:
        made = dict(json.loads((folder / TABLE).read_text("utf-8")))
        if not isinstance(made["swap"], list) or not isinstance(made["code"], dict):
            raise ValueError("`swap` or `code` is missing")
        return made
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / TABLE}: the table of the run's own code cannot be read: {error}") from error


def _of_run(folder: Path, spec: str, allow: bool) -> str:
    entry = table(folder)["code"].get(spec)
    if not isinstance(entry, dict) or not {"file", "sha256"} <= entry.keys():
        raise InputError(f"{folder}: {spec} is not the code that this run was trained with")
    copy, name = folder / TABLE.parent / Path(str(entry["file"])).name, spec.rpartition(":")[2]
    if not copy.is_file() or sha256(copy) != entry["sha256"]:
        raise InputError(f"{copy}: its sha256 is not the one noted at training; the file was changed")
    noted, here = Path(str(entry.get("path", ""))), None if spec.rpartition(":")[0].endswith(".py") else source(spec)
    kept = _elsewhere(noted, folder)
    if kept == entry["sha256"] or (here and _ours(here) and sha256(here) == entry["sha256"]):
        # a module of a package may import its neighbours, which only the package can give it
        return spec if here and (_ours(here) or here.resolve() == noted) else f"{copy}:{name}"
    if not allow:
        why = f"{noted} is another file now" if kept else "the recipe's own file, which it was copied from, is not on this machine"
        raise InputError(
            f"{folder}: this run would execute the code of {copy} ({name}, sha256 {entry['sha256'][:12]}...). It is not run unasked,"
            f" for {why}. Read it first; then add --allow-code."
        )
    return f"{copy}:{name}"


def _elsewhere(noted: Path, folder: Path) -> str | None:
    """The sha256 of the file that the code was copied from; None unless it can be read here and is not of the run itself."""
    try:
        outside = noted.is_absolute() and not noted.resolve().is_relative_to(folder.resolve()) and noted.is_file()
        return sha256(noted) if outside else None
    except (OSError, ValueError):
        return None


def _ours(path: Path) -> bool:
    return path.resolve().is_relative_to(find.ENGINE)
