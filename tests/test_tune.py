"""Every tuning method on every architecture obeys the same laws.

A method is a file in engine/tune/; a case below names its options. A new file without a case fails the count.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MakeRecipe
from torch import nn

from engine import find, finetune, freeze, models, prepare
from engine.errors import InputError

CASES: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "last_n": {"method": "last_n", "n": 1},
    "bitfit": {"method": "bitfit"},
    "layernorm": {"method": "layernorm"},
    "lora": {"method": "lora", "r": 4},
    "rslora": {"method": "lora", "r": 4, "rslora": True},
    "dora": {"method": "lora", "r": 4, "dora": True},
    "loraplus": {"method": "lora", "b_rate": 16.0},
    "ia3": {"method": "ia3"},
    "houlsby": {"method": "adapter", "reduction": 4},
    "prefix": {"method": "prefix", "length": 5},
    "prompt": {"method": "prompt", "length": 5},
    "random prompt": {"method": "prompt", "length": 5, "init": "random"},
    "ptuning": {"method": "ptuning", "length": 5},
    "lstm ptuning": {"method": "ptuning", "length": 5, "encoder": "lstm", "encoder_size": 16, "encoder_layers": 1},
    "reparametrized prefix": {"method": "prefix", "length": 5, "reparametrize": True, "bottleneck": 16},
    "pfeiffer": {"method": "adapter", "placement": "pfeiffer", "reduction": 4},
}
REFUSED = {
    ("bitfit", "Llama"): "needs biases",
    ("bitfit", "ModernBert"): "needs biases",
    ("bitfit", "T5"): "needs biases",
}
CHANGES_AT_INIT = {"prefix", "prompt", "ptuning"}  # a random prefix or prompt is no identity, and none is promised
SMALL = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Bert": SMALL, "Roberta": SMALL, "Electra": SMALL, "DebertaV2": SMALL, "ModernBert": SMALL, "Llama": {**SMALL, "num_key_value_heads": 2},
    "DistilBert": {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "GPT2": {"vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "T5": {"vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
}  # fmt: skip


def build(architecture: str) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(**ARCHITECTURES[architecture], **IDS)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():  # random heads and norms, so that nothing is hidden by a zero
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    lengths = torch.tensor([11, 4, 7, 2])
    mask = (torch.arange(11) < lengths[:, None]).long()
    ids = torch.randint(3, 60, mask.shape) * mask
    ids[torch.arange(4), lengths - 1] = IDS["eos_token_id"]  # T5 classifies by the token that ends the text
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: nn.Module, inputs: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**(inputs or batch())).logits


def apply(model: Any, case: str) -> tuple[Any, Any]:
    """Apply a case to a model; returns (method, options)."""
    options = CASES[case]
    method = find.module("tune", options["method"], "test")
    made = method.Options.model_validate(options)
    method.apply(model, made, models.head_of(model, []))
    return method, made


def train(model: Any, method: Any, options: Any, steps: int = 3) -> None:
    rates = method.rates(model, options) if hasattr(method, "rates") else {}
    optimizer = torch.optim.AdamW(freeze.groups(model, 1e-2, 0.01, rates))
    model.train()
    for _ in range(steps):
        model(**batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def plain_name(name: str) -> str:
    return name.replace(".base.", ".")


def test_every_method_has_a_case() -> None:
    assert {c["method"] for c in CASES.values()} == set(find.names("tune"))


Law = Callable[[str, str], None]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", CASES)
def test_laws(case: str, architecture: str) -> None:
    base = build(architecture)
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    expected = logits(base)
    model = copy.deepcopy(base)
    refused = REFUSED.get((CASES[case]["method"], architecture))
    if refused:
        with pytest.raises(InputError, match=refused):
            apply(model, case)
        assert torch.equal(logits(model), expected)
        return
    method, options = apply(model, case)

    # identity at init
    if CASES[case]["method"] not in CHANGES_AT_INIT:
        assert torch.allclose(logits(model), expected, atol=1e-5)

    # only its own parameters train, and each gets a gradient
    own = {n for n, p in model.named_parameters() if p.requires_grad}
    assert own
    model.train()
    model(**batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} <= own
    unreached = {n for n in own if model.get_parameter(n).grad is None}
    assert case == "full" or not unreached, unreached
    model.zero_grad(set_to_none=True)

    # after training the base is bit-equal, and something has moved
    train(model, method, options)
    for name, parameter in model.named_parameters():
        if name not in own:
            assert torch.equal(parameter, before[plain_name(name)]), name
    trained = logits(model)
    assert not torch.allclose(trained, expected, atol=1e-3)

    # padding changes nothing
    one = {k: v[1:2, :4] for k, v in batch().items()}
    assert torch.allclose(logits(model, one), trained[1:2], atol=1e-5)

    # saved and loaded it computes the same
    fresh = build(architecture)
    apply(fresh, case)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), trained)

    # merged it is the plain architecture and computes the same
    if hasattr(method, "merge"):
        method.merge(model)
        assert {n for n, _ in model.named_parameters()} == set(before)
        assert torch.allclose(logits(model), trained, atol=1e-5)
    else:
        assert getattr(method, "STAYS", False) == ({n for n, _ in model.named_parameters()} != set(before))


@pytest.mark.parametrize("case", [c for c in CASES if c != "full"])
def test_bfloat16_and_gradient_checkpointing(case: str) -> None:
    model = build("Bert")
    apply(model, case)
    plain = copy.deepcopy(model)
    for m in (model, plain):
        for module in m.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        m.train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    for m in (model, plain):
        m(**batch(), labels=torch.tensor([0, 1, 1, 0])).loss.backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.allclose(a.grad, b.grad, atol=1e-6), name
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = plain(**batch(), labels=torch.tensor([0, 1, 1, 0])).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in plain.parameters() if p.grad is not None)


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
    import re

    with pytest.raises(InputError) as error:
        finetune.finetune(recipe(options), "r", say=lambda line: None)
    assert re.search(said.replace("**", r"\*\*"), str(error.value))
    assert not Path("r").exists()


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


DROPPED = """
\"\"\"Train a gain on the output of every query projection.\"\"\"

import torch
from pydantic import Field
from torch import nn

from engine.freeze import train_only
from engine.schema import Patterns, Tune
from engine.swap import swap
from engine.tune._around import Around

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
    from engine.recipe import describe
    from engine.runs import open_run

    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "gain.py").write_text(DROPPED)
    monkeypatch.setattr(engine.tune, "__path__", [*engine.tune.__path__, str(tmp_path / "more")])
    monkeypatch.setitem(CASES, "gain", {"method": "gain"})
    assert "gain" in find.names("tune")
    assert any(meaning == "(gain) Where." for *_, meaning in describe())
    for architecture in ARCHITECTURES:
        test_laws("gain", architecture)
    test_bfloat16_and_gradient_checkpointing("gain")
    lines: list[str] = []
    finetune.finetune(recipe("tune.method=gain", "tune.at=**.value"), "r", say=lines.append)
    assert any(line.startswith("tune    gain: 2 projections") for line in lines)
    gains = [p.item() for n, p in open_run("r").model.named_parameters() if n.endswith("gain")]
    assert len(gains) == 2
    assert 1.0 not in gains
    sys.modules.pop("engine.tune.gain")
