"""Laws of numbers and memory: no NaN ever reaches a weight, and a step redone for want of memory is the step that was meant."""

import copy
import dataclasses
import gc
import itertools
import math
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_loop
import torch
import torch.nn.functional as F
from conftest import FLOAT32, MakeRecipe
from torch import Tensor, nn

from engine import checkpoint, evaluate, faults, finetune, freeze, optim, prepare
from engine.errors import RunError
from engine.progress import Progress, Settings
from engine.train import train

QUIET: dict[str, Any] = {"say": lambda line: None}
CPU = torch.device("cpu")
OUT_OF_MEMORY = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "python": MemoryError,
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
}


class Uncast:
    """Classification whose logits keep the model's own type, so that float64 stays float64."""

    def __init__(self, task: Any):
        self.items = task.items

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "truncated")}
        return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="sum")


def loop(
    ready: prepare.Prepared,
    *,
    steps: int = 6,
    task: Any = None,
    dtype: torch.dtype = torch.float32,
    rate: float = 1e-3,
    precision: str = "float32",
    scale: float = 2.0**16,
    arrange: Callable[[nn.Module, Any], None] = lambda m, o: None,
    **more: Any,
) -> tuple[nn.Module, Progress, list[Any], torch.amp.GradScaler]:
    """train() on a prepared recipe: (model, progress, records, scaler). `arrange` plants the fault."""
    model = ready.loaded.model.to(dtype)
    optimizer = optim.adamw(freeze.groups(model, rate, 0.01), rate, [0.9, 0.999], 1e-8)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16", init_scale=scale)
    settings = Settings(steps=steps, seed=1, clip=1.0, max_skipped=3, evaluate_every=None, save_every=10**9)
    settings, progress, records = dataclasses.replace(settings, **more), Progress(), []
    arrange(model, optimizer)
    ready.progress = progress  # type: ignore[attr-defined]  # where a test finds it when train() raises
    train(
        model, task or ready.task, ready.windows, optimizer, scaler, lambda s: 1.0, lambda s: list(model.parameters()), settings,
        progress, device=CPU, autocast=optim.autocast(precision, CPU), evaluate=dict, save=lambda k: None, write=records.append,
        interrupted=lambda: False,
    )  # fmt: skip
    return model, progress, records, scaler


def prepared(made: Any, tokens: int = 10**6) -> prepare.Prepared:
    ready = prepare.prepare(made, **QUIET)
    ready.windows.tokens = tokens
    return ready


def all_finite(model: nn.Module) -> bool:
    return all(bool(torch.isfinite(p).all()) for p in model.parameters())


def distance(a: nn.Module, b: nn.Module) -> float:
    return test_loop.relative(list(a.state_dict().values()), list(b.state_dict().values()))


# -- numbers -------------------------------------------------------------------------------------------------------------


def test_a_nan_weight_stops_the_run_at_its_first_step_and_is_named(recipe: MakeRecipe) -> None:
    """Leaving out windows cannot help here; the other weights stay what they were, bit for bit."""
    ready, before = prepared(recipe()), {}
    name = "bert.encoder.layer.1.output.dense.weight"

    def plant(model: nn.Module, optimizer: Any) -> None:
        with torch.no_grad():
            model.get_parameter(name)[3, 4] = math.nan
        before.update(copy.deepcopy(model.state_dict()))

    with pytest.raises(RunError, match=rf"step 1: loss nan .*\n.*: the weight {name}\n.*train.jsonl:\d+, train.jsonl:\d+"):
        loop(ready, arrange=plant)
    after = ready.loaded.model.state_dict()
    assert all(torch.equal(after[n], t) or n == name for n, t in before.items())


