"""A run that comes from someone else: none of its code runs unasked, whatever its files say."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import MakeRecipe

from engine import finetune, trust
from engine.__main__ import main
from engine.errors import InputError
from engine.recipe import load
from engine.runs import open_run

QUIET = {"say": lambda line: None}
LAYER = """
from pathlib import Path
from torch import nn

Path("ran").touch()


class Same(nn.Module):
    def __init__(self, old):
        super().__init__()
        self.old = old

    @classmethod
    def from_old(cls, old):
        return cls(old)

    def forward(self, x):
        return self.old(x)
"""


@pytest.fixture
def run(recipe: MakeRecipe, files: Path) -> Path:
    """A run with a layer of its own, whose recipe and layer lie in another folder."""
    (files / "mine.py").write_text(LAYER)
    made = recipe("swap=[{at: '**.intermediate.dense', with: 'mine.py:Same'}]", "train.max_steps=1", "train.epochs=1")
    finetune.finetune(made, "r", **QUIET)
    Path("ran").unlink()
    return Path("r")


def test_the_own_file_opens_unasked_and_an_edited_one_does_not(run: Path, files: Path) -> None:
    open_run("r")
    assert Path("ran").exists()
    Path("ran").unlink()
    (files / "mine.py").write_text(LAYER + "\n# edited\n")
    with pytest.raises(InputError, match=r"would execute the code of r/layers/mine.py \(Same, sha256 .*is another file now.*--allow-code"):
        open_run("r")
    assert not Path("ran").exists()
    (files / "mine.py").unlink()
    with pytest.raises(InputError, match="is not on this machine"):
        open_run("r")
    assert not Path("ran").exists()
    open_run("r", allow_code=True)


@pytest.mark.parametrize("path", ["layers/mine.py", "mine.py", "other/mine.py", "", "\0", None])
@pytest.mark.parametrize("spec", ["mine.py:Same", "r/mine.py:Same", "layers/../layers/mine.py:Same", "r.layers.mine:Same"])
def test_a_file_that_came_along_is_not_the_recipes_own(run: Path, files: Path, path: str | None, spec: str) -> None:
    """What a stranger may put beside the copy, and write into the table, does not count as a file of this machine."""
    (files / "mine.py").unlink()
    for place in (run, run / "layers"):
        (place / "__init__.py").write_text(LAYER)
    shutil.copy(run / "layers" / "mine.py", run / "mine.py")
    Path("other").mkdir()
    shutil.copy(run / "layers" / "mine.py", "other/mine.py")
    table = json.loads((run / trust.TABLE).read_text())
    entry = table["code"].pop("mine.py:Same")
    inside = str((run / path).resolve()) if path in ("layers/mine.py", "mine.py") else path
    table["code"][spec] = {k: v for k, v in {**entry, "path": inside}.items() if v is not None}
    table["swap"][0]["with"] = spec
    (run / trust.TABLE).write_text(json.dumps(table))
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("mine.py:Same", spec))
    with pytest.raises(InputError, match="would execute the code of r/layers/mine.py"):
        open_run("r")
    assert not Path("ran").exists()


def test_a_strangers_run_is_not_resumed_checked_or_shown_unasked(run: Path, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(run / "layers" / "mine.py", run / "mine.py")
    (files / "mine.py").unlink()
    for verb in (["finetune", "r/recipe.yaml", "--out", "r", "--resume", "train.max_steps=2"], ["check", "r/recipe.yaml"], ["layers", "r/recipe.yaml"]):
        assert main(verb) == 2
        assert "would execute the code of" in capsys.readouterr().err
    assert not Path("ran").exists()
    assert main(["finetune", "r/recipe.yaml", "--out", "r", "--resume", "train.max_steps=2", "--allow-code"]) == 0
    assert Path("ran").exists()
    open_run("r", allow_code=True)


def test_a_run_goes_on_by_its_own_copy_wherever_the_code_lay(recipe: MakeRecipe, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RUN/recipe.yaml names the layer as the first recipe did, relative to a folder that is neither here nor the run's."""
    (files / "mine.py").write_text(LAYER)
    data = [f"data.{split}={files / split}.jsonl" for split in ("train", "validation", "test")]
    made = recipe("swap=[{at: '**.intermediate.dense', with: 'mine.py:Same'}]", "train.max_steps=1", *data)
    (files / "away").mkdir()
    monkeypatch.chdir(files / "away")
    finetune.finetune(made, "r", **QUIET)
    finetune.finetune(load("r/recipe.yaml", ["train.max_steps=2"]), "r", resume=True, **QUIET)
    open_run("r")


def test_a_module_of_a_package_may_import_its_neighbours(recipe: MakeRecipe, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = files / "lib" / "own_layers"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "base.py").write_text(LAYER)
    (package / "layer.py").write_text("from .base import Same\n\n\nclass Mine(Same):\n    pass\n")
    monkeypatch.syspath_prepend(str(files / "lib"))
    made = recipe("swap=[{at: '**.intermediate.dense', with: 'own_layers.layer:Mine'}]", "train.max_steps=1")
    finetune.finetune(made, "r", **QUIET)
    open_run("r")


def test_to_find_a_file_runs_nothing(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "loud").mkdir()
    (files / "loud" / "__init__.py").write_text("raise SystemExit")
    (files / "loud" / "deep.py").write_text("")
    monkeypatch.syspath_prepend(str(files))
    assert trust.source("loud.deep:X") == files / "loud" / "deep.py"
    assert trust.source("loud.other:X") is None
    assert trust.source("engine.layers.rmsnorm:RMSNorm") is not None
