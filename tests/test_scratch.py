"""Models from scratch, tokenizers of one's own, hidden tokens, stand-ins: the same bits from the same recipe, and said what is used."""

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import FLOAT32, SHARED, WORDS, MakeRecipe, StopAt, make_bert, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import disk, find, models, prepare, recipe, report, runs, scratch, vocabulary
from engine.__main__ import main
from engine.data.windows import Windows
from engine.errors import InputError
from engine.finetune import finetune
from engine.schema import FromScratch, NewTokenizer
from engine.tasks import masked_lm

QUIET = {"say": lambda line: None}
KINDS = {"wordpiece": vocabulary.ENCODER, "byte_bpe": vocabulary.GPT2, "unigram": vocabulary.ENCODER_DECODER}
BODY = {"architecture": "bert", "layers": 1, "hidden": 16, "heads": 2, "max_positions": 64}
SCRATCH = [f"model.from_scratch={json.dumps(BODY)}", "model.tokenizer={train: {kind: wordpiece, vocabulary: 300}}"]


def sentences(count: int, seed: int = 0) -> list[str]:
    """Word salads with endings, capitals, accents, digits, and Chinese."""
    draw = random.Random(seed)
    endings, chinese = ("", "s", "ed", "ing", "ness", "ly"), "味道很好送餐快量大不错了是的我们都喜欢"
    out = []
    for _ in range(count):
        words = [draw.choice(WORDS) + draw.choice(endings) for _ in range(draw.randint(3, 12))]
        words[0] = words[0].capitalize()
        out.append(
            " ".join(words) + draw.choice([".", "!", ", café.", f" {draw.randint(1, 99)}."]) + "".join(draw.choices(chinese, k=6))
        )
    return out


def trained(kind: str, texts: list[str], **more: Any) -> Any:
    options = NewTokenizer(kind=kind, **{"vocabulary": 500, **more})  # type: ignore[arg-type]
    return vocabulary.train(options, KINDS[kind], texts, segments=kind == "wordpiece")


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all else here, and is tested elsewhere."""
    monkeypatch.setattr(report, "write", lambda folder: disk.replace(folder / "report.html", b"report"))


# -- tokenizers -------------------------------------------------------------------------------------------------------


def test_the_same_texts_give_the_same_bytes_in_every_process() -> None:
    """Each process walks through its hash maps in an order of its own; the trainers alone would give others."""
    code = (
        "import sys, json, hashlib; sys.path.insert(0, sys.argv[1])\n"
        "from engine import vocabulary as v; from engine.schema import NewTokenizer\n"
        "texts, kinds = json.load(sys.stdin), ('wordpiece', 'byte_bpe', 'unigram')\n"
        "made = [v.train(NewTokenizer(kind=k, vocabulary=500), v.ENCODER, texts, True).to_str() for k in kinds]\n"
        "print([hashlib.sha256(one.encode()).hexdigest() for one in made])"
    )
    texts, command = json.dumps(sentences(300)), [sys.executable, "-c", code, str(find.PROJECT)]
    said = {subprocess.run(command, input=texts, capture_output=True, text=True, check=True).stdout for _ in range(3)}
    assert len(said) == 1
    assert said.pop().count("'") == 6


def test_the_librarys_own_trainer_would_not() -> None:
    """The care above is needed: WordPiece pieces get other ids when it is left out."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from tokenizers import models as kinds

    made = set()
    for _ in range(8):
        one = Tokenizer(kinds.WordPiece(unk_token="[UNK]"))
        one.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        one.train_from_iterator(sentences(300), trainers.WordPieceTrainer(vocab_size=500, show_progress=False))
        made.add(one.to_str())
    assert len(made) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_has_the_size_asked_for_or_less_and_special_tokens_first(kind: str) -> None:
    many = [chr(0x4E00 + i) * 3 + " " + chr(0x4E00 + i + 1) for i in range(2000)]  # more characters than there is room for
    for texts in (sentences(300), sentences(100) + many):
        made = trained(kind, texts)
        assert 300 < made.get_vocab_size() <= 500
        special = list(dict.fromkeys(KINDS[kind].tokens.values()))
        assert [made.token_to_id(token) for token in special] == list(range(len(special)))
        assert sorted(made.get_vocab().values()) == list(range(made.get_vocab_size()))


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8"), min_size=1))
def test_bytes_know_every_text(text: str) -> None:
    made = _bytes()
    assert made.decode(made.encode(text).ids, skip_special_tokens=False) == text


