"""Laws of tasks, inherited by every file in engine/tasks/: exact accumulation, padding, full marks for the truth, metrics as
scikit-learn has them, the same outputs after save and load, two steps of everything, bad rows named by file:line.

tests/cases/NAME.py holds the small data set of a task; a task without one fails.
"""

import importlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import FLOAT32, make_bert, make_decoder, write_jsonl
from sklearn import metrics as sk

from engine import bases, evaluate, find, optim, prepare, recipe, runs
from engine.__main__ import main
from engine.finetune import finetune

TASKS = find.names("tasks")
ON_BODIES = [
    (name, body) for name in TASKS for body in getattr(importlib.import_module(f"cases.{name}"), "BODIES", ("bert",))
]  # a task without a file in tests/cases fails here
BASE = """task: {task}
model: {{name: {model}}}
data: {{train: train{ending}, validation: validation{ending}, test: test{ending}, max_length: 40}}
train: {{epochs: 1, max_steps: 2, batch_size: 8, learning_rate: 1e-3, packing: false, device: cpu}}
evaluate: {{bootstrap: 20}}
"""
Make = Callable[..., recipe.Recipe]


def case(name: str) -> Any:
    return importlib.import_module(f"cases.{name}")


@pytest.fixture(scope="session")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models without dropout, by name."""
    folder = tmp_path_factory.mktemp("bodies")
    made = {"bert": make_bert(folder / "bert", dropout=0.0, hidden=16)}
    return made | {kind: make_decoder(folder / kind, kind) for kind in ("gpt2", "llama")}


@pytest.fixture
def make(bodies: dict[str, Path], tmp_path: Path) -> Make:
    """make(task, "key=value", ..., body="bert") -> a recipe on the task's small data set, in the working folder."""

    def made(name: str, *overrides: str, body: str | None = None, counts: tuple[int, int, int] = (20, 16, 16)) -> recipe.Recipe:
        one = case(name)
        body = body or getattr(one, "BODIES", ("bert",))[0]
        ending = getattr(one, "ENDING", ".jsonl")
        for seed, (split, count) in enumerate(zip(("train", "validation", "test"), counts, strict=True)):
            getattr(one, "write", write_jsonl)(tmp_path / f"{split}{ending}", one.rows(count, seed))
        path = tmp_path / f"{name}.yaml"
        path.write_text(BASE.format(task=name, model=bodies[body], ending=ending), "utf-8")
        return recipe.load(str(path), [*one.RECIPE, *overrides])

    return made


def prepared(given: recipe.Recipe) -> prepare.Prepared:
    return prepare.prepare(given, say=lambda line: None)


def outputs_of(ready: prepare.Prepared, split: str) -> Any:
    device = torch.device("cpu")
    how: dict[str, Any] = {"tokens": 4096, "device": device, "autocast": optim.autocast("float32", device)}
    return evaluate.outputs(ready.loaded.model, ready.task, ready.encoded[split], **how)


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_every_task_has_a_small_data_set() -> None:
    held = {path.stem for path in Path(__file__).with_name("cases").glob("*.py")} - {"__init__"}
    assert held == set(TASKS)
    assert len(TASKS) >= 3


@pytest.mark.parametrize(("name", "body"), ON_BODIES)
def test_accumulation_is_one_big_batch(make: Make, name: str, body: str) -> None:
    """Micro-batches of any size, of one, and a short last window: the gradient of one big batch by plain autograd."""
    ready = prepared(make(name, "train.batch_size=11", body=body))
    task, model, encoded = ready.task, ready.loaded.model.eval(), ready.encoded["train"]
    windows = list(ready.windows.epoch(0))
    assert len(windows[-1].rows) < len(windows[0].rows)
    for window in (windows[0], windows[-1]):
        whole = encoded.batch(window.rows, (ready.windows.seed, 0))
        (task.loss(model, whole) / task.items(whole)).backward()
        expected = gradient(model)
        assert expected.abs().max() > 0
        for tokens in (1, 60, 100_000):  # each row alone; a few; all at once
            model.zero_grad()
            ready.windows.tokens = tokens
            cut = ready.windows.window(window.rows)
            assert tokens > 1 or len(cut.micro_batches) == len(window.rows)
            assert cut.items == task.items(whole)
            for batch in cut.micro_batches:
                (task.loss(model, batch) / cut.items).backward()
            assert (gradient(model) - expected).norm() / expected.norm() < FLOAT32
        model.zero_grad()


