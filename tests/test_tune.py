"""Every tuning method on every architecture obeys the same laws.

The laws and the cases are in laws.py. A new file in engine/tune/ without a case fails the count.
"""

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import laws
import pytest
import torch
from conftest import MakeRecipe, StopAt
from laws import ARCHITECTURES, CASES, REFUSED, logits

from engine import find, finetune, freeze, optim, prepare
from engine.errors import InputError
from engine.progress import Progress, Settings
from engine.train import train


def test_every_method_has_a_case() -> None:
    elsewhere = {"fusion"}  # it needs trained adapters: tests/test_adapters.py writes them and calls these laws
    assert {c["method"] for c in CASES.values()} == set(find.names("tune")) - elsewhere


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_laws(case: str, architecture: str) -> None:
    refused = REFUSED.get((case, architecture))
    if refused:
        base = laws.build(architecture)
        model = copy.deepcopy(base)
        with pytest.raises(InputError, match=refused):
            laws.apply(model, case)
        assert torch.equal(logits(model), logits(base))
        return
    one = laws.tuned(case, architecture)
    for law in laws.laws_of(architecture):
        law(one)


@pytest.mark.parametrize("case", [c for c in CASES if c not in ("rslora", "lora+")])
def test_torch_compile_changes_nothing(case: str) -> None:
    laws.compiled(laws.tuned(case, "Bert"))


PEFT = {
    "lora": "tune={method: lora, r: 4, alpha: 6, at: ['**.{query,key}', '**.dense'], r_pattern: {'**.query': 2}, alpha_pattern: {'**.key': 9}}",
    "rslora": "tune={method: lora, r: 4, rslora: true}",
    "dora": "tune={method: lora, r: 4, dora: true}",
    "ia3": "tune.method=ia3",
}


