"""Token classification: a tag for every word, and the entities that the tags make.

    tokens (or text)  ->  words  ->  tokens  ->  model  ->  logits (B, T, K)  ->  a tag a word  ->  entities

    word       Peter   Blackburn        lives  in   Oslo
    token      peter   black   ##burn   lives  in   oslo
    label      B-PER   I-PER   -100     O      O    B-LOC         the first token of a word carries its tag

Loss: the sum over labelled tokens of the cross-entropy  -log softmax(logits)[tag].  Items are labelled tokens, so words.
A document longer than data.max_length becomes windows that overlap (data/words.py): every word is labelled, and scored, in
exactly one of them. The scheme of the tags (BIO2, BIO1, IOBES) is found from train; gold tags that break it are bad rows.
Predictions are read leniently, as seqeval does (engine/spans.py). Scores are of entities; a bootstrap draws rows.
"""

import math
from collections import Counter
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from engine import spans
from engine.blocks import Block, Example, Examples, Matrix, Table, marked
from engine.data import words
from engine.data.encode import Encoded
from engine.data.read import Row
from engine.errors import InputError, nearest, quoted
from engine.metrics import Metric
from engine.schema import Data
from engine.tasks._base import MISTAKES, Base, Judged, labels_of, sum_by_row
from engine.tasks._text import broken, text_problem
from engine.tasks.classification import label_name, probabilities

SHOWN = 60  # words of a long document that the report shows
TYPES_SHOWN = 20  # of the confusion matrix


class Options(Data):
    """What a recipe may say of the data beside the usual."""

    scheme: Literal["auto", "BIO2", "BIO1", "IOBES", "any"] = Field(
        "auto",
        description="What gold tags are held to; auto finds it from train. any: all are taken, read as seqeval does, I- after O begins.",
    )
    stride: int | None = Field(
        None, ge=0, description="Tokens that neighbouring windows of a long document share; by default a quarter of max_length."
    )


def _score(name: str, counts: np.ndarray) -> float:
    """One metric of the counts of R rows, (R, types + 1, 3)."""
    return float(spans.scores(counts.sum(axis=0))[name])


