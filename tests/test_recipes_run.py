"""Every recipe of recipes/ runs from end to end: check, two steps of training, evaluate, predict, report. None is missed.

The recipes are run as they stand, their own files and the embedded model, or their `offline:` block where they have one.
Cut is what takes time: training, to two steps; validation and test, to their first rows; the bootstrap's resamples.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from engine import find, recipe, runs
from engine.__main__ import main
from engine.watch import read_log

RECIPES = sorted((find.PROJECT / "recipes").glob("*.yaml"))
NAMES = [path.stem for path in RECIPES]
SPLITS = ("validation", "test")
ROWS = 40  # of validation and of test


def first_rows(source: str, folder: Path) -> Path:
    """A copy of a file of the project that ends early: JSON lines, CoNLL sentences, or SQuAD articles."""
    path = find.PROJECT / source
    copy, text = folder / f"{path.parent.name}-{path.name}", path.read_text("utf-8")
    if path.suffix == ".json":
        whole = json.loads(text)
        copy.write_text(json.dumps({**whole, "data": whole["data"][: ROWS // 5]}), "utf-8")
    else:
        between = {".conll": "\n\n", ".jsonl": "\n"}[path.suffix]
        copy.write_text(between.join(text.split(between)[:ROWS]) + "\n", "utf-8")
    return copy


def held_out(group: dict[str, Any], path: str = "") -> list[tuple[str, str]]:
    """(key, file) of every validation and test file that a resolved recipe names, in its own data or in that of its tasks."""
    found = []
    for key, value in group.items():
        if isinstance(value, dict) and key != "offline":
            found += held_out(value, f"{path}{key}.")
        elif key in SPLITS and isinstance(value, list) and path.endswith("data."):
            found += [(f"{path}{key}", one) for one in value]
    return found


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of tokenised data for all."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.usefixtures("draws")
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_evaluates_predicts_and_reports(
    name: str, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = recipe.load(name)
    offline = ["--offline"] if given.offline else []
    made = recipe.load(name, offline=bool(offline))
    monkeypatch.chdir(find.PROJECT)  # where a recipe's header is typed
    run = cache / name
    short = ["train.max_steps=2", "evaluate.bootstrap=20", f"data.cache={cache}/data"]
    for key, source in held_out(made.resolved()):
        short.append(f"{key}={first_rows(source, cache)}")

    assert main(["check", name, *short, *offline]) == 0
    assert "steps" in capsys.readouterr().out
    assert main(["finetune", name, *short, *offline, "--out", str(run)]) == 0, capsys.readouterr().err
    results = json.loads((run / "metrics.json").read_text("utf-8"))
    assert results["steps"] == 2
    said = capsys.readouterr().out

    # every split's headline scores are there, with their intervals, in the file, on the screen and on the page
    page = (run / "report.html").read_text("utf-8")
    headline = next(record["metrics"] for record in read_log(run / "log.jsonl") if record["event"] == "plan")
    assert headline == (made.evaluate.metrics or headline)
    for split in SPLITS:
        for metric in headline:
            low, high = results["intervals"][split][metric]
            assert low <= high, (split, metric)
            assert f"{metric} {results[split][metric]:.4f}" in said
        lines = [json.loads(line) for line in (run / f"predictions/{split}.jsonl").read_text("utf-8").splitlines()]
        assert all("prediction" in line and "loss" in line for line in lines)
    assert f"{results['test'][headline[0]]:.3f}" in page
    assert "recipe.yaml" in page
    assert (run / "plots/loss.png").stat().st_size > 1000

    # what a run says of itself, `evaluate` says of it again, from the saved model
    assert main(["evaluate", str(run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["rows"] == len(lines)
    for metric in headline:
        assert again["scores"][metric] == pytest.approx(results["test"][metric], abs=2e-3, rel=2e-3), metric

    # and predictions come back for rows without their truth, the same that the run made
    task = runs.open_run(str(run)).task
    given_rows = [{column: line[column] for column in inputs_of(task, line) if column in line} for line in lines[:5]]
    write_jsonl(cache / f"{name}.jsonl", given_rows)
    assert main(["predict", str(run), "--input", str(cache / f"{name}.jsonl")]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(answers) == 5
    for answer, line in zip(answers, lines, strict=False):
        if made.task == "multitask":  # each task's answer stands under its name
            told = answer[line["task"]][task.parts[line["task"]].answer]
        else:
            told = answer[task.answer]
        if isinstance(line["prediction"], float):
            assert told == pytest.approx(line["prediction"], abs=1e-4)
        elif made.task != "masked_lm":  # whose rows have no mask of their own
            assert told == line["prediction"]


def inputs_of(task: Any, line: dict[str, Any]) -> list[str]:
    """The columns that a line's prediction was made from; of several tasks those of its own, and its name."""
    if "task" in line and hasattr(task, "parts"):
        return [*inputs_of(task.parts[line["task"]], {k: v for k, v in line.items() if k != "task"}), "task"]
    return list(task.inputs(set(line)).values())


def test_none_is_missed() -> None:
    """The list above is that of the engine's own `recipes`, and of every task that has a file one recipe at least is run."""
    assert set(NAMES) == set(recipe.available()) == {path.stem for path in find.PROJECT.rglob("recipes/*.y*ml")}
    assert {recipe.load(name).task for name in NAMES} == set(find.names("tasks"))


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_header_says_how_to_launch_what_to_expect_and_what_is_next(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    header = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    text = "\n".join(header)
    assert len(header[0]) > 20
    assert f"make finetune RECIPE={path.stem}" in text
    assert "make predict RUN=runs/" in text
    for field in ("Data ", "Score", "Time ", "Yours", "Real ", "Model"):
        assert sum(line.startswith(f"# {field}  ") for line in header) == 1, field
    assert not re.search(r"SCORE|TODO|XXX", path.read_text("utf-8"))
    assert re.search(r"^# Score +.*\d", text, re.MULTILINE), "a score is a number"
    assert re.search(r"^# Time +.*(second|minute|hour)", text, re.MULTILINE)
    # every override that a header offers is a valid one
    for line in header:
        if line[:7] in ("# Yours", "# Real ", "# Model") or line.startswith("#        "):
            offered = re.findall(r"(?:^|\s)([a-z_]+(?:\.[a-z_]+)+=\S+)", line)
            recipe.load(path.stem, [one.rstrip(".,;") for one in offered])


def test_a_header_offers_only_files_that_its_task_reads() -> None:
    for path in RECIPES:
        for given in re.findall(r"recipes/data/\w+/\S+\.(?:md|jsonl|json|conll)", path.read_text("utf-8")):
            assert (find.PROJECT / given).is_file(), f"{path.name}: {given}"
