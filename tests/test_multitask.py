"""Several tasks on one encoder: one alone is the run it always was, mixing keeps its ratios, each head lives alone, nothing leaks."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from cases import classification, question_answering, regression, token_classification
from conftest import FLOAT32, MakeRecipe, StopAt, make_rows, write_jsonl
from safetensors.torch import load_file

from engine import prepare, recipe, runs
from engine.__main__ import main
from engine.data.several import Joined, Mixed, apportion
from engine.errors import InputError
from engine.finetune import Result, finetune
from engine.recipe import Recipe

QUIET: dict[str, Any] = {"say": lambda line: None}
KINDS = """task: multitask
model: {{name: {model}}}
data: {{max_length: 40, mixing: temperature}}
tasks:
  mood: {{task: classification, data: {{train: mood.jsonl, validation: 0.2, test: mood.jsonl}}}}
  score:
    task: regression
    metrics: [spearman, mean_absolute_error]
    data: {{train: score.jsonl, validation: 0.2, test: score.jsonl, columns: {{text: text, text_pair: other, score: score}}}}
  names: {{task: token_classification, data: {{train: names.jsonl, validation: 0.2, test: names.jsonl}}}}
  answers: {{task: question_answering, data: {{train: answers.jsonl, validation: 0.2, test: answers.jsonl, answer_tokens: 6}}}}
  words: {{task: masked_lm, data: {{train: mood.jsonl, validation: 0.2, test: mood.jsonl}}, metrics: [accuracy]}}
