"""What every task has: the answers of those that need nothing special. The contract is told in __init__.py.

Metrics are functions of arrays whose first axis is the rows. So one function scores all rows and a bootstrap's draw of them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from engine import metrics
from engine.blocks import Block, Example, Examples
from engine.data.encode import Vary
from engine.data.read import Row
from engine.errors import InputError, nearest

INPUTS = ("input_ids", "attention_mask", "token_type_ids")  # what of a batch a model is given
MISTAKES = 15  # rows that a report shows
NOT_SHOWN = {"label", "prediction", "probabilities", "loss"}  # of a line of predictions/, beside the input's columns
Outputs = np.ndarray | list[np.ndarray]


@dataclass
class Judged:
    """A split's R rows, ready to be scored."""

    arrays: tuple[np.ndarray, ...]  # (R, ...) each: what the task's metrics take, in order
    losses: np.ndarray  # (R,) summed over a row's items
    items: np.ndarray  # (R,)

    @property
    def loss(self) -> float:
        """The mean over all items."""
        return float(self.losses.astype(np.float64).sum() / max(1, self.items.sum()))

    @property
    def means(self) -> np.ndarray:
        """Each row's own loss, (R,)."""
        return np.asarray(self.losses.astype(np.float64) / np.maximum(1, self.items))


