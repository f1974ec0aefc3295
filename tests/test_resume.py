"""A run goes on from its own recipe.yaml: under its name, with its data, from anywhere, with the stand-in it was begun with."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import BASE, StopAt, make_rows, write_jsonl
from test_loop import log_of

from engine import find, finetune, recipe
from engine.__main__ import main
from engine.errors import InputError

QUIET: dict[str, Any] = {"say": lambda line: None}
LAYER = """import torch

class Gain(torch.nn.Module):
    def __init__(self, old):
        super().__init__()
        self.old, self.gain = old, torch.nn.Parameter(torch.ones(()))

    @classmethod
    def from_old(cls, old):
        return cls(old)

    def forward(self, x):
        return self.gain * self.old(x)
"""


@pytest.fixture
def begun(tmp_path: Path, bert: Path) -> Path:
    """A run that stopped after step 5, of a recipe whose model stands only in `offline:` and whose files lie beside it; and a whole one."""
    mine = tmp_path / "mine"
    mine.mkdir()
    for name, count, seed in (("train", 90, 1), ("validation", 30, 2), ("test", 30, 3)):
        write_jsonl(mine / f"{name}.jsonl", make_rows(count, seed))
    (mine / "gain.py").write_text(LAYER)
    text = BASE.format(model="owner/large") + 'swap: [{at: "**.intermediate.dense", with: "gain.py:Gain"}]\n'
    (mine / "films.yaml").write_text(f"{text}offline:\n  model: {{name: {bert}}}\n  train: {{learning_rate: 5e-3}}\n")
    made = recipe.load("mine/films.yaml", offline=True)
    finetune.finetune(made, "whole", **QUIET)
    assert finetune.finetune(made, "stopped", interrupted=StopAt("stopped", 5), **QUIET).code == 130  # type: ignore[arg-type]
    (tmp_path / "elsewhere").mkdir()
    return tmp_path


def same(a: Path, b: Path) -> None:
    for name in ("model/model.safetensors", "model/README.md", "metrics.json", "predictions/test.jsonl", "recipe.yaml"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    assert log_of(str(a)) == log_of(str(b))


def test_a_run_goes_on_from_its_own_recipe_wherever_it_is_called(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, relative data, own layers and the stand-in are those of the start, though the command names none of them."""
    monkeypatch.chdir(begun / "elsewhere")
    kept = recipe.load("../stopped/recipe.yaml")
    assert (kept.name, kept.train.learning_rate) == ("films", 5e-3)
    assert kept.stand_in == recipe.load(str(begun / "mine/films.yaml"), offline=True).stand_in != {}
    assert main(["finetune", "../stopped/recipe.yaml", "--resume"]) == 0  # the run folder is where the recipe lies
    same(begun / "stopped", begun / "whole")
    assert "# films" in (begun / "stopped/model/README.md").read_text()
    assert main(["evaluate", "../stopped"]) == 0  # its test file is found too


def test_a_run_killed_before_its_first_save_begins_again_as_itself(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (begun / "killed").mkdir()
    for name in ("recipe.yaml", "environment.json", "layers"):
        source = begun / "stopped" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, begun / "killed" / name)
    monkeypatch.chdir(begun / "elsewhere")
    assert main(["finetune", "../killed/recipe.yaml", "--out", "../killed", "--resume"]) == 0
    same(begun / "killed", begun / "whole")
    notes = [record["note"] for record in log_of(str(begun / "killed")) if record["event"] == "note"]
    assert any("offline block stands in" in note for note in notes)


def test_going_on_without_the_stand_in_is_refused_with_the_way(begun: Path) -> None:
    with pytest.raises(InputError, match=r"model.name: .* -> owner/large(?s:.*)make resume RUN=stopped"):
        finetune.finetune(recipe.load("mine/films.yaml"), "stopped", resume=True, **QUIET)


def test_a_new_run_of_a_runs_recipe_bears_the_name_and_finds_the_data(begun: Path) -> None:
    made = recipe.load("stopped/recipe.yaml", ["train.max_steps=2"])
    folder = finetune.finetune(made, **QUIET).folder
    assert folder.parent == Path("runs/films")
    assert json.loads((folder / "environment.json").read_text())["recipe"] == "films"


@pytest.mark.parametrize("noted", ["", "[]", "[" * 10**5, '{"recipe": "../../up"}', '{"recipe": 3}', '{"recipe": "x", "folders": 7}'])
def test_what_stands_beside_a_recipe_is_believed_only_if_it_is_a_name(bert: Path, noted: str) -> None:
    Path("recipe.yaml").write_text(BASE.format(model=bert))
    Path("environment.json").write_text(noted)
    assert recipe.load("./recipe.yaml").name == "recipe"


def test_make_resume_names_the_run_alone(tmp_path: Path) -> None:
    """What the target hands on is the run's own recipe, changes that are allowed, the folder and --resume."""
    seen, venv = tmp_path / "seen", tmp_path / "venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").write_text('#!/bin/sh\nprintf "%s\\0" "$@" > "$SEEN"\n')
    (venv / "bin" / "python").chmod(0o755)
    (venv / "ready").touch()
    make = ["make", "-C", str(find.PROJECT), f"VENV={venv}", "resume", "RUN=runs/a b"]
    for more, expected in (([], []), (["SET=train.epochs=9 early_stopping.patience=4"], ["train.epochs=9", "early_stopping.patience=4"])):
        subprocess.run([*make, *more], capture_output=True, check=True, env={**os.environ, "SEEN": str(seen)})
        given = seen.read_text().split("\0")[:-1]
        assert given == ["-m", "engine", "finetune", "runs/a b/recipe.yaml", *expected, "--out", "runs/a b", "--resume"]
