"""A method that adds layers works for every task: trained, stopped, resumed, opened, scored, asked, merged, several at once."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import StopAt
from test_tasks import Make, bodies, case, make  # noqa: F401 (bodies and make are fixtures)

from engine import find, recipe
from engine.__main__ import main
from engine.finetune import finetune

METHODS = {"lora": "{method: lora, r: 2}", "adapter": "{method: adapter, reduction: 4}", "prefix": "{method: prefix, length: 3}"}
QUIET = {"say": lambda line: None}


def near(a: Any, b: Any) -> bool:
    """Equal, but for the rounding of numbers: merged weights against an adapter beside its base."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(near(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(near, a, b))
    return bool(pytest.approx(a, rel=1e-3, abs=1e-4) == b) if isinstance(a, float) else a == b


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", find.names("tasks"))
def test_a_method_on_a_task(make: Make, task: str, method: str, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    given = make(task, f"tune={METHODS[method]}", "checkpoint.every=1", "seed=14", body="bert")
    whole = finetune(given, "whole", **QUIET)
    assert finetune(given, "r", interrupted=StopAt("r", 1), **QUIET).code == 130
    resumed = finetune(recipe.load("r/recipe.yaml"), "r", resume=True, **QUIET)
    assert resumed.metrics == whole.metrics
    capsys.readouterr()
    assert main(["evaluate", "r", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["scores"] == pytest.approx(resumed.metrics["test"], rel=1e-3, abs=1e-3, nan_ok=True)
    file = f"test{getattr(case(task), 'ENDING', '.jsonl')}"
    assert main(["predict", "r", "--input", file, "--output", "alone.jsonl"]) == 0
    assert main(["predict", "r", "--also", "whole", "--input", file, "--output", "several.jsonl"]) == 0
    alone, several = ([json.loads(line) for line in Path(f"{n}.jsonl").read_text().splitlines()] for n in ("alone", "several"))
    assert [line.pop("run") for line in several] == ["r", "whole"] * len(alone)
    assert near(several[::2], alone)
    merged = main(["merge", "r"])
    said = capsys.readouterr()
    assert merged == (0 if method == "lora" else 2), said.err
    assert ("it computes the same" in said.out) if method == "lora" else "do not fold into plain weights" in said.err