@pytest.mark.parametrize("case", PEFT)
def test_the_saved_adapter_computes_the_same_in_peft(recipe: MakeRecipe, bert: Path, case: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is a rival to compare with, not a dependency")
    from transformers import AutoModelForSequenceClassification

    finetune.finetune(recipe(PEFT[case], "train.learning_rate=3e-2"), "r", say=lambda line: None)
    merged = AutoModelForSequenceClassification.from_pretrained("r/model")
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    start = logits(base).clone()
    theirs = peft.PeftModel.from_pretrained(base, "r/adapter")
    assert torch.allclose(logits(theirs), logits(merged), atol=1e-5)
    assert not torch.allclose(logits(merged), start, atol=1e-2)


@pytest.mark.parametrize("options", ["tune={method: adapter, reduction: 4}", "tune={method: adapter, placement: pfeiffer}"])
def test_a_run_with_layers_that_stay_opens_again(recipe: MakeRecipe, options: str) -> None:
    from engine.predict import evaluate_run

    result = finetune.finetune(recipe(options), "r", say=lambda line: None)
    again = evaluate_run("r", "test.jsonl", [], as_json=True)
    assert again["scores"]["accuracy"] == result.metrics["test"]["accuracy"]
    assert again["scores"]["loss"] == pytest.approx(result.metrics["test"]["loss"], rel=1e-5)
    assert "layers of its own" in Path("r/model/README.md").read_text()


def test_lora_plus_gives_b_its_own_rate(recipe: MakeRecipe) -> None:
    finetune.finetune(recipe("tune={method: lora, b_rate: 16}"), "r", say=lambda line: None)
    newest = sorted(Path("r/checkpoints").glob("step-*"))[-1]
    groups = json.loads((newest / "state.json").read_text())["groups"]
    rate = {n: g["initial_lr"] for g in groups for n in g["names"]}
    assert {round(r, 9) for n, r in rate.items() if n.endswith("lora_B")} == {0.16}
    assert {r for n, r in rate.items() if not n.endswith("lora_B")} == {0.01}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("tune={method: lora, r_pattern: {'**.kwery': 2}}", "'**.kwery' matches none of the 4 adapted layers"),
        ("tune={method: ia3, feed_forward: ['**.key']}", "is matched by tune.at too"),
        ("tune={method: adapter, activation: rellu}", "no activation 'rellu'; did you mean 'relu'"),
        ("tune={method: adapter, at: ['**.LayerNorm']}", "this method adapts linear layers"),
    ],
)
def test_wrong_options_are_errors(recipe: MakeRecipe, options: str, said: str) -> None:
    with pytest.raises(InputError) as error:
        finetune.finetune(recipe(options), "r", say=lambda line: None)
    assert re.search(said.replace("**", r"\*\*"), str(error.value))
    assert not Path("r").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("{method: lora, r: 0}", "tune.r: "), ("{method: lora, r: 65}", "tune.r: 65 is more than .* wide .32 x 32.; a rank is far smaller"),
        ("{method: lora, r_pattern: {'**.query': -2}}", "tune.r_pattern.\\*\\*.query: "),
        ("{method: lora, r_pattern: {'**.query': 90}}", "tune.r_pattern: 90 is more than"),
        ("{method: lora, alpha: 0}", "tune.alpha: "), ("{method: lora, alpha: 1e30}", "tune.alpha: "),
        ("{method: lora, alpha_pattern: {'**.query': 0}}", "tune.alpha_pattern.\\*\\*.query: "),
        ("{method: lora, alpha_pattern: {'': 4}}", "tune.alpha_pattern: a pattern that can match something is needed.*, not ''"),
        ("{method: lora, dropout: 1}", "tune.dropout: "), ("{method: lora, b_rate: -1}", "tune.b_rate: "),
        ("{method: lora, at: ''}", "tune.at: a pattern that can match something is needed"),
        ("{method: lora, at: []}", "tune.at: a list that names something is needed"),
        ("{method: ia3, at: [' ']}", "tune.at.0: a pattern that can"), ("{freeze: ['']}", "tune.freeze.0: a pattern that can"),
        ("{unfreeze: []}", "tune.unfreeze: write a list"), ("{unfreeze: [{after: 1, train: ''}]}", "tune.unfreeze.0.train: a pattern"),
        ("{rates: {'**': 0}}", "tune.rates.\\*\\*: "), ("{start: ''}", "tune.start: a name is needed"),
        ("{method: adapter, reduction: 64}", "tune.reduction: 64 leaves nothing of the hidden size 32"),
        ("{method: compacter, reduction: 64}", "tune.reduction: 64 leaves nothing"), ("{method: prefix, length: 100000}", "tune.length: "),
    ],
)  # fmt: skip
def test_numbers_and_patterns_without_sense_are_refused_by_their_key(recipe: MakeRecipe, options: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        prepare.prepare(recipe(f"tune={options}"), say=lambda line: None)


def test_patterns_freeze_and_train_besides(recipe: MakeRecipe) -> None:
    def training(options: str) -> set[str]:
        model = prepare.prepare(recipe(options), say=lambda line: None).loaded.model
        return {n for n, p in model.named_parameters() if p.requires_grad}

    everything = training("tune={}")
    without = training("tune={freeze: '**.embeddings.**', train: ['**.LayerNorm.*']}")
    assert everything - without == {n for n in everything if "embeddings" in n and "LayerNorm" not in n}
    assert "bert.embeddings.LayerNorm.weight" in training("tune={method: bitfit, train: ['**.LayerNorm.weight']}")
    for options, said in (
        ("tune={freeze: '**.embedings.**'}", "tune.freeze: '**.embedings.**' matches no parameter"),
        ("tune={freeze: '**'}", "fresh parameters are frozen"),
    ):
        with pytest.raises(InputError) as error:
            training(options)
        assert said in str(error.value)


def test_layer_decay_follows_its_formula(recipe: MakeRecipe) -> None:
    ready = prepare.prepare(recipe("tune.layer_decay=0.5"), say=lambda line: None)
    rates = freeze.layer_rates(ready.loaded.model, ready.head, 0.5)
    assert {n: rates[n] for n in ("classifier.weight", "bert.pooler.dense.weight")} == {
        "classifier.weight": 1,
        "bert.pooler.dense.weight": 1,
    }
    assert rates["bert.encoder.layer.1.output.dense.weight"] == 0.5
    assert rates["bert.encoder.layer.0.attention.self.query.bias"] == 0.25
    assert rates["bert.embeddings.word_embeddings.weight"] == 0.125
    finetune.finetune(recipe("tune.layer_decay=0.5"), "r", say=lambda line: None)
    newest = sorted(Path("r/checkpoints").glob("step-*"))[-1]
    groups = json.loads((newest / "state.json").read_text())["groups"]
    assert {n: g["initial_lr"] / 0.01 for g in groups for n in g["names"]} == pytest.approx(rates)


def stage_by_stage(made: Any, per_step: int = 1) -> list[set[str]]:
    """Which parameters each step of a run moved."""
    seen: list[dict[str, torch.Tensor]] = []

    ready = prepare.prepare(made, say=lambda line: None)
    model = ready.loaded.model
    optimizer = optim.adamw(freeze.groups(model, 1e-2, 0.0, ready.rates), 1e-2, [0.9, 0.999], 1e-8)

    def look() -> None:
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})

    look()
    settings = Settings(steps=8, seed=1, clip=1.0, max_skipped=0, evaluate_every=None, save_every=10**9)
    train(
        model, ready.task, ready.windows, optimizer, torch.amp.GradScaler("cpu", enabled=False), lambda step: 1.0,
        lambda step: freeze.thaw(model, step), settings, Progress(), device=torch.device("cpu"),
        autocast=optim.autocast("float32", torch.device("cpu")), evaluate=dict, save=lambda k: None, write=lambda r: look(),
        interrupted=lambda: False,
    )  # fmt: skip
    return [{n for n in a if not torch.equal(a[n], b[n])} for a, b in itertools.pairwise(seen)]


