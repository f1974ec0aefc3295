"""LoRA: identity at init, base untouched, merged = unmerged, and the peft package reads what is written."""

import json
from pathlib import Path

import pytest
import torch
from conftest import FLOAT32, MakeRecipe
from safetensors.torch import load_file
from torch import nn

from engine import adapters, finetune, prepare
from engine.errors import InputError
from engine.layers import lora

QUIET = {"say": lambda line: None}


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    ids = torch.randint(5, 60, (6, 17))
    mask = torch.ones_like(ids)
    mask[2, 9:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch()).logits


def test_at_init_the_model_is_the_base_and_only_lora_and_head_train(recipe: MakeRecipe) -> None:
    off = ("train.packing=false", "train.last_layer=false")
    plain, adapted = (prepare.prepare(recipe(*off, *more), **QUIET).loaded.model for more in ((), ("tune.method=lora",)))
    assert torch.equal(logits(adapted), logits(plain))
    adapted = prepare.prepare(recipe("tune.method=lora"), **QUIET).loaded.model  # other shapes, so other sums
    torch.testing.assert_close(logits(adapted), logits(plain), rtol=FLOAT32, atol=FLOAT32)
    training = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert len(training) == 2 * 2 * 2 + 2
    assert all(n.endswith(("lora_A", "lora_B")) or n.startswith("classifier.") for n in training)


def test_the_base_is_bit_equal_after_training(recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {n: p.clone() for n, p in prepare.prepare(recipe(), **QUIET).loaded.model.named_parameters()}
    saved: list[dict[str, torch.Tensor]] = []
    keep = adapters.save

    def watch(model: nn.Module, *rest: object) -> None:
        saved.append({n: p.detach().clone() for n, p in model.named_parameters()})
        keep(model, *rest)

    monkeypatch.setattr(adapters, "save", watch)
    finetune.finetune(recipe("tune.method=lora", "tune.r=3"), "r", **QUIET)
    trained = {n.replace(".base.", "."): p for n, p in saved[0].items()}
    frozen = [n for n in before if not n.startswith("classifier.")]
    assert len(frozen) > 30
    assert all(torch.equal(trained[n], before[n]) for n in frozen)
    assert all(p.abs().max() > 0 for n, p in trained.items() if n.endswith("lora_B"))


def test_the_adapter_loads_in_peft_and_the_merged_model_computes_the_same(recipe: MakeRecipe, bert: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is a rival to compare with, not a dependency")
    from transformers import AutoModelForSequenceClassification

    finetune.finetune(
        recipe("tune={method: lora, r: 4, alpha: 6, dropout: 0.1, at: ['**.{query,key,value}', '**.dense']}"), "r", **QUIET
    )
    merged = AutoModelForSequenceClassification.from_pretrained("r/model")
    base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
    theirs = peft.PeftModel.from_pretrained(base, "r/adapter")
    assert torch.allclose(logits(theirs), logits(merged), atol=1e-5)
    assert not torch.allclose(
        logits(merged), logits(AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)), atol=1e-2
    )
    config = json.loads(Path("r/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["modules_to_save"]) == (4, 6, ["classifier"])


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_merged_equals_unmerged_and_the_formula(kind: str) -> None:
    from transformers.pytorch_utils import Conv1D

    base = nn.Linear(5, 7) if kind == "Linear" else Conv1D(7, 5)
    layer = lora.LoRALinear(base, r=3, alpha=6).double()
    assert layer.lora_A.shape == (3, 5)
    assert layer.lora_B.shape == (7, 3)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    unmerged = layer(x)
    weight = base.weight if kind == "Linear" else base.weight.T
    formula = x @ (weight + (6 / 3) * layer.lora_B @ layer.lora_A).T + base.bias
    assert torch.allclose(unmerged, formula, atol=1e-12)
    assert torch.allclose(layer.merged()(x), unmerged, atol=1e-12)


def test_targets_that_match_nothing_or_are_not_linear(recipe: MakeRecipe) -> None:
    for at, said in (
        ("'**.qurey'", "'\\*\\*.qurey' matches no module of this model; nearest are: .*query"),
        ("'**.LayerNorm'", "this method adapts linear layers"),
    ):
        with pytest.raises(InputError, match=said) as error:
            finetune.finetune(recipe(f"tune={{method: lora, at: [{at}]}}"), "r", **QUIET)
        assert "tune.at" in str(error.value)
        assert not Path("r").exists()


def test_the_run_keeps_only_what_trains_in_its_checkpoints(recipe: MakeRecipe) -> None:
    finetune.finetune(recipe("tune.method=lora"), "r", **QUIET)
    newest = sorted(Path("r/checkpoints").glob("step-*"))[-1]
    names = load_file(newest / "weights.safetensors").keys()
    assert {n.rpartition(".")[2] for n in names if "classifier" not in n} <= {
        "lora_A",
        "lora_B",
        "position_ids",
        "token_type_ids",
    }


def test_last_n_and_bitfit_freeze_the_rest(recipe: MakeRecipe) -> None:
    def training(*options: str) -> set[str]:
        model = prepare.prepare(recipe(*options), **QUIET).loaded.model
        return {n for n, p in model.named_parameters() if p.requires_grad}

    one = training("tune={method: last_n, n: 1}")
    assert {n.split(".")[3] for n in one if "encoder" in n} == {"1"}
    assert not any("embeddings" in n for n in one)
    assert {"bert.pooler.dense.weight", "classifier.weight"} <= one
    assert training("tune={method: last_n, n: 0}") == {"classifier.weight", "classifier.bias"}
    bias = training("tune.method=bitfit")
    assert all(n.endswith(".bias") or n.startswith("classifier.") for n in bias)
    assert "bert.encoder.layer.0.attention.self.query.bias" in bias
    with pytest.raises(InputError, match="3 is more than this model's 2 blocks"):
        training("tune={method: last_n, n: 3}")


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_the_update_s_written_gradient_is_autograd_s(kind: torch.dtype) -> None:
    """Against the formula in plain operations, in float64 to rounding; in bfloat16 no further from float64 than autograd's own."""
    torch.manual_seed(0)
    y, x, a, b = (torch.randn(*s, dtype=torch.float64) for s in ((3, 5, 7), (3, 5, 6), (2, 6), (7, 2)))
    weight = torch.randn(3, 5, 7, dtype=torch.float64)

    def run(function: object, kind: torch.dtype) -> list[torch.Tensor]:
        given = [t.to(kind).requires_grad_() for t in (y, x, a, b)]
        out = function(*given)  # type: ignore[operator]
        return [t.double() for t in (out, *torch.autograd.grad((out * weight.to(kind)).sum(), given))]

    def plain(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return y + 0.7 * (x @ a.T @ b.T)

    exact, theirs = run(plain, torch.float64), run(plain, kind)
    for one, other, true in zip(run(lambda *given: lora.LowRank.apply(*given, 0.7), kind), theirs, exact, strict=True):
        assert (one - true).abs().max() <= 1.5 * (other - true).abs().max() + 1e-12 * true.abs().max()


def test_the_update_keeps_its_parameters_types_under_autocast() -> None:
    layer = lora.LoRALinear(nn.Linear(6, 7).requires_grad_(False), 2, 4.0)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 5, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert [t.grad.dtype for t in (x, layer.lora_A, layer.lora_B)] == [torch.float32] * 3  # type: ignore[union-attr]
