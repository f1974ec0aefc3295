"""Classification: one label for a text, or for a pair of texts.

    text [, text_pair]  ->  tokens  ->  model  ->  logits (B, K)  ->  label

Loss: the sum over examples of the cross-entropy  -log softmax(logits)[label].  Items are examples.
Every other task offers the same names as this class; the loop, evaluation and prediction know no more than these.
"""

import re
import unicodedata
from collections import Counter
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.data.read import Row
from engine.errors import InputError, nearest, quoted

NUMBER = re.compile(r"-?[0-9]{1,18}")


class Task:
    """K labels, one for each example."""

    roles: ClassVar = {"text": "required", "text_pair": "optional", "label": "target"}
    auto_class = "AutoModelForSequenceClassification"
    default_metrics: ClassVar = ["accuracy", "f1_macro"]
    peft_type = "SEQ_CLS"

    def __init__(self, columns: dict[str, str], labels: list[str] | None = None):
        unknown = [
            f"data.columns.{c}: {type(self).__module__.rpartition('.')[2]} reads no '{c}'{nearest(c, self.roles)}"
            for c in columns
            if c not in self.roles
        ]
        if unknown:
            raise InputError("\n".join(unknown))
        self.columns = {
            role: columns.get(role, role) for role, need in self.roles.items() if need != "optional" or role in columns
        }
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
            numbers = all(NUMBER.fullmatch(name) for name in found)
            self._know(sorted(found, key=lambda name: (int(name), name)) if numbers else sorted(found))
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

    def problem(self, row: Row, target: bool = True) -> tuple[str, str] | None:
        """(reason, detail) of what makes a row unusable, or None."""
        for role in ("text", "text_pair"):
            if role in self.columns:
                name = self.columns[role]
                text = row.get(name)
                if text is None:
                    return f"missing {role}", f"column '{name}' is missing or null"
                if not isinstance(text, str):
                    return f"{role} is no text", f"column '{name}' holds a {type(text).__name__} ({text!r:.40}), not a text"
                if not text.strip():
                    return f"empty {role}", f"column '{name}' is empty"
                if not text.isascii() and _broken(text):
                    return f"{role} is no text", f"column '{name}' holds half of a surrogate pair, which is no character"
        if target:
            name = self.columns["label"]
            if isinstance(row.get(name), list | dict | bytes):
                return "label is no name", f"column '{name}' holds a {type(row[name]).__name__} ({row[name]!r:.40}), not a label"
            label = label_name(row.get(name))
            if label is None:
                return "missing label", f"column '{name}' has no label"
            if self.labels and label not in self.ids:
                return (
                    "unknown label",
                    f"column '{name}': the label {quoted(label)} is not in the training set{self._hint(label)}",
                )
        return None

    def _hint(self, label: str) -> str:
        """The nearest known label, for the first 20 unknown ones: comparing each with all costs hours where there are many."""
        if label not in self._hints and len(self._hints) < 20:
            self._hints[label] = nearest(label, self.labels)
        return self._hints.get(label, "")

    def text_of(self, row: Row) -> str:
        """The whole input of a row as one text, to find duplicates by."""
        return "\x1f".join(str(row.get(self.columns[r], "")) for r in ("text", "text_pair") if r in self.columns)

    def stratum(self, row: Row) -> Any:
        return label_name(row[self.columns["label"]])

    def facts(self, rows: list[Row]) -> dict[str, Any]:
        counts = Counter(self.ids[name] for row in rows if (name := label_name(row.get(self.columns["label"]))) is not None)
        return {"labels": {label: counts[i] for i, label in enumerate(self.labels)}}

    # -- tokens and model ---------------------------------------------------------------------------------------------

    def fingerprint(self) -> Any:
        """What of the task the tokens depend on."""
        return [self.columns, self.ids]

    def encode(self, rows: list[Row], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Ragged input_ids (and token_type_ids of pairs), labels where the rows have them, what was cut."""
        texts = [row[self.columns["text"]] for row in rows]
        pairs = [row[self.columns["text_pair"]] for row in rows] if "text_pair" in self.columns else None
        encoded = tokenizer(texts, pairs, truncation=True, max_length=max_length)
        out = {"input_ids": encoded["input_ids"], "truncated": [bool(e.overflowing) for e in encoded.encodings]}
        if pairs and "token_type_ids" in encoded:
            out["token_type_ids"] = encoded["token_type_ids"]
        ids, name = self.ids, self.columns["label"]
        labels = [ids.get(label_name(row.get(name)) or "", -100) for row in rows]
        return {**out, "labels": labels}

    def model_options(self) -> dict[str, Any]:
        """Written into the model's config, so that the saved model knows its labels."""
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    # -- loss and predictions -----------------------------------------------------------------------------------------

    def items(self, batch: dict[str, Tensor]) -> int:
        """What the loss sums over: examples."""
        return len(batch["labels"])

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Logits (B, K), float32."""
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "truncated")}
        logits: Tensor = model(**inputs).logits
        return logits.float()

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The SUM of the examples' cross-entropies; the loop divides by the items of the whole window."""
        return F.cross_entropy(self.forward(model, batch), batch["labels"], reduction="sum")

    def losses(self, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Each example's loss from its logits: (N, K), (N,) -> (N,)."""
        return F.cross_entropy(torch.tensor(outputs), torch.tensor(labels), reduction="none").numpy()

    def probabilities(self, outputs: np.ndarray) -> np.ndarray:
        """Softmax in float64: (N, K) -> (N, K)."""
        exp = np.exp(outputs.astype(np.float64) - outputs.max(axis=1, keepdims=True))
        return np.asarray(exp / exp.sum(axis=1, keepdims=True))

    def predictions(self, outputs: np.ndarray) -> list[dict[str, Any]]:
        """What a user reads for each example."""
        return [
            {
                "prediction": self.labels[int(p.argmax())],
                "probabilities": {name: float(x) for name, x in zip(self.labels, p, strict=True)},
            }
            for p in self.probabilities(outputs)
        ]


def _broken(text: str) -> bool:
    """Whether a lone surrogate stands in `text`, as the bytes of a command line that are not UTF-8 become."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


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
