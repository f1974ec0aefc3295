"""Three kinds of word salads; on an encoder and on two decoders, which read the last real token."""

import random
from typing import Any

import numpy as np
from sklearn import metrics as sk

KINDS = {"bad": ["bad", "awful", "poor"], "fine": ["fine", "kind", "warm"], "great": ["great", "superb", "clever"]}
FILL = ["the", "film", "was", "it", "and", "very", "we", "had", "book", "room"]
RECIPE: list[str] = []
BODIES = ("bert", "gpt2", "llama")
FULL = {"accuracy": 1.0, "f1_macro": 1.0, "matthews_corrcoef": 1.0}
BAD = {
    "label out of range": ({"text": "the film", "label": "grand"}, ["label", "'grand'", "not in the training set"]),
    "no text": ({"text": " ", "label": "bad"}, ["'text' is empty"]),
    "no label": ({"text": "the film", "label": None}, ["'label' has no label"]),
}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    out = []
    for i in range(count):
        kind = list(KINDS)[i % 3]
        words = draw.choices(KINDS[kind], k=2) + draw.choices(FILL, k=draw.randint(0, 25))
        draw.shuffle(words)
        out.append({"text": " ".join(words), "label": kind})
    return out


def perfect(task: Any, encoded: Any, rows: list[dict[str, Any]]) -> np.ndarray:
    return np.float32(20 * np.eye(3)[[task.labels.index(row["label"]) for row in rows]])


def reference(rows: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, float]:
    y, p = [row["label"] for row in rows], [line["prediction"] for line in lines]
    q = np.array([[line["probabilities"][kind] for kind in KINDS] for line in lines])
    return {
        "accuracy": sk.accuracy_score(y, p), "f1_macro": sk.f1_score(y, p, average="macro"),
        "matthews_corrcoef": sk.matthews_corrcoef(y, p), "roc_auc": sk.roc_auc_score(y, q, multi_class="ovr"),
        "log_loss": sk.log_loss(y, q),
    }  # fmt: skip