@pytest.mark.parametrize(("value", "where"), [(math.nan, "embeddings"), (math.inf, "embeddings"), (math.nan, "loss")])
def test_a_fault_in_some_windows_is_skipped_and_in_all_ends_the_run(recipe: MakeRecipe, value: float, where: str) -> None:
    """Planted in the input embeddings' output, or in the loss as a label's weight would."""
    bad_steps: set[int] = set()
    ready = prepared(recipe())

    class Weighted:
        def loss(self, model: Any, batch: Any) -> Tensor:
            return ready.task.loss(model, batch) * (value if where == "loss" and ready.progress.step in bad_steps else 1.0)  # type: ignore[attr-defined]

    def plant(model: Any, optimizer: Any) -> None:
        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            bad = where == "embeddings" and ready.progress.step in bad_steps  # type: ignore[attr-defined]
            return output + value if bad else output

        model.bert.embeddings.word_embeddings.register_forward_hook(hook)

    bad_steps |= {1, 4}
    model, progress, records, _ = loop(ready, task=Weighted(), arrange=plant)
    assert [r["step"] for r in records if r["event"] == "skipped"] == [2, 5]
    assert (progress.skipped, progress.skipped_in_row, progress.step) == (2, 0, 6)
    assert all_finite(model)
    bad_steps |= set(range(99))
    what = (
        r"bert.embeddings.word_embeddings \(Embedding\)" if where == "embeddings" else "the loss; what the model gives is finite"
    )
    before = copy.deepcopy(model)
    with pytest.raises(RunError, match=rf"(?s)step 4: .*4 times in a row, at learning rate 1.00e-03.*{what}.*train.jsonl:"):
        loop(ready, task=Weighted())
    assert distance(model, before) == 0.0


class Once:
    """A task whose loss is NaN the first time that it is asked at some steps, as after a flipped bit."""

    def __init__(self, ready: Any, steps: set[int]):
        self.ready, self.steps = ready, steps

    def loss(self, model: Any, batch: Any) -> Tensor:
        loss: Tensor = self.ready.task.loss(model, batch)
        if self.ready.progress.step in self.steps:
            self.steps.remove(self.ready.progress.step)
            return loss * math.nan
        return loss


def test_chance_is_told_from_data_and_leaves_no_trace(recipe: MakeRecipe) -> None:
    """With dropout: the replay draws the same masks, so the run ends in the same bits as one where nothing happened."""
    clean, *_ = loop(prepared(recipe(), 100))
    ready = prepared(recipe(), 100)
    struck, progress, records, _ = loop(ready, task=Once(ready, {0, 3}))
    assert [r["step"] for r in records if r["event"] == "replayed"] == [1, 4]
    assert progress.skipped == 0
    assert distance(struck, clean) == 0.0


def test_ten_in_a_run_are_the_most(recipe: MakeRecipe) -> None:
    """Every second window is bad: never two in a row, and the eleventh ends the run."""
    ready = prepared(recipe())

    class EverySecond:
        def loss(self, model: Any, batch: Any) -> Tensor:
            return ready.task.loss(model, batch) * (math.nan if ready.progress.step % 2 else 1.0)  # type: ignore[attr-defined]

    assert Settings(1, 1, None, 3, None, 1).max_skipped_in_run == recipe().train.max_skipped_in_run == 10
    with pytest.raises(RunError, match=r"step 22: .*1 times in a row.* and 11 times in this run"):
        loop(ready, task=EverySecond(), steps=40)
    assert all_finite(ready.loaded.model)


def test_an_absurd_learning_rate_ends_the_run_without_a_nan_weight(recipe: MakeRecipe) -> None:
    made = recipe("train.learning_rate=1e20", "train.epochs=4", "checkpoint.every=1", "train.warmup=0")
    with pytest.raises(
        RunError, match=r"not finite.*at learning rate .*e\+\d\d.*lower train.learning_rate(?s:.*)last good checkpoint is"
    ):
        finetune.finetune(made, "r", **QUIET)
    paths = sorted(Path("r/checkpoints").iterdir())
    assert paths
    for path in paths:
        assert all(bool(torch.isfinite(t).all()) for t in test_loop.load_file(path / "weights.safetensors").values())


def test_weights_that_are_not_finite_are_never_saved(recipe: MakeRecipe) -> None:
    """A rate that is infinite in float32 makes the update itself infinite; the one before it is the last checkpoint."""
    with pytest.raises(RunError, match=r"step 1: weights are not finite.*no checkpoint was saved yet"):
        finetune.finetune(recipe("train.learning_rate=1e300", "checkpoint.every=1", "train.warmup=0"), "r", **QUIET)
    assert not list(Path("r").glob("checkpoints/step-*"))