def test_gradual_unfreezing_keeps_to_its_timetable(recipe: MakeRecipe) -> None:
    """One block from the top every E epochs, embeddings last; or what a list says, and nothing before its time."""
    steps = prepare.prepare(recipe(), say=lambda line: None).windows.per_epoch
    every = 2 / steps  # a stage each two steps
    moved = stage_by_stage(recipe(f"tune.unfreeze={every}", "train.epochs=9"))

    def parts(names: set[str]) -> set[str]:
        return {re.sub(r"^bert\.(?:encoder\.)?(embeddings|layer\.\d|pooler).*|^(classifier).*", r"\1\2", n) for n in names}

    top = {"classifier", "pooler"}
    assert [parts(m) for m in moved[:8:2]] == [
        top,
        top | {"layer.1"},
        top | {"layer.1", "layer.0"},
        top | {"layer.1", "layer.0", "embeddings"},
    ]
    assert [parts(m) for m in moved[1:8:2]] == [parts(m) for m in moved[:8:2]]
    table = f"[{{after: {every}, train: '**.query.*'}}, {{after: {2 * every}, train: ['**.value.bias']}}]"
    moved = stage_by_stage(recipe("tune={method: bitfit, unfreeze: " + table + "}", "train.epochs=9"))
    assert not any("query" in n or "value" in n for m in moved[:2] for n in m)
    assert {n.split(".")[-2] for n in moved[2] - moved[1]} == {"query"}
    assert {n.split(".")[-2] for n in moved[4] - moved[3]} == {"value"}
    for wrong, said in (
        ("[{after: 1, train: '**.kwery.*'}]", "tune.unfreeze: .*kwery.* matches nothing that this method lets train"),
        ("[{after: 1, train: '**'}]", "nothing trains at the first step"),
        ("-1", "a number of epochs above 0"),
        ("[{afer: 1, train: '**'}]", "did you mean 'after'"),
    ):
        with pytest.raises(InputError, match=said):
            prepare.prepare(recipe(f"tune.unfreeze={wrong}"), say=lambda line: None)


def test_rates_by_pattern_multiply(recipe: MakeRecipe) -> None:
    ready = prepare.prepare(
        recipe("tune={layer_decay: 0.5, rates: {'**.layer.1.**': 3, '**.layer.*.output.**': 0.1}}"), say=lambda line: None
    )
    groups = freeze.groups(ready.loaded.model, 0.01, 0.0, ready.rates)
    rate = {n: g["initial_lr"] / 0.01 for g in groups for n in g["names"]}
    assert rate["bert.encoder.layer.1.output.dense.weight"] == pytest.approx(0.5 * 3 * 0.1)
    assert rate["bert.encoder.layer.1.intermediate.dense.bias"] == pytest.approx(0.5 * 3)
    assert rate["bert.encoder.layer.0.output.dense.weight"] == pytest.approx(0.25 * 0.1)
    assert rate["classifier.weight"] == 1
    with pytest.raises(InputError, match="tune.rates: '\\*\\*.kwery' matches no parameter that trains"):
        prepare.prepare(recipe("tune.rates={'**.kwery': 2}"), say=lambda line: None)