@pytest.mark.parametrize(("name", "body"), ON_BODIES)
def test_padding_changes_nothing(make: Make, name: str, body: str) -> None:
    """The loss of examples padded together is the sum of their losses alone, and so are the outputs."""
    ready = prepared(make(name, body=body))
    task, model, encoded = ready.task, ready.loaded.model.eval(), ready.encoded["train"]
    first = getattr(encoded, "first", [0, len(encoded)])  # of several data sets each by itself
    for index in (np.arange(a, b) for a, b in itertools.pairwise(first)):
        with torch.inference_mode():
            together = task.loss(model, encoded.batch(index))
            alone = sum(task.loss(model, encoded.batch(index[i : i + 1])) for i in range(len(index)))
            out = task.output(model, encoded.batch(index))
            assert float(together) == pytest.approx(float(alone), rel=1e-5)
            for i in range(len(index)):
                one = task.output(model, encoded.batch(index[i : i + 1]))[0]
                padded = out[i, : len(one)] if task.per_token else out[i]
                assert padded.numpy() == pytest.approx(one.numpy(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_the_truth_scores_full_marks(make: Make, name: str) -> None:
    one, ready = case(name), prepared(make(name))
    task, encoded, rows = ready.task, ready.encoded["test"], ready.splits["test"].table.rows
    made = one.perfect(task, encoded, rows)
    scored = evaluate.score(task, made, encoded, rows, list(one.FULL))
    assert scored.scores == pytest.approx({**one.FULL, "loss": scored.scores["loss"]}, abs=1e-9)
    assert len(scored.judged.losses) == len(rows)
    lines = evaluate.lines(task, scored, encoded, rows)
    assert not any(task.wrong(line) for line in lines)
    assert task.mistakes(lines) is None or None in {task.wrong(line) for line in lines}


@pytest.mark.parametrize("name", TASKS)
def test_metrics_are_those_of_the_reference(make: Make, name: str) -> None:
    """On random outputs, from the lines of predictions/ alone; a bootstrap's draw is scored as the rows that it holds."""
    one, ready = case(name), prepared(make(name))
    task, encoded, rows = ready.task, ready.encoded["test"], ready.splits["test"].table.rows
    draw = np.random.default_rng(0)
    made = outputs_of(ready, "test")

    def noisy(part: np.ndarray) -> np.ndarray:
        return np.float32(part + 2 * draw.normal(size=part.shape))

    made = [noisy(part) for part in made] if isinstance(made, list) else noisy(made)
    judged = task.judge(made, encoded, rows)
    scored = evaluate.score(task, made, encoded, rows, [])
    lines = json.loads(json.dumps(evaluate.lines(task, scored, encoded, rows)))
    expected = one.reference(rows, lines)
    assert task.compute(list(expected), judged) == pytest.approx(expected, abs=1e-9)
    index = draw.integers(0, len(rows), len(rows))
    expected = one.reference([rows[i] for i in index], [lines[i] for i in index])
    assert task.compute(list(expected), judged, index) == pytest.approx(expected, abs=1e-9, nan_ok=True)
    assert np.isfinite(judged.losses).all()
    if not task.parts:  # else it is the mean over the tasks
        assert scored.scores["loss"] == pytest.approx(judged.losses.sum() / judged.items.sum())


@pytest.mark.parametrize(("name", "body"), ON_BODIES)
def test_a_run_of_two_steps_does_all_that_was_promised(
    make: Make, name: str, body: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """finetune, evaluate, predict, check; the model read back gives the predictions that were written."""
    given = make(name, body=body)
    assert main(["check", str(given.path), *case(name).RECIPE]) == 0
    finetune(given, "r", say=lambda line: None)
    rows = prepared(given).splits["test"].table.rows
    lines = [json.loads(line) for line in Path("r/predictions/test.jsonl").read_text("utf-8").splitlines()]
    results = json.loads(Path("r/metrics.json").read_text("utf-8"))
    page = Path("r/report.html").read_text("utf-8")
    assert len(lines) == len(rows)
    assert {"label", "prediction", "loss"} <= set(lines[0])
    names = given.evaluate.metrics or prepared(given).task.default_metrics
    assert set(names) <= set(results["test"])
    assert set(results["intervals"]["test"]) <= set(names)
    assert "How good it is" in page

    run = runs.open_run("r")
    for _, task, model in run.task.heads(run.model):
        assert type(model).__name__.endswith(task.auto_class.removeprefix("AutoModel"))
    capsys.readouterr()
    assert main(["evaluate", "r", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["scores"] == pytest.approx(results["test"], rel=1e-3, abs=1e-3, nan_ok=True)
    ending = getattr(case(name), "ENDING", ".jsonl")
    assert main(["predict", "r", "--input", f"test{ending}", "--output", "out.jsonl"]) == 0
    told = [json.loads(line) for line in Path("out.jsonl").read_text("utf-8").splitlines()]
    answers = case(name).answers(told) if run.task.parts else [one[run.task.answer] for one in told]
    for one, line in zip(answers, lines, strict=True):
        assert one == (
            pytest.approx(line["prediction"], rel=1e-4) if isinstance(line["prediction"], float) else line["prediction"]
        )


@pytest.mark.parametrize("name", TASKS)
def test_bad_rows_are_named_by_file_and_line(make: Make, name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    one = case(name)
    given = make(name)
    ending = getattr(one, "ENDING", ".jsonl")
    for what, (row, words) in one.BAD.items():
        good = one.rows(6, 1)
        getattr(one, "write", write_jsonl)(tmp_path / f"validation{ending}", [*good[:3], row, *good[3:]])
        assert main(["finetune", str(given.path), *one.RECIPE, "--out", "bad"]) == 2, what
        said = capsys.readouterr().err
        assert f"validation{ending}:4: " in said or getattr(one, "PLACES", {}).get(what, "\0") in said, (what, said)
        for word in words:
            assert word in said, (what, said)
        assert not Path("bad").exists()
    with pytest.raises(Exception, match="no metric"):
        prepared(make(name, "evaluate.metrics=[nonsense]"))


def test_regression_folds_its_scale_into_the_head(make: Make) -> None:
    """The saved model gives values in the targets' own unit to plain transformers, through an adapter's head too."""
    for out, method in (("full", "{method: full}"), ("lora", "{method: lora, r: 2}")):
        finetune(make("regression", f"tune={method}"), out, say=lambda line: None)
        lines = [json.loads(line) for line in Path(out, "predictions/test.jsonl").read_text("utf-8").splitlines()]
        model = transformers.AutoModelForSequenceClassification.from_pretrained(Path(out, "model")).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(Path(out, "model"))
        batch = tokenizer([line["text"] for line in lines], [line["other"] for line in lines], padding=True, return_tensors="pt")
        with torch.inference_mode():
            found = model(**batch).logits[:, 0]
        assert found.tolist() == pytest.approx([line["value"] for line in lines], rel=1e-5)
        state = json.loads(Path(out, "model/config.json").read_text())["task_state"]
        assert state["folded"] is True
        assert 250 < state["mean"] < 290
    unmerged, _ = bases.open_unmerged("lora")
    with torch.inference_mode():
        found = unmerged.model.eval()(**batch).logits[:, 0]
    assert found.tolist() == pytest.approx([line["value"] for line in lines], rel=1e-5)


def test_regression_keeps_the_scale_of_a_head_without_a_bias(make: Make) -> None:
    """GPT-2's head cannot take the mean in: the config says so, and predictions are in the targets' unit all the same."""
    finetune(make("regression", body="gpt2"), "r", say=lambda line: None)
    assert json.loads(Path("r/model/config.json").read_text())["task_state"]["folded"] is False
    assert main(["predict", "r", "--input", "test.jsonl", "--output", "out.jsonl"]) == 0
    told = [json.loads(line)["value"] for line in Path("out.jsonl").read_text().splitlines()]
    lines = [json.loads(line) for line in Path("r/predictions/test.jsonl").read_text().splitlines()]
    assert told == pytest.approx([line["value"] for line in lines], rel=1e-5)
    assert 200 < np.mean(told) < 340


def test_the_threshold_is_the_best_of_validation_and_stays_with_the_model(make: Make) -> None:
    finetune(make("multilabel", "train.max_steps=8"), "r", say=lambda line: None)
    results = json.loads(Path("r/metrics.json").read_text())
    lines = [json.loads(line) for line in Path("r/predictions/validation.jsonl").read_text().splitlines()]
    y = np.array([[mood in line["label"] for mood in ("fear", "joy", "shame")] for line in lines])
    q = np.array([list(line["probabilities"].values()) for line in lines])
    values = np.unique(q)
    best = max(sk.f1_score(y, q >= t, average="micro") for t in [0.5, *((values[1:] + values[:-1]) / 2)])
    assert results["validation"]["f1_micro"] == pytest.approx(best, abs=1e-9)  # 48 probabilities: every threshold is tried
    threshold = results["task"]["threshold"]
    assert json.loads(Path("r/model/config.json").read_text())["task_state"] == {"threshold": threshold}
    assert runs.open_run("r").task.threshold == threshold
    last = [r for line in Path("r/log.jsonl").read_text().splitlines() if (r := json.loads(line))["event"] == "evaluation"][-1]
    assert last["f1_micro"] == results["validation"]["f1_micro"]


def test_a_column_for_each_label(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = make("multilabel")
    moods = list(case("multilabel").MOODS)
    for split in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": r["text"], **{m: int(m in r["labels"]) for m in moods}} for r in rows])
    columns = "data.columns={text: text, labels: [fear, joy, shame]}"
    done = finetune(recipe.load(str(given.path), [columns]), "r", say=lambda line: None)
    line = json.loads(Path("r/predictions/test.jsonl").read_text().splitlines()[3])
    assert line["label"] == ["fear", "joy"]
    assert (line["fear"], line["joy"], line["shame"]) == (1, 1, 0)
    assert done.metrics["test"]["f1_micro"] >= 0
    assert main(["predict", "r", "--text", "the film"]) == 0
    write_jsonl(tmp_path / "validation.jsonl", [{"text": "the film", "fear": 1, "joy": 2, "shame": 0}])
    capsys.readouterr()
    assert main(["finetune", str(given.path), columns, "--out", "bad"]) == 2
    assert "validation.jsonl:1: column 'joy' holds 2, not 0 or 1" in capsys.readouterr().err
    assert main(["finetune", str(given.path), "data.columns.text=[a, b]", "--out", "bad"]) == 2
    assert "data.columns.text: one column is needed, not a list" in capsys.readouterr().err
