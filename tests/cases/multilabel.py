"""Word salads with any of three moods, or none."""

import random
from typing import Any

import numpy as np
from sklearn import metrics as sk

MOODS = {"fear": ["dark", "grim", "cold"], "joy": ["great", "bright", "warm"], "shame": ["mean", "weak", "poor"]}
FILL = ["the", "film", "was", "it", "and", "very", "we", "had", "book", "room"]
RECIPE = ["evaluate.metrics=[f1_micro, f1_macro, roc_auc_macro]"]
FULL = {"f1_micro": 1.0, "f1_macro": 1.0, "subset_accuracy": 1.0, "hamming_loss": 0.0, "average_precision_macro": 1.0}
BAD = {
    "label out of range": ({"text": "the film", "labels": ["joy", "sham"]}, ["'sham'", "not in the training set", "'shame'"]),
    "labels are no list": ({"text": "the film", "labels": {"joy": 1}}, ["not a list of labels"]),
    "a label is no name": ({"text": "the film", "labels": ["joy", ["fear"]]}, ["not a list of labels"]),
    "no labels": ({"text": "the film"}, ["'labels' is missing or null", "write []"]),
}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    out = []
    for i in range(count):
        moods = [mood for k, mood in enumerate(MOODS) if i >> k & 1]  # every set of labels, the empty one too
        words = [draw.choice(MOODS[mood]) for mood in moods] + draw.choices(FILL, k=draw.randint(1, 25))
        draw.shuffle(words)
        labels: Any = [moods, "|".join(moods), ", ".join(moods)][i % 3]  # three ways to write them
        out.append({"text": " ".join(words), "labels": labels})
    return out


def perfect(task: Any, encoded: Any, rows: list[dict[str, Any]]) -> np.ndarray:
    return np.float32([[20 if mood in row["labels"] else -20 for mood in task.labels] for row in rows])


def reference(rows: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, float]:
    y = np.array([[int(mood in row["labels"]) for mood in MOODS] for row in rows])
    p = np.array([[int(mood in line["prediction"]) for mood in MOODS] for line in lines])
    q = np.array([[line["probabilities"][mood] for mood in MOODS] for line in lines])
    out = {
        f"{name}_{average}": function(y, p, average=average, zero_division=0)
        for name, function in (("f1", sk.f1_score), ("precision", sk.precision_score), ("recall", sk.recall_score))
        for average in ("micro", "macro", "weighted", "samples")
    }
    return out | {
        "subset_accuracy": sk.accuracy_score(y, p), "hamming_loss": sk.hamming_loss(y, p),
        "roc_auc_macro": sk.roc_auc_score(y, q), "average_precision_macro": sk.average_precision_score(y, q),
    }  # fmt: skip
