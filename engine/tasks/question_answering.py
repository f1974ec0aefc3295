"""Question answering: the span of a context that answers a question, or the finding that none does.

    question, context  ->  [CLS] question [SEP] context [SEP]  ->  model  ->  start and end logits (B, T, 2)
                                         |-----|
    a context that is too long:     window 0 |---------------|
                                             window 1    |---------------|      data.stride tokens in common
                                                                window 2   |--------|

Every window is an example of its own. Its target is the answer's first and last token, where the answer stands in it whole;
elsewhere both are [CLS], "not here" (position 0 for tokenizers without one). In the overlap an answer is a target in both
windows. Loss: the sum over windows of (CE(start) + CE(end)) / 2, each a softmax over the T tokens; items are windows.

A row's answer is the span i <= j of context tokens, in any of its windows, with the highest start[i] + end[j] (Devlin et
al. 2018, arXiv:1810.04805); what two windows find alike counts once, by its higher score. Characters i..j of the context
are cut out, so an answer is a piece of it to the letter. Where train holds questions without an answer (SQuAD v2), nothing
is answered if the null score, the least start + end of [CLS], is more than a threshold above it. The threshold is the best on
validation and is kept in the model's config.json. Scores are on SQuAD's scale of 0 to 100; their rules are in _squad.py.
"""

import re
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from engine.blocks import Block, Example, Examples, Table
from engine.data.encode import Encoded
from engine.data.read import Row
from engine.errors import InputError, RowError, quoted
from engine.schema import Data
from engine.tasks._answers import answers_of, answers_problem, characters_of, context_of, null_of, shown_context, targets_of
from engine.tasks._base import INPUTS, Base, Judged, sum_by_row
from engine.tasks._squad import against, best_spans, best_threshold, without_spaces, words_of
from engine.tasks._text import text_problem

Found = list[tuple[float, int, int]]  # spans of a row: (score, first character, character behind the last)
SHOWN = 12  # rows whose answers a report shows in their context

HIDDEN = {
    "label",
    "prediction",
    "start",
    "end",
    "score",
    "null_score",
    "best",
    "loss",
    "is_impossible",
    "id",
    "title",
}  # in a report
ASKED = [
    ("how many", r"\bhow (?:many|much|long|far|old|often|tall|big)\b"), ("how", r"\bhow\b"), ("what", r"\bwhat\b"), ("when", r"\bwhen\b"),
    ("who", r"\bwho(?:m|se)?\b"), ("where", r"\bwhere\b"), ("which", r"\bwhich\b"), ("why", r"\bwhy\b"),
    ("多少", "多少|几"), ("何时", "何时|什么时候|哪一?年"), ("哪里", "哪里|哪儿|何处|什么地方"), ("为什么", "为什么|为何"),
    ("如何", "如何|怎么|怎样"), ("谁", "谁|哪位"), ("什么", "什么|何种"), ("哪", "哪"),
]  # fmt: skip
QUESTION = re.compile("|".join(f"({pattern})" for _, pattern in ASKED), re.IGNORECASE)


class Options(Data):
    """The data group's keys of this task."""

    stride: int | None = Field(
        None,
        ge=1,
        description="Tokens that neighbouring windows of a long context share; by default max_length // 4, 128 at most.",
    )
    answer_tokens: int = Field(30, ge=1, description="The most tokens that a predicted answer may have.")


