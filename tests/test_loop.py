"""The loop's laws: accumulated = one batch, resumed = never stopped, best = best, watching changes nothing."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import FLOAT32, MakeRecipe, StopAt, make_rows, write_jsonl
from safetensors.torch import load_file

from engine import checkpoint, evaluate, finetune, freeze, optim, prepare
from engine.errors import RunError
from engine.progress import Progress, Settings, due, judge
from engine.train import train

QUIET = {"say": lambda line: None}


def run(made: Any, out: str, **more: Any) -> finetune.Result:
    return finetune.finetune(made, out, **QUIET, **more)


def model_bytes(folder: str) -> bytes:
    return (Path(folder) / "model" / "model.safetensors").read_bytes()


def one_window_gradients(made: Any, tokens: int, epoch: int = 0) -> list[list[torch.Tensor]]:
    """The gradient of each window of an epoch as the loop computes it, at fixed weights."""
    ready = prepare.prepare(made, **QUIET)
    ready.windows.tokens = tokens
    model, seen = ready.loaded.model, []
    optimizer = torch.optim.SGD(freeze.groups(model, 0.0, 0.0), lr=0.0)
    step = optimizer.step

    def watch(*args: Any, **kwargs: Any) -> Any:
        seen.append([p.grad.clone() for p in model.parameters()])
        return step(*args, **kwargs)

    optimizer.step = watch  # type: ignore[method-assign]
    settings = Settings(steps=ready.windows.per_epoch, seed=1, clip=None, max_skipped=0, evaluate_every=None, save_every=10**9)
    train(
        model, ready.task, ready.windows, optimizer, torch.amp.GradScaler("cpu", enabled=False), lambda step: 1.0,
        lambda step: list(model.parameters()), settings, Progress(epoch=epoch),
        device=torch.device("cpu"), autocast=optim.autocast("float32", torch.device("cpu")), evaluate=dict, save=lambda k: None,
        write=lambda r: None, interrupted=lambda: False,
    )  # fmt: skip
    return seen


def relative(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Relative L2 distance of two gradients."""
    x, y = (torch.cat([t.flatten().double() for t in g]) for g in (a, b))
    return float((x - y).norm() / y.norm())


def test_accumulated_gradients_equal_one_batch_and_plain_autograd(recipe: MakeRecipe, still_bert: Path) -> None:
    rows = [row for i, row in enumerate(make_rows(150, 1)) if row["label"] == "positive" or i % 4 == 0][:90]
    write_jsonl(Path("train.jsonl"), rows)  # two to one: level labels nearly cancel at random weights, and no ratio is left
    made = recipe("train.batch_size=32", model=still_bert)  # 90 rows: windows of 32, 32 and 26
    whole = one_window_gradients(made, tokens=10**6)
    for tokens in (1, 40, 100, 300):  # micro-batches of one row, and uneven ones
        for pieces, at_once in zip(one_window_gradients(made, tokens), whole, strict=True):
            assert relative(pieces, at_once) <= FLOAT32
    ready = prepare.prepare(made, **QUIET)
    ready.windows.tokens = 100
    assert {len(w.micro_batches) > 4 for w in ready.windows.epoch(0)} == {True}
    model, sizes = ready.loaded.model.train(), []
    for number, rows in enumerate(np.split(ready.windows.order(0), [32, 64])):
        batch = ready.encoded["train"].batch(rows)
        model.zero_grad()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        F.cross_entropy(logits, batch["labels"]).backward()  # the mean over the window, by plain autograd
        assert relative(whole[number], [p.grad for p in model.parameters()]) <= FLOAT32
        sizes.append(len(rows))
    assert sizes == [32, 32, 26]


def test_a_mean_of_means_would_have_failed(recipe: MakeRecipe, still_bert: Path) -> None:
    """The law above has teeth: the usual accumulation is off by far more than the tolerance."""
    ready = prepare.prepare(recipe("train.batch_size=32", model=still_bert), **QUIET)
    model = ready.loaded.model
    ready.windows.tokens = 100
    window = ready.windows.window(ready.windows.order(0)[:32])
    grads = []
    for mean_of_means in (False, True):
        model.zero_grad()
        for batch in window.micro_batches:
            share = len(batch["labels"]) * len(window.micro_batches) if mean_of_means else window.items
            (ready.task.loss(model, batch) / share).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert relative(grads[1], grads[0]) > 1000 * FLOAT32


def test_the_same_seed_gives_the_same_bits(recipe: MakeRecipe) -> None:
    run(recipe(), "a")
    run(recipe(), "b")
    run(recipe("seed=14"), "c")
    assert model_bytes("a") == model_bytes("b") != model_bytes("c")
    assert Path("a/metrics.json").read_bytes() == Path("b/metrics.json").read_bytes()
    assert Path("a/predictions/test.jsonl").read_bytes() == Path("b/predictions/test.jsonl").read_bytes()