class Base:
    """Names and defaults."""

    roles: ClassVar[dict[str, str]]  # role -> "required", "optional" or "target"
    many: ClassVar[set[str]] = set()  # roles that may name several columns
    auto_class: ClassVar[str]
    peft_type: ClassVar[str]
    pipeline_tag: ClassVar[str]
    default_metrics: ClassVar[list[str]]
    metrics: ClassVar[dict[str, metrics.Metric]]
    answer: ClassVar[str] = "label"
    per_token: ClassVar[bool] = False
    padding: ClassVar[dict[str, int]] = {}
    full_marks: ClassVar[float] = 1.0  # what a perfect model scores by the first of default_metrics
    parts: dict[str, "Base"] = {}  # noqa: RUF012 (multitask alone has any: its tasks by name)

    def __init__(self, columns: dict[str, Any], labels: list[str] | None = None, options: Any = None):
        name = type(self).__module__.rpartition(".")[2]
        problems = [f"data.columns.{c}: {name} reads no '{c}'{nearest(c, self.roles)}" for c in columns if c not in self.roles]
        problems += [
            f"data.columns.{c}: one column is needed, not a list"
            for c, given in columns.items()
            if isinstance(given, list) and c in self.roles and c not in self.many
        ]
        if problems:
            raise InputError("\n".join(problems))
        self.columns: dict[str, Any] = {
            role: columns.get(role, role) for role, need in self.roles.items() if need != "optional" or role in columns
        }
        self.needs = {role: self.roles[role] for role in self.columns}
        self.options = options  # the recipe's `data` group

    # -- rows ---------------------------------------------------------------------------------------------------------

    def fit(self, rows: list[Row], source: str) -> None:
        """Nothing to learn from train but by the model."""

    def adapt(self, rows: list[Row]) -> str | None:
        return None

    def stratum(self, row: Row) -> Any:
        """What a fair split shares out alike."""
        return None

    def group(self, row: Row) -> Any:
        """What must not be torn apart by a split, such as the questions on one context; None for a row that stands alone."""
        return None

    def inputs(self, have: set[str] | None = None) -> dict[str, str]:
        """Role -> column of what a prediction is made from: of a file with the columns `have`, or None for a text alone."""
        return {role: name for role, name in self.columns.items() if self.needs[role] != "target"}

    def targets(self) -> set[str]:
        """The columns that hold the truth."""
        return set(self.columns.values()) - set(self.inputs().values())

    def asked(self) -> str:
        """What the model is to tell, for the line at the start of a run."""
        return ""

    @classmethod
    def summary(cls, fact: dict[str, Any]) -> str:
        """A split's `facts` in a line."""
        return ", ".join(f"{label} {n:,}" for label, n in fact.get("labels", {}).items())

    def chance(self) -> float | None:
        """The loss of a model that knows nothing, where there is a formula."""
        return None

    # -- tokens -------------------------------------------------------------------------------------------------------

    def vary(self, tokenizer: Any) -> Vary | None:
        """What changes in a batch each time that it is seen; nothing, for most tasks."""
        return None

    # -- model --------------------------------------------------------------------------------------------------------

    def model_options(self) -> dict[str, Any]:
        return {}

    def heads(self, model: Any) -> list[tuple[str, Any, Any]]:
        """(folder in model/, task, model) of what is saved: one model, in model/ itself."""
        return [("", self, model)]

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Logits of the head, float32."""
        logits: Tensor = model(**{name: batch[name] for name in INPUTS if name in batch}).logits
        return logits.float()

    def output(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """What evaluation keeps of each example: (B, ...)."""
        return self.forward(model, batch)

    # -- judgement ----------------------------------------------------------------------------------------------------

    def check(self, names: list[str], where: str) -> None:
        """InputError if a metric is none of this task's."""
        metrics.check(names, where, self.metrics)

    def every_metric(self) -> list[str]:
        """Those of the long report."""
        return list(self.metrics)

    def lower_is_better(self, name: str) -> bool:
        return name in metrics.LOWER_IS_BETTER

    def compute(self, names: list[str], judged: Judged, index: np.ndarray | None = None) -> dict[str, float]:
        """Each metric on all rows, or on the rows `index`; NaN where it is not defined."""
        return metrics.compute(self.metrics, names, judged.arrays, index)

    def calibrate(self, judged: Judged, aim: str) -> bool:
        return False

    def lines(self, outputs: Any, judged: Judged, encoded: Any, rows: list[Row]) -> list[dict[str, Any]]:
        """One object a row, in the file's order: its columns, the truth, the prediction, its loss."""
        made = zip(rows, self.predictions(outputs, encoded, rows), judged.means.tolist(), strict=True)  # type: ignore[attr-defined]
        return [{**row, "label": self.gold(row), **one, "loss": loss} for row, one, loss in made]  # type: ignore[attr-defined]

    def detail(self, judged: Judged) -> dict[str, Any]:
        return {}

    @classmethod
    def sections(cls, detail: dict[str, Any], lines: list[dict[str, Any]]) -> list[Block]:
        """Beside the scores: what the report draws. `lines` are those of predictions/SPLIT.jsonl."""
        return []

    @classmethod
    def wrong(cls, line: dict[str, Any]) -> bool | None:
        """Whether a line of predictions/ is a mistake; None where nothing is simply right or wrong."""
        return bool(line["label"] != line["prediction"])

    @classmethod
    def example(cls, line: dict[str, Any]) -> Example:
        """A line of predictions/ as the report shows it: its texts, then truth and prediction."""
        texts, other = shown_columns(line)
        return Example(texts, other, [line["label"], line["prediction"]])

    header: ClassVar[list[tuple[str, str]]] = [("truth", "good"), ("predicted", "bad")]

    @classmethod
    def mistakes(cls, lines: list[dict[str, Any]]) -> Examples | None:
        """The wrong rows in which the truth was least expected; None where none is wrong."""
        wrong = sorted((line for line in lines if cls.wrong(line)), key=lambda line: -line["loss"])
        note = f"Of the {len(wrong):,} wrong rows, those in which the truth was least expected."
        return (
            Examples("The worst mistakes", cls.header, [cls.example(line) for line in wrong[:MISTAKES]], note) if wrong else None
        )

    # -- kept with the model ------------------------------------------------------------------------------------------

    def finish(self, model: nn.Module) -> None:
        """Nothing is left to do."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, config: dict[str, Any]) -> None:
        """Nothing beside the recipe is needed."""


def shown_columns(line: dict[str, Any], hidden: set[str] = NOT_SHOWN) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the texts, the rest) of a line's input columns; the rest without what the truth beside it says again.

    A text is long, has three words, or is in a script of which a few characters say much.
    """
    kept = {k: v for k, v in line.items() if k not in hidden}
    texts = {k: v for k, v in kept.items() if isinstance(v, str) and (len(v) > 12 or v.count(" ") > 1 or not v.isascii())}
    rest = {k: v for k, v in kept.items() if k not in texts and not _same(v, line.get("label"))}
    return (texts, rest) if texts else (kept, {})


def _same(value: Any, truth: Any) -> bool:
    """Whether a column holds the truth itself."""
    if isinstance(value, list) and isinstance(truth, list):
        return sorted(map(str, value)) == sorted(map(str, truth))
    return bool(value == truth) or str(value) == str(truth)


def sum_by_row(values: np.ndarray, row: np.ndarray, rows: int) -> np.ndarray:
    """Of examples to rows: (N,) -> (R,) sums."""
    return np.bincount(row, weights=values, minlength=rows)


def labels_of(config: dict[str, Any]) -> list[str]:
    """The labels in a saved model's config, in the order of their ids."""
    names = config.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers leaves out what is its default
    return [names[str(i)] for i in range(len(names))]