class Task(Base):
    """K tags, one for each word of a row."""

    roles: ClassVar[dict[str, str]] = {"tokens": "required", "tags": "target", "text": "optional"}
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    peft_type: ClassVar[str] = "TOKEN_CLS"
    pipeline_tag: ClassVar[str] = "token-classification"
    default_metrics: ClassVar[list[str]] = ["f1", "precision", "recall"]
    metrics: ClassVar[dict[str, Metric]] = {name: partial(_score, name) for name in spans.METRICS}
    per_token: ClassVar[bool] = True
    padding: ClassVar[dict[str, int]] = {"words": -1}
    header: ClassVar[list[tuple[str, str]]] = [("right", "n"), ("missed", "n"), ("wrong", "n")]

    def __init__(self, columns: dict[str, Any], labels: list[str] | None = None, options: Any = None):
        super().__init__(columns, labels, options)
        self.text: str = self.columns.pop("text", "text")  # read where a row to predict has no tokens
        self.scheme: str | None = None
        self._know([label_name(name) or name for name in labels or []])

    def _know(self, labels: list[str]) -> None:
        self.labels = labels
        self.types = spans.types(labels)
        self.ids = {name: i for i, name in enumerate(labels)}  # what a file may write -> the tag's id

    # -- rows ---------------------------------------------------------------------------------------------------------

    def fit(self, rows: list[Row], source: str) -> None:
        """Learn the tags from train, O first, then by type; and their scheme."""
        tagged = [[tag for tag in tags if tag is not None] for row in rows if (tags := self._named(row))]
        if self.labels:
            self._numbers({tag for tags in tagged for tag in tags})
            tagged = [[self.labels[self.ids[tag]] for tag in tags if tag in self.ids] for tags in tagged]
        given = getattr(self.options, "scheme", "auto")
        self.scheme = spans.scheme(tagged) if given == "auto" else given
        found = {tag for tags in tagged if spans.fault(tags, self.scheme) is None for tag in tags}
        if len(found) < 2:
            only = f"only {quoted(next(iter(found)))}" if found else "none that makes sense"
            raise InputError(
                f"{source}: column '{self.columns['tags']}' holds {only}; token_classification needs two tags or more"
            )
        if not self.labels:
            self._know(sorted(found, key=lambda tag: (tag != "O", spans.parse(tag)[1], "BIES".find(spans.parse(tag)[0]), tag)))

    def adapt(self, rows: list[Row]) -> str | None:
        """Let a file that numbers the tags (0, 1, ...) be scored by a model that names them. Says so, or None."""
        found = {tag for row in rows for tag in self._named(row) or [] if tag is not None}
        if not self._numbers(found):
            return None
        return "tags are read as ids: " + ", ".join(f"{i} = {name}" for i, name in enumerate(self.labels))

    def _numbers(self, found: set[str]) -> bool:
        numbers = {str(i) for i in range(len(self.labels))}
        if not found or found & set(self.labels) or not found <= numbers:
            return False
        self.ids = {number: int(number) for number in numbers} | self.ids
        return True

    def _named(self, row: Row) -> list[str | None] | None:
        """The row's tags by name, or None where there is no list of them."""
        tags = row.get(self.columns["tags"])
        return [label_name(tag) for tag in tags] if isinstance(tags, list) else None

    def problem(self, row: Row, target: bool = True) -> tuple[str, str] | tuple[str, str, int] | None:
        """(reason, detail) of what makes a row unusable, with the number of the word where it is one word's; or None."""
        name = self.columns["tokens"]
        tokens = row.get(name)
        if tokens is None:
            if not target and row.get(self.text) is not None:
                return text_problem(row, "text", self.text)
            return "missing tokens", f"column '{name}' is missing or null"
        if not isinstance(tokens, list):
            return "tokens are no list", f"column '{name}' holds a {type(tokens).__name__} ({tokens!r:.40}), not a list of words"
        if not tokens:
            return "no words", f"column '{name}' is an empty list"
        for i, token in enumerate(tokens):
            if not isinstance(token, str):
                return "word is no text", f"column '{name}': word {i} is a {type(token).__name__} ({token!r:.40}), not a text", i
            if not token.strip(" \t\r\n") or broken(token):
                what = "empty" if not token.strip(" \t\r\n") else "half of a surrogate pair, which is no character"
                return "word is no text", f"column '{name}': word {i} is {what}", i
        return self._target_problem(row, tokens) if target else None

    def _target_problem(self, row: Row, tokens: list[str]) -> tuple[str, str] | tuple[str, str, int] | None:
        name = self.columns["tags"]
        tags = self._named(row)
        if tags is None:
            value = row.get(name)
            what = (
                "is missing or null" if value is None else f"holds a {type(value).__name__} ({value!r:.40}), not a list of tags"
            )
            return "missing tags", f"column '{name}' {what}"
        if len(tags) != len(tokens):
            return "misaligned tags", f"{len(tokens)} words and {len(tags)} tags; every word needs one"
        for i, tag in enumerate(tags):
            if tag is None:
                return "missing tag", f"column '{name}': word {i} ({quoted(tokens[i])}) has no tag", i
        known = [self.labels[self.ids[tag]] if tag in self.ids else tag or "O" for tag in tags]
        if self.scheme and (fault := spans.fault(known, self.scheme)):
            i, detail = fault
            detail = f"column '{name}': word {i} ({quoted(tokens[i])}): {detail} (data.scheme=any takes all)"
            return f"tags break {self.scheme}", detail, i
        for i, tag in enumerate(known):
            if self.labels and tag not in self.labels:
                hint = nearest(tag, self.labels)
                return (
                    "unknown tag",
                    f"column '{name}': the tag {quoted(tag)} of {quoted(tokens[i])} is not in the training set{hint}",
                    i,
                )
        return None

    def inputs(self, have: set[str] | None = None) -> dict[str, str]:
        """Words; or a text, where a file has only that."""
        tokens = self.columns["tokens"]
        from_text = have is None or (tokens not in have and self.text in have)
        return {"text": self.text} if from_text else {"tokens": tokens}

    def targets(self) -> set[str]:
        return {self.columns["tags"]}

    def words(self, row: Row) -> list[str]:
        if (tokens := row.get(self.columns["tokens"])) is not None:
            return list(tokens)
        text = row[self.text]
        return [text[a:b] for a, b in words.split(text)]

    def gold(self, row: Row) -> list[str]:
        return [self.labels[self.ids[tag or ""]] for tag in self._named(row) or []]

    def text_of(self, row: Row) -> str:
        return " ".join(self.words(row))

    def stratum(self, row: Row) -> Any:
        """The type of the first entity."""
        return next((kind for kind, _, _ in spans.decode(self.gold(row))), "")

    def facts(self, rows: list[Row]) -> dict[str, Any]:
        found = Counter(kind for row in rows for kind, _, _ in spans.decode(self.gold(row)))
        return {"labels": {kind: found[kind] for kind in self.types}, "words": sum(len(self.words(row)) for row in rows)}

    @classmethod
    def summary(cls, fact: dict[str, Any]) -> str:
        return f"{fact['words']:,} words; " + super().summary(fact)

    def asked(self) -> str:
        return f"entities: {', '.join(self.types)} ({spans.FULL[self.scheme or 'any']})"

    # -- tokens and model ---------------------------------------------------------------------------------------------

    def fingerprint(self) -> Any:
        """What of the task the tokens depend on."""
        return [self.columns, self.ids, getattr(self.options, "stride", None)]

    def encode(self, rows: list[Row], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Windows: input_ids; words (which word a token answers for, else -1); labels at those, -100 elsewhere; the row of each."""
        head, tail = words.special_ids(tokenizer)
        capacity = max_length - len(head) - len(tail)
        stride = getattr(self.options, "stride", None)
        stride = min(max_length // 4 if stride is None else stride, capacity - 1)
        out: dict[str, list[Any]] = {"input_ids": [], "words": [], "labels": [], "truncated": [], "row": []}
        for number, (row, tokens) in enumerate(zip(rows, words.tokenize([self.words(r) for r in rows], tokenizer), strict=True)):
            tags = [self.ids.get(tag or "", -100) for tag in self._named(row) or []] or [-100] * (len(tokens.starts) - 1)
            for window in words.windows(tokens.starts, capacity, stride):
                first, last = tokens.starts[window.first], tokens.starts[window.last]
                ids = tokens.ids[first:last][:capacity]
                answers = np.full(len(head) + len(ids) + len(tail), -1, dtype=np.int64)
                labels = np.full(len(answers), -100, dtype=np.int64)
                at = len(head) + tokens.starts[window.scored] - first
                answers[at], labels[at] = window.scored, np.asarray(tags)[window.scored]
                out["input_ids"].append([*head, *ids.tolist(), *tail])
                out["words"].append(answers)
                out["labels"].append(labels)
                out["truncated"].append(bool(last - first > capacity))
                out["row"].append(number)
        return out

    def model_options(self) -> dict[str, Any]:
        """Written into the model's config, so that the saved model knows its tags."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
        }

    def state(self) -> dict[str, Any]:
        return {"scheme": self.scheme}

    def restore(self, config: dict[str, Any]) -> None:
        self._know(labels_of(config))
        given = getattr(self.options, "scheme", "auto")
        self.scheme = (config.get("task_state") or {}).get("scheme") if given == "auto" else given

    # -- loss and judgement -------------------------------------------------------------------------------------------

    def items(self, batch: dict[str, Tensor]) -> int:
        """What the loss sums over: labelled tokens, one a word."""
        return int((batch["labels"] != -100).sum())

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The SUM of the labelled tokens' cross-entropies; the loop divides by those of the whole window."""
        return F.cross_entropy(self.forward(model, batch).flatten(0, 1), batch["labels"].flatten(), reduction="sum")

    def chance(self) -> float:
        return math.log(len(self.labels))

    def _by_word(self, outputs: list[np.ndarray], encoded: Encoded) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of windows to words in the rows' order: (logits (W, K), labels (W,), the row of each (W,)). Every word once."""
        word = encoded.ragged["words"][0]
        answers = np.flatnonzero(word >= 0)
        row = np.repeat(encoded.row, encoded.lengths)[answers]
        order = np.lexsort((word[answers], row))
        labels = encoded.ragged["labels"][0][answers][order]
        return np.concatenate(outputs)[answers][order], labels, row[order]

    def _tags(self, logits: np.ndarray, row: np.ndarray, rows: int) -> list[list[str]]:
        """The likeliest tag of each word, row by row."""
        names = np.array(self.labels, dtype=object)[logits.argmax(axis=1)]
        return [part.tolist() for part in np.split(names, np.searchsorted(row, np.arange(1, rows)))]

    def judge(self, outputs: list[np.ndarray], encoded: Encoded, rows: list[Row]) -> Judged:
        """Logits of windows to the counts of each row (R, types + 1, 3) and its words by type, truth and prediction."""
        logits, labels, row = self._by_word(outputs, encoded)
        gold, made = [self.gold(r) for r in rows], self._tags(logits, row, len(rows))
        losses = F.cross_entropy(torch.tensor(logits), torch.tensor(labels, dtype=torch.int64), reduction="none").numpy()
        counts = spans.counts(gold, made, self.types)
        return Judged((counts,), sum_by_row(losses, row, len(rows)), np.bincount(row, minlength=len(rows)))

    def predictions(self, outputs: list[np.ndarray], encoded: Encoded, rows: list[Row]) -> list[dict[str, Any]]:
        """Tags, and entities: with offsets in words of rows that have tokens, in characters of texts. Score: the tags' mean probability."""
        logits, _, row = self._by_word(outputs, encoded)
        sure = np.split(probabilities(logits).max(axis=1), np.searchsorted(row, np.arange(1, len(rows))))
        made = []
        for r, tags, p in zip(rows, self._tags(logits, row, len(rows)), sure, strict=True):
            parts, text = self.words(r), r.get(self.text) if r.get(self.columns["tokens"]) is None else None
            joined, places = join(parts) if text is None else (text, words.split(text))
            entities = []
            for kind, first, last in spans.decode(tags):
                start, end = places[first][0], places[last - 1][1]
                at = (first, last) if text is None else (start, end)
                one = {
                    "type": kind,
                    "start": at[0],
                    "end": at[1],
                    "text": joined[start:end],
                    "score": float(p[first:last].mean()),
                }
                entities.append(one)
            made.append({"tokens": parts, "prediction": tags, "entities": entities})
        return made

    # -- what is shown ------------------------------------------------------------------------------------------------

    def detail(self, judged: Judged) -> dict[str, Any]:
        return {"scheme": self.scheme, "per_type": spans.per_type(judged.arrays[0].sum(axis=0), self.types)}

    @classmethod
    def sections(cls, detail: dict[str, Any], lines: list[dict[str, Any]]) -> list[Block]:
        header = ["entity", "precision", "recall", "f1", "gold", "predicted"]
        rows = [
            [kind, one["precision"], one["recall"], one["f1"], one["support"], one["predicted"]]
            for kind, one in detail["per_type"].items()
        ]
        blocks: list[Block] = [Table("Each type of entity", header, rows)]
        if len(rows) < TYPES_SHOWN:
            names = ["O", *detail["per_type"]]
            counts = Counter(
                (spans.parse(a)[1] or "O", spans.parse(b)[1] or "O")
                for line in lines
                for a, b in zip(line["label"], line["prediction"], strict=True)
            )
            blocks.append(Matrix("confusion", "Words by type", names, [[counts[a, b] for b in names] for a in names]))
        whole = [line for line in lines if not cls.wrong(line) and spans.decode(line["label"])]
        found = sorted(whole, key=lambda line: -len(spans.decode(line["label"])))[:5]
        if found:
            blocks.append(Examples("Entities found", [], [Example({"": _marks(line, "prediction")}, {}, []) for line in found]))
        return blocks

    @classmethod
    def wrong(cls, line: dict[str, Any]) -> bool:
        return spans.decode(line["label"]) != spans.decode(line["prediction"])

    @classmethod
    def mistakes(cls, lines: list[dict[str, Any]]) -> Examples | None:
        """The sentences with the most wrong and missed entities."""
        wrong = [
            (line, set(spans.decode(line["label"])), set(spans.decode(line["prediction"]))) for line in lines if cls.wrong(line)
        ]
        wrong.sort(key=lambda one: (-len(one[1] ^ one[2]), -one[0]["loss"]))
        if not wrong:
            return None
        shown = [
            Example(
                {"truth": _marks(line, "label"), "predicted": _marks(line, "prediction")},
                {},
                [len(g & p), len(g - p), len(p - g)],
            )
            for line, g, p in wrong[:MISTAKES]
        ]
        note = f"Of the {len(wrong):,} rows with a wrong or missed entity, those with the most of them."
        return Examples("The worst mistakes", cls.header, shown, note)


def join(parts: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """Words as a text to read, with spaces but between ideographs, and where each stands: (start, end) in characters."""
    text, places = "", []
    for part in parts:
        if text and not (words.ideograph(text[-1]) and words.ideograph(part[0])):
            text += " "
        places.append((len(text), len(text) + len(part)))
        text += part
    return text, places


def _marks(line: dict[str, Any], which: str) -> Any:
    """A line's words with the entities of `which` marked: right, missed (of the label), wrong (of the prediction)."""
    parts = line["tokens"]
    wanted, found = spans.decode(line["label"]), spans.decode(line["prediction"])
    faults = [first for _, first, _ in set(wanted) ^ set(found)]
    begin = max(0, min(faults, default=0) - SHOWN // 4) if len(parts) > SHOWN else 0
    text, places = join(parts[begin : begin + SHOWN])
    other, kind = (set(found), "missed") if which == "label" else (set(wanted), "bad")
    inside = [
        (places[first - begin][0], places[last - begin - 1][1], "good" if (of, first, last) in other else kind, of)
        for of, first, last in spans.decode(line[which])
        if first >= begin and last <= begin + len(places)
    ]
    return marked(text, inside)
