"""Metric names to scikit-learn calls.

Names are scikit-learn's own. A table of metrics holds functions that take the same arrays, each with the rows as its first
axis, and give a plain number; CLASSIFICATION's take label ids (N,), predicted ids (N,) and probabilities (N, K). Which table
is a task's, the task says. Intervals are percentile bootstrap (Efron 1979): the rows are drawn again with replacement.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from sklearn import config_context
from sklearn import metrics as sk

from engine.errors import InputError, nearest

Array = np.ndarray
Metric = Callable[..., float]  # of arrays (N, ...)
LOWER_IS_BETTER = {"loss", "log_loss", "mean_absolute_error", "mean_squared_error"}


def _roc_auc(labels: Array, predicted: Array, probabilities: Array) -> float:
    """Area under the ROC curve; for K > 2 the mean of one class against the rest."""
    k = probabilities.shape[1]
    if k == 2:
        return float(sk.roc_auc_score(labels, probabilities[:, 1]))
    return float(sk.roc_auc_score(labels, probabilities, multi_class="ovr", labels=np.arange(k)))


def _average_precision(labels: Array, predicted: Array, probabilities: Array) -> float:
    k = probabilities.shape[1]
    if k == 2:
        return float(sk.average_precision_score(labels, probabilities[:, 1]))
    return float(sk.average_precision_score(np.eye(k)[labels], probabilities, average="macro"))


def _log_loss(labels: Array, predicted: Array, probabilities: Array) -> float:
    return float(sk.log_loss(labels, probabilities, labels=np.arange(probabilities.shape[1])))


def _averaged(function: Callable[..., Any], average: str, labels: Array, predicted: Array, probabilities: Array) -> float:
    present = None if average == "binary" else np.arange(probabilities.shape[1])
    return float(function(labels, predicted, average=average, labels=present, zero_division=0))


CLASSIFICATION: dict[str, Metric] = {
    "accuracy": lambda y, p, q: float(sk.accuracy_score(y, p)),
    "balanced_accuracy": lambda y, p, q: float(sk.balanced_accuracy_score(y, p)),
    "matthews_corrcoef": lambda y, p, q: float(sk.matthews_corrcoef(y, p)),
    "cohen_kappa": lambda y, p, q: float(sk.cohen_kappa_score(y, p)),
    "roc_auc": _roc_auc,
    "average_precision": _average_precision,
    "log_loss": _log_loss,
}
for _name, _function in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
    CLASSIFICATION[_name] = partial(_averaged, _function, "binary")  # of the second label, for two labels
    for _average in ("macro", "micro", "weighted"):
        CLASSIFICATION[f"{_name}_{_average}"] = partial(_averaged, _function, _average)


OF_TWO = ("precision", "recall", "f1")


def check(names: list[str], where: str, table: dict[str, Metric]) -> None:
    """Every name is known."""
    for name in names:
        if name not in table:
            raise InputError(f"{where}: evaluate.metrics: no metric '{name}'{nearest(name, table)}")


def compute(
    table: dict[str, Metric], names: list[str], arrays: tuple[Array, ...], index: Array | None = None
) -> dict[str, float]:
    """Each metric on all rows, or on the rows `index`; NaN where it is not defined (one class alone has no ROC curve)."""
    out = {}
    chosen = arrays if index is None else tuple(array[index] for array in arrays)
    with warnings.catch_warnings(), config_context(skip_parameter_validation=True):
        warnings.simplefilter("ignore")
        for name in names:
            try:
                out[name] = float(table[name](*chosen))
            except ValueError:
                out[name] = float("nan")
    return out


def intervals(
    compute: Callable[[Array], dict[str, float]], names: list[str], count: int, resamples: int, seed: int = 0
) -> dict[str, list[float]]:
    """95 % percentile bootstrap interval of each metric: {name: [low, high]}. `compute` scores the rows of an index, of `count`."""
    random = np.random.Generator(np.random.PCG64(seed))
    drawn = [compute(random.integers(0, count, count)) for _ in range(resamples)]
    out = {}
    for name in names:
        values = np.array([d[name] for d in drawn])
        values = values[np.isfinite(values)]
        if len(values):
            out[name] = [float(v) for v in np.percentile(values, [2.5, 97.5])]
    return out


def detail(label_names: list[str], labels: Array, predicted: Array) -> dict[str, Any]:
    """Confusion matrix (rows: truth, columns: prediction) and precision, recall, F1, support of each class."""
    index = np.arange(len(label_names))
    precision, recall, f1, support = sk.precision_recall_fscore_support(labels, predicted, labels=index, zero_division=0)
    return {
        "labels": label_names,
        "confusion_matrix": sk.confusion_matrix(labels, predicted, labels=index).tolist(),
        "per_class": {
            name: {"precision": float(precision[i]), "recall": float(recall[i]), "f1": float(f1[i]), "support": int(support[i])}
            for i, name in enumerate(label_names)
        },
    }