_made: list[Any] = []


def _bytes() -> Any:
    if not _made:
        _made.append(trained("byte_bpe", sentences(100)))
    return _made[0]


def test_wordpiece_cuts_chinese_into_characters_and_words_into_pieces() -> None:
    made = trained("wordpiece", sentences(400), lowercase=True)
    assert made.encode("味道很好").tokens == ["[CLS]", "味", "道", "很", "好", "[SEP]"]
    tokens = made.encode("Loveliness, CAFÉ").tokens
    assert "".join(t.removeprefix("##") for t in tokens[1:-1]) == "loveliness,cafe"
    pair = made.encode("good", "bad")
    assert pair.tokens.count("[SEP]") == 2
    assert pair.type_ids[-2:] == [1, 1]
    assert "[UNK]" in made.encode("\u2603").tokens
    cased = trained("wordpiece", sentences(400))
    assert cased.decode(cased.encode("Good films").ids) == "Good films"


def test_frequent_pairs_become_pieces() -> None:
    """What a text repeats is written with fewer tokens than what it never held."""
    for kind in KINDS:
        made = trained(kind, sentences(400))
        usual, odd = "the film was never dull", "eht mlif saw revne ludl"
        assert len(made.encode(usual).tokens) < len(made.encode(odd).tokens) / 1.5


# -- models -----------------------------------------------------------------------------------------------------------