def test_watching_changes_nothing(recipe: MakeRecipe) -> None:
    """Evaluating after every step leaves weights as if it had not been done: modes and random states are untouched."""
    run(recipe("evaluate.every=1"), "often")
    run(recipe("data.validation=null"), "never")
    assert model_bytes("often") == model_bytes("never")


def log_of(folder: str) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("time", "seconds")} for r in records]


MIXED = ["train.micro_batch_tokens=60", "train.precision=bfloat16"]  # two and more micro-batches in a window
VARIANTS = {
    "full": MIXED,
    "lora": ["tune.method=lora", "tune.r=2", "tune.dropout=0.1", *MIXED],
    "gradual unfreezing": ["tune.unfreeze=0.3", "tune.rates={'**.LayerNorm.*': 0.5}", *MIXED],
    "float32": [],
    "pissa": ["tune.method=lora", "tune.r=2", "tune.init=pissa"],
    "qlora": ["tune={method: lora, r: 2, quantize: nf4}"],
}
RESUMED = ["evaluate.every=3", "checkpoint.every=4", "early_stopping={monitor: accuracy}", "train.schedule=cosine"]


def stopped_and_resumed_equals_whole(recipe: MakeRecipe, options: list[str], stops: list[int], out: str = "stopped") -> None:
    """The law of resuming: one run, stopped after each of these steps in turn, ends as the one in whole/ that was not."""
    for attempt, stop in enumerate(stops):
        result = run(recipe(*options), out, resume=attempt > 0, interrupted=StopAt(out, stop))
        assert (result.progress.step, result.progress.stopped, result.code) == (stop, "interrupted", 130)
        assert result.progress.unjudged == (stop % 3 == 0)  # the signal came during the evaluation
    last = run(recipe(*options), out, resume=True).progress.step
    for file in ("weights.safetensors", "optimizer.safetensors"):  # of the last step; model/ holds the best
        mine, other = (Path(folder, "checkpoints", f"step-{last:08d}", file).read_bytes() for folder in (out, "whole"))
        assert mine == other, f"stopped after step {stops}: {file}"
    assert model_bytes(out) == model_bytes("whole"), f"stopped after step {stops}"
    assert Path(out, "metrics.json").read_bytes() == Path("whole/metrics.json").read_bytes()
    assert log_of(out) == log_of("whole")


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_at_any_step_equals_never_stopped(recipe: MakeRecipe, variant: str) -> None:
    """With dropout, a decaying schedule, evaluation every 3 steps and the best restored: weights, metrics, log.

    Stopped after every step in turn, each resume does one step: whatever one of them forgot is missing in the end. And once from
    the middle to the end.
    """
    options = [*RESUMED, *VARIANTS[variant]]
    whole = run(recipe(*options), "whole")
    steps = json.loads(Path("whole/metrics.json").read_text())["steps"]
    assert steps == whole.progress.step == 12
    stopped_and_resumed_equals_whole(recipe, options, list(range(1, steps + 1)), "often")
    stopped_and_resumed_equals_whole(recipe, options, [7], "once")


def test_the_resumed_runs_do_accumulate_and_unfreeze(recipe: MakeRecipe) -> None:
    """What the variants are named for does happen in them."""
    ready = prepare.prepare(recipe(*RESUMED, *VARIANTS["gradual unfreezing"]), **QUIET)
    assert all(len(window.micro_batches) > 1 for window in ready.windows.epoch(0))
    assert ready.precision == "bfloat16"
    opened = [len(freeze.thaw(ready.loaded.model, step)) for step in range(12)]
    assert opened == sorted(opened)
    assert len(set(opened)) > 1


def test_resume_refuses_another_recipe_and_says_what_differs(recipe: MakeRecipe) -> None:
    run(recipe(), "r", interrupted=StopAt("r", 5))
    with pytest.raises(Exception, match=r"train.learning_rate: 0.01 -> 0.1"):
        run(recipe("train.learning_rate=0.1"), "r", resume=True)


def test_the_best_weights_are_restored(recipe: MakeRecipe) -> None:
    """What a run returns scores exactly what its best evaluation scored, and it is not simply the last."""
    made = recipe(
        "evaluate.every=1",
        "train.learning_rate=5e-2",
        "train.schedule=constant",
        "train.epochs=4",
        "early_stopping={monitor: loss, patience: 9}",
    )
    run(made, "r")
    results = json.loads(Path("r/metrics.json").read_text())
    evaluations = [r for r in log_of("r") if r["event"] == "evaluation"]
    best = min(evaluations, key=lambda r: r["loss"])
    assert results["best_step"] == best["step"] < evaluations[-1]["step"]
    assert results["validation"]["loss"] == best["loss"]
    assert results["validation"]["accuracy"] == best["accuracy"]
    from engine.predict import evaluate_run

    again = evaluate_run("r", "validation.jsonl", [], as_json=True)
    assert again["scores"]["accuracy"] == best["accuracy"]
    assert again["scores"]["loss"] == pytest.approx(best["loss"], rel=1e-5)


