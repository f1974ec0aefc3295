"""Contexts of uneven length, some of several windows, with one place or none that answers the question."""

import random
from typing import Any

import numpy as np

from engine.tasks._squad import against

THINGS = ["film", "book", "meal", "phone", "room"]
KINDS = ["good", "great", "warm", "bad", "dull", "very cold", "quite poor"]
FILL = ["the", "it", "and", "we", "had", "they", "with", "all", "more", "from", "to"]
RECIPE: list[str] = ["data.answer_tokens=6"]
BODIES = ("bert", "gpt2", "llama")
FULL = {"exact_match": 100.0, "f1": 100.0, "answerable_f1": 100.0, "unanswerable_exact_match": 100.0}
GOOD: dict[str, Any] = {"question": "film", "context": "the film was good", "answers": {"text": ["good"], "answer_start": [13]}}
BAD = {
    "not at its offset": (
        {**GOOD, "answers": {"text": ["good"], "answer_start": [12]}},
        ["'good' is not at 12", "it stands at 13"],
    ),
    "outside": ({**GOOD, "answers": {"text": ["good"], "answer_start": [15]}}, ["'good' at 15 lies outside", "17 characters"]),
    "before the text": ({**GOOD, "answers": [{"text": "good", "answer_start": -4}]}, ["lies outside"]),
    "nowhere": ({**GOOD, "answers": {"text": ["bad"], "answer_start": [9]}}, ["'bad' is not at 9", "stands nowhere"]),
    "empty answer": ({**GOOD, "answers": {"text": [" "], "answer_start": [3]}}, ["at 3 is empty"]),
    "no question": ({**GOOD, "question": " "}, ["'question' is empty"]),
    "no context": ({**GOOD, "context": None}, ["'context' is missing or null"]),
    "no answers": ({**GOOD, "answers": None}, ["'answers' is missing", '"text": []']),
    "another shape": ({**GOOD, "answers": "good"}, ["holds 'good'", "answers are written"]),
    "uneven lists": ({**GOOD, "answers": {"text": ["good"], "answer_start": []}}, ["answers are written"]),
    "contradiction": ({**GOOD, "is_impossible": True}, ["is_impossible is true, and there are 1 answers"]),
}


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    out = []
    for i in range(count):
        things = draw.sample(THINGS, 3)
        kinds = draw.sample(KINDS, 3)
        words: list[str] = []
        for thing, kind in zip(things, kinds, strict=True):
            words += [*draw.choices(FILL, k=draw.randint(0, 18)), "this", thing, "is", kind, "."]
        context = " ".join(words)
        if i % 4 == 3:  # the thing is not in the context
            asked = next(thing for thing in THINGS if thing not in things)
            out.append({"question": f"this {asked}", "context": context, "answers": {"text": [], "answer_start": []}})
        else:
            at = context.index(f"{things[0]} is ") + len(f"{things[0]} is ")
            longer = [kinds[0], f"is {kinds[0]}"], [at, at - 3]  # two annotators
            out.append(
                {"question": f"this {things[0]}", "context": context, "answers": {"text": longer[0], "answer_start": longer[1]}}
            )
    return out


def perfect(task: Any, encoded: Any, rows: list[dict[str, Any]]) -> list[np.ndarray]:
    made = []
    for labels, length in zip(encoded.scalars["labels"], encoded.lengths, strict=True):
        one = np.zeros((length, 2), np.float32)
        one[labels, [0, 1]] = 20
        made.append(one)
    return made


def reference(rows: list[dict[str, Any]], lines: list[dict[str, Any]]) -> dict[str, float]:
    scores = [against(line["prediction"], row["answers"]["text"]) for row, line in zip(rows, lines, strict=True)]
    has = np.array([bool(row["answers"]["text"]) for row in rows])
    exact, f1 = np.array(scores).T
    return {
        "exact_match": 100 * exact.mean(), "f1": 100 * f1.mean(), "answerable_exact_match": 100 * exact[has].mean(),
        "answerable_f1": 100 * f1[has].mean(), "unanswerable_exact_match": 100 * exact[~has].mean(),
    }  # fmt: skip