def test_float16_overflow_lowers_the_scale_and_loses_no_window(recipe: MakeRecipe) -> None:
    ready = prepared(recipe())
    model, progress, records, scaler = loop(ready, precision="float16", scale=2.0**40, steps=4)
    assert [r["event"] for r in records] == ["step"] * 4
    assert progress.skipped == 0
    assert 1 <= scaler.get_scale() < 2.0**40
    assert all_finite(model)


def test_float16_scale_has_a_floor_of_one_and_then_it_is_a_fault(recipe: MakeRecipe) -> None:
    """A gradient that is not finite at any scale: the loss is finite, the derivative of sqrt at 0 is not."""
    ready, scales = prepared(recipe()), []

    class Vertical:
        def loss(self, model: Any, batch: Any) -> Tensor:
            loss = ready.task.loss(model, batch)
            return loss + torch.sqrt(loss - loss.detach())

    def keep(model: nn.Module, optimizer: Any) -> None:
        update = torch.amp.GradScaler.update
        monkeypatch.setattr(torch.amp.GradScaler, "update", lambda s, *a: (update(s, *a), scales.append(s.get_scale()))[0])

    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(RunError, match=r"step 4: loss \d\.\d+ and gradient norm"):
        loop(ready, task=Vertical(), precision="float16", arrange=keep)
    assert min(scales) == 1.0
    assert all_finite(ready.loaded.model)


# -- memory --------------------------------------------------------------------------------------------------------------


class Full:
    """Memory that holds `rows` rows and no more: raises in the part of the step that is asked for. Says how often."""

    def __init__(self, part: str, kind: str, rows: int = 4, times: int = 10**9):
        self.part, self.error, self.rows, self.times, self.raised = part, OUT_OF_MEMORY[kind], rows, times, 0

    def strike(self) -> None:
        if self.raised < self.times:
            self.raised += 1
            raise self.error()

    def __call__(self, model: Any, optimizer: Any) -> None:
        layer = model.bert.encoder.layer[1]
        if self.part == "forward":
            layer.register_forward_pre_hook(lambda m, inputs: self.strike() if len(inputs[0]) > self.rows else None)
        elif self.part == "backward":
            layer.register_full_backward_hook(lambda m, gave, got: self.strike() if len(got[0]) > self.rows else None)
        else:
            make = optimizer._init_group

            def init_group(group: Any, *lists: Any) -> Any:
                if group is optimizer.param_groups[-1]:  # the other groups' averages are made already
                    self.strike()
                return make(group, *lists)

            optimizer._init_group = init_group


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.float64, 1e-14)])
@pytest.mark.parametrize(
    ("part", "kind"), [("forward", "cuda"), ("backward", "cpu"), ("backward", "cuda"), ("optimizer", "python")]
)
def test_a_step_redone_for_want_of_memory_is_the_same_step(
    recipe: MakeRecipe, still_bert: Path, part: str, kind: str, dtype: torch.dtype, tolerance: float
) -> None:
    """The gradients of every step, at weights that stand still, and what one real update makes of them."""
    made = recipe("train.packing=false", model=still_bert)
    taken: list[list[list[Tensor]]] = []
    results = []
    for full in (None, Full(part, kind, times=2 if part == "optimizer" else 10**9)):
        grads: list[list[Tensor]] = []

        def watch(model: nn.Module, optimizer: Any, full: Any = full, grads: Any = grads) -> None:
            if full:
                full(model, optimizer)
            optimizer.register_step_post_hook(
                lambda *a: grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            )

        ready = prepared(made)
        results.append((loop(ready, task=Uncast(ready.task), dtype=dtype, rate=1e-30, arrange=watch), ready.windows.tokens, full))
        taken.append(grads)
    ((_, whole, whole_records, _), _, _), ((_, progress, records, _), tokens, full) = results
    assert full is not None
    assert full.raised >= 2
    for redone, meant in zip(*reversed(taken), strict=True):
        assert test_loop.relative(redone, meant) <= tolerance
    steps = [r for r in records if r["event"] == "step"]
    assert [(r["step"], r["items"], r["tokens"]) for r in steps] == [(r["step"], r["items"], r["tokens"]) for r in whole_records]
    assert progress.loss_sum == pytest.approx(whole.loss_sum, rel=1e-6)  # the log's loss is a float32
    noted = [r for r in records if r["event"] == "memory"]
    assert [r["tokens"] for r in noted] == sorted((r["tokens"] for r in noted), reverse=True)
    assert noted[-1]["tokens"] == tokens < 10**6  # the smaller budget is kept
    assert progress.skipped == 0


