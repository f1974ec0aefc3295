"""Compact vocabulary: a run with it is the run without it, row by row; what was not there has only decayed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import MakeRecipe, StopAt, make_rows, write_jsonl
from laws import ARCHITECTURES, IDS, batch, still
from safetensors.torch import load_file
from test_loop import model_bytes, run
from test_weights import _quick, ready, steps  # noqa: F401
from torch import nn

from engine import checkpoint, freeze, models
from engine.errors import RunError
from engine.fast.vocabulary import CompactEmbedding, Vocabulary
from engine.fast.weights import Masters
from engine.layers.lora import LoRAEmbedding
from engine.progress import Progress

OFF = "train.compact_vocabulary=false"
TABLE = "bert.embeddings.word_embeddings.weight"


@pytest.fixture
def few(files: Path) -> Path:
    """Train, validation and test use some of the tiny model's words; the others stand nowhere."""
    for name, count, seed in (("train", 90, 1), ("validation", 30, 2), ("test", 30, 3)):
        rows = [{**row, "text": " ".join(w for w in row["text"].split() if len(w) < 5) or "a"} for row in make_rows(count, seed)]
        write_jsonl(files / f"{name}.jsonl", rows)
    return files


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_a_run_with_it_is_the_run_without_it(few: Path, recipe: MakeRecipe, decay: float, still_bert: Path) -> None:
    """Losses, norms and used rows to float rounding; unused rows to the bit without decay, to rounding with it."""
    options = [f"train.weight_decay={decay}", "train.learning_rate=1e-3"]
    records, models_ = [], []
    for more in ([OFF], []):
        made, model = steps(recipe(*options, *more, model=still_bert), 12)
        records.append(made)
        models_.append(model)
    whole, small = (m.bert.embeddings.word_embeddings for m in models_)
    assert type(whole) is nn.Embedding
    assert type(small) is CompactEmbedding
    assert len(small.weight) < 0.9 * len(whole.weight)
    for a, b in zip(*records, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)
    torch.testing.assert_close(small.weight, whole.weight[small.tokens], rtol=1e-5, atol=1e-6)
    assert float(small.decayed) == pytest.approx((1 - 1e-3 * decay) ** 12, rel=1e-12)


@pytest.mark.parametrize("padding", [None, 0])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_a_lookup_adds_what_embedding_would(padding: int | None, kind: str) -> None:
    """Two micro-batches with repeated rows, beside F.embedding's gradient in float64; in bfloat16 sums are float32 all the same."""
    torch.manual_seed(0)
    old = nn.Embedding(50, 8, padding_idx=padding)
    small, table = CompactEmbedding(old, torch.arange(0, 50, 2)), old.weight.detach().double().requires_grad_()
    masters = Masters(small, kind)
    for _ in range(2):
        ids = 2 * torch.randint(0, 25, (3, 40))
        g = torch.randn(3, 40, 8).bfloat16()  # whose numbers both types hold
        small(ids).backward(g.to(small.weight.dtype))
        torch.nn.functional.embedding(ids, table, padding).backward(g.double())
    assert table.grad is not None
    weight = freeze.moved(small.weight)
    found = weight.grad
    assert found is not None
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), table.grad[::2], rtol=1e-5, atol=1e-5)
    weight.grad[3] = torch.nan  # what stands in a gradient does not matter once it is dropped
    weight.grad = None
    small(torch.tensor([[8]])).sum().backward()  # the next step reads one other row
    assert weight.grad is not None
    assert weight.grad.nonzero()[:, 0].unique().tolist() == [4]
    masters.restore()


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_the_saved_model_holds_the_whole_table(few: Path, recipe: MakeRecipe, decay: float) -> None:
    """With warm-up, a falling rate, the best weights restored (an earlier product of decay), and bfloat16 weights beside."""
    options = [
        f"train.weight_decay={decay}",
        "train.learning_rate=1e-2",
        "train.warmup=3",
        "early_stopping={monitor: loss}",
        "evaluate.every=3",
        "train.max_steps=10",
    ]
    run(recipe(*options, OFF), "whole")
    run(recipe(*options), "small")
    run(recipe(*options, "train.weights=bfloat16"), "low")
    whole, small, low = (load_file(f"{out}/model/model.safetensors") for out in ("whole", "small", "low"))
    assert whole.keys() == small.keys() == low.keys()
    assert (
        json.loads(Path("whole/metrics.json").read_text())["best_step"]
        == json.loads(Path("small/metrics.json").read_text())["best_step"]
    )
    found, lean, _ = ready(recipe(*options))
    others = lean.vocabulary.others
    assert len(others) > 5
    start = lean.vocabulary.rest
    if decay == 0:
        assert torch.equal(whole[TABLE][others], start)
        assert torch.equal(small[TABLE][others], start)
        assert torch.equal(low[TABLE][others], start)
    else:
        assert not torch.allclose(whole[TABLE][others], start, rtol=1e-4)
        torch.testing.assert_close(small[TABLE][others], whole[TABLE][others], rtol=3e-6, atol=0)
    for name in whole:
        torch.testing.assert_close(small[name], whole[name], rtol=1e-4, atol=1e-5)
    assert type(found.loaded.model.bert.embeddings.word_embeddings) is CompactEmbedding
    lean.restore()
    assert type(found.loaded.model.bert.embeddings.word_embeddings) is nn.Embedding


