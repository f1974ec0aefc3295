"""Bfloat16 working weights: sums and masters are float32, what is saved is float32, and off means off."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FLOAT32, MakeRecipe, StopAt
from hypothesis import given
from hypothesis import strategies as st
from laws import still
from safetensors.torch import load_file
from test_loop import Poisoned, model_bytes, run
from torch import nn

from engine import checkpoint, disk, evaluate, faults, freeze, models, optim, predict, prepare, report, seeds
from engine.errors import InputError
from engine.fast import weights, working
from engine.progress import Progress, Settings
from engine.train import train

QUIET = {"say": lambda line: None}
CPU = torch.device("cpu")
BF16 = "train.weights=bfloat16"
ALL_OFF = ["train.weights=float32", "train.dropout=exact", "train.compact_vocabulary=false", "train.kernels=false"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "write", lambda folder: disk.replace(folder / "report.html", b"report"))  # plots take seconds


class Left:
    """In the place of Working: nothing is done to the model."""

    said: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, *args: Any):
        pass

    def prove(self, *args: Any) -> None:
        pass

    follow = rest = restore = prove


def ready(made: Any, quiet: bool = False) -> tuple[prepare.Prepared, working.Working, optim.AdamW]:
    """Prepared, put into its working form, with the optimizer that follows it; without dropout if `quiet`."""
    found = prepare.prepare(made, **QUIET)
    if quiet:
        still(found.loaded.model)
    t = made.train
    lean = working.Working(found.loaded.model, t, found.encoded, found.loaded.tokenizer, found.windows.tokens)
    groups = freeze.groups(found.loaded.model, t.learning_rate, t.weight_decay, found.rates)
    optimizer = optim.adamw(groups, t.learning_rate, t.betas, t.eps)
    lean.follow(optimizer)
    return found, lean, optimizer


def steps(made: Any, count: int, task: Callable[[Any], Any] = lambda task: task, **more: Any) -> tuple[list[dict[str, Any]], Any]:
    """The log's lines of `count` steps of the loop, and the model."""
    found, _, optimizer = ready(made, more.get("quiet", False))
    model, records = found.loaded.model, []
    settings = Settings(steps=count, seed=made.seed, clip=1.0, max_skipped=3, evaluate_every=None, save_every=10**9)
    train(
        model, task(found.task), found.windows, optimizer, torch.amp.GradScaler("cpu", enabled=False), lambda step: 1.0,
        lambda step: freeze.thaw(model, step), settings, Progress(), device=CPU, autocast=optim.autocast(found.precision, CPU),
        evaluate=dict, save=lambda kind: None, write=more.get("write", records.append), interrupted=lambda: False,
    )  # fmt: skip
    return records, model


# -- splitting --------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_what_is_split_comes_back_bit_for_bit(words: list[int]) -> None:
    w = torch.from_numpy(np.array(words, dtype=np.uint32).view(np.float32))
    w = w[torch.isfinite(w)]
    high, rest = weights.split(w)
    assert torch.equal(weights.join(high, rest).view(torch.int32), w.view(torch.int32))
    nearest = w.bfloat16()
    assert ((high.double() - w.double()).abs() <= (nearest.double() - w.double()).abs()).all()
    assert weights.split(nearest.float())[1] is None, "what was made in bfloat16 has no rest"


def test_ties_come_back_too() -> None:
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001], dtype=torch.int32).view(torch.float32)
    ties = torch.cat([ties, -ties])
    assert torch.equal(weights.join(*weights.split(ties)), ties)


# -- off, and on ------------------------------------------------------------------------------------------------------