ARCHITECTURES = {
    "bert": "wordpiece",
    "gpt2": "byte_bpe",
    "llama": "byte_bpe",
    "t5": "unigram",
    "qwen3": "byte_bpe",
    "roberta": "byte_bpe",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_is_built_to_size_and_reads_back(architecture: str, tmp_path: Path) -> None:
    import transformers

    kind = scratch.config_class(architecture, "r.yaml")
    family, segments = scratch.family(kind), getattr(kind(), "type_vocab_size", 0) > 1
    options = NewTokenizer(kind=ARCHITECTURES[architecture], vocabulary=400)  # type: ignore[arg-type]
    tokenizer = vocabulary.wrap(vocabulary.train(options, family, sentences(100), segments).to_str(), family, segments, 64)
    spec = FromScratch(architecture=architecture, layers=3, hidden=24, heads=4, intermediate=40, max_positions=64, dropout=0.0)
    built = []
    for _ in range(2):
        torch.manual_seed(5)
        built.append(scratch.build(spec, kind, tokenizer, "AutoModelForSequenceClassification", {"num_labels": 3}, "r.yaml"))
    model = built[0].eval()
    models.settle(model, tokenizer, "r.yaml", 32)
    assert all(torch.equal(a, b) for a, b in zip(built[0].state_dict().values(), built[1].state_dict().values(), strict=True))
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 24, 4)
    assert {40} <= {size for p in model.parameters() for size in p.shape}
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert not [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    texts = ["The film was not dull.", "Good"]
    batch = again(texts, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], tokenizer(texts, padding=True, return_tensors="pt")["input_ids"])
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, local_files_only=True).eval()
    with torch.inference_mode():
        out = loaded(**batch).logits
        assert torch.equal(out, model(**batch).logits)
        assert out[1].numpy() == pytest.approx(loaded(**again(texts[1:], return_tensors="pt")).logits[0].numpy(), abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.name=x", *SCRATCH], ["model: name and from_scratch stand there both"]),
        (["model.name=null"], ["neither name nor from_scratch"]),
        (SCRATCH[:1], ["model.tokenizer: a model from scratch needs one"]),
        (["model.tokenizer={train: {kind: wordpiece}}"], ["belong to its own tokens"]),
        ([*SCRATCH, "model.from_scratch.architecture=brt"], ["model.from_scratch.architecture", "did you mean 'bert'"]),
        ([*SCRATCH, "model.from_scratch.heads=3"], ["hidden 16 is no multiple of heads 3"]),
        ([*SCRATCH, "model.from_scratch.layer=3"], ["model.from_scratch.layer: unknown key; did you mean 'layers'"]),
        ([*SCRATCH, "model.from_scratch.options={hidden_akt: relu}"], ["bert has no 'hidden_akt'", "did you mean 'hidden_act'"]),
        ([*SCRATCH, "model.from_scratch.options={auto_map: x}"], ["bert has no 'auto_map'"]),
        ([*SCRATCH, "model.tokenizer.train.kind=bpe"], ["model.tokenizer.train.kind"]),
        ([*SCRATCH, "model.tokenizer=nowhere"], ["model.tokenizer: nowhere is no folder that holds a tokenizer.json"]),
        ([*SCRATCH, "model.from_scratch.max_positions=32"], ["data.max_length=48 is more than this model's 32 positions"]),
        ([*SCRATCH, "task=masked_lm", "data.columns={text: text}", "model.from_scratch.architecture=gpt2"], ["gpt2 has no AutoModelForMaskedLM"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_key(recipe: MakeRecipe, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        prepare.prepare(recipe(*overrides), **QUIET)
    for word in words:
        assert word in str(error.value)


def test_a_name_on_the_command_line_takes_the_place_of_scratch(tmp_path: Path, bert: Path, files: Path) -> None:
    (tmp_path / "s.yaml").write_text(
        "task: classification\ndata: {train: train.jsonl}\nmodel:\n  from_scratch: {architecture: bert}\n  tokenizer: {train: {kind: unigram}}\n"
    )
    assert recipe.load("s.yaml", [f"model.name={bert}"]).model.tokenizer is None
    assert recipe.load("s.yaml", ["model.from_scratch.layers=2"]).model.from_scratch.layers == 2  # type: ignore[union-attr]


# -- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_from_scratch_goes_on_bit_for_bit_and_trains_its_tokenizer_once(
    recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [*SCRATCH, "train.epochs=1", "checkpoint.every=2", "data.cache=cache-a"]
    said: list[str] = []
    finetune(recipe(*options), "whole", say=said.append)
    assert any("bert (from scratch)" in line for line in said)
    about = json.loads(Path("whole/environment.json").read_text())["model"]
    assert (about["name"], about["origin"]) == ("bert", "from scratch")
    finetune(recipe(*options), "cut", **QUIET, interrupted=StopAt("cut", 3))
    kept = Path("cut/tokenizer.json").read_bytes()
    assert kept == Path("whole/tokenizer.json").read_bytes()
    monkeypatch.setattr(vocabulary, "train", lambda *a: pytest.fail("trained anew"))
    finetune(recipe(*options[:-1], "data.cache=cache-b"), "cut", **QUIET, resume=True)  # not even the cache is there
    for file in ("model/model.safetensors", "model/tokenizer.json", "metrics.json", "predictions/test.jsonl"):
        assert Path("cut", file).read_bytes() == Path("whole", file).read_bytes(), file
    finetune(recipe(*options, "seed=14"), "other", **QUIET)  # the same texts: from the cache
    assert Path("other/model/model.safetensors").read_bytes() != Path("whole/model/model.safetensors").read_bytes()
    assert json.loads(Path("other/environment.json").read_text())["model"]["sha256"] != about["sha256"]
    assert main(["predict", "whole", "--text", "a warm film", "--output", "p.jsonl"]) == 0
    assert main(["evaluate", "whole", "--data", "test.jsonl"]) == 0


def test_a_damaged_tokenizer_in_the_cache_is_trained_anew(recipe: MakeRecipe) -> None:
    first = prepare.prepare(recipe(*SCRATCH), **QUIET).loaded
    (path,) = Path("runs/.cache/tokenizers").glob("*.json")
    path.write_bytes(path.read_bytes().replace(b"film", b"fxlm"))
    again = prepare.prepare(recipe(*SCRATCH), **QUIET).loaded
    assert first.trained == again.trained
    assert first.sha256 == again.sha256


def test_an_adapter_on_random_weights_is_noted_and_merges(recipe: MakeRecipe) -> None:
    said: list[str] = []
    finetune(recipe(*SCRATCH, "tune={method: lora, r: 2}", "train.epochs=1"), "r", say=said.append)
    assert any("are random, and those that lora freezes stay so" in line for line in said)
    assert main(["merge", "r"]) == 0
    assert main(["predict", "r", "--also", "r", "--text", "good", "--output", "p.jsonl"]) == 0
    recorded = json.loads(Path("r/environment.json").read_text())
    recorded["model"]["sha256"] = "0" * 64
    Path("r/environment.json").write_text(json.dumps(recorded))
    assert main(["merge", "r", "--out", "again"]) == 2


# -- masked_lm --------------------------------------------------------------------------------------------------------


@pytest.fixture
def masked(recipe: MakeRecipe) -> Any:
    """masked("key=value", ...) -> a prepared masked_lm recipe on texts of 5 to 40 words."""

    def make(*overrides: str, model: Path | None = None) -> prepare.Prepared:
        options = ["task=masked_lm", "data.columns={text: text}", "data.max_length=16", *overrides]
        draw = random.Random(3)
        for name, count in (("train", 60), ("validation", 20), ("test", 20)):
            write_jsonl(
                Path(f"{name}.jsonl"), [{"text": " ".join(draw.choices(WORDS, k=draw.randint(5, 40)))} for _ in range(count)]
            )
        return prepare.prepare(recipe(*options, **({"model": model} if model else {})), **QUIET)

    return make


def test_no_token_of_a_long_text_is_lost(masked: Any) -> None:
    ready = masked()
    encoded, tokenizer = ready.encoded["train"], ready.loaded.tokenizer
    flat, offsets = encoded.ragged["input_ids"]
    assert len(encoded) > len(ready.splits["train"])
    assert encoded.lengths.max() == 16
    for i, row in enumerate(ready.splits["train"].table.rows):
        parts = [flat[offsets[e] + 1 : offsets[e + 1] - 1].tolist() for e in np.flatnonzero(encoded.row == i)]
        assert list(itertools.chain(*parts)) == tokenizer(row["text"], add_special_tokens=False)["input_ids"]


def test_what_is_hidden_is_a_function_of_seed_epoch_and_example(masked: Any) -> None:
    ready = masked("train.batch_size=7")
    encoded, windows = ready.encoded["train"], ready.windows

    def hidden(epoch: int, tokens: int, skip: int = 0, seed: int = 13) -> dict[int, list[int]]:
        """Example -> its labels, as the windows of an epoch bring them."""
        cut = Windows(encoded, ready.task.items, batch_size=7, tokens=tokens, seed=seed)
        out = {}
        for window in cut.epoch(epoch, skip):
            for part, batch in zip(cut.parts(window.rows, 0), window.micro_batches, strict=True):
                for i, labels, mask in zip(part.tolist(), batch["labels"], batch["attention_mask"], strict=True):
                    out[i] = labels[: int(mask.sum())].tolist()
        return out

    whole = hidden(0, 10_000)
    assert whole == hidden(0, 1)  # however a window is cut
    assert hidden(0, 100, skip=3).items() <= whole.items()  # wherever a run goes on
    assert hidden(1, 10_000) != whole != hidden(0, 10_000, seed=14)
    window = next(iter(windows.epoch(1)))
    assert windows.smaller(window).items == window.items  # the same tokens after memory ran out
    first = encoded.batch(np.arange(5))
    assert torch.equal(encoded.batch(np.array([3]))["labels"][0], first["labels"][3][: encoded.lengths[3]])  # evaluation


def test_of_the_hidden_tokens_8_in_10_are_masked_1_is_random_1_stays(masked: Any) -> None:
    ready = masked("data.masked=0.5")
    encoded, tokenizer = ready.encoded["train"], ready.loaded.tokenizer
    plain = {i: encoded.ragged["input_ids"][0][slice(*encoded.ragged["input_ids"][1][i : i + 2])] for i in range(len(encoded))}
    kinds = {"mask": 0, "random": 0, "same": 0}
    shares = []
    for epoch in range(20):
        batch = encoded.batch(np.arange(len(encoded)), (1, epoch))
        for i, (ids, labels) in enumerate(zip(batch["input_ids"].numpy(), batch["labels"].numpy(), strict=True)):
            ids, labels = ids[: len(plain[i])], labels[: len(plain[i])]
            chosen = labels != -100
            assert (ids == plain[i])[~chosen].all()
            assert (labels == plain[i])[chosen].all()
            assert not chosen[[0, -1]].any()  # [CLS] and [SEP] are never hidden
            assert chosen.sum() == max(1, round(0.5 * (len(ids) - 2)))
            shares.append(chosen.sum())
            for now, then in zip(ids[chosen], labels[chosen], strict=True):
                kinds["mask" if now == tokenizer.mask_token_id else "same" if now == then else "random"] += 1
    total = sum(kinds.values())
    assert total == sum(shares) > 4000
    assert kinds["mask"] / total == pytest.approx(0.8, abs=0.03)
    assert kinds["random"] / total == pytest.approx(0.1, abs=0.02)
    assert kinds["same"] / total == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "electra", "modernbert"])
def test_the_head_computes_for_hidden_tokens_alone_what_it_would_for_all(masked: Any, architecture: str) -> None:
    kind = "wordpiece" if architecture in ("bert", "distilbert", "electra") else "byte_bpe"
    body = {**BODY, "architecture": architecture, "dropout": 0.0}
    ready = masked(
        f"model.from_scratch={json.dumps(body)}",
        f"model.tokenizer={{train: {{kind: {kind}, vocabulary: 300}}}}",
        "data.max_length=32",
    )
    model, task = ready.loaded.model.eval(), ready.task
    batch = ready.encoded["train"].batch(np.arange(9), (1, 1))
    wanted = batch["labels"] != -100
    hooks = [m for m in model.modules() if m._forward_hooks]  # those of the packed rows
    task.loss(model, batch).backward()
    some = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="sum").backward()
    every = [p.grad for p in model.parameters() if p.grad is not None]
    a, b = (torch.cat([g.flatten().double() for g in grads]) for grads in (some, every))
    assert float((a - b).norm() / b.norm()) < FLOAT32
    with torch.inference_mode():
        assert task.forward(model, batch).numpy() == pytest.approx(logits[wanted].detach().numpy(), abs=1e-5)
    assert [m for m in model.modules() if m._forward_hooks] == hooks
    assert len(logits[wanted]) == task.items(batch)


def test_pretraining_goes_on_bit_for_bit_and_a_classifier_begins_from_it(recipe: MakeRecipe, masked: Any) -> None:
    masked()  # writes the files
    options = [
        "task=masked_lm",
        "data.columns={text: text}",
        "data.max_length=16",
        *SCRATCH,
        "train.epochs=2",
        "checkpoint.every=3",
    ]
    finetune(recipe(*options), "whole", **QUIET)
    finetune(recipe(*options), "cut", **QUIET, interrupted=StopAt("cut", 7))
    finetune(recipe(*options), "cut", **QUIET, resume=True)
    for file in ("model/model.safetensors", "metrics.json", "predictions/test.jsonl"):
        assert Path("cut", file).read_bytes() == Path("whole", file).read_bytes(), file
    results = json.loads(Path("whole/metrics.json").read_text())["test"]
    assert results["perplexity"] == pytest.approx(np.exp(results["loss"]))
    body = runs.open_run("whole").model.bert.state_dict()
    write_jsonl(Path("train.jsonl"), [{"text": "good film", "label": "p"}, {"text": "bad film", "label": "n"}] * 9)
    write_jsonl(Path("validation.jsonl"), [{"text": "good film", "label": "p"}, {"text": "bad film", "label": "n"}])
    ready = prepare.prepare(recipe("model.name=whole/model", "data.test=null"), **QUIET)
    assert all(name.startswith(("classifier", "bert.pooler")) for name in ready.loaded.fresh)
    found = ready.loaded.model.bert.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in body.items())
    assert ready.loaded.tokenizer.get_vocab() == runs.open_run("whole").tokenizer.get_vocab()


