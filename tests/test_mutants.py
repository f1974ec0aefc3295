"""The laws have teeth: eight rules of safety, each taken away, and the law that then fails.

A mutant is what someone might write who does not know why the rule is there. Were one of them not caught, the test that should
catch it would be looking at nothing.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import MakeRecipe
from test_loop import RESUMED, run, stopped_and_resumed_equals_whole
from test_storage import broken_promises, log_is_rewound, manifest_is_last, memory, undetected

from engine import checkpoint, disk, seeds, watch
from engine.data.windows import Windows

__all__ = ["memory"]  # the fixture


def manifest_first(folder: Path, contents: Iterator[tuple[str, disk.Content]], linked: dict[str, Any]) -> None:
    held = [(file, content if isinstance(content, bytes) else b"".join(content)) for file, content in contents]
    facts = linked | {file: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)} for file, content in held}
    disk.write(folder / "manifest.json", json.dumps(facts).encode())
    for file, content in held:
        disk.write(folder / file, content)


def any_hash(path: Path) -> str:
    return str(json.loads((path.parent / "manifest.json").read_text())[path.name]["sha256"])


class Impure:
    """An order that depends on how often it was asked for."""

    def __init__(self) -> None:
        self.state = np.random.default_rng(0)

    def __get__(self, windows: Windows, kind: type) -> Callable[[int], np.ndarray]:
        return lambda epoch: self.state.permutation(len(windows.encoded))


real_load = checkpoint.load_optimizer


def decayed_rate(path: Path, optimizer: Any, scaler: Any) -> None:
    """torch's own state holds the rate as the schedule left it; it is taken for the rate that the schedule begins from."""
    real_load(path, optimizer, scaler)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]


def power_loss(folder: Path, recipe: MakeRecipe) -> bool:
    return next(broken_promises(folder), None) is None


def order_of_files(folder: Path, recipe: MakeRecipe) -> bool:
    return manifest_is_last(folder)


def damage(folder: Path, recipe: MakeRecipe) -> bool:
    return next(undetected(folder, 50), None) is None


def log(folder: Path, recipe: MakeRecipe) -> bool:
    return log_is_rewound(folder)


def resuming(folder: Path, recipe: MakeRecipe) -> bool:
    run(recipe(*RESUMED), "whole")
    try:
        stopped_and_resumed_equals_whole(recipe, RESUMED, [5])
    except AssertionError as error:
        assert "stopped after step" in str(error)  # other weights, no other failure
        return False
    return True


Law = Callable[[Path, MakeRecipe], bool]
MUTANTS: dict[str, tuple[Any, str, Any, Law]] = {
    "no file fsync": (disk, "sync_file", lambda descriptor: None, power_loss),
    "no directory fsync": (disk, "sync_directory", lambda path: None, power_loss),
    "manifest first": (checkpoint, "_write_files", manifest_first, order_of_files),
    "no hash check": (checkpoint, "sha256", any_hash, damage),
    "log offset dropped": (watch.Log, "_rewind", lambda log, keep: None, log),
    "random state not keyed": (seeds, "seed_all", lambda *place: None, resuming),
    "order not pure": (Windows, "order", Impure(), resuming),
    "lr not restored": (checkpoint, "load_optimizer", decayed_rate, resuming),
}


def test_there_are_eight() -> None:
    assert len(MUTANTS) == 8
    assert len({(id(room), name) for room, name, _, _ in MUTANTS.values()}) == 8  # each takes away another rule
    assert all(hasattr(room, name) for room, name, _, _ in MUTANTS.values())


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_mutant_breaks_a_law(memory: Path, recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    room, name, replacement, law = MUTANTS[mutant]
    monkeypatch.setattr(room, name, replacement)
    assert not law(memory, recipe)


@pytest.mark.parametrize("law", [power_loss, order_of_files, damage, log, resuming])
def test_without_a_mutant_each_law_holds(memory: Path, recipe: MakeRecipe, law: Law) -> None:
    assert law(memory, recipe)