def test_switched_off_is_the_plain_loop_bit_for_bit(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    run(recipe(*ALL_OFF), "off")
    monkeypatch.setattr(working, "Working", Left)
    run(recipe(*ALL_OFF), "plain")
    assert model_bytes("off") == model_bytes("plain")
    assert Path("off/metrics.json").read_bytes() == Path("plain/metrics.json").read_bytes()


def apart(recipe: MakeRecipe, model: Path, *beside: str) -> list[float]:
    """How far the losses of 40 steps of full fine-tuning without dropout are from those of float32."""
    options = ["train.learning_rate=5e-5", "train.epochs=7"]
    plain, low = (steps(recipe(*options, *more, model=model), 40, quiet=True)[0] for more in ([], [BF16, *beside]))
    assert len(plain) == len(low) == 40
    return [abs(a["loss"] - b["loss"]) for a, b in zip(plain, low, strict=True)]


@pytest.mark.parametrize("beside", [[], ["train.precision=bfloat16"]])
def test_losses_stay_near_those_of_float32(recipe: MakeRecipe, still_bert: Path, beside: list[str]) -> None:
    """With autocast and without it. 32 random numbers a token are rougher than a real model: see the next test."""
    found = apart(recipe, still_bert, *beside)
    assert 0 < max(found) < 2e-3
    assert sum(found) / 40 < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(not models._embedded("here"), reason="the embedded MiniLM is not installed")
def test_losses_of_a_real_model_are_within_a_thousandth_of_float32(recipe: MakeRecipe) -> None:
    found = apart(recipe, Path(models.EMBEDDED))
    assert 0 < max(found) < 1e-3


def test_gradients_are_added_up_in_float32(recipe: MakeRecipe, still_bert: Path) -> None:
    """The master's gradient is the float32 sum of each micro-batch's bfloat16 gradient; a bfloat16 sum is another number."""
    found, _, _ = ready(recipe(BF16, "train.compact_vocabulary=false", "train.micro_batch_tokens=60", model=still_bert))
    model, window = found.loaded.model.train(), found.windows.window(found.windows.order(0)[:32])
    assert len(window.micro_batches) > 4
    for batch in window.micro_batches:
        (found.task.loss(model, batch) / window.items).backward()
    assert all(p.grad is None for p in model.parameters())
    plain = copy.deepcopy(model)  # a copy knows nothing of masters
    sums: dict[str, torch.Tensor] = {}
    for batch in window.micro_batches:
        (found.task.loss(plain, batch) / window.items).backward()
        for name, p in plain.named_parameters():
            assert p.dtype == torch.bfloat16
            sums[name] = sums[name] + p.grad.float() if name in sums else p.grad.float()
            p.grad = None
    for batch in window.micro_batches:
        (found.task.loss(plain, batch) / window.items).backward()
    rounded = dict(plain.named_parameters())
    differ = 0
    for name, p in model.named_parameters():
        gradient = freeze.moved(p).grad
        assert gradient is not None
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, sums[name]), name
        differ += not torch.equal(gradient, rounded[name].grad.float())
    assert differ > 10, "adding up in bfloat16 would have gone unnoticed"


def test_the_step_is_adamw_on_the_masters(recipe: MakeRecipe, still_bert: Path) -> None:
    """Updates far below a bfloat16's spacing are kept: masters move where working weights cannot yet."""
    found, lean, optimizer = ready(recipe(BF16, "train.compact_vocabulary=false", "train.learning_rate=1e-6", model=still_bert))
    model = found.loaded.model.train()
    before = {n: freeze.moved(p).detach().clone() for n, p in model.named_parameters()}
    window = found.windows.window(found.windows.order(0)[:16])
    (found.task.loss(model, window.micro_batches[0]) / window.items).backward()
    by_hand = {n: nn.Parameter(t.clone()) for n, t in before.items()}
    for name, p in model.named_parameters():
        by_hand[name].grad = freeze.moved(p).grad.clone()
    groups = [{**g, "params": [by_hand[n] for n in g["names"]]} for g in optimizer.param_groups]
    optim.adamw(groups, 1e-6, [0.9, 0.999], 1e-8).step()
    optimizer.step()
    moved = 0
    for name, p in model.named_parameters():
        assert torch.equal(freeze.moved(p), by_hand[name]), name
        assert torch.equal(p, by_hand[name].bfloat16()), name
        moved += int((freeze.moved(p) != before[name]).sum()) - int((p != before[name].bfloat16()).sum())
    assert moved > 1000
    lean.restore()
    assert all(torch.equal(p, by_hand[n]) and p.dtype == torch.float32 for n, p in model.named_parameters())


# -- what is saved, resumed, evaluated --------------------------------------------------------------------------------