def test_a_text_that_asks_is_answered_there(recipe: MakeRecipe, masked: Any, capsys: pytest.CaptureFixture[str]) -> None:
    masked()
    finetune(recipe("task=masked_lm", "data.columns={text: text}", "data.max_length=16", "train.max_steps=1"), "r", **QUIET)
    capsys.readouterr()
    text = "the film was [MASK] and the book " + "was never very warm to us and " * 3 + "[MASK]"
    assert main(["predict", "r", "--text", text]) == 0
    line = json.loads(capsys.readouterr().out)
    assert [text[t["start"] : t["end"]] for t in line["tokens"]] == ["[MASK]", "[MASK]"]
    assert [t["truth"] for t in line["tokens"]] == [None, None]
    assert line["filled"] == masked_lm.filled(text, line["tokens"])
    assert line["filled"].replace(line["tokens"][0]["token"], "[MASK]").startswith("the film was [MASK]")


# -- decoders ---------------------------------------------------------------------------------------------------------


def test_a_decoder_reads_its_last_real_token(recipe: MakeRecipe, tmp_path: Path) -> None:
    """A config that names another padding token than the tokenizer's, and a tokenizer that pads on the left."""
    import transformers

    for architecture in ("gpt2", "llama"):
        body = {**BODY, "architecture": architecture, "dropout": 0.0}
        tokens = "model.tokenizer={train: {kind: byte_bpe, vocabulary: 400}}"
        first = prepare.prepare(recipe(f"model.from_scratch={json.dumps(body)}", tokens), **QUIET).loaded
        folder = tmp_path / architecture
        first.model.save_pretrained(folder)
        first.tokenizer.padding_side = "left"
        first.tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 7}))
        ready = prepare.prepare(recipe(model=folder), **QUIET)
        model, task, encoded = ready.loaded.model.eval(), ready.task, ready.encoded["train"]
        assert model.config.pad_token_id == ready.loaded.tokenizer.pad_token_id != 7
        with torch.inference_mode():
            together = task.forward(model, encoded.batch(np.arange(12)))
            hidden = model.base_model(
                **{k: v for k, v in encoded.batch(np.arange(12)).items() if k in ("input_ids", "attention_mask")}
            )[0]
            last = hidden[torch.arange(12), torch.tensor(encoded.lengths[:12]) - 1]
            assert together.numpy() == pytest.approx(model.score(last).numpy(), abs=1e-6)
            for i in range(12):
                alone = task.forward(model, encoded.batch(np.array([i])))
                assert alone[0].numpy() == pytest.approx(together[i].numpy(), abs=1e-5)
        finetune(recipe("train.max_steps=2", model=folder), f"run-{architecture}", **QUIET)
        saved = transformers.AutoTokenizer.from_pretrained(f"run-{architecture}/model", local_files_only=True)
        assert saved.padding_side == "right"


