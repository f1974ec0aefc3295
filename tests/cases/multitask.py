"""Three tasks on one file, told apart by their columns: a label, a set of labels, and a score of a pair."""

from collections.abc import Callable
from typing import Any

import numpy as np

from cases import classification, multilabel, regression

PARTS: dict[str, Any] = {"kind": classification, "mood": multilabel, "score": regression}
COLUMNS = {
    "kind": "{text: text, label: label}", "mood": "{text: text, labels: labels}",
    "score": "{text: text, text_pair: other, score: score}",
}  # fmt: skip
TASKS = {"kind": "classification", "mood": "multilabel", "score": "regression"}
RECIPE = [
    *(f"tasks.{name}={{task: {task}, data: {{columns: {COLUMNS[name]}}}}}" for name, task in TASKS.items()),
    "tasks.score.weight=0.5", "data.mixing=round_robin",
]  # fmt: skip
BODIES = ("bert", "gpt2", "llama")
FULL = {"mean": 1.0, "kind.accuracy": 1.0, "mood.f1_micro": 1.0, "score.spearman": 1.0, "score.mean_absolute_error": 0.0}
GOOD: dict[str, Any] = {"text": "the film", "label": "bad", "labels": ["joy"], "other": "a book", "score": 250.0}
BAD = {
    "label out of range": ({**GOOD, "label": "grand"}, ["'grand'", "not in the training set"]),
    "NaN score": ({**GOOD, "score": float("nan")}, ["'score' has no number"]),
    "unknown mood": ({**GOOD, "labels": ["hunger"]}, ["hunger"]),
    "no pair": ({**GOOD, "other": None}, ["'other' is missing"]),
}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    made = [part.rows(count, seed) for part in PARTS.values()]
    return [{**one[1], **one[2], **one[0]} for one in zip(*made, strict=True)]


def of_each(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """All rows of all tasks, one task after the other, as they stand in a split."""
    return [rows[i * len(rows) // 3 : (i + 1) * len(rows) // 3] for i in range(3)]


def perfect(task: Any, encoded: Any, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    return [
        PARTS[name].perfect(task.parts[name], encoded.parts[name], own) for name, own in zip(PARTS, of_each(rows), strict=True)
    ]


def reference(rows: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, part in PARTS.items():
        own = [i for i, line in enumerate(lines) if line["task"] == name]
        scores = part.reference([rows[i] for i in own], [lines[i] for i in own])
        found |= {f"{name}.{metric}": float(value) for metric, value in scores.items()}
    return found | {"mean": (found["kind.accuracy"] + found["mood.f1_micro"] + found["score.spearman"]) / 3}


def answers(told: list[dict[str, Any]]) -> list[Any]:
    """Of predict's lines the answers in the order of predictions/test.jsonl."""
    keys: dict[str, Callable[[dict[str, Any]], Any]] = {
        "kind": lambda one: one["label"], "mood": lambda one: one["labels"], "score": lambda one: one["value"],
    }  # fmt: skip
    return [key(line[name]) for name, key in keys.items() for line in told]