def test_weights_after_memory_errors_equal_those_of_the_same_cut(recipe: MakeRecipe, still_bert: Path) -> None:
    """Whole runs that update: the failed attempts leave nothing behind, so the bits are those of the smaller budget."""
    made = recipe("train.packing=false", model=still_bert)
    for part in ("forward", "backward", "optimizer"):
        ready = prepared(made)
        struck, progress, _, _ = loop(ready, arrange=Full(part, "cuda", times=1), steps=4)
        plain, again, _, _ = loop(prepared(made, ready.windows.tokens), steps=4)
        assert distance(struck, plain) == 0.0, part
        assert progress == again


def test_float16_survives_a_memory_error_with_its_scale(recipe: MakeRecipe) -> None:
    for part in ("forward", "backward", "optimizer"):
        model, progress, records, scaler = loop(
            prepared(recipe("train.packing=false")), precision="float16", scale=8.0, arrange=Full(part, "cuda", times=1), steps=3
        )
        assert (progress.skipped, scaler.get_scale()) == (0, 8.0)
        assert [r["event"] for r in records] == ["memory", "step", "step", "step"]
        assert all_finite(model)


@pytest.mark.parametrize("part", ["forward", "optimizer"])
def test_one_row_that_does_not_fit_is_named(recipe: MakeRecipe, part: str) -> None:
    ready = prepared(recipe("train.packing=false"))
    before, lengths = copy.deepcopy(ready.loaded.model), ready.encoded["train"].lengths
    first = ready.windows.order(0)[:16]
    longest = ready.splits["train"].table.places[first[np.argmax(lengths[first])]]
    with pytest.raises(RunError, match=rf"step 1: memory does not suffice for a single example, {longest}\. Cures: "):
        loop(ready, arrange=Full(part, "cuda", rows=0))
    assert distance(ready.loaded.model, before) == 0.0