def test_resumed_at_any_step_equals_never_stopped(few: Path, recipe: MakeRecipe) -> None:
    options = ["train.weight_decay=0.3", "tune.unfreeze=[{after: 0.3, train: '**.embeddings.**'}]", "train.max_steps=8"]
    run(recipe(*options), "whole")
    for stop in (1, 5):
        run(recipe(*options), f"r{stop}", interrupted=StopAt(f"r{stop}", stop))
        run(recipe(*options), f"r{stop}", resume=True)
        assert model_bytes(f"r{stop}") == model_bytes("whole")
    saved = load_file(sorted(Path("whole/checkpoints").glob("step-*"))[-1] / "weights.safetensors")
    assert saved[TABLE].shape[0] == len(saved[TABLE.replace("weight", "tokens")])
    assert 0.5 < float(saved[TABLE.replace("weight", "decayed")]) < 1
    run(recipe(*options, OFF), "plain")
    torch.testing.assert_close(
        load_file("whole/model/model.safetensors")[TABLE], load_file("plain/model/model.safetensors")[TABLE], rtol=1e-4, atol=1e-5
    )


def test_other_tokens_than_the_checkpoint_s_are_refused(few: Path, recipe: MakeRecipe, tmp_path: Path) -> None:
    model = ready(recipe())[0].loaded.model
    path = checkpoint.write(tmp_path / "c", "best-00000001", model, Progress())
    tokens = model.bert.embeddings.word_embeddings.tokens
    tokens[0], tokens[1] = tokens[1].clone(), tokens[0].clone()
    with pytest.raises(RunError, match=r"other tokens' embeddings"):
        checkpoint.load_weights(path, model)


def test_what_stands_in_no_split_is_an_error_and_never_another_row(few: Path, recipe: MakeRecipe) -> None:
    found, lean, _ = ready(recipe())
    model, others = found.loaded.model.eval(), lean.vocabulary.others
    ids = torch.tensor([[2, int(others[0]), 3]])
    with pytest.raises(IndexError):
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    special = torch.tensor([found.loaded.tokenizer.all_special_ids])
    assert torch.isfinite(model(input_ids=special, attention_mask=torch.ones_like(special)).logits).all()


def architecture(name: str) -> Any:
    """The config of a tiny one."""
    torch.manual_seed(0)
    return getattr(transformers, f"{name}Config")(**ARCHITECTURES[name], **IDS)


@pytest.mark.parametrize("name", ["Bert", "Roberta", "Electra", "DistilBert", "DebertaV2", "ModernBert", "GPT2", "Llama"])
def test_on_every_architecture_outputs_and_gradients_are_the_same(name: str) -> None:
    """Ids stay the model's own, so padding, positions from ids and the last token's place are found as before."""
    model = still(transformers.AutoModelForSequenceClassification.from_config(architecture(name)))
    inputs = batch()
    model(**inputs).logits.logsumexp(1).sum().backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    expected = model(**inputs).logits.detach()
    model.zero_grad()
    compact = Vocabulary(model, [inputs["input_ids"].numpy().ravel()], [0, 1, 2])
    assert compact.path, compact.said
    table = f"{compact.path}.weight"
    assert torch.equal(model(**inputs).logits, expected)
    model(**inputs).logits.logsumexp(1).sum().backward()
    for n, p in model.named_parameters():
        if n != table and n in whole:
            assert torch.equal(p.grad, whole[n]), n
    assert torch.equal(model.get_parameter(table).grad, whole[table][compact.tokens])
    assert not whole[table][compact.others].any()
    before = compact.rest.clone()
    compact.restore()
    assert model.get_parameter(table).shape == whole[table].shape
    assert torch.equal(model.get_parameter(table)[compact.others], before)


def test_it_leaves_alone_what_it_must(recipe: MakeRecipe) -> None:
    few, special = [np.array([5, 6, 7])], [0, 1, 2]
    for kind in ("MaskedLM", "CausalLM"):
        name = "Bert" if kind == "MaskedLM" else "GPT2"
        model = getattr(transformers, f"AutoModelFor{kind}").from_config(architecture(name))
        assert not Vocabulary(model, few, special).path
        assert "are shared by" in Vocabulary(model, few, special).said
    t5 = transformers.AutoModelForSequenceClassification.from_config(architecture("T5"))
    assert not Vocabulary(t5, few, special).path
    model = transformers.AutoModelForSequenceClassification.from_config(architecture("Bert"))
    model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    frozen = Vocabulary(model, few, special)
    assert (frozen.path, frozen.said) == ("", "")
    model.bert.embeddings.word_embeddings.weight.requires_grad_(True)
    assert "57 of its 60 tokens are used" in Vocabulary(model, [np.arange(3, 60)], []).said
    model.bert.embeddings.word_embeddings = LoRAEmbedding(model.bert.embeddings.word_embeddings, 2, 4.0, False)
    assert "LoRAEmbedding" in Vocabulary(model, few, special).said


@pytest.mark.skipif(not models._embedded("here"), reason="the embedded MiniLM is not installed")
def test_memory_of_the_real_model_goes_down(few: Path, recipe: MakeRecipe) -> None:
    """12 bytes for each number of a row that is not there: gradient and AdamW's two averages; the rows themselves are kept."""
    found, lean, optimizer = ready(recipe(model=Path(models.EMBEDDED)))
    unused = len(lean.vocabulary.others)
    assert unused > 30_000
    trained = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert trained + 384 * unused == sum(p.numel() for p in found.loaded.model.parameters()) + lean.vocabulary.rest.numel()
    lean.restore()
    assert models.count(found.loaded.model)[0] == trained + 384 * unused
    assert found.loaded.model.get_input_embeddings().weight.shape == (30522, 384)
