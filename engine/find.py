"""Names to code: the folder listing is the registry.

`tune.method: lora` is the file engine/tune/lora.py, `task: classification` is engine/tasks/classification.py. A new
task or method is therefore one new file, with no list to edit. A researcher's own code is named by
"file.py:Class" or "package.module:Class".
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from engine.errors import InputError, nearest

ENGINE = Path(__file__).resolve().parent
PROJECT = ENGINE.parent  # the folder that holds engine/ and recipes/


def names(kind: str) -> list[str]:
    """The names that engine/KIND/ offers: its files, without those that begin with an underscore."""
    folders = importlib.import_module(f"engine.{kind}").__path__
    return sorted(p.stem for folder in folders for p in Path(folder).glob("*.py") if not p.stem.startswith("_"))


def module(kind: str, name: str, where: str) -> ModuleType:
    """engine/KIND/NAME.py as a module, or an error at `where` that offers the nearest name."""
    if name not in names(kind):
        raise InputError(f"{where}: no {kind.rstrip('s')} '{name}'{nearest(name, names(kind))}")
    return importlib.import_module(f"engine.{kind}.{name}")


def offers(kind: str, name: str, what: str) -> bool:
    """Whether engine/KIND/NAME.py defines the class `what`; the file is not run, since that may take seconds."""
    folders = importlib.import_module(f"engine.{kind}").__path__
    texts = [path.read_text("utf-8") for folder in folders if (path := Path(folder, f"{name}.py")).exists()]
    return any(f"\nclass {what}(" in text for text in texts)


def method(name: str, where: str, folders: tuple[Path, ...] = ()) -> Any:
    """A tuning method: the module engine/tune/NAME.py, or the class that "file.py:Class" names. Either has `Options` and `apply`."""
    if ":" not in name:
        return module("tune", name, where)
    found = load_class(name, where, folders)
    missing = [part for part in ("Options", "apply") if not hasattr(found, part)]
    if missing:
        raise InputError(
            f"{where}: {name} has no {' and no '.join(missing)}; a method is written as engine/tune/__init__.py says"
        )
    return found


def locate(path: str, folders: tuple[Path, ...] = ()) -> Path | None:
    """The first existing place of a relative `path`: here, in the project, in one of `folders`."""
    try:
        candidate = Path(path).expanduser()
        places = [candidate] if candidate.is_absolute() else [folder / candidate for folder in (Path.cwd(), PROJECT, *folders)]
        return next((place for place in places if place.exists()), None)
    except (OSError, RuntimeError):  # a name too long, a folder that may not be entered, a user who does not exist
        return None


def load_class(spec: str, where: str, folders: tuple[Path, ...] = ()) -> type:
    """The class that "file.py:Class" or "package.module:Class" names. Importing runs that file's code."""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise InputError(f"{where}: '{spec}' names no class; write file.py:Class or package.module:Class")
    if source.endswith(".py"):
        path = locate(source, folders)
        if path is None:
            raise InputError(f"{where}: no file {source} (looked here and in the recipe's folder)")
        loaded = _load_file(path, where)
    else:
        try:
            loaded = importlib.import_module(source)
        except Exception as error:  # a name that is none, or whatever the module's own code raises
            raise InputError(f"{where}: cannot import {source}: {type(error).__name__}: {error}") from error
    if not hasattr(loaded, name):
        classes = [k for k, v in vars(loaded).items() if isinstance(v, type)]
        raise InputError(f"{where}: {source} has no class '{name}'{nearest(name, classes)}")
    found = getattr(loaded, name)
    if not isinstance(found, type):
        raise InputError(f"{where}: {spec} is a {type(found).__name__}, not a class")
    return found


def _load_file(path: Path, where: str) -> ModuleType:
    name = f"engine_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # noqa: PT018
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded  # so that dataclasses and pickling-free copies of its classes find their module
    try:
        spec.loader.exec_module(loaded)
    except Exception as error:
        raise InputError(f"{where}: {path} cannot be loaded: {type(error).__name__}: {error}") from error
    return loaded
