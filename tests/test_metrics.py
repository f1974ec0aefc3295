"""Metrics agree with scikit-learn's own calls; intervals cover what they should."""

import numpy as np
import pytest
from sklearn import metrics as sk

from engine import metrics
from engine.errors import InputError
from engine.tasks import classification


def made(k: int, n: int = 200, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, k, n)
    logits = random.normal(size=(n, k)) + 1.2 * np.eye(k)[labels]
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return labels, probabilities.argmax(1), probabilities


def test_every_metric_is_scikit_learns() -> None:
    y, p, q = made(3)
    expected = {
        "accuracy": sk.accuracy_score(y, p), "balanced_accuracy": sk.balanced_accuracy_score(y, p), "cohen_kappa": sk.cohen_kappa_score(y, p),
        "matthews_corrcoef": sk.matthews_corrcoef(y, p), "log_loss": sk.log_loss(y, q), "roc_auc": sk.roc_auc_score(y, q, multi_class="ovr"),
        "average_precision": sk.average_precision_score(np.eye(3)[y], q),
    }  # fmt: skip
    for name, function in (("precision", sk.precision_score), ("recall", sk.recall_score), ("f1", sk.f1_score)):
        expected |= {f"{name}_{a}": function(y, p, average=a) for a in ("macro", "micro", "weighted")}
    found = metrics.compute(metrics.CLASSIFICATION, list(expected), (y, p, q))
    assert found == pytest.approx(expected, abs=1e-12)
    y, p, q = made(2)
    binary = {"roc_auc": sk.roc_auc_score(y, q[:, 1]), "f1": sk.f1_score(y, p), "precision": sk.precision_score(y, p), "recall": sk.recall_score(y, p),
              "average_precision": sk.average_precision_score(y, q[:, 1])}  # fmt: skip
    assert metrics.compute(metrics.CLASSIFICATION, list(binary), (y, p, q)) == pytest.approx(binary, abs=1e-12)
    assert set(expected) | set(binary) == set(metrics.CLASSIFICATION)


def test_one_class_alone_has_no_curve_but_no_crash() -> None:
    y, p, q = np.zeros(5, int), np.zeros(5, int), np.full((5, 2), 0.5)
    found = metrics.compute(metrics.CLASSIFICATION, ["roc_auc", "accuracy"], (y, p, q))
    assert found["accuracy"] == 1.0
    assert np.isnan(found["roc_auc"])


def test_bootstrap_is_close_to_the_binomial_interval_and_is_pure() -> None:
    y, p, q = made(2, n=800)

    def compute(index: np.ndarray) -> dict[str, float]:
        return metrics.compute(metrics.CLASSIFICATION, ["accuracy"], (y, p, q), index)

    low, high = metrics.intervals(compute, ["accuracy"], len(y), 1000)["accuracy"]
    share = (y == p).mean()
    half = 1.96 * np.sqrt(share * (1 - share) / len(y))
    assert (low, high) == pytest.approx((share - half, share + half), abs=0.006)
    assert metrics.intervals(compute, ["accuracy"], len(y), 1000)["accuracy"] == [low, high]


def test_detail_counts_every_class_even_an_absent_one() -> None:
    found = metrics.detail(["a", "b", "c"], np.array([0, 0, 1]), np.array([0, 1, 1]))
    assert found["confusion_matrix"] == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert found["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert found["per_class"]["b"]["precision"] == 0.5


def test_unknown_metrics_are_named() -> None:
    with pytest.raises(InputError, match="no metric 'acuracy'; did you mean 'accuracy'"):
        metrics.check(["acuracy"], "r.yaml:3", metrics.CLASSIFICATION)
    with pytest.raises(InputError, match="'f1' is for two labels, and there are 3; write f1_macro"):
        classification.Task({}, ["a", "b", "c"]).check(["f1"], "r.yaml:3")
