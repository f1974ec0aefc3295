"""The house's rules: who may import whom, how long the loop is, what may not appear."""

import ast
import re
from pathlib import Path

from engine import find

LEVELS = [
    {
        "errors",
        "find",
        "yaml12",
        "vet",
        "seeds",
        "distributed",
        "interrupt",
        "hub",
        "watch",
        "disk",
        "lock",
        "progress",
        "blocks",
        "lean",
        "trust",
    },
    {"schema", "keys", "recipe", "override", "faults", "spans"},
    {"data", "swap", "metrics"},
    {"models", "together", "scratch", "vocabulary", "freeze", "optim", "layers", "tune", "tasks", "fast", "adapters"},
    {"checkpoint", "evaluate"},
    {"train"},
    {"prepare", "runs", "claim", "resume", "card", "finetune"},
    {"bases", "report"},
    {"predict", "preflight"},
    {"__main__", "launch"},
]
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}
FILES = sorted(p for p in find.ENGINE.rglob("*.py") if p.name != "__init__.py")


def room_of(path: Path) -> str:
    return path.relative_to(find.ENGINE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The rooms that a file imports at its top level; imports inside functions are the lazy ones."""
    found = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "engine":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found - {"__version__"}


def test_every_room_has_a_level_and_imports_only_lower_ones() -> None:
    assert {room_of(p) for p in FILES} <= set(LEVEL)
    for path in FILES:
        for room in imports(path):
            same = (
                room == room_of(path)
                or {room, room_of(path)} <= LEVELS[0] | {"finetune", "prepare", "runs", "claim", "resume", "card"}
                or {room, room_of(path)} <= LEVELS[3] | LEVELS[1]
            )
            assert same or LEVEL[room] < LEVEL[room_of(path)], f"{path.name} imports {room}"


def test_the_loop_imports_torch_and_few_rooms_and_stays_readable() -> None:
    assert imports(find.ENGINE / "train.py") == {"distributed", "faults", "optim", "seeds", "progress"}
    tree = ast.parse((find.ENGINE / "train.py").read_text("utf-8"))
    loop = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train")
    assert loop.end_lineno
    assert loop.end_lineno - loop.lineno < 110
    assert len((find.ENGINE / "train.py").read_text("utf-8").splitlines()) < 200
    assert len(ast.get_docstring(tree) or "") > 1000


def test_rivals_and_pickles_never_run() -> None:
    assert len(FILES) > 25
    for path in FILES:
        text = path.read_text("utf-8")
        for name in ("peft", "accelerate", "lightning", "pickle"):
            assert not re.search(rf"^\s*(import|from) {name}\b", text, re.M), f"{path.name} imports {name}"
        for word in ("torch.load(", "yaml.load(", "trust_remote_code=True", "eval(", "exec("):
            hits = [m.start() for m in re.finditer(rf"(?<![\w.]){re.escape(word)}", text)]
            assert not hits, f"{path.name}: {word}"
        assert "Trainer" not in text or path.name in ("train.py", "vocabulary.py")


def test_every_file_teaches_and_stays_short() -> None:
    for path in FILES:
        text = path.read_text("utf-8")
        assert ast.get_docstring(ast.parse(text)), f"{path}: no docstring"
        assert len(text.splitlines()) <= 400, path
        assert path.stem not in ("utils", "helpers", "common")


def test_every_task_and_method_file_offers_what_the_engine_asks_for() -> None:
    for name in find.names("tune"):
        module = find.module("tune", name, "")
        assert issubclass(module.Options, find.module("tune", "full", "").Options.__mro__[1])
        assert callable(module.apply)
    for name in find.names("tasks"):
        task = find.module("tasks", name, "").Task
        for part in (
            "roles",
            "default_metrics",
            "auto_class",
            "metrics",
            "fit",
            "problem",
            "encode",
            "items",
            "loss",
            "forward",
            "judge",
            "predictions",
        ):
            assert hasattr(task, part), f"{name}.{part}"