DROPPED = """
\"\"\"Train a gain on the output of every query projection.\"\"\"

import torch
from pydantic import Field
from torch import nn

from engine.freeze import train_only
from engine.schema import Patterns, Tune
from engine.swap import swap
from engine.layers._around import Around

STAYS = True


class Options(Tune):
    at: Patterns = Field(["**.{query,q_proj,q_lin,query_proj,q,c_attn,Wqkv}"], description="Where.")


class Gain(Around):
    def __init__(self, base):
        super().__init__(base)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.gain * self.base(x)


def apply(model, options, head):
    done = swap(model, options.at, lambda old, path: Gain(old), where="tune.at")
    train_only(model, [f"{s.path}.gain" for s in done] + head)
    return f"gain: {len(done)} projections"
"""


def test_a_new_method_is_one_new_file(recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropped into the folder, it is found by name, described, held to the laws, trained and opened again."""
    import sys

    import engine.tune
    from engine.keys import describe
    from engine.runs import open_run

    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "gain.py").write_text(DROPPED)
    monkeypatch.setattr(engine.tune, "__path__", [*engine.tune.__path__, str(tmp_path / "more")])
    monkeypatch.setitem(CASES, "gain", {"method": "gain"})
    assert "gain" in find.names("tune")
    assert any(meaning == "(gain) Where." for *_, meaning in describe())
    for architecture in ARCHITECTURES:
        test_laws("gain", architecture)
    test_torch_compile_changes_nothing("gain")
    lines: list[str] = []
    finetune.finetune(recipe("tune.method=gain", "tune.at=**.value"), "r", say=lines.append)
    assert any(line.startswith("tune    gain: 2 projections") for line in lines)
    gains = [p.item() for n, p in open_run("r").model.named_parameters() if n.endswith("gain")]
    assert len(gains) == 2
    assert 1.0 not in gains
    sys.modules.pop("engine.tune.gain")


METHOD = (
    DROPPED.split("def apply", maxsplit=1)[0]
    .replace("STAYS = True", "")
    .replace("class Options(Tune)", "class GainOptions(Tune)")
    + """
class Method:
    Options = GainOptions
    STAYS = True

    @staticmethod
    def apply(model, options, head):
        done = swap(model, options.at, lambda old, path: Gain(old), where="tune.at")
        train_only(model, [f"{s.path}.gain" for s in done] + head)
        return f"gain: {len(done)} projections"
"""
)


def test_a_method_of_ones_own_is_a_class_in_a_file(recipe: MakeRecipe, files: Path) -> None:
    """Named by file.py:Class it trains, resumes, opens again from the run's own copy, and is guarded like a layer."""
    from engine.predict import evaluate_run
    from engine.recipe import load
    from engine.runs import open_run

    (files / "mine.py").write_text(METHOD)
    made = recipe("tune={method: 'mine.py:Method', at: '**.value'}", "checkpoint.every=1")
    lines: list[str] = []
    result = finetune.finetune(made, "r", say=lines.append)
    assert any(line.startswith("tune    gain: 2 projections") for line in lines)
    finetune.finetune(made, "half", interrupted=StopAt("half", 2), say=lambda line: None)
    resumed = finetune.finetune(load("half/recipe.yaml"), "half", resume=True, say=lambda line: None)
    assert resumed.metrics["test"] == result.metrics["test"]
    assert evaluate_run("r", "test.jsonl", [], as_json=True)["scores"]["accuracy"] == result.metrics["test"]["accuracy"]
    (files / "mine.py").write_text(METHOD + "\n# another file now\n")
    with pytest.raises(InputError, match="would execute the code of r/layers/mine.py"):
        open_run("r")
    assert open_run("r", allow_code=True)
    Path("r/layers/mine.py").write_text("raise SystemExit")
    with pytest.raises(InputError, match="the file was changed"):
        open_run("r", allow_code=True)
    for wrong, said in (
        ("mine.py:Meth", "no class 'Meth'; did you mean 'Method'"),
        ("mine.py:Gain", "has no Options; a method is written as"),
        ("nil.py:Method", "no file nil.py"),
    ):
        with pytest.raises(InputError, match=said):
            recipe(f"tune.method={wrong}")
