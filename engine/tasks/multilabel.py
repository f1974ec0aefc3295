"""Multilabel: any number of labels for a text or a pair, none among them. K yes-or-no questions, answered at once.

    text [, text_pair]  ->  tokens  ->  model  ->  logits (B, K)  ->  sigmoid  ->  those at or above the threshold

Loss: the sum over a row's K labels of  -log sigmoid(logit)  where the label is true,  -log sigmoid(-logit)  where it is not.
That is the negative log-likelihood of the row's set of labels. Items are examples, not labels: a row is judged as one, and a
question weighs the same however many others are asked beside it. (transformers' own loss for this problem type is the mean
over labels too, so ours is K times as large; the model and what its logits mean are the same.)

How labels may be written:  ["joy", "fear"]   "joy|fear" or "joy, fear"   one 0/1 column each, data.columns.labels: [joy, fear]

The threshold. 0.5 is right for a model that knows its labels well; a rare label seldom reaches it. So the threshold with the
best F1 on the validation split is chosen, and kept with the model (config.json, task_state). One for all labels: with one
for each, rare ones would be fitted to a handful of rows.
"""

import math
import re
from collections import Counter
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from engine import metrics
from engine.blocks import Block, Example, Span
from engine.data.encode import Encoded
from engine.data.read import Row
from engine.errors import InputError, nearest, quoted
from engine.schema import Data
from engine.tasks._base import Judged, labels_of, shown_columns
from engine.tasks._text import TextTask
from engine.tasks.classification import in_order, label_name, per_label, reliability

CANDIDATES = 100  # thresholds that are tried
YES, NO = {"1", "true", "yes"}, {"0", "false", "no", ""}


class Options(Data):
    """What multilabel adds to `data`."""

    separators: str = Field("|,", description="The characters that divide labels written as one text.")