VARIANTS = {
    "full": [],
    "lora": ["tune.method=lora", "tune.r=2", "tune.dropout=0.1"],
    "gradual unfreezing": ["tune.unfreeze=0.3", "tune.rates={'**.LayerNorm.*': 0.5}"],
    "qlora": ["tune={method: lora, r: 2, quantize: nf4}"],
    "prompt": ["tune={method: prompt, length: 3}"],
    "every piece": ["train.dropout=pool", "train.micro_batch_tokens=60", "train.compact_vocabulary=true"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_equals_never_stopped_and_what_is_saved_is_float32(recipe: MakeRecipe, variant: str) -> None:
    options = [
        BF16,
        "evaluate.every=3",
        "checkpoint.every=4",
        "train.max_steps=9",
        "early_stopping={monitor: loss}",
        *VARIANTS[variant],
    ]
    run(recipe(*options), "whole")
    assert run(recipe(*options), "stopped", interrupted=StopAt("stopped", 5)).progress.step == 5
    run(recipe(*options), "stopped", resume=True)
    assert model_bytes("stopped") == model_bytes("whole")
    assert Path("stopped/metrics.json").read_bytes() == Path("whole/metrics.json").read_bytes()
    files = [p for p in Path("whole").rglob("*.safetensors") if "checkpoints" in str(p) or "model" in str(p)]
    assert len(files) >= 4
    for path in files:
        kinds = {t.dtype for t in load_file(path).values()}
        assert torch.bfloat16 not in kinds, path
        assert torch.float32 in kinds
    if variant == "full":
        run(recipe(*options, *ALL_OFF, "train.max_steps=1"), "plain")
        assert load_file("whole/model/model.safetensors").keys() == load_file("plain/model/model.safetensors").keys()


def test_a_frozen_base_comes_back_bit_for_bit(recipe: MakeRecipe, bert: Path) -> None:
    base = load_file(bert / "model.safetensors")
    run(recipe(BF16, "tune={method: lora, r: 2, at: '**.query'}"), "r")
    after = load_file("r/model/model.safetensors")
    same = {n for n, t in base.items() if torch.equal(t, after[f"bert.{n}"])}
    assert {n for n in base if "query.weight" not in n and "pooler" not in n} <= same
    assert len(same) < len(base)


def test_evaluation_computes_with_the_working_weights_and_prediction_does_too(recipe: MakeRecipe) -> None:
    found, lean, _ = ready(recipe(BF16))
    model = found.loaded.model
    how = {"tokens": 999, "device": CPU, "autocast": optim.autocast("float32", CPU)}
    made = evaluate.outputs(model, found.task, found.encoded["test"], **how)
    lean.restore()
    plain = evaluate.outputs(model, found.task, found.encoded["test"], **how)
    cast = evaluate.outputs(copy.deepcopy(model).bfloat16(), found.task, found.encoded["test"], **how)
    assert np.array_equal(made, cast)
    assert 0 < np.abs(made - plain).max() < 0.05
    alike = ("train.kernels=false", "train.packing=false", "train.last_layer=false")  # the same shapes: rounded alike
    result = run(recipe(BF16, *alike), "r")
    again = predict.evaluate_run("r", "test.jsonl", [], as_json=True)
    assert again["scores"]["loss"] == pytest.approx(result.metrics["test"]["loss"], rel=FLOAT32)


def test_masters_and_working_weights_stay_together_through_saving(recipe: MakeRecipe, tmp_path: Path) -> None:
    found, _, optimizer = ready(recipe(BF16))
    model = found.loaded.model
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    path = checkpoint.write(tmp_path / "c", "step-00000001", model, Progress(), optimizer, scaler)
    saved = load_file(path / "weights.safetensors")
    with torch.no_grad():
        for p in model.parameters():
            freeze.moved(p).zero_()
            p.zero_()
    checkpoint.load_weights(path, model)
    for name, p in model.named_parameters():
        assert torch.equal(freeze.moved(p), saved[name])
        assert torch.equal(p, saved[name].bfloat16())


# -- when it goes wrong -----------------------------------------------------------------------------------------------


def test_a_skipped_step_changes_no_bit(recipe: MakeRecipe) -> None:
    """Three steps of which the last is skipped end where two do, in masters and working weights."""
    records: list[Any] = []
    _, model = steps(recipe(BF16), 3, lambda task: Poisoned(task, {2}, math.nan, records), write=records.append)
    assert [r["event"] for r in records] == ["step", "step", "skipped"]
    _, other = steps(recipe(BF16), 2)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(freeze.moved(p), freeze.moved(q))
        assert torch.equal(p, freeze.moved(p).bfloat16())
        assert freeze.moved(p).grad is None


def test_where_numbers_stop_being_finite_is_found_in_the_masters(recipe: MakeRecipe) -> None:
    found, _, _ = ready(recipe(BF16))
    model, window = found.loaded.model.train(), next(iter(found.windows.epoch(0)))

    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * math.nan

    model.bert.pooler.register_forward_hook(lambda module, inputs, output: Bad.apply(output))

    def again() -> torch.Tensor:
        seeds.seed_all(1, 1)
        loss = found.task.loss(model, window.micro_batches[0])
        loss.backward()
        return loss.detach()

    assert faults.first_not_finite(model, again) == "the gradient of bert.pooler.dense.bias"


def test_what_cannot_compute_in_bfloat16_is_named(recipe: MakeRecipe) -> None:
    Path("mixed.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Mixed(nn.Module):\n    def __init__(self, old):\n        super().__init__()\n"
        "        self.old = old\n\n    from_old = classmethod(lambda cls, old: cls(old))\n\n    def forward(self, x):\n        return self.old(x.float())\n"
    )
    swap = "swap=[{at: '**.intermediate.dense', with: 'mixed.py:Mixed'}]"
    with pytest.raises(InputError, match=r"train.weights=bfloat16.*intermediate.dense.*failed on a probe batch"):
        run(recipe(swap, BF16), "r")
    run(recipe(swap, "train.max_steps=1"), "float32")
    with pytest.raises(InputError, match=r"train.weights.*does not go with train.precision=float16"):
        run(recipe(BF16, "train.precision=float16"), "r16")


def test_bytes_of_what_is_kept(recipe: MakeRecipe) -> None:
    """Frozen: 4 bytes a weight, or 2 where the base was made in bfloat16. Trained: 2 besides the master's 4."""
    found, lean, _ = ready(recipe(BF16, "tune={method: lora, r: 2}"))
    frozen = [p for p in found.loaded.model.parameters() if not p.requires_grad]
    held = sum(p.nbytes + (0 if (rest := lean.masters.rests[p]) is None else rest.nbytes) for p in frozen)
    assert held == pytest.approx(4 * sum(p.numel() for p in frozen), rel=0.1)
    lean.restore()
    for p in frozen:
        p.data = p.data.bfloat16().float()
    again = weights.Masters(found.loaded.model, "bfloat16")
    assert all(again.rests[p] is None for p in frozen)