def test_half_moved_weights_are_an_error_and_never_a_redone_step(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, fused = itertools.count(), torch._fused_adamw_

    def second(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 1:
            raise torch.OutOfMemoryError
        return fused(*args, **kwargs)

    monkeypatch.setattr(torch, "_fused_adamw_", second)
    with pytest.raises(RunError, match=r"memory ran out while the optimizer moved the weights"):
        loop(prepared(recipe()))


def test_other_errors_pass_through(recipe: MakeRecipe) -> None:
    ready = prepared(recipe())

    def plant(model: Any, optimizer: Any) -> None:
        model.bert.encoder.register_forward_hook(lambda *a: torch.ones(2) @ torch.ones(3))

    with pytest.raises(RuntimeError, match="size"):
        loop(ready, arrange=plant)
    assert not any(r for r in (ValueError("can't allocate memory"), RuntimeError("size mismatch")) if faults.out_of_memory(r))


def test_evaluation_shrinks_itself_alone_and_gives_the_same(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run whose evaluations fit 5 rows: same weights and scores, recorded once, training's budget untouched."""
    options = ("train.packing=false", "evaluate.every=4", "train.epochs=1")
    finetune.finetune(recipe(*options), "plain", **QUIET)
    ready = prepare.prepare(recipe(*options), **QUIET)
    real = type(ready.task).forward

    def forward(self: Any, model: Any, batch: Any) -> Any:
        if torch.is_inference_mode_enabled() and len(batch["labels"]) > 5:
            raise torch.OutOfMemoryError
        return real(self, model, batch)

    monkeypatch.setattr(type(ready.task), "forward", forward)
    finetune.finetune(recipe(*options), "full", **QUIET)
    assert test_loop.model_bytes("full") == test_loop.model_bytes("plain")
    plain, full = test_loop.log_of("plain"), test_loop.log_of("full")
    noted = [r for r in full if r["event"] == "memory"]
    assert noted
    assert {(r["during"], r["step"]) for r in noted} == {("evaluation", 4)}  # the smaller budget is kept: once is enough
    assert [r for r in full if r["event"] == "step"] == [r for r in plain if r["event"] == "step"]
    for a, b in zip(*([r for r in log if r["event"] == "evaluation"] for log in (full, plain)), strict=True):
        assert a["step"] == b["step"]
        assert (a["loss"], a["accuracy"]) == pytest.approx((b["loss"], b["accuracy"]), rel=1e-5)
    how: dict[str, Any] = {"tokens": 10**6, "device": CPU, "autocast": optim.autocast("float32", CPU)}
    split = ready.encoded["test"]
    told: list[int] = []
    halved = evaluate.outputs(ready.loaded.model, ready.task, split, **how, shrunk=told.append)
    monkeypatch.setattr(type(ready.task), "forward", real)
    assert halved == pytest.approx(evaluate.outputs(ready.loaded.model, ready.task, split, **how), rel=1e-5, abs=1e-6)
    assert told == sorted(told, reverse=True) != []

    def never(self: Any, model: Any, batch: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(type(ready.task), "forward", never)
    shortest = ready.splits["test"].table.places[int(np.argsort(split.lengths, kind="stable")[0])]
    with pytest.raises(RunError, match=rf"evaluation: memory does not suffice for a single example, {shortest}"):
        evaluate.outputs(ready.loaded.model, ready.task, split, **how, places=ready.splits["test"].table.places)


# -- many steps ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Toy:
    """Windows of a linear regression: (4, 8) -> (4, 1), forever."""

    per_epoch: int = 100

    def epoch(self, number: int, skip: int = 0) -> Iterator[Any]:
        from engine.data.windows import Window

        for i in range(skip, self.per_epoch):
            x = torch.full((4, 8), float(i % 7))
            yield Window(np.arange(4), [{"x": x, "y": x[:, :1]}], 4, 32)


class Squares:
    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]) - batch["y"]).square().sum()


def resident() -> int:
    """Bytes of this process in memory now (Linux); elsewhere the most there ever were."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("steps", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_and_open_files_do_not_grow(tmp_path: Path, steps: int) -> None:
    """With a log, and a real checkpoint every 100 steps: at most 10 MB more in 10,000 steps, and not one file more."""
    from engine.watch import Log

    gc.collect()  # files that the tests before this one left to it

    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 1))
    optimizer = optim.adamw(freeze.groups(model, 1e-3, 0.0), 1e-3, [0.9, 0.999], 1e-8)
    scaler, progress, log = torch.amp.GradScaler("cpu", enabled=False), Progress(), Log(tmp_path / "log.jsonl")
    seen: list[tuple[int, int]] = []

    def save(kind: str) -> None:
        checkpoint.write(tmp_path / "checkpoints", f"step-{progress.step:08d}", model, progress, optimizer, scaler, log.sync())
        checkpoint.prune(tmp_path / "checkpoints", 1)
        seen.append((resident(), len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0))

    settings = Settings(steps=steps, seed=1, clip=1.0, max_skipped=3, evaluate_every=100, save_every=100, monitor="m")
    train(
        model, Squares(), Toy(), optimizer, scaler, lambda s: 1.0, lambda s: list(model.parameters()), settings, progress,
        device=CPU, autocast=optim.autocast("float32", CPU), evaluate=lambda: {"m": 0.5}, save=save, write=log,
        interrupted=lambda: False,
    )  # fmt: skip
    steady = seen[2:]  # the first steps load kernels
    grown = steady[-1][0] - steady[0][0]
    print(f"{steps} steps: {grown / 1e6:+.2f} MB, {steady[-1][1]} open files")
    assert grown < 10e6
    assert {files for _, files in steady} == {steady[0][1]}


def test_smaller_budgets_halve_until_each_is_one_row(recipe: MakeRecipe) -> None:
    """Every halving really cuts, all rows stay, none is met twice, and the last answer is None."""
    for packed in (False, True):
        ready = prepared(recipe())
        windows = ready.windows
        windows.packed = packed
        window: Any = windows.window(windows.order(0)[:16])
        sizes = []
        while (cut := windows.smaller(window)) is not None:
            window = cut
            sizes.append([len(b["labels"]) for b in window.micro_batches])
            assert (sum(sizes[-1]), window.items) == (16, 16)
        assert sizes[-1] == [1] * 16
        assert all(len(a) < len(b) for a, b in itertools.pairwise(sizes))
        assert (
            windows.where(window.rows)[0]
            == ready.splits["train"].table.places[window.rows[np.argmax(windows.encoded.lengths[window.rows])]]
        )
