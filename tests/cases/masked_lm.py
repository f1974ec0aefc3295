"""Word salads, some longer than the model: hidden tokens are told in several examples of a row."""

import math
import random
from typing import Any

import numpy as np

WORDS = ["good", "bad", "the", "film", "was", "it", "and", "very", "we", "had", "book", "room", "never", "warm"]
RECIPE = ["data.columns={text: text}"]
FULL = {"accuracy": 1.0, "perplexity": 1.0}
BAD = {
    "no text": ({"text": " "}, ["'text' is empty"]),
    "a number": ({"text": 3}, ["'text' holds a int"]),
    "nothing": ({"text": None}, ["'text' is missing or null"]),
}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    return [{"text": " ".join(draw.choices(WORDS, k=draw.randint(3, 60)))} for _ in range(count)]


def perfect(task: Any, encoded: Any, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    """Of each token: the likeliest, its probability, the loss."""
    labels = [encoded.batch(np.array([i]))["labels"][0].numpy() for i in range(len(encoded))]
    return [np.stack([np.maximum(one, 0), one >= 0, np.zeros(len(one))], -1).astype(np.float32) for one in labels]


def reference(rows: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, float]:
    hidden = [[token for token in line["tokens"] if token["truth"] is not None] for line in lines]
    items = sum(map(len, hidden))
    loss = sum(line["loss"] * len(tokens) for line, tokens in zip(lines, hidden, strict=True))
    return {"accuracy": sum(t["right"] for tokens in hidden for t in tokens) / items, "perplexity": math.exp(loss / items)}