class Task(TextTask):
    """K labels, each true or not."""

    roles: ClassVar = {"text": "required", "text_pair": "optional", "labels": "target"}
    many: ClassVar = {"labels"}
    default_metrics: ClassVar = ["f1_micro", "f1_macro"]
    metrics: ClassVar = metrics.MULTILABEL
    answer: ClassVar = "labels"
    header: ClassVar = [("truth", ""), ("predicted", "")]

    def __init__(self, columns: dict[str, Any], labels: list[str] | None = None, options: Any = None):
        super().__init__(columns, labels, options)
        self.threshold = 0.5
        self.separators = getattr(options, "separators", "|,")
        self.counts: Counter[str] = Counter()
        self.flags: list[str] = []  # the columns that hold 0 or 1, where labels are written so
        if isinstance(self.columns["labels"], list):
            self.flags = self.columns.pop("labels")
            self.needs.pop("labels")
            if not self.flags or len(set(self.flags)) < len(self.flags):
                raise InputError("data.columns.labels: a list of different columns is needed")
            if labels and labels != self.flags:
                raise InputError("data.labels: with a column for each label the columns' names are the labels; leave it out")
            self.columns |= {f"labels.{name}": name for name in self.flags}
            self.needs |= dict.fromkeys((f"labels.{name}" for name in self.flags), "target")
        self._know(self.flags or [label_name(name) or name for name in labels or []])

    def _know(self, labels: list[str]) -> None:
        self.labels = labels
        self.ids = {name: i for i, name in enumerate(labels)}

    # -- rows ---------------------------------------------------------------------------------------------------------

    def names(self, row: Row) -> list[str] | None:
        """The labels that a row is given, as they are written; None where they are not to be read."""
        if self.flags:
            words = [str(label_name(row.get(name)) or "").lower() for name in self.flags]
            readable = all(word in YES | NO for word in words) and not any(row.get(name) is None for name in self.flags)
            return [name for name, word in zip(self.flags, words, strict=True) if word in YES] if readable else None
        given = row.get(self.columns["labels"])
        if isinstance(given, str):
            given = [part for part in re.split(f"[{re.escape(self.separators)}]", given) if part.strip()]
        elif isinstance(given, int | float) and given == given:
            given = [given]
        if not isinstance(given, list):
            return None
        found = [label_name(one) for one in given]
        return None if None in found else [name for name in found if name is not None]

    def fit(self, rows: list[Row], source: str) -> None:
        """Learn the labels from train, in the order of classification's."""
        self.counts = Counter(name for row in rows for name in self.names(row) or [])
        if not self.labels:
            self._know(in_order(set(self.counts)))
        if not self.counts:
            raise InputError(f"{source}: {self._where()} holds no label in any row")

    def _where(self) -> str:
        return f"columns {', '.join(self.flags)}" if self.flags else f"column '{self.columns['labels']}'"

    def target_problem(self, row: Row) -> tuple[str, str] | None:
        if self.flags:
            for name in self.flags:
                if row.get(name) is None:
                    return "missing labels", f"column '{name}' is missing or null"
                if str(label_name(row[name]) or "").lower() not in YES | NO:
                    return "label is not 0 or 1", f"column '{name}' holds {quoted(row[name])}, not 0 or 1"
            return None
        if row.get(self.columns["labels"]) is None:
            return "missing labels", f"{self._where()} is missing or null; write [] where a row has none"
        names = self.names(row)
        if names is None:
            return "labels are no list", f"{self._where()} holds {quoted(row[self.columns['labels']])}, not a list of labels"
        unknown = next((name for name in names if self.labels and name not in self.ids), None)
        if unknown is not None:
            hint = nearest(unknown, self.labels)
            return "unknown label", f"{self._where()}: the label {quoted(unknown)} is not in the training set{hint}"
        return None

    def stratum(self, row: Row) -> Any:
        """A row's rarest label: so each label is shared out, where a stratum for each set would hold single rows."""
        return min(self.names(row) or [], key=lambda name: (self.counts[name], name), default=None)

    def facts(self, rows: list[Row]) -> dict[str, Any]:
        counts = Counter(name for row in rows for name in set(self.names(row) or []))
        return {"labels": {label: counts[label] for label in self.labels}}

    def gold(self, row: Row) -> Any:
        return sorted(set(self.names(row) or []), key=lambda name: self.ids[name])

    def asked(self) -> str:
        return "any of the labels: " + ", ".join(self.labels)

    # -- tokens and model ---------------------------------------------------------------------------------------------

    def fingerprint(self) -> Any:
        return [self.columns, self.ids, self.separators]

    def encode(self, rows: list[Row], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Tokens; labels as K numbers 0 or 1, all -100 where a row has none to read."""
        labels = []
        for row in rows:
            names = self.names(row)
            labels.append(tuple(-100 if names is None else int(label in names) for label in self.labels))
        return {**self.tokens(rows, tokenizer, max_length), "labels": labels}

    def model_options(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": dict(self.ids),
            "problem_type": "multi_label_classification",
        }

    def state(self) -> dict[str, Any]:
        return {"threshold": self.threshold}

    def restore(self, config: dict[str, Any]) -> None:
        self._know(labels_of(config))
        self.threshold = float(config.get("task_state", {}).get("threshold", 0.5))

    # -- loss and judgement -------------------------------------------------------------------------------------------

    def items(self, batch: dict[str, Tensor]) -> int:
        """What the loss sums over: examples."""
        return len(batch["labels"])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The SUM over examples and labels of the binary cross-entropy."""
        return F.binary_cross_entropy_with_logits(self.forward(model, batch), batch["labels"].float(), reduction="sum")

    def chance(self) -> float:
        return len(self.labels) * math.log(2)

    def judge(self, outputs: np.ndarray, encoded: Encoded, rows: list[Row]) -> Judged:
        """Logits (N, K) to labels, predicted (N, K) of 0 and 1, probabilities (N, K)."""
        labels, q = encoded.scalars["labels"], sigmoid(outputs)
        each = F.binary_cross_entropy_with_logits(torch.tensor(outputs), torch.tensor(labels).float(), reduction="none")
        return Judged((labels, (q >= self.threshold).astype(int), q), each.sum(1).numpy(), np.ones(len(labels)))

    def calibrate(self, judged: Judged, aim: str) -> bool:
        """The threshold with the best F1 (`aim`'s average, else micro) among those between the rows' probabilities."""
        name = aim if aim.startswith("f1_") else "f1_micro"
        labels, _, q = judged.arrays
        values = np.unique(q)
        between: list[float] = []
        if len(values) > 1:
            between = np.unique(np.quantile((values[1:] + values[:-1]) / 2, np.linspace(0, 1, CANDIDATES))).tolist()
        scored = [
            (metrics.compute(self.metrics, [name], (labels, (q >= t).astype(int), q))[name], -abs(t - 0.5), t)
            for t in [0.5, *between]
        ]  # of equals the one nearest to 0.5
        before, self.threshold = self.threshold, float(max(scored)[2])
        return before != self.threshold

    def predictions(self, outputs: np.ndarray, encoded: Encoded, rows: list[Row]) -> list[dict[str, Any]]:
        """The labels at or above the threshold, and the probability of each, for each row."""
        return [
            {
                "prediction": [name for name, x in zip(self.labels, p, strict=True) if x >= self.threshold],
                "probabilities": {name: float(x) for name, x in zip(self.labels, p, strict=True)},
            }
            for p in sigmoid(outputs)
        ]

    # -- what is shown ------------------------------------------------------------------------------------------------

    def detail(self, judged: Judged) -> dict[str, Any]:
        labels, predicted, _ = judged.arrays
        return {
            "labels": self.labels,
            "threshold": self.threshold,
            "per_class": metrics.per_class(self.labels, labels, predicted),
        }

    @classmethod
    def sections(cls, detail: dict[str, Any], lines: list[dict[str, Any]]) -> list[Block]:
        table = per_label(detail["per_class"])
        table.note = f"A label is given from a probability of {detail['threshold']:.3f} on, chosen on the validation split."
        sure = [x for line in lines for x in line["probabilities"].values()]
        true = [name in line["label"] for line in lines for name in line["probabilities"]]
        return [reliability("confidence", sure, true, 0.0, "probability of a label (area: decisions)", "share true"), table]

    @classmethod
    def example(cls, line: dict[str, Any]) -> Example:
        """Each label by itself: right, missed (of the truth), wrong (of the prediction)."""
        gold, made = line["label"], line["prediction"]
        cells = [_marks(gold, made, "missed"), _marks(made, gold, "bad")]
        return Example(*shown_columns(line), cells, right=not cls.wrong(line))


def _marks(names: list[str], other: list[str], kind: str) -> list[Span]:
    """The labels `names`, good where the `other` side has them too."""
    parts = [[Span(" ")] * (i > 0) + [Span(name, "good" if name in other else kind)] for i, name in enumerate(names)]
    return [span for part in parts for span in part] or [Span("(none)")]


def sigmoid(outputs: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) in float64, without overflow: (N, K) -> (N, K)."""
    small = np.exp(-np.abs(outputs.astype(np.float64)))
    return np.where(outputs >= 0, 1 / (1 + small), small / (1 + small))