def test_patience_stops_early(recipe: MakeRecipe) -> None:
    made = recipe(
        "evaluate.every=1",
        "train.learning_rate=1e-9",
        "train.epochs=9",
        "early_stopping={monitor: loss, patience: 2, min_delta: 0.5}",
    )
    result = run(made, "r")
    assert (result.progress.stopped, result.progress.step, result.progress.best_step) == ("early", 3, 1)
    assert json.loads(Path("r/metrics.json").read_text())["stopped"] == "early"


def test_a_metric_that_is_no_number_is_never_best() -> None:
    progress, settings = (
        Progress(),
        Settings(steps=9, seed=0, clip=None, max_skipped=0, evaluate_every=1, save_every=1, monitor="f1"),
    )
    assert [judge(progress, settings, {"f1": v}) for v in (math.nan, 0.3, math.nan, 0.3, 0.4)] == [
        False,
        True,
        False,
        False,
        True,
    ]
    assert progress.stale == 0


def test_due_is_after_every_n_steps_or_epoch_and_always_last() -> None:
    assert [s for s in range(1, 11) if due(4, s, False, s == 10)] == [4, 8, 10]
    assert [due("epoch", 3, end, False) for end in (True, False)] == [True, False]
    assert not due(None, 1, True, True)


class Poisoned:
    """A task whose loss is not finite at some steps; `records` has a line for each step done."""

    def __init__(self, task: Any, steps: set[int], value: float, records: list[Any]):
        self.task, self.steps, self.value, self.records = task, steps, value, records

    def loss(self, model: Any, batch: Any) -> torch.Tensor:
        return self.task.loss(model, batch) * (self.value if len(self.records) in self.steps else 1.0)


def loop_with(made: Any, steps: set[int], records: list[Any], value: float = math.nan) -> tuple[Any, Progress]:
    ready = prepare.prepare(made, **QUIET)
    settings = Settings(steps=10, seed=1, clip=1.0, max_skipped=3, evaluate_every=None, save_every=10**9)
    optimizer = optim.adamw(freeze.groups(ready.loaded.model, 1e-3, 0.0), 1e-3, [0.9, 0.999], 1e-8)
    progress = Progress()
    train(
        ready.loaded.model, Poisoned(ready.task, steps, value, records), ready.windows, optimizer, torch.amp.GradScaler("cpu", enabled=False), lambda s: 1.0,
        lambda s: list(ready.loaded.model.parameters()), settings, progress, device=torch.device("cpu"), autocast=optim.autocast("float32", torch.device("cpu")), evaluate=dict,
        save=lambda k: None, write=records.append, interrupted=lambda: False,
    )  # fmt: skip
    return ready.loaded.model, progress


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_whose_numbers_are_not_finite_is_skipped_and_said(recipe: MakeRecipe, value: float) -> None:
    records: list[Any] = []
    model, progress = loop_with(recipe(), {2, 5}, records, value)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert [r["step"] for r in records if r["event"] == "skipped"] == [3, 6]
    assert progress.skipped == 2
    assert math.isfinite(progress.loss_sum)


def test_too_many_in_a_row_end_the_run_with_step_and_cures(recipe: MakeRecipe) -> None:
    with pytest.raises(
        RunError, match=r"step 6: .*not finite, 4 times in a row, at learning rate 1.00e-03.*lower train.learning_rate"
    ):
        loop_with(recipe(), {2, 3, 4, 5}, [])


def test_precisions_all_train(recipe: MakeRecipe) -> None:
    losses = {}
    for precision in ("float32", "bfloat16", "float16"):
        run(recipe(f"train.precision={precision}", "train.epochs=4"), precision)
        losses[precision] = [r["loss"] for r in log_of(precision) if r["event"] == "evaluation"]
        assert json.loads(Path(precision, "metrics.json").read_text())["test"]["accuracy"] > 0.7
        weights = load_file(Path(precision) / "model" / "model.safetensors")
        assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.float32}
    for precision in ("bfloat16", "float16"):
        assert losses[precision] == pytest.approx(losses["float32"], abs=0.15)
        assert losses[precision] != losses["float32"]


