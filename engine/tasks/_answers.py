"""Answers in their contexts: what a file says of them, which tokens they are, how they are shown.

context   T h e   t o w e r   w a s   b u i l t   i n   1 4 1 2 .        answer "in 1412" at 20
tokens    |the| |tower|   |was| |built|     |in| |14||12||.|         ->  tokens 4 to 6
"""

import itertools
import re
from typing import Any

import numpy as np

from engine.blocks import Span, marked
from engine.errors import quoted

AROUND = 240  # characters that a report shows on either side of what is marked


def answers_of(value: Any) -> list[tuple[str, int]] | None:
    """[(text, answer_start), ...] of a column: two lists (as the hub has them) or a list of objects (as SQuAD's files); else None."""
    if isinstance(value, dict):
        texts, starts = value.get("text"), value.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            return None
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(one, dict) for one in value):
        pairs = [(one.get("text"), one.get("answer_start")) for one in value]
    else:
        return None
    sound = all(isinstance(text, str) and isinstance(start, int) and not isinstance(start, bool) for text, start in pairs)
    return pairs if sound else None


def answers_problem(value: Any, name: str, context: str, impossible: Any) -> tuple[str, str] | None:
    """(reason, detail) of what is wrong with the answers in column `name`, or None. `impossible`: SQuAD v2's flag, if there."""
    golds, of = answers_of(value), f"column '{name}': the answer"
    if value is None:
        return (
            "missing answers",
            f'column \'{name}\' is missing or null; without an answer write {{"text": [], "answer_start": []}}',
        )
    if golds is None:
        shape = '{"text": ["..."], "answer_start": [0]}'
        return "answers of another shape", f"column '{name}' holds {quoted(value)}; answers are written {shape}"
    for text, start in golds:
        if not text.strip():
            return "empty answer", f"{of} at {start} is empty; a question without an answer has no answers at all"
        if start < 0 or start + len(text) > len(context):
            size = f"the context has {len(context)} characters"
            return (
                "answer outside the context",
                f"{of} {quoted(text)} at {start} lies outside: {size}{_elsewhere(text, context, start)}",
            )
        if (there := context[start : start + len(text)]) != text:
            said = f"{of} {quoted(text)} is not at {start}, where {quoted(there)} stands{_elsewhere(text, context, start)}"
            return "answer not at its offset", said
    if isinstance(impossible, bool) and impossible == bool(golds):
        return "is_impossible contradicts", f"is_impossible is {str(impossible).lower()}, and there are {len(golds)} answers"
    return None


def _elsewhere(text: str, context: str, start: int) -> str:
    """A hint where the answer does stand, nearest to where it should."""
    places = [m.start() for m in re.finditer(re.escape(text), context)] if len(text) < 10_000 else []
    return f"; it stands at {min(places, key=lambda at: abs(at - start))}" if places else "; it stands nowhere in it"


def null_of(ids: list[int], cls: int | None) -> int:
    """Where "no answer" is said: at [CLS], or at the first token where there is none."""
    return ids.index(cls) if cls in ids else 0


def characters_of(window: Any, context: str) -> tuple[np.ndarray, np.ndarray]:
    """Which characters of the context each token of a window is: begin, end (T,), without spaces around; -1 where none."""
    begin, end = np.array(window.offsets, dtype=np.int64).T  # (T,)
    inside = np.array([s == 1 for s in window.sequence_ids])
    solid = ~np.fromiter(map(str.isspace, context), bool, len(context))
    at = np.arange(len(context) + 1)
    later = np.minimum.accumulate(np.where(np.append(solid, True), at, len(context))[::-1])[
        ::-1
    ]  # the next solid one from here on
    before = np.maximum.accumulate(np.where(np.append(True, solid), at, 0))  # the end of the last one before here
    begin, end = later[np.where(inside, begin, 0)], before[np.where(inside, end, 0)]
    usable = inside & (begin < end)
    return np.where(usable, begin, -1), np.where(usable, end, -1)


def targets_of(
    spans: list[tuple[np.ndarray, np.ndarray]], nulls: list[int], golds: list[tuple[str, int]]
) -> list[tuple[int, int]]:
    """(start, end) token of the answer in each window of a row; the null token where it is not there whole."""
    labels = [(null, null) for null in nulls]
    for text, start in golds:
        a, b = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
        begins, ends = (np.concatenate(every) for every in zip(*spans, strict=True))
        touched = (begins >= 0) & (ends > a) & (begins < b)
        if not touched.any():
            continue
        a, b = int(begins[touched].min()), int(ends[touched].max())  # as whole tokens
        for i, (begin, end) in enumerate(spans):
            tokens = np.flatnonzero((begin >= a) & (end <= b) & (begin >= 0))
            if len(tokens) and begin[tokens[0]] == a and end[tokens[-1]] == b:
                labels[i] = int(tokens[0]), int(tokens[-1])
    return labels


def context_of(line: dict[str, Any]) -> str:
    """The column of a line of predictions/ that holds the context: the longest text that has the prediction at its place."""
    span = slice(line["start"], line["end"]) if line["prediction"] else slice(0, 0)
    return max(
        (k for k, v in line.items() if isinstance(v, str) and k != "prediction"),
        key=lambda k: (line[k][span] == line["prediction"], len(line[k])),
    )


def shown_context(context: str, line: dict[str, Any]) -> list[Span]:
    """The context with every character that a gold answer or the prediction holds marked, and what is far from them left out."""
    golds = next((found for v in line.values() if (found := answers_of(v))), [])
    truth, said = np.zeros(len(context), bool), np.zeros(len(context), bool)
    for text, start in golds[:1]:
        truth[start : start + len(text)] = True
    if line["prediction"]:
        said[line["start"] : line["end"]] = True
        if not any(start <= line["start"] and line["end"] <= start + len(text) for text, start in golds[:1]):
            for text, start in golds[1:]:  # another annotator's answer, where that is the one predicted
                truth[start : start + len(text)] |= said[start : start + len(text)]
    kinds = np.select([truth & said, said, truth], [1, 2, 3], 0)
    edges = np.flatnonzero(np.diff(kinds, prepend=0, append=0))
    pieces = [(int(a), int(b), ("", "good", "bad", "missed")[kinds[a]], "") for a, b in itertools.pairwise(edges) if kinds[a]]
    out = marked(context, pieces)
    for i, span in enumerate(out):
        if not span.kind and len(span.text) > 2 * AROUND:
            head = "" if i == 0 and pieces else span.text[:AROUND]
            tail = "" if i == len(out) - 1 else span.text[-AROUND:]
            out[i] = Span(f"{head} ... {tail}")
    return out
