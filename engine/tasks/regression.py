"""Regression: a number for a text, or for a pair of texts.

    text [, text_pair]  ->  tokens  ->  model  ->  z (B, 1)  ->  value = mean + deviation * z

Loss: the sum over examples of  (z - (target - mean) / deviation)^2.  Items are examples.

Scale. A fresh head gives numbers about 0; targets may be prices. So the model learns standardised targets, with train's mean
and standard deviation, and predictions are put back into the targets' own unit. When the run is over this is folded into the
head's last linear layer,

    W' = deviation * W        b' = deviation * b + mean

and the saved model gives values by itself, to plain transformers too. A head without a bias (GPT-2's, Llama's) cannot take
the mean in: its model stays on the standardised scale. Which it is, config.json says: task_state {mean, deviation, folded}.
"""

import math
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from engine import metrics
from engine.blocks import Block, Example, Examples, Points, Table
from engine.data.encode import Encoded
from engine.data.read import Row
from engine.errors import InputError, quoted
from engine.tasks._base import MISTAKES, Judged, shown_columns
from engine.tasks._text import TextTask

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Task(TextTask):
    """One number for each example."""

    roles: ClassVar = {"text": "required", "text_pair": "optional", "score": "target"}
    default_metrics: ClassVar = ["spearman", "pearson"]
    metrics: ClassVar = metrics.REGRESSION
    answer: ClassVar = "value"
    header: ClassVar = [("truth", "n"), ("predicted", "n"), ("off by", "n")]

    def __init__(self, columns: dict[str, Any], labels: list[str] | None = None, options: Any = None):
        super().__init__(columns, labels, options)
        if labels:
            raise InputError("data.labels: regression predicts a number and has no labels; leave it out")
        self.mean, self.deviation, self.folded = 0.0, 1.0, False

    # -- rows ---------------------------------------------------------------------------------------------------------

    def fit(self, rows: list[Row], source: str) -> None:
        """Learn the scale from train: mean and standard deviation of the targets."""
        found = [value for row in rows if (value := number(row.get(self.columns["score"]))) is not None]
        if not found or min(found) == max(found):
            what = f"only {found[0]:g}" if found else "no number"
            raise InputError(f"{source}: column '{self.columns['score']}' holds {what}; regression needs numbers that differ")
        with np.errstate(over="ignore", invalid="ignore"):  # answered below
            self.mean, self.deviation = float(np.mean(found)), float(np.std(found))
        if not math.isfinite(self.mean) or not math.isfinite(self.deviation) or self.deviation == 0:
            raise InputError(f"{source}: column '{self.columns['score']}' holds numbers too large or too close to be told apart")

    def target_problem(self, row: Row) -> tuple[str, str] | None:
        name = self.columns["score"]
        given = row.get(name)
        if given is None or (isinstance(given, str) and not given.strip()):
            return "missing score", f"column '{name}' has no number"
        if number(given) is None:
            return "score is no number", f"column '{name}' holds {quoted(given)}, not a finite number"
        return None

    def facts(self, rows: list[Row]) -> dict[str, Any]:
        found = [value for row in rows if (value := number(row.get(self.columns["score"]))) is not None]
        told = {"mean": np.mean(found), "deviation": np.std(found), "lowest": min(found), "highest": max(found)}
        return {"labels": {name: float(f"{value:.6g}") for name, value in told.items()}}

    def gold(self, row: Row) -> Any:
        return number(row[self.columns["score"]])

    def asked(self) -> str:
        return f"a number; train's have the mean {self.mean:.4g} and the deviation {self.deviation:.4g}"

    # -- tokens and model ---------------------------------------------------------------------------------------------

    def fingerprint(self) -> Any:
        return [self.columns, self.mean, self.deviation]

    def encode(self, rows: list[Row], tokenizer: Any, max_length: int) -> dict[str, list[Any]]:
        """Tokens; labels are the standardised targets, NaN where a row has none."""
        found = [number(row.get(self.columns["score"])) for row in rows]
        labels = [np.float32(math.nan if value is None else (value - self.mean) / self.deviation) for value in found]
        return {**self.tokens(rows, tokenizer, max_length), "labels": labels}

    def model_options(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def finish(self, model: nn.Module) -> None:
        """Fold the scale into the head, where its last layer is a plain linear one with a bias."""
        last = last_linear(model)
        if self.folded or last is None:
            return
        with torch.no_grad():
            last.weight.mul_(self.deviation)
            last.bias.mul_(self.deviation).add_(self.mean)
        self.folded = True

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean, "deviation": self.deviation, "folded": self.folded}

    def restore(self, config: dict[str, Any]) -> None:
        kept = config.get("task_state", {})
        self.mean, self.deviation = float(kept.get("mean", 0.0)), float(kept.get("deviation", 1.0))
        self.folded = bool(kept.get("folded", True))

    # -- loss and judgement -------------------------------------------------------------------------------------------

    def items(self, batch: dict[str, Tensor]) -> int:
        """What the loss sums over: examples."""
        return len(batch["labels"])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The SUM of the examples' squared errors, in standard deviations."""
        made = self.forward(model, batch).squeeze(-1)  # (B,)
        z = (made - self.mean) / self.deviation if self.folded else made
        return (z - batch["labels"].float()).square().sum()

    def chance(self) -> float:
        """Of the mean as the answer to everything."""
        return 1.0

    def values(self, outputs: np.ndarray) -> np.ndarray:
        """In the targets' unit: (N, 1) -> (N,)."""
        made = outputs[:, 0].astype(np.float64)
        return made if self.folded else made * self.deviation + self.mean

    def judge(self, outputs: np.ndarray, encoded: Encoded, rows: list[Row]) -> Judged:
        """Outputs (N, 1) to gold (N,) and values (N,)."""
        gold, values = np.array([self.gold(row) for row in rows], dtype=np.float64), self.values(outputs)
        return Judged((gold, values), ((values - gold) / self.deviation) ** 2, np.ones(len(gold)))

    def predictions(self, outputs: np.ndarray, encoded: Encoded, rows: list[Row]) -> list[dict[str, Any]]:
        """The value of each row."""
        return [{"prediction": value, "value": value} for value in self.values(outputs).tolist()]

    # -- what is shown ------------------------------------------------------------------------------------------------

    def detail(self, judged: Judged) -> dict[str, Any]:
        """What is left over: the residuals, value - truth."""
        gold, values = judged.arrays
        left = values - gold
        told = {"mean": left.mean(), "deviation": left.std(), **{f"{q:.0%}": np.quantile(left, q) for q in QUANTILES}}
        return {"residuals": {name: float(value) for name, value in told.items()}}

    @classmethod
    def sections(cls, detail: dict[str, Any], lines: list[dict[str, Any]]) -> list[Block]:
        gold, values = [line["label"] for line in lines], [line["prediction"] for line in lines]
        low, high = min(gold), max(gold)
        left = [v - g for g, v in zip(gold, values, strict=True)]
        return [
            Points("scatter", "Predicted against true", gold, values, "truth", "predicted", line=((low, low), (high, high)), said="exact"),
            Points("residuals", "What is left over", values, left, "predicted", "predicted - truth",
                   line=((min(values), 0.0), (max(values), 0.0)), said="exact"),
            Table("Residuals, predicted - truth", list(detail["residuals"]), [list(detail["residuals"].values())]),
        ]  # fmt: skip

    @classmethod
    def wrong(cls, line: dict[str, Any]) -> bool | None:
        return None  # a number is more or less far off

    @classmethod
    def example(cls, line: dict[str, Any]) -> Example:
        texts, other = shown_columns({k: v for k, v in line.items() if k != "value"})
        return Example(texts, other, [line["label"], line["prediction"], f"{line['prediction'] - line['label']:+.3f}"])

    @classmethod
    def mistakes(cls, lines: list[dict[str, Any]]) -> Examples | None:
        worst = sorted(lines, key=lambda line: -line["loss"])[:MISTAKES]
        return Examples("The largest errors", cls.header, [cls.example(line) for line in worst], "Rows by their error.")


def number(value: Any) -> float | None:
    """A finite number, or a text that is one; None for everything else, true and false among it."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):  # a whole number of thousands of digits is none that a float holds
        return None
    return found if math.isfinite(found) else None


def last_linear(model: nn.Module) -> nn.Linear | None:
    """The head's last layer, if it is a plain linear one that gives one number and has a bias."""
    linear = [(name, module) for name, module in model.named_modules() if type(module) is nn.Linear and module.out_features == 1]
    found = [module for name, module in linear if not name.startswith(str(getattr(model, "base_model_prefix", "")) + ".")]
    return found[-1] if found and found[-1].bias is not None else None