@pytest.mark.parametrize(
    ("kind", "end"), [("linear", 1 / 90), ("cosine", 0.5 * (1 + math.cos(math.pi * 89 / 90))), ("constant", 1.0)]
)
def test_schedules_follow_their_formula(kind: str, end: float) -> None:
    factor = optim.schedule(kind, 0.1, 100)
    assert [factor(s) for s in range(10)] == pytest.approx([(s + 1) / 11 for s in range(10)])
    assert factor(10) == 1.0
    assert factor(99) == pytest.approx(end)
    assert optim.schedule(kind, 10, 100)(57) == factor(57)
    assert optim.schedule(kind, 0, 100)(0) == 1.0


@pytest.mark.parametrize(("most", "size"), [(1.0, 5.0), (1.0, 0.5), (None, 5.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipping_within_the_step_is_clipping_before_it(most: float | None, size: float, dtype: torch.dtype) -> None:
    """Three steps beside torch's clip_grad_norm_ and AdamW; the norm is bit-equal; gradients below the limit change no bit."""
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(7, 5, dtype=dtype)), torch.nn.Parameter(torch.randn(3, dtype=dtype))]
    plain = copy.deepcopy(ours)
    one, two = optim.adamw([{"params": ours}], 0.1, [0.9, 0.999], 1e-8), torch.optim.AdamW(plain, lr=0.1, fused=True)
    for _ in range(3):
        for a, b in zip(ours, plain, strict=True):
            a.grad = size * torch.nn.functional.normalize(torch.randn_like(a), dim=None, p=2.0)  # type: ignore[arg-type]
            b.grad = a.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(plain, most or math.inf)
        assert torch.equal(optim.clip(one, ours, most), expected)
        one.step()
        two.step()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert (most is not None and size > most) or torch.equal(a, b)


def test_adamw_takes_decay_from_vectors(recipe: MakeRecipe) -> None:
    model = prepare.prepare(recipe(), **QUIET).loaded.model
    plain = {n: g["weight_decay"] for g in freeze.groups(model, 1e-3, 0.1) for n in g["names"]}
    assert plain["classifier.weight"] == 0.1
    assert plain["classifier.bias"] == plain["bert.embeddings.LayerNorm.weight"] == 0.0
    assert plain.keys() == dict(model.named_parameters()).keys()


def test_evaluation_leaves_modes_and_random_state(recipe: MakeRecipe) -> None:
    ready = prepare.prepare(recipe(), **QUIET)
    model = ready.loaded.model.train()
    model.bert.encoder.layer[0].eval()
    before, state = [m.training for m in model.modules()], torch.get_rng_state()
    how = {"tokens": 99, "device": torch.device("cpu"), "autocast": optim.autocast("float32", torch.device("cpu"))}
    first = evaluate.outputs(model, ready.task, ready.encoded["test"], **how)
    assert [m.training for m in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), state)
    for tokens in (1, 64, 5000):  # however it is batched: padding changes nothing
        assert evaluate.outputs(model, ready.task, ready.encoded["test"], **{**how, "tokens": tokens}) == pytest.approx(
            first, abs=1e-6
        )


def test_checkpoints_verify_fall_back_and_prune(recipe: MakeRecipe) -> None:
    run(recipe("checkpoint.every=2", "evaluate.every=2", "early_stopping={monitor: loss}"), "r")
    folder = Path("r/checkpoints")
    steps = sorted(folder.glob("step-*"))
    assert [p.name for p in steps] == ["step-00000010", "step-00000012"]
    best = json.loads(Path("r/metrics.json").read_text())["best_step"]
    assert (folder / f"best-{best:08d}").exists()
    assert checkpoint.newest(folder) == steps[1]
    damaged = bytearray((steps[1] / "weights.safetensors").read_bytes())
    damaged[-9] ^= 1
    (steps[1] / "weights.safetensors").write_bytes(damaged)
    assert checkpoint.newest(folder, quarantine=True) == steps[0]
    assert Path("r/quarantine/step-00000012").exists()
    assert not list(Path("r").rglob("*.pt")) + list(Path("r").rglob("*.bin")) + list(Path("r").rglob("*.pkl"))


def test_the_optimizer_comes_back_whole(recipe: MakeRecipe) -> None:
    run(recipe(), "r")
    ready = prepare.prepare(recipe(), **QUIET)
    first = optim.adamw(freeze.groups(ready.loaded.model, 1e-2, 0.01), 1e-2, [0.9, 0.999], 1e-8)
    path = checkpoint.newest(Path("r/checkpoints"))
    assert path
    checkpoint.load_optimizer(path, first, torch.amp.GradScaler("cpu", enabled=False))
    second = copy.deepcopy(checkpoint.optimizer_state(first))
    saved = load_file(path / "optimizer.safetensors")
    assert saved.keys() == second.keys()
    assert all(torch.equal(saved[k], second[k]) for k in saved)
    assert {g["initial_lr"] for g in first.param_groups} == {1e-2}
    assert all(g["lr"] < 1e-2 for g in first.param_groups)
