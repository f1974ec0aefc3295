"""Metric names to scikit-learn calls.

Names are scikit-learn's own. A table of metrics holds functions that take the same arrays, each with the rows as its first
axis, and give a plain number; CLASSIFICATION's take label ids (N,), predicted ids (N,) and probabilities (N, K). Which table
is a task's, the task says. Intervals are percentile bootstrap (Efron 1979): the rows are drawn again with replacement.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from engine.errors import InputError, nearest


class Later:
    """A module's functions; it is imported when the first of them is called, for nothing is scored before the first steps."""

    def __init__(self, module: str):
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            return getattr(importlib.import_module(self._module), name)(*args, **more)

        return call


sk, stats, config_context = Later("sklearn.metrics"), Later("scipy.stats"), Later("sklearn").config_context

Array = np.ndarray
Metric = Callable[..., float]  # of arrays (N, ...)
LOWER_IS_BETTER = {"loss", "log_loss", "hamming_loss", "mean_absolute_error", "mean_squared_error", "root_mean_squared_error"}


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


def _of_sets(function: Callable[..., Any], average: str, labels: Array, predicted: Array, probabilities: Array) -> float:
    if labels.shape[1] == 1:  # scikit-learn takes one column for two classes; the yes is what is asked for
        average = "binary" if average in ("macro", "micro", "weighted") else average
        labels, predicted = (labels[:, 0], predicted[:, 0]) if average == "binary" else (labels, predicted)
    return float(function(labels, predicted, average=average, zero_division=0))


def _macro(function: Callable[..., Any], labels: Array, predicted: Array, probabilities: Array) -> float:
    """The mean over the labels that are true of some rows and not of others; the rest have no curve."""
    both = [k for k in range(labels.shape[1]) if 0 < labels[:, k].sum() < len(labels)]
    return float(np.mean([function(labels[:, k], probabilities[:, k]) for k in both])) if both else float("nan")


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


MULTILABEL: dict[str, Metric] = {  # of labels and predicted (N, K), 0 or 1, and probabilities (N, K)
    "subset_accuracy": lambda y, p, q: float(sk.accuracy_score(y, p)),
    "hamming_loss": lambda y, p, q: float(sk.hamming_loss(y, p)),
    "roc_auc_macro": partial(_macro, sk.roc_auc_score),
    "roc_auc_micro": lambda y, p, q: float(sk.roc_auc_score(y, q, average="micro")),
    "average_precision_macro": partial(_macro, sk.average_precision_score),
    "average_precision_micro": lambda y, p, q: float(sk.average_precision_score(y, q, average="micro")),
}
for _name, _function in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
    for _average in ("macro", "micro", "weighted", "samples"):
        MULTILABEL[f"{_name}_{_average}"] = partial(_of_sets, _function, _average)

REGRESSION: dict[str, Metric] = {  # of truth and values (N,)
    "pearson": lambda y, p: float(stats.pearsonr(y, p).statistic),
    "spearman": lambda y, p: float(stats.spearmanr(y, p).statistic),
    "r2": lambda y, p: float(sk.r2_score(y, p)),
    "mean_absolute_error": lambda y, p: float(sk.mean_absolute_error(y, p)),
    "mean_squared_error": lambda y, p: float(sk.mean_squared_error(y, p)),
    "root_mean_squared_error": lambda y, p: float(sk.root_mean_squared_error(y, p)),
}

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


def per_class(label_names: list[str], labels: Array, predicted: Array) -> dict[str, Any]:
    """Precision, recall, F1 and support of each class, of label ids (N,) or of yes and no (N, K)."""
    index = np.arange(len(label_names))
    precision, recall, f1, support = sk.precision_recall_fscore_support(
        labels, predicted, labels=index, average=None, zero_division=0
    )
    return {
        name: {"precision": float(precision[i]), "recall": float(recall[i]), "f1": float(f1[i]), "support": int(support[i])}
        for i, name in enumerate(label_names)
    }


def detail(label_names: list[str], labels: Array, predicted: Array) -> dict[str, Any]:
    """Confusion matrix (rows: truth, columns: prediction) and the scores of each class."""
    return {
        "labels": label_names,
        "confusion_matrix": sk.confusion_matrix(labels, predicted, labels=np.arange(len(label_names))).tolist(),
        "per_class": per_class(label_names, labels, predicted),
    }