@pytest.mark.skipif(not (SHARED / "weights").exists(), reason="no ../shared/weights here")
def test_real_decoders_learn_to_classify(recipe: MakeRecipe) -> None:
    shared = SHARED / "weights"
    learn = ["train.epochs=4", "train.batch_size=8"]
    llama = finetune(recipe("train.learning_rate=2e-3", *learn, model=shared / "stories260K"), "llama", **QUIET)
    assert llama.metrics["test"]["accuracy"] >= 0.7
    body = {**BODY, "architecture": "gpt2", "dropout": 0.0}
    scratch_ = [
        f"model.from_scratch={json.dumps(body)}",
        f"model.tokenizer={shared / 'gpt2_tokenizer'}",
        "train.learning_rate=1e-2",
    ]
    gpt2 = finetune(recipe(*scratch_, *learn), "gpt2", **QUIET)
    assert gpt2.metrics["test"]["accuracy"] >= 0.7
    assert not Path("gpt2/tokenizer.json").exists()  # nothing was trained


# -- stand-ins --------------------------------------------------------------------------------------------------------

STAND_IN = """task: classification
model: {name: owner/large, revision: abc}
data:
  train: hub:owner/rows#train
  validation: validation.jsonl
tune: {method: lora, r: 2}
train: {epochs: 9, batch_size: 16}
offline:
  model:
    from_scratch: {architecture: bert, layers: 1, hidden: 16, heads: 2}
    tokenizer: {train: {kind: wordpiece, vocabulary: 300}}
  data: {train: train.jsonl}
  tune: {method: full}
  train: {epochs: 1}
"""