class Task(Base):
    """A start and an end in the context, or none."""

    roles: ClassVar = {"question": "required", "context": "required", "answers": "target"}
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    peft_type: ClassVar[str] = "QUESTION_ANS"
    pipeline_tag: ClassVar[str] = "question-answering"
    default_metrics: ClassVar = ["exact_match", "f1"]
    metrics: ClassVar = {  # of exact match, F1 (0 to 1) and whether there is an answer, (R,) each
        "exact_match": lambda exact, f1, answerable, *_: _mean(exact),
        "f1": lambda exact, f1, answerable, *_: _mean(f1),
        "answerable_exact_match": lambda exact, f1, answerable, *_: _mean(exact[answerable]),
        "answerable_f1": lambda exact, f1, answerable, *_: _mean(f1[answerable]),
        "unanswerable_exact_match": lambda exact, f1, answerable, *_: _mean(exact[~answerable]),
    }
    answer: ClassVar[str] = "answer"
    full_marks: ClassVar[float] = 100.0
    per_token: ClassVar[bool] = True
    padding: ClassVar = {"begin": -1, "end": -1}
    header: ClassVar = [("truth", "good"), ("predicted", "bad")]

    def __init__(self, columns: dict[str, Any], labels: list[str] | None = None, options: Any = None):
        super().__init__(columns, labels, options)
        if labels:
            raise InputError("data.labels: question_answering has no labels; leave it out")
        given = options if isinstance(options, Options) else Options.model_construct(train=[])
        self.stride, self.longest = given.stride, given.answer_tokens
        self.threshold: float | None = None  # no answer where null score - span score is more; None: there always is one

    # -- rows ---------------------------------------------------------------------------------------------------------

    def fit(self, rows: list[Row], source: str) -> None:
        """Learn from train whether a question may have no answer."""
        golds = [answers_of(row.get(self.columns["answers"])) for row in rows]
        if not any(golds):
            raise InputError(f"{source}: no question in train has an answer in column '{self.columns['answers']}'")
        self.threshold = 0.0 if any(gold == [] for gold in golds) else None

    def problem(self, row: Row, target: bool = True) -> tuple[str, str] | None:
        """(reason, detail) of what makes a row unusable, or None."""
        for role in ("question", "context"):
            if found := text_problem(row, role, self.columns[role]):
                return found
        return self.target_problem(row) if target else None

    def target_problem(self, row: Row) -> tuple[str, str] | None:
        """The same for its answers."""
        name = self.columns["answers"]
        return answers_problem(row.get(name), name, row[self.columns["context"]], row.get("is_impossible"))

    def text_of(self, row: Row) -> str:
        return f"{row.get(self.columns['question'])}\x1f{row.get(self.columns['context'])}"

    def group(self, row: Row) -> Any:
        return row[self.columns["context"]]

    def facts(self, rows: list[Row]) -> dict[str, Any]:
        golds = [answers_of(row.get(self.columns["answers"])) or [] for row in rows]
        contexts = len({row.get(self.columns["context"]) for row in rows})
        return {"questions": len(rows), "contexts": contexts, "unanswerable": sum(not gold for gold in golds)}

    @classmethod
    def summary(cls, fact: dict[str, Any]) -> str:
        return f"{fact['questions']:,} questions on {fact['contexts']:,} contexts, {fact['unanswerable']:,} without an answer"

    def gold(self, row: Row) -> list[str]:
        """The right answers, each once; none where there is none."""
        return list(dict.fromkeys(text for text, _ in answers_of(row.get(self.columns["answers"])) or []))

    def asked(self) -> str:
        return "answers are pieces of the context" + ("" if self.threshold is None else ", or there is none")

    # -- tokens and model ---------------------------------------------------------------------------------------------

    def fingerprint(self) -> Any:
        return [self.columns, self.stride]

    def encode(self, rows: list[Row], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """The windows of each row. Ragged: tokens, and which characters of the context each is (-1: none).

        Scalars: row, labels (start, end), null (where [CLS] stands), truncated (the answer is in no window of its row whole).
        """
        stride = self.stride or min(128, max_length // 4)
        questions, contexts = ([row[self.columns[role]] for row in rows] for role in ("question", "context"))
        self._room(questions, contexts, tokenizer, max_length, stride)
        encoded = tokenizer(
            questions, contexts, truncation="only_second", max_length=max_length, stride=stride, return_overflowing_tokens=True
        )
        out: dict[str, list[Any]] = {"input_ids": encoded["input_ids"], "row": encoded["overflow_to_sample_mapping"]}
        if "token_type_ids" in encoded:
            out["token_type_ids"] = encoded["token_type_ids"]
        out |= {name: [] for name in ("begin", "end", "labels", "null", "truncated")}
        windows: list[list[int]] = [[] for _ in rows]
        for i, r in enumerate(out["row"]):
            windows[r].append(i)
        for row, context, own in zip(rows, contexts, windows, strict=True):
            spans = [characters_of(encoded.encodings[i], context) for i in own]
            nulls = [null_of(encoded["input_ids"][i], tokenizer.cls_token_id) for i in own]
            golds = answers_of(row.get(self.columns["answers"]))
            labels = [(-100, -100)] * len(own) if golds is None else targets_of(spans, nulls, golds[:1])
            lost = bool(golds) and all(label == (null, null) for label, null in zip(labels, nulls, strict=True))
            out["begin"] += [begin for begin, _ in spans]
            out["end"] += [end for _, end in spans]
            out["labels"] += labels
            out["null"] += nulls
            out["truncated"] += [lost, *[False] * (len(own) - 1)]
        return out

    def _room(self, questions: list[str], contexts: list[str], tokenizer: Any, max_length: int, stride: int) -> None:
        """RowError for a question that leaves no room for a window of its context."""
        special = tokenizer.num_special_tokens_to_add(pair=True)
        counted = tokenizer(questions, add_special_tokens=False)["input_ids"]
        for row, (question, context, ids) in enumerate(zip(questions, contexts, counted, strict=True)):
            room = max_length - special - len(ids)
            if room <= stride and len(tokenizer(context, add_special_tokens=False)["input_ids"]) > room:
                raise RowError(
                    row,
                    f"data.max_length={max_length}: the question {quoted(question)} has {len(ids)} tokens, which leaves"
                    f" {max(0, room)} for its context; windows of it share {stride} (data.stride). Raise data.max_length,"
                    " lower data.stride, or shorten the question",
                )

    def model_options(self) -> dict[str, Any]:
        return {"num_labels": 2}  # a start and an end, whatever the pretrained model counted

    def state(self) -> dict[str, Any]:
        return {} if self.threshold is None else {"null_threshold": self.threshold}

    def restore(self, config: dict[str, Any]) -> None:
        self.threshold = (config.get("task_state") or {}).get("null_threshold")

    # -- loss ---------------------------------------------------------------------------------------------------------

    def items(self, batch: dict[str, Tensor]) -> int:
        """What the loss sums over: windows."""
        return len(batch["labels"])

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Start and end logits (B, T, 2), float32; at padding float32's least number."""
        made = model(**{name: batch[name] for name in INPUTS if name in batch})
        logits = torch.stack([made.start_logits, made.end_logits], dim=-1).float()
        return logits.masked_fill(batch["attention_mask"][:, :, None] == 0, torch.finfo(torch.float32).min)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The SUM over windows of the mean of the two cross-entropies; the loop divides by the items of the whole window."""
        logits = self.forward(model, batch)
        return F.cross_entropy(logits, batch["labels"], reduction="sum") / 2  # over (B, T, 2): T classes, two targets (B, 2)

    # -- judgement ----------------------------------------------------------------------------------------------------

    def find(self, outputs: list[np.ndarray], encoded: Encoded, rows: int, n: int) -> tuple[list[Found], np.ndarray]:
        """The n best spans of each row over all its windows, best first, and its null score: (R,) each."""
        begin, at = encoded.ragged["begin"]
        end, null = encoded.ragged["end"][0], encoded.scalars["null"]
        found: list[dict[tuple[int, int], float]] = [{} for _ in range(rows)]
        nulls = np.full(rows, np.inf)
        for i, (row, scores) in enumerate(zip(encoded.row.tolist(), outputs, strict=True)):
            first, last = begin[at[i] : at[i + 1]], end[at[i] : at[i + 1]]  # (T,)
            nulls[row] = min(nulls[row], float(scores[null[i]].sum(dtype=np.float64)))
            for score, s, e in zip(*(x.tolist() for x in best_spans(scores, first >= 0, self.longest, n)), strict=True):
                span = int(first[s]), int(last[e])
                found[row][span] = max(score, found[row].get(span, score))
        best = [sorted((-score, a, b) for (a, b), score in spans.items())[:n] for spans in found]
        return [[(-score, a, b) for score, a, b in spans] for spans in best], nulls

    def abstains(self, spans: Found, null: float) -> bool:
        """Whether a row with these spans is given no answer."""
        return not spans or (self.threshold is not None and null - spans[0][0] > self.threshold)

    def judge(self, outputs: list[np.ndarray], encoded: Encoded, rows: list[Row]) -> Judged:
        """Arrays: exact match, F1 (0 to 1), whether there is an answer; for `calibrate` the null margin, both scores of the best
        span and of no answer; for `detail` the question's word and the answer's length. (R,) each."""
        found, nulls = self.find(outputs, encoded, len(rows), 1)
        table = []
        for row, spans, null in zip(rows, found, nulls.tolist(), strict=True):
            context, golds = row[self.columns["context"]], self.gold(row)
            characters = without_spaces(context)
            text = context[spans[0][1] : spans[0][2]] if spans else ""
            best, none = against(text, golds, characters), against("", golds, characters)
            margin = null - spans[0][0] if spans else 1e30
            exact, f1 = none if self.abstains(spans, null) else best
            length = len(words_of(golds[0], characters)) if golds else 0
            table.append((exact, f1, bool(golds), margin, *best, *none, _asked(row[self.columns["question"]]), length))
        losses = np.array([_loss(scores, label) for scores, label in zip(outputs, encoded.scalars["labels"], strict=True)])
        known = encoded.scalars["labels"][:, 0] >= 0
        return Judged(
            tuple(map(np.array, zip(*table, strict=True))),
            sum_by_row(losses, encoded.row, len(rows)),
            sum_by_row(known.astype(np.float64), encoded.row, len(rows)),
        )

    def calibrate(self, judged: Judged, aim: str) -> bool:
        """Choose the null threshold by F1, or by exact match where that is the aim."""
        if self.threshold is None:
            return False
        before, (margin, exact, f1, no_exact, no_f1) = self.threshold, judged.arrays[3:8]
        by_exact = aim.endswith("exact_match")
        self.threshold = best_threshold(margin, exact if by_exact else f1, no_exact if by_exact else no_f1)
        return self.threshold != before

    def predictions(self, outputs: list[np.ndarray], encoded: Encoded, rows: list[Row]) -> list[dict[str, Any]]:
        """Text, characters and score of the best span ("" and nulls: no answer), and the three best spans. Scores are sums of logits."""
        found, nulls = self.find(outputs, encoded, len(rows), 3)
        made = []
        for row, spans, null in zip(rows, found, nulls.tolist(), strict=True):
            context = row[self.columns["context"]]
            score, start, end = spans[0] if spans else (None, None, None)
            if self.abstains(spans, null):
                start = end = None
            made.append(
                {"prediction": "" if start is None else context[start:end], "start": start, "end": end, "score": score}
                | ({} if self.threshold is None else {"null_score": null})
                | {"best": [{"text": context[a:b], "start": a, "end": b, "score": s} for s, a, b in spans]}
            )
        return made

    # -- what is shown ------------------------------------------------------------------------------------------------

    def detail(self, judged: Judged) -> dict[str, Any]:
        exact, f1, *_, word, length = judged.arrays
        known = [name for name, _ in ASKED] + ["other"]
        bins = np.select([length == 0, length == 1, length == 2, length <= 4, length <= 8], LENGTHS[:5], LENGTHS[5])
        out: dict[str, Any] = {"by_question": _groups(word, known, exact, f1), "by_length": _groups(bins, LENGTHS, exact, f1)}
        return out if self.threshold is None else {"null_threshold": self.threshold, **out}

    @classmethod
    def sections(cls, detail: dict[str, Any], lines: list[dict[str, Any]]) -> list[Block]:
        note, kept = "In words without articles; in characters where the context is Chinese or Japanese.", ""
        if "null_threshold" in detail:
            limit = detail["null_threshold"]
            kept = f"No answer is given where the null score is more than {limit:.3f} above that of the best span."
        step = max(1, len(lines) // SHOWN)
        return [
            _table("By the question's word", "asks", detail["by_question"], kept),
            _table("By the answer's length", "length", detail["by_length"], note),
            Examples("Answers in their context", cls.header, [cls.example(line) for line in lines[::step][:SHOWN]], HOW),
        ]

    @classmethod
    def wrong(cls, line: dict[str, Any]) -> bool:
        return not against(line["prediction"], line["label"], without_spaces(line[context_of(line)]))[0]

    @classmethod
    def example(cls, line: dict[str, Any]) -> Example:
        """The context with its answers marked: right, wrong and missed characters."""
        name = context_of(line)
        kept = {k: v for k, v in line.items() if k not in HIDDEN | {name} and answers_of(v) is None}
        texts: dict[str, Any] = {k: v for k, v in kept.items() if isinstance(v, str)} | {name: shown_context(line[name], line)}
        other = {k: v for k, v in kept.items() if k not in texts}
        return Example(texts, other, [_said(line["label"]), _said([line["prediction"]])], right=not cls.wrong(line))


HOW = "Green: predicted rightly; red: predicted, and no part of an answer; dashed: of an answer, and missed."
LENGTHS = ["no answer", "1", "2", "3 to 4", "5 to 8", "9 or more"]


def _loss(scores: np.ndarray, label: np.ndarray) -> float:
    """A window's loss from its logits (T, 2) and (start, end); 0 where no answer is known."""
    if label[0] < 0:
        return 0.0
    x = scores.astype(np.float64)
    top = x.max(axis=0)
    log_sum = top + np.log(np.exp(x - top).sum(axis=0))  # (2,)
    return float((log_sum - x[label, [0, 1]]).mean())


def _mean(values: np.ndarray) -> float:
    return 100 * float(values.mean()) if len(values) else float("nan")


def _asked(question: str) -> str:
    """The first question word in it."""
    found = QUESTION.search(question)
    return ASKED[found.lastindex - 1][0] if found and found.lastindex else "other"


def _groups(keys: np.ndarray, known: list[str], exact: np.ndarray, f1: np.ndarray) -> dict[str, dict[str, Any]]:
    return {
        name: {"rows": int(own.sum()), "exact_match": _mean(exact[own]), "f1": _mean(f1[own])}
        for name in known
        if (own := keys == name).any()
    }


def _table(title: str, first: str, groups: dict[str, dict[str, Any]], note: str) -> Table:
    return Table(
        title, [first, "exact_match", "f1", "rows"], [[k, g["exact_match"], g["f1"], g["rows"]] for k, g in groups.items()], note
    )


def _said(answers: list[str]) -> str:
    return ", ".join(answer for answer in answers if answer) or "(no answer)"
