"""Pairs of word salads; the score is how many words of the second stand in the first, on a scale far from 0 and 1."""

import random
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics as sk

WORDS = ["the", "film", "was", "it", "and", "very", "we", "had", "book", "room", "good", "bad", "warm", "cold", "dull", "kind"]
RECIPE = ["data.columns={text: text, text_pair: other, score: score}"]
FULL = {"pearson": 1.0, "spearman": 1.0, "r2": 1.0, "mean_absolute_error": 0.0, "mean_squared_error": 0.0}
BAD = {
    "NaN score": ({"text": "the film", "other": "a book", "score": float("nan")}, ["'score' has no number"]),
    "infinite score": ({"text": "the film", "other": "a book", "score": "inf"}, ["'score'", "not a finite number"]),
    "a word for a score": ({"text": "the film", "other": "a book", "score": "high"}, ["'high'", "not a finite number"]),
    "no score": ({"text": "the film", "other": "a book"}, ["'score' has no number"]),
    "true for a score": ({"text": "the film", "other": "a book", "score": True}, ["not a finite number"]),
    "no pair": ({"text": "the film", "score": 1.5}, ["'other' is missing"]),
}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    out = []
    for i in range(count):
        first, other = (draw.choices(WORDS, k=draw.randint(1, 12)) for _ in range(2))
        score: Any = 250 + 40 * sum(word in first for word in other) / len(other)
        out.append({"text": " ".join(first), "other": " ".join(other), "score": str(score) if i % 3 else score})
    return out


def perfect(task: Any, encoded: Any, rows: list[dict[str, Any]]) -> np.ndarray:
    assert not task.folded
    return np.array([[(float(row["score"]) - task.mean) / task.deviation] for row in rows])


def reference(rows: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, float]:
    y, p = [float(row["score"]) for row in rows], [line["value"] for line in lines]
    return {
        "pearson": stats.pearsonr(y, p)[0], "spearman": stats.spearmanr(y, p)[0], "r2": sk.r2_score(y, p),
        "mean_absolute_error": sk.mean_absolute_error(y, p), "mean_squared_error": sk.mean_squared_error(y, p),
    }  # fmt: skip
