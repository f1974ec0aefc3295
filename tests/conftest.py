"""What every test may use: a tiny BERT in a folder, small files, recipes that join the two. Nothing from a network."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # two workers with two spinning threads each would be slower than one
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib.figure
import pytest
import torch

from engine import recipe as recipes

# Thousands of syncs wait for the disk and show nothing, as no test can pull the plug. That the engine syncs what it must, and when,
# is held by a model of a disk (powerloss.py); runs in processes of their own sync for real.
os.fsync = lambda descriptor: None

WORDS = [
    "good",
    "great",
    "warm",
    "lovely",
    "fine",
    "superb",
    "bright",
    "brave",
    "kind",
    "clever",
    "bad",
    "awful",
    "cold",
    "dull",
    "poor",
    "grim",
    "dark",
    "weak",
    "mean",
    "stupid",
    "the",
    "a",
    "film",
    "book",
    "meal",
    "phone",
    "room",
    "was",
    "is",
    "and",
    "not",
    "never",
    "but",
    "very",
    "quite",
    "it",
    "this",
    "that",
    "we",
    "they",
    "had",
    "has",
    "been",
    "with",
    "from",
    "for",
    "to",
    "of",
    "in",
    "on",
    "at",
    "all",
    "more",
    "most",
    "less",
    "so",
    "too",
]
POSITIVE, NEGATIVE = WORDS[:5], WORDS[10:15]
SHARED = Path(__file__).resolve().parents[2] / "shared"

# Tolerances, in one place, with their reasons.
EXACT = 0.0  # the same operations in the same order
FLOAT32 = 1e-6  # relative; sums in another order


class StopAt:
    """An interrupt that comes once the log of a run holds this many steps: in the evaluation after that step, or behind it."""

    code = 130

    def __init__(self, folder: str, steps: int):
        self.log, self.steps = Path(folder, "log.jsonl"), steps

    def __call__(self) -> bool:
        return self.log.exists() and self.log.read_text().count('"event": "step"') >= self.steps


SAVEFIG = matplotlib.figure.Figure.savefig


@pytest.fixture(autouse=True)
def _steady(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed, a working folder of its own; plots are made but not drawn, which would take half of a small run's time.

    The command line in a process of its own, runs that a whole file shares, and tests that ask for `draws`, draw them.
    """
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, to, **how: to.write(b"not drawn"))


@pytest.fixture
def draws(_steady: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a test that looks at plots."""
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", SAVEFIG)


def make_bert(folder: Path, *, layers: int = 2, hidden: int = 32, dropout: float = 0.1, **more: Any) -> Path:
    """A BERT body with random weights and a word tokenizer, saved as the hub lays a model out."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        model_max_length=64, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=2 * hidden,
        max_position_embeddings=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, initializer_range=0.1, **more,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def make_decoder(folder: Path, kind: str) -> Path:
    """A decoder with random weights (gpt2 or llama) and a word tokenizer that has an end token but no padding token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*WORDS, "<end>", "[UNK]"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="<end>", model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(2)
    sizes = {
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "llama": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
                  "max_position_embeddings": 64},
    }  # fmt: skip
    end = vocabulary["<end>"]
    config = AutoConfig.for_model(
        kind, vocab_size=len(vocabulary), bos_token_id=end, eos_token_id=end, initializer_range=0.1, **sizes[kind]
    )
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT with dropout."""
    return make_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def still_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny BERT without dropout, where sums can be compared."""
    return make_bert(tmp_path_factory.mktemp("models") / "still", dropout=0.0)


def make_rows(count: int, seed: int = 0, noise: float = 0.0) -> list[dict[str, Any]]:
    """Word salads of 2 to 24 words whose label is the kind of the words that judge."""
    import random

    draw = random.Random(seed)
    rows = []
    for i in range(count):
        label = "positive" if i % 2 else "negative"
        own, other = (POSITIVE, NEGATIVE) if label == "positive" else (NEGATIVE, POSITIVE)
        words = [draw.choice(own if draw.random() > noise else other) for _ in range(draw.randint(2, 4))]
        words += [draw.choice(WORDS[20:]) for _ in range(draw.randint(1, 20))]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """train (90 rows), validation (30), test (30) in the working folder."""
    for name, count, seed in (("train", 90, 1), ("validation", 30, 2), ("test", 30, 3)):
        write_jsonl(tmp_path / f"{name}.jsonl", make_rows(count, seed))
    return tmp_path


BASE = """task: classification
model:
  name: {model}
data:
  train: train.jsonl
  validation: validation.jsonl
  test: test.jsonl
  max_length: 48
train:
  epochs: 2
  batch_size: 16
  learning_rate: 1e-2
evaluate: {{bootstrap: 50}}
"""

MakeRecipe = Callable[..., recipes.Recipe]


@pytest.fixture
def recipe(files: Path, bert: Path) -> MakeRecipe:
    """recipe("train.epochs=1", ...) -> a checked recipe on the tiny model and files."""

    def make(*overrides: str, model: Path = bert) -> recipes.Recipe:
        (files / "tiny.yaml").write_text(BASE.format(model=model), "utf-8")
        return recipes.load(str(files / "tiny.yaml"), list(overrides))

    return make