train: {{epochs: 2, batch_size: 8, learning_rate: 1e-3, micro_batch_tokens: 200, device: cpu}}
evaluate: {{bootstrap: 10}}
early_stopping: {{monitor: mean}}
"""
CASES = {"mood": classification, "score": regression, "names": token_classification, "answers": question_answering}


@pytest.fixture
def kinds(tmp_path: Path, bert: Path) -> Any:
    """kinds("key=value", ...) -> a recipe of five tasks of five kinds, of unlike sizes, on the tiny model with dropout."""
    for number, (name, case) in enumerate(CASES.items()):
        write_jsonl(tmp_path / f"{name}.jsonl", case.rows(40 - 8 * number, number))  # type: ignore[attr-defined]
    path = tmp_path / "kinds.yaml"
    path.write_text(KINDS.format(model=bert), "utf-8")
    return lambda *overrides: recipe.load(str(path), list(overrides))


def run(made: Recipe, out: str, **more: Any) -> Result:
    return finetune(made, out, **QUIET, **more)


def weights(folder: str) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder, "model").rglob("*.safetensors"))}


@pytest.mark.parametrize("mixing", ["proportional", "temperature", "round_robin"])
def test_one_task_alone_is_the_run_that_it_always_was(recipe: MakeRecipe, mixing: str, tmp_path: Path) -> None:
    """The same weights, bit for bit, the same scores and predictions; only names differ."""
    alone = run(recipe(), "alone")
    given = Path("tiny.yaml").read_text().replace("task: classification", "task: multitask")
    given = given.replace("data:\n", f"data:\n  mixing: {mixing}\n")
    Path("one.yaml").write_text(given + "tasks: {only: {task: classification}}\n")
    from engine import recipe as recipes

    one = run(recipes.load("one.yaml"), "one")
    assert Path("one/model/only/model.safetensors").read_bytes() == Path("alone/model/model.safetensors").read_bytes()
    for split in ("validation", "test"):
        assert one.metrics[split]["mean"] == one.metrics[split]["only.accuracy"] == alone.metrics[split]["accuracy"]
        assert one.metrics[split]["loss"] == alone.metrics[split]["loss"]
        told = [
            [json.loads(line) for line in Path(f"{out}/predictions/{split}.jsonl").read_text().splitlines()]
            for out in ("alone", "one")
        ]
        assert [{**line, "task": "only"} for line in told[0]] == told[1]


def test_five_kinds_of_tasks_share_one_body_and_each_head_loads_alone(kinds: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Classification, regression, entities, answers, masked words: trained, scored, predicted; plain transformers gives the same logits."""
    assert main(["check", "kinds.yaml"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}: first window: loss" in said for name in (*CASES, "words"))
    assert "get no gradient" not in said
    done = run(kinds(), "r")
    ready = prepare.prepare(kinds(), **QUIET)
    body = ready.loaded.model.bert
    held = sum(p.numel() for p in ready.loaded.model.parameters())
    heads = sum(
        p.numel()
        for head in ready.loaded.model.heads.values()
        for p in head.parameters()
        if p is not body.embeddings.word_embeddings.weight
    )
    assert held == sum(p.numel() for p in body.parameters()) + heads  # the body once, masked words' output tied to it
    opened = runs.open_run("r")
    for name, part, head in opened.task.heads(opened.model):
        alone, info = getattr(transformers, part.auto_class).from_pretrained(f"r/model/{name}", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert (name in ("names", "answers", "words")) == (alone.eval().bert.pooler is None)
        split = ready.encoded["test"].parts[name]  # type: ignore[attr-defined]
        batch = {k: v for k, v in split.batch(np.arange(5)).items() if k in prepare.INPUTS}
        with torch.inference_mode():
            for key, logits in alone(**batch).items():
                assert torch.equal(logits, head(**batch)[key])
    means = {name: done.metrics["test"][f"{name}.{metric}"] for name, metric in
             (("mood", "accuracy"), ("score", "spearman"), ("names", "f1"), ("answers", "exact_match"), ("words", "accuracy"))}  # fmt: skip
    means["answers"] /= 100
    assert done.metrics["test"]["mean"] == pytest.approx(np.mean(list(means.values())))
    page = Path("r/report.html").read_text()
    assert all(f"{name}: " in page for name in (*CASES, "words"))
    assert "Each task" in page
    capsys.readouterr()
    assert main(["evaluate", "r"]) == 0
    assert "names.f1" in capsys.readouterr().out
    assert main(["evaluate", "r", "--json", "--data", "score=score.jsonl"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores["score.spearman"] == pytest.approx(done.metrics["test"]["score.spearman"])
    assert not any(name.startswith("mood.") for name in scores)
    assert main(["evaluate", "r", "--data", "score.jsonl"]) == 2
    assert "say whose file it is: --data mood=FILE" in capsys.readouterr().err
    assert main(["predict", "r", "--text", "the good film"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert {"mood", "words"} <= set(line)
    assert line["mood"]["label"] in ("bad", "fine", "great")
    write_jsonl(
        Path("mixed.jsonl"),
        [{"text": "a", "other": "b"}, {"task": "score", "text": "a", "other": "b"}, {"tokens": ["the", "film"]}],
    )
    assert main(["predict", "r", "--input", "mixed.jsonl"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(line) & {*CASES, "words"} for line in told] == [{"mood", "score", "names", "words"}, {"score"}, {"names"}]
    assert told[0]["score"] == told[1]["score"]
    write_jsonl(Path("mixed.jsonl"), [{"text": "a", "other": "b"}, {"task": "score", "text": "a"}])
    assert main(["predict", "r", "--input", "mixed.jsonl"]) == 2
    assert "mixed.jsonl:2: no task can read it" in capsys.readouterr().err


def test_resumed_at_any_step_equals_never_stopped(kinds: Any) -> None:
    """All heads, all scores, all predictions: whichever task's window was the last."""
    options = ["evaluate.every=4", "checkpoint.every=3", "train.max_steps=9"]
    run(kinds(*options), "whole")
    for stop in range(1, 9):
        out = f"stopped-{stop}"
        assert run(kinds(*options), out, interrupted=StopAt(out, stop)).progress.step == stop
        run(kinds(*options), out, resume=True)
        assert weights(out) == weights("whole"), f"stopped after step {stop}"
        for file in ("metrics.json", "predictions/test.jsonl"):
            assert Path(out, file).read_bytes() == Path("whole", file).read_bytes()


def test_a_step_moves_the_body_and_the_head_that_it_is_for(kinds: Any) -> None:
    """Decoupled decay and running averages leave the other heads alone; the gradient is the task's own, times its weight."""
    ready = prepare.prepare(kinds("tasks.score.weight=0.25", "train.weight_decay=0.1"), **QUIET)
    model, task = ready.loaded.model.eval(), ready.task
    found = {}
    for window, name in zip(ready.windows.unlike(), task.parts, strict=True):
        model.zero_grad()
        for batch in window.micro_batches:
            (task.loss(model, batch) / window.items).backward()
        assert {n.split(".")[1] for n, p in model.named_parameters() if p.grad is not None and n.startswith("heads.")} <= {name}
        assert any(p.grad is not None for p in model.bert.parameters())
        found[name] = torch.cat([p.grad.flatten() for p in model.heads[name].parameters() if p.grad is not None])
    plain = prepare.prepare(kinds(), **QUIET)
    window = plain.windows.unlike()[list(task.parts).index("score")]
    for batch in window.micro_batches:
        (plain.task.loss(plain.loaded.model.eval(), batch) / window.items).backward()
    whole = torch.cat([p.grad.flatten() for p in plain.loaded.model.heads["score"].parameters()])
    assert (found["score"] - whole / 4).norm() <= FLOAT32 * whole.norm()


def fake(sizes: dict[str, int]) -> Joined:
    """Data sets of these sizes whose examples are one token each."""
    from engine.data.encode import Encoded

    def one(n: int) -> Encoded:
        return Encoded({"input_ids": (np.arange(n), np.arange(n + 1))}, {"truncated": np.zeros(n, bool)}, {})

    return Joined({name: one(n) for name, n in sizes.items()}, list(sizes.values()))


@pytest.mark.parametrize(
    ("mixing", "shares"), [("proportional", [80, 20, 5, 1]), ("temperature", [57, 29, 14, 6]), ("round_robin", [27, 27, 26, 26])]
)
def test_mixing_keeps_its_ratios(mixing: str, shares: list[int]) -> None:
    """A window is of one data set; their numbers are those of the formula; each data set is gone through from end to end, again and again."""
    sizes = {"a": 800, "b": 195, "c": 50, "d": 3}
    made = Mixed(fake(sizes), len, mixing=mixing, temperature=2, batch_size=10, tokens=10**6, seed=3)
    assert made.per_epoch == sum(shares)
    seen: dict[int, list[int]] = {k: [] for k in range(4)}
    for epoch in range(4):
        plan, turns = made.plan(epoch), made.turns(epoch)
        assert [int((turns == k).sum()) for k in range(4)] == shares
        assert [list(rows) for rows in plan] == [list(rows) for rows in made.plan(epoch)]
        for rows, k in zip(plan, turns.tolist(), strict=True):
            of = {int(made.encoded.scalars["task"][i]) for i in rows}
            assert of == {k}
            seen[k] += rows.tolist()
        rest = [w.rows.tolist() for w in made.epoch(epoch, skip=7)]
        assert rest == [rows.tolist() for rows in plan[7:]]
    for k, (first, end) in enumerate(itertools.pairwise(made.first.tolist())):
        n = end - first
        passes = [seen[k][i : i + n] for i in range(0, len(seen[k]) - n + 1, n)]
        assert all(sorted(one) == list(range(first, end)) for one in passes)
        assert len(passes) < 2 or n < 4 or passes[0] != passes[1]
    if mixing == "proportional":
        assert Counter(Counter(itertools.chain(*seen.values())).values()) == {4: 1048}
    assert made.plan(0) is not made.plan(1)
    assert made.turns(0).tolist() != made.turns(1).tolist() or mixing == "round_robin"


def test_shares_are_whole_none_is_empty_and_they_sum_up() -> None:
    draw = np.random.default_rng(0)
    for _ in range(200):
        counts = draw.integers(1, 200, draw.integers(1, 9))
        for power in (0, 0.3, 1):
            shares = apportion(int(counts.sum()), counts.astype(float) ** power)
            exact = counts.sum() * counts.astype(float) ** power / (counts.astype(float) ** power).sum()
            assert shares.sum() == counts.sum()
            assert shares.min() >= 1
            assert power < 1 or (shares == counts).all()
            assert (np.abs(shares - exact) < 1).all() or exact.min() < 1


METHODS = [
    "{method: lora, r: 2}",
    "{method: prefix, length: 3}",
    "{method: adapter}",
    "{method: bitfit}",
    "{method: last_n, n: 1}",
]


@pytest.mark.parametrize("method", METHODS)
def test_a_tuning_method_is_for_the_body_and_all_heads_train(kinds: Any, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = run(kinds("train.max_steps=4", f"tune={method}", "evaluate.every=4"), "r")
    assert done.progress.step == 4
    capsys.readouterr()
    assert main(["evaluate", "r", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)["scores"]
    assert scores == pytest.approx(
        {k: v for k, v in done.metrics["test"].items() if k in scores}, rel=1e-3, abs=1e-3, nan_ok=True
    )
    if "lora" in method:
        assert main(["merge", "r"]) == 0
        merged = transformers.AutoModelForSequenceClassification.from_pretrained("r/merged/mood")
        kept = load_file("r/model/mood/model.safetensors")
        assert all(torch.allclose(t, kept[n], atol=1e-6) for n, t in merged.state_dict().items())


WRONG: dict[str, tuple[str, list[str]]] = {
    "no tasks": ("tasks={}", ["tasks: multitask needs some"]),
    "unknown kind": ("tasks.mood.task=clasification", ["tasks.mood.task: no task 'clasification'", "did you mean 'classification'?"]),
    "itself": ("tasks.mood.task=multitask", ["tasks.mood.task: no task 'multitask' that can be one of several"]),
    "unknown key": ("tasks.mood.wieght=2", ["tasks.mood.wieght: unknown key; did you mean 'weight'?"]),
    "unknown data key": ("tasks.mood.data.trian=x.jsonl", ["tasks.mood.data.trian: unknown key; did you mean 'train'?"]),
    "a key of another kind": ("tasks.mood.data.answer_tokens=3", ["tasks.mood.data.answer_tokens: unknown key"]),
    "weight": ("tasks.mood.weight=0", ["tasks.mood.weight: input should be greater than 0, not 0"]),
    "no train": ("tasks.extra={task: classification}", ["tasks.extra.data.train: this key is required and missing"]),
    "name": ("tasks={'a.b': {task: classification}}", ["'a.b' is no name of a task"]),
    "reserved name": ("tasks={mean: {task: classification}}", ["'mean' is no name of a task"]),
    "torch's name": ("tasks.train={task: classification, data: {train: mood.jsonl, validation: 0.2, test: mood.jsonl}}", ["tasks.train: torch's modules"]),
    "one without test": ("tasks.mood.data.test=null", ["tasks.mood.data.test: missing, and other tasks have one"]),
    "mixing": ("data.mixing=random", ["data.mixing"]),
    "shared data": ("data.max_length=1", ["data.max_length", "greater than or equal to 4"]),
    "metric of a task": ("tasks.mood.metrics=[acuracy]", ["tasks.mood.metrics: no metric 'acuracy'; did you mean 'accuracy'?"]),
    "metric": ("evaluate.metrics=[mean, mood.acuracy]", ["no metric 'acuracy'"]),
    "metric of no task": ("evaluate.metrics=[mean, modo.accuracy]", ["no metric 'modo.accuracy'; did you mean 'mood.accuracy'?"]),
    "less is better": ("tasks.score.metrics=[mean_absolute_error]", ["tasks.score.metrics: 'mean_absolute_error' comes first", "more must be better"]),
    "monitor": ("early_stopping.monitor=accuracy", ["early_stopping.monitor", "mood.accuracy"]),
    "file": ("tasks.score.data.train=gone.jsonl", ["tasks.score.data.train", "no file gone.jsonl"]),
    "column": ("tasks.score.data.columns.score=scroe", ["tasks.score.data.columns.score", "no column 'scroe'; did you mean 'score'?"]),
    "cache of one task": ("tasks.mood.data.cache=mine", ["tasks.mood.data.cache: one folder serves all tasks; set data.cache"]),
    "role": ("tasks.score.data.columns.tetx=text", ["tasks.score.data.columns.tetx: regression reads no 'tetx'"]),
    "cache": ("train.cache_frozen=float32", ["train.cache_frozen"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_by_key(kinds: Any, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    option, words = WRONG[case]
    assert main(["finetune", "kinds.yaml", option, "--out", "bad"]) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said, said
    assert "Traceback" not in said
    assert not Path("bad").exists()


def test_tasks_belong_to_multitask_and_keys_have_their_lines(kinds: Any, recipe: MakeRecipe) -> None:
    with pytest.raises(InputError, match="only `task: multitask` has tasks"):
        recipe("tasks={a: {task: classification}}")
    text = Path("kinds.yaml").read_text().replace("metrics: [spearman, mean_absolute_error]", "weight: much")
    Path("kinds.yaml").write_text(text)
    number = next(i for i, line in enumerate(text.splitlines(), 1) if "weight: much" in line)
    with pytest.raises(InputError, match=rf"kinds.yaml:{number}: tasks.score.weight: a number is needed, not 'much'"):
        kinds()


def test_what_all_have_in_common_is_said_once(recipe: MakeRecipe, bert: Path) -> None:
    """The recipe's `data` is the default of each task's; the resolved recipe reads back as the same one."""
    write_jsonl(Path("train.jsonl"), [{**row, "score": i % 7} for i, row in enumerate(make_rows(40))])
    Path("two.yaml").write_text(
        f"task: multitask\nmodel: {{name: {bert}}}\ndata: {{train: train.jsonl, max_length: 20}}\n"
        "tasks:\n  a: {task: classification}\n  b: {task: regression, data: {max_length: 12}}\ntrain: {max_steps: 2}\n"
    )
    from engine import recipe as recipes

    made = recipes.load("two.yaml")
    assert [one.data.train for one in made.tasks.values()] == [["train.jsonl"]] * 2
    assert [one.data.max_length for one in made.tasks.values()] == [20, 12]
    run(made, "r")
    assert recipes.load("r/recipe.yaml").resolved() == made.resolved()
    assert main(["finetune", "two.yaml", "data.cache=elsewhere", "--out", "r", "--resume"]) == 0  # told again: it changes nothing
    assert main(["finetune", "two.yaml", "tasks.b.weight=2", "--out", "r", "--resume"]) == 2


def test_a_layer_that_reads_the_mask_finds_it_under_every_head(kinds: Any) -> None:
    """A layer in the shared body is handed the attention mask whichever head calls, so padding changes nothing."""
    Path("seen.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Mean(nn.Module):\n"
        '    """The pooler: the mean over the real tokens."""\n\n    READS = "attention_mask"\n\n'
        "    def __init__(self, old):\n        super().__init__()\n        self.dense = old.dense\n\n"
        "    @classmethod\n    def from_old(cls, old):\n        return cls(old)\n\n"
        "    def forward(self, hidden):\n        mask = self.attention_mask[:, :, None].to(hidden.dtype)\n"
        "        return torch.tanh(self.dense((hidden * mask).sum(1) / mask.sum(1)))\n"
    )
    ready = prepare.prepare(kinds("swap=[{at: '**.pooler', with: 'seen.py:Mean'}]"), **QUIET)
    task, model, encoded = ready.task, ready.loaded.model.eval(), ready.encoded["train"]
    for name in ("mood", "score"):
        part = encoded.parts[name]  # type: ignore[attr-defined]
        short, long = int(part.lengths.argmin()), int(part.lengths.argmax())
        with torch.inference_mode():
            both = task.parts[name].output(model.heads[name], part.batch(np.array([short, long])))
            alone = task.parts[name].output(model.heads[name], part.batch(np.array([short])))
        assert torch.allclose(both[0], alone[0], atol=1e-5)


def test_from_scratch_all_heads_share_one_new_body_and_tokenizer(kinds: Any) -> None:
    text = Path("kinds.yaml").read_text()
    line = next(line for line in text.splitlines() if line.startswith("model:"))
    new = (
        "model: {from_scratch: {architecture: bert, layers: 1, hidden: 16, heads: 2, max_positions: 64},"
        " tokenizer: {train: {kind: wordpiece, vocabulary: 300}}}"
    )
    Path("kinds.yaml").write_text(text.replace(line, new))
    run(kinds("train.max_steps=6"), "r")
    run(kinds("train.max_steps=6"), "again")
    assert weights("r") == weights("again")
    bodies = [load_file(f"r/model/{name}/model.safetensors") for name in (*CASES, "words")]
    assert all(
        torch.equal(one["bert.encoder.layer.0.output.dense.weight"], bodies[0]["bert.encoder.layer.0.output.dense.weight"])
        for one in bodies
    )
    assert main(["predict", "r", "--text", "the film was good", "--output", "out.jsonl"]) == 0


def test_the_recipe_of_the_project_trains_two_steps(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """recipes/multitask.yaml on the tiny model, from its own files: trained, scored, predicted, reported."""
    from engine import find
    from engine import recipe as recipes

    made = recipes.load("multitask", [f"model.name={bert}", "tune.n=1", "train.max_steps=2", "data.max_length=40"])
    done = run(made, "r")
    assert set(done.metrics["test"]) >= {"mean", "sentiment.accuracy", "topics.accuracy", "similarity.spearman"}
    assert main(["predict", "r", "--text", "the film was good", "--output", "out.jsonl"]) == 0
    line = json.loads(Path("out.jsonl").read_text())
    assert set(line) == {"text", "sentiment", "topics"}
    assert Path("r/report.html").exists()
    assert (find.PROJECT / "recipes/multitask.yaml").read_text().startswith("# ")