def test_a_stand_in_is_used_only_when_asked_for_and_said(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "s.yaml").write_text(STAND_IN)
    assert main(["finetune", "s.yaml"]) == 2
    said = capsys.readouterr().err
    assert "hub:owner/rows#train cannot be loaded" in said
    assert "OFFLINE=1" in said
    assert "model.from_scratch, model.tokenizer, data.train" in said
    assert main(["finetune", "s.yaml", "data.train=train.jsonl"]) == 2
    said = capsys.readouterr().err
    assert "no model 'owner/large'" in said
    assert "OFFLINE=1" in said
    assert main(["finetune", "s.yaml", "--offline", "--out", "r"]) == 0
    said = capsys.readouterr().out
    assert "the recipe's offline block stands in for its own model.from_scratch, model.tokenizer, data.train" in said
    made = recipe.load("s.yaml", offline=True)
    assert (made.model.name, made.model.revision, made.data.train, made.tune.method) == (None, None, ["train.jsonl"], "full")
    assert (made.train.epochs, made.train.batch_size) == (1, 16)
    kept = recipe.load("r/recipe.yaml")
    assert kept.resolved() == made.resolved()
    assert "offline" in Path("r/recipe.yaml").read_text()
    assert any("offline block" in json.loads(line).get("note", "") for line in Path("r/log.jsonl").read_text().splitlines())
    assert main(["finetune", "r/recipe.yaml", "--out", "r", "--resume"]) == 0  # finished: told again


def test_a_mistake_in_the_stand_in_is_named_by_its_own_line(files: Path) -> None:
    (files / "s.yaml").write_text(STAND_IN.replace("epochs: 1}", "epochs: none}"))
    recipe.load("s.yaml")
    with pytest.raises(InputError, match=r"s.yaml:14: train.epochs: a whole number"):
        recipe.load("s.yaml", offline=True)


def test_a_recipe_without_stand_in_offers_none(files: Path, bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "s.yaml").write_text(STAND_IN.partition("offline:")[0])
    assert main(["check", "s.yaml", "data.train=train.jsonl"]) == 2
    assert "OFFLINE" not in capsys.readouterr().err


def test_a_tokenizer_folder_serves_a_named_model(recipe: MakeRecipe, tmp_path: Path) -> None:
    other = make_bert(tmp_path / "other")
    for file in ("config.json", "model.safetensors"):
        (other / file).unlink()
    ready = prepare.prepare(recipe(f"model.tokenizer={other}"), **QUIET)
    assert ready.loaded.tokenizer.name_or_path == str(other)
