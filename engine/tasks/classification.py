"""Classification: one label for a text, or for a pair of texts.

    text [, text_pair]  ->  tokens  ->  model  ->  logits (B, K)  ->  label

Loss: the sum over examples of the cross-entropy  -log softmax(logits)[label].  Items are examples.
"""

import math
import re
import unicodedata
from collections import Counter
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine import metrics
from engine.blocks import Block, Example, Matrix, Points, Table
from engine.data.encode import Encoded
from engine.data.read import Row
from engine.errors import InputError, nearest, quoted
from engine.tasks._base import Judged, labels_of, shown_columns
from engine.tasks._text import TextTask

NUMBER = re.compile(r"-?[0-9]{1,18}")


class Task(TextTask):
    """K labels, one for each example."""

    roles: ClassVar = {"text": "required", "text_pair": "optional", "label": "target"}
    default_metrics: ClassVar = ["accuracy", "f1_macro"]
    metrics: ClassVar = metrics.CLASSIFICATION
    header: ClassVar = [("truth", "good"), ("predicted", "bad"), ("how sure", "n")]

    def __init__(self, columns: dict[str, Any], labels: list[str] | None = None, options: Any = None):
        super().__init__(columns, labels, options)
        self._know([label_name(name) or name for name in labels or []])

    def _know(self, labels: list[str]) -> None:
        self.labels = labels
        self._hints: dict[str, str] = {}
        self.ids = {name: i for i, name in enumerate(labels)}  # what a file may write -> the label's id

    # -- rows ---------------------------------------------------------------------------------------------------------

    def fit(self, rows: list[Row], source: str) -> None:
        """Learn the labels from train: as numbers where all are whole numbers, else by the alphabet."""
        found = {name for row in rows if (name := label_name(row.get(self.columns["label"]))) is not None}
        if not self.labels:
            self._know(in_order(found))
        if len(found) < 2:
            only = f"only {quoted(next(iter(found)))}" if found else "none"
            raise InputError(f"{source}: column '{self.columns['label']}' holds {only}; classification needs two labels or more")

    def adapt(self, rows: list[Row]) -> str | None:
        """Let a file that numbers the labels (0, 1, ...) be scored by a model that names them. Says so, or None."""
        found = {label_name(row.get(self.columns["label"])) for row in rows} - {None}
        numbers = {str(i) for i in range(len(self.labels))}
        if not found or found & set(self.labels) or not found <= numbers:
            return None
        self.ids = {number: int(number) for number in numbers} | self.ids
        return "labels are read as ids: " + ", ".join(f"{i} = {name}" for i, name in enumerate(self.labels))

    def target_problem(self, row: Row) -> tuple[str, str] | None:
        name = self.columns["label"]
        if isinstance(row.get(name), list | dict | bytes):
            return "label is no name", f"column '{name}' holds a {type(row[name]).__name__} ({row[name]!r:.40}), not a label"
        label = label_name(row.get(name))
        if label is None:
            return "missing label", f"column '{name}' has no label"
        if self.labels and label not in self.ids:
            return "unknown label", f"column '{name}': the label {quoted(label)} is not in the training set{self._hint(label)}"
        return None

    def _hint(self, label: str) -> str:
        """The nearest known label, for the first 20 unknown ones: comparing each with all costs hours where there are many."""
        if label not in self._hints and len(self._hints) < 20:
            self._hints[label] = nearest(label, self.labels)
        return self._hints.get(label, "")

    def stratum(self, row: Row) -> Any:
        return label_name(row[self.columns["label"]])

    def facts(self, rows: list[Row]) -> dict[str, Any]:
        counts = Counter(self.ids[name] for row in rows if (name := label_name(row.get(self.columns["label"]))) is not None)
        return {"labels": {label: counts[i] for i, label in enumerate(self.labels)}}

    def gold(self, row: Row) -> Any:
        return self.labels[self.ids[label_name(row[self.columns["label"]]) or ""]]

    def asked(self) -> str:
        return "labels: " + ", ".join(self.labels)

    # -- tokens and model ---------------------------------------------------------------------------------------------

    def fingerprint(self) -> Any:
        """What of the task the tokens depend on."""
        return [self.columns, self.ids]

    def encode(self, rows: list[Row], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Tokens; labels where the rows have them, -100 elsewhere."""
        ids, name = self.ids, self.columns["label"]
        labels = [ids.get(label_name(row.get(name)) or "", -100) for row in rows]
        return {**self.tokens(rows, tokenizer, max_length), "labels": labels}

    def model_options(self) -> dict[str, Any]:
        """Written into the model's config, so that the saved model knows its labels."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    def restore(self, config: dict[str, Any]) -> None:
        self._know(labels_of(config))

    # -- loss and judgement -------------------------------------------------------------------------------------------

    def items(self, batch: dict[str, Tensor]) -> int:
        """What the loss sums over: examples."""
        return len(batch["labels"])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The SUM of the examples' cross-entropies; the loop divides by the items of the whole window."""
        return F.cross_entropy(self.forward(model, batch), batch["labels"], reduction="sum")

    def chance(self) -> float:
        return math.log(len(self.labels))

    def judge(self, outputs: np.ndarray, encoded: Encoded, rows: list[Row]) -> Judged:
        """Logits (N, K) to labels (N,), predicted (N,), probabilities (N, K)."""
        labels, q = encoded.scalars["labels"], probabilities(outputs)
        losses = F.cross_entropy(torch.tensor(outputs), torch.tensor(labels), reduction="none").numpy()
        return Judged((labels, q.argmax(axis=1), q), losses, np.ones(len(labels)))

    def check(self, names: list[str], where: str) -> None:
        super().check(names, where)
        for name in names:
            if name in metrics.OF_TWO and len(self.labels) != 2:
                raise InputError(
                    f"{where}: evaluate.metrics: '{name}' is for two labels, and there are {len(self.labels)}; write {name}_macro"
                )

    def every_metric(self) -> list[str]:
        return [n for n in self.metrics if len(self.labels) == 2 or n not in metrics.OF_TWO]

    def predictions(self, outputs: np.ndarray, encoded: Encoded, rows: list[Row]) -> list[dict[str, Any]]:
        """The likeliest label and all probabilities, for each row."""
        return [
            {
                "prediction": self.labels[int(p.argmax())],
                "probabilities": {name: float(x) for name, x in zip(self.labels, p, strict=True)},
            }
            for p in probabilities(outputs)
        ]

    # -- what is shown ------------------------------------------------------------------------------------------------

    def detail(self, judged: Judged) -> dict[str, Any]:
        labels, predicted, _ = judged.arrays
        return metrics.detail(self.labels, labels, predicted)

    @classmethod
    def sections(cls, detail: dict[str, Any], lines: list[dict[str, Any]]) -> list[Block]:
        sure = [line["probabilities"][line["prediction"]] for line in lines]
        right = [line["label"] == line["prediction"] for line in lines]
        low = 1 / max(2, len(detail["labels"]))
        return [
            Matrix("confusion", "Confusion matrix", detail["labels"], detail["confusion_matrix"]),
            reliability("confidence", sure, right, low, "confidence (area: rows)", "share right"),
            per_label(detail["per_class"]),
        ]

    @classmethod
    def example(cls, line: dict[str, Any]) -> Example:
        sure = f"{100 * line['probabilities'][line['prediction']]:.1f} %"
        return Example(*shown_columns(line), [line["label"], line["prediction"], sure])


def in_order(labels: set[str]) -> list[str]:
    """As numbers where all are whole numbers, else by the alphabet."""
    numbers = all(NUMBER.fullmatch(name) for name in labels)
    return sorted(labels, key=lambda name: (int(name), name)) if numbers else sorted(labels)


def probabilities(outputs: np.ndarray) -> np.ndarray:
    """Softmax in float64: (N, K) -> (N, K)."""
    exp = np.exp(outputs.astype(np.float64) - outputs.max(axis=1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=1, keepdims=True))


def per_label(scores: dict[str, Any]) -> Table:
    """Precision, recall, F1 and support of each label."""
    rows = [[name, row["precision"], row["recall"], row["f1"], row["support"]] for name, row in scores.items()]
    return Table("Each label", ["label", "precision", "recall", "f1", "rows"], rows)


def reliability(name: str, sure: list[float], right: list[bool], low: float, across: str, up: str) -> Points:
    """Is what is 90 % sure right in 90 % of the cases? Eight bins from `low` to 1, each a point."""
    edges = np.linspace(low, 1, 9)
    x, y = np.asarray(sure), np.asarray(right, dtype=float)
    place = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, 7)
    bins = [place == i for i in range(8) if (place == i).any()]
    return Points(
        name, "Confidence against accuracy", [float(x[b].mean()) for b in bins], [float(y[b].mean()) for b in bins], across, up,
        [float(b.mean()) for b in bins], line=((low, low), (1.0, 1.0)), said="perfectly calibrated", limits=(-0.03, 1.08),
    )  # fmt: skip


def label_name(value: Any) -> str | None:
    """A label as it is written in files: 1, 1.0 and "1" are the same one, and é is é however it is composed (Unicode NFC).

    None where there is none, and for lists and mappings, which name nothing.
    """
    if value is None or isinstance(value, list | dict | bytes) or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return None if value != value else str(int(value)) if value.is_integer() else str(value)
    name = str(value).strip()
    return name if name.isascii() else unicodedata.normalize("NFC", name)
