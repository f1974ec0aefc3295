"""What a recipe does not use is not imported before the first step; what it uses comes when it is used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from conftest import BASE, make_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from engine import find
from engine.data import encode

# transformers' model classes import PIL themselves; engine/lean.py keeps the others out
HEAVY = [
    "sympy.core",
    "torch.utils._sympy.functions",
    "torch._dynamo.eval_frame",
    "torch.distributed.tensor._api",
    "scipy.optimize._optimize",
    "sklearn",
    "scipy.stats",
    "pandas",
    "matplotlib",
    "datasets",
    "jinja2.sandbox_",
    "torch._inductor.compile_fx",
    "http.server",
]

STEPS = """
import json, sys
from engine import recipe, finetune
made = recipe.load("tiny.yaml", ["train.max_steps=2", "evaluate.every=1"])
seen = {}
def loaded(): return [name for name in %r if name in sys.modules]
inner = finetune.train
def train(model, task, windows, optimizer, *args, **more):
    write, evaluate, step = more["write"], more["evaluate"], optimizer.step
    def first(*a, **k):
        seen.setdefault("first step", loaded())
        return step(*a, **k)
    def scored():
        scores = evaluate()
        seen.setdefault("evaluation", loaded())
        return scores
    optimizer.step = first
    return inner(model, task, windows, optimizer, *args, **{**more, "evaluate": scored})
finetune.train = train
finetune.finetune(made, "out", say=lambda line: None)
seen["end"] = loaded()
print(json.dumps(seen))
"""


def test_heavy_modules_come_when_they_are_needed(tmp_path: Path, bert: Path) -> None:
    for name, count, seed in (("train", 20, 1), ("validation", 10, 2), ("test", 10, 3)):
        write_jsonl(tmp_path / f"{name}.jsonl", make_rows(count, seed))
    (tmp_path / "tiny.yaml").write_text(BASE.format(model=bert), "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(find.PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", STEPS % HEAVY], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["first step"] == []
    assert "sklearn" in seen["evaluation"]
    assert "matplotlib" not in seen["evaluation"]
    assert "matplotlib" in seen["end"]


def test_a_verb_without_a_model_answers_without_torch(tmp_path: Path) -> None:
    code = "import sys; from engine.__main__ import main\ntry: main(['--version'])\nexcept SystemExit: pass\n"
    code += "assert not [m for m in ('torch', 'pydantic', 'numpy', 'yaml') if m in sys.modules], sorted(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(find.PROJECT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)


NUMBERS = st.sampled_from([np.int32, np.int64, np.float32, np.float64, np.bool_]).flatmap(
    lambda kind: arrays.arrays(kind, st.integers(0, 40))
)


@settings(deadline=None)
@given(NUMBERS, st.integers(0, 45), st.integers(0, 45))
def test_arrow_arrays_are_what_pyarrow_itself_makes_of_numbers(numbers: np.ndarray, start: int, count: int) -> None:
    expected = pyarrow.array(numbers)
    assert encode._arrow(numbers).equals(expected) or np.isnan(numbers).any()
    for array in (expected, encode._arrow(numbers)):
        part = array.slice(start, count)
        found = encode._numbers(part)
        assert found.dtype == numbers.dtype
        np.testing.assert_array_equal(found, part.to_numpy(zero_copy_only=False))


def test_missing_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="missing"):
        encode._numbers(pyarrow.array([1, None]))
