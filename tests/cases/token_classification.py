"""Names in sentences, the first one longer than the model takes: tags BIO2."""

import random
import warnings
from typing import Any

import numpy as np
import pytest
from conftest import WORDS

RECIPE: list[str] = []
FULL = {"f1": 1.0, "precision": 1.0, "recall": 1.0, "f1_macro": 1.0, "accuracy": 1.0}
GOOD = ["the", "good", "film"]
BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "misaligned": ({"tokens": GOOD, "tags": ["O", "O"]}, ["3 words and 2 tags"]),
    "broken scheme": ({"tokens": GOOD, "tags": ["O", "I-PER", "O"]}, ["'I-PER' after 'O'", "in BIO2"]),
    "other type": ({"tokens": GOOD, "tags": ["B-LOC", "I-PER", "O"]}, ["'I-PER' after 'B-LOC'"]),
    "unknown": ({"tokens": GOOD, "tags": ["O", "B-PRE", "O"]}, ["'B-PRE' of 'good'", "did you mean 'B-PER'?"]),
    "no prefix": ({"tokens": GOOD, "tags": ["O", "PER", "O"]}, ["'PER' is neither O nor"]),
    "empty word": ({"tokens": ["the", "", "film"], "tags": ["O"] * 3}, ["word 1 is empty"]),
    "no list": ({"tokens": "the good film", "tags": ["O"] * 3}, ["holds a str"]),
    "null": ({"tokens": None, "tags": []}, ["'tokens' is missing or null"]),
    "no tags": ({"tokens": GOOD, "tags": None}, ["'tags' is missing or null"]),
}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    draw, made = random.Random(seed), []
    for n in range(count):
        tokens: list[str] = []
        tags: list[str] = []
        least = draw.randint(1, 20) if n else 100  # four windows of 40 tokens
        while len(tokens) < least:
            kind = draw.choice(["O", "PER", "LOC"])
            size = 1 if kind == "O" else draw.randint(1, 3)
            tokens += draw.choices(WORDS[20:] if kind == "O" else WORDS[:10] if kind == "PER" else WORDS[10:20], k=size)
            tags += ["O"] if kind == "O" else [f"B-{kind}", *[f"I-{kind}"] * (size - 1)]
        made.append({"tokens": tokens, "tags": tags})
    made[1] = {"tokens": ["the", "good", "warm", "bad", "dull"], "tags": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]}
    return made


def perfect(task: Any, encoded: Any, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    flat, offsets = encoded.ragged["labels"]
    one_hot = np.float32(30 * np.eye(len(task.labels)))[np.maximum(flat, 0)]
    return [one_hot[offsets[i] : offsets[i + 1]] for i in range(len(encoded))]


def reference(rows: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, float]:
    seqeval = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed")
    gold, made = [row["tags"] for row in rows], [line["prediction"] for line in lines]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        averaged = {
            f"{name}{'' if average == 'micro' else '_' + average}": getattr(seqeval, f"{name}_score")(gold, made, average=average)
            for name in ("precision", "recall", "f1")
            for average in ("micro", "macro", "weighted")
        }
    return {**averaged, "accuracy": seqeval.accuracy_score(gold, made)}
