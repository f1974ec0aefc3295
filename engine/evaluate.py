"""Model and examples to predictions, predictions to scores. Training is left as it was: modes, random states, gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from engine import faults, metrics, seeds
from engine.data.encode import Encoded
from engine.data.windows import in_order
from engine.models import eval_mode


@dataclass
class Scored:
    """A split's outputs in the file's order, and what they are worth."""

    outputs: np.ndarray  # (N, K) logits
    losses: np.ndarray  # (N,)
    scores: dict[str, float]


def outputs(
    model: nn.Module,
    task: Any,
    encoded: Encoded,
    *,
    tokens: int,
    device: torch.device,
    autocast: Any,
    interrupted: Callable[[], bool] = lambda: False,
    shrunk: Callable[[int], None] = lambda tokens: None,
    places: list[str] | None = None,
) -> np.ndarray:
    """The task's raw outputs for every example, in the examples' order. Raises KeyboardInterrupt once `interrupted` says so.

    A batch that does not fit into memory is done again in halves, as are those after it; `shrunk` is told the new `tokens`.
    RunError names the example (by `places`) that does not fit alone.
    """
    made: np.ndarray | None = None
    done = 0
    with seeds.untouched(), eval_mode(model), torch.inference_mode():
        while done < len(encoded):
            for rows, batch in in_order(encoded, tokens, done):
                if interrupted():
                    raise KeyboardInterrupt
                with faults.Memory() as memory:
                    with autocast():
                        part = task.forward(model, {k: v.to(device, non_blocking=True) for k, v in batch.items()})
                    part = part.float().cpu().numpy()
                if memory.short:
                    faults.release()
                    if len(rows) == 1:
                        raise faults.too_large(places[rows[0]] if places else f"example {rows[0]}", "evaluation")
                    tokens = len(rows) * int(encoded.lengths[rows].max()) // 2
                    shrunk(tokens)
                    break
                if made is None:
                    made = np.empty((len(encoded), *part.shape[1:]), dtype=part.dtype)
                made[rows] = part
                done += len(rows)
    assert made is not None, "an empty split reached evaluation"
    return made


def score(task: Any, made: np.ndarray, labels: np.ndarray, names: list[str]) -> Scored:
    """Mean loss and the named metrics of outputs (N, K) against labels (N,)."""
    losses = task.losses(made, labels)
    probabilities = task.probabilities(made)
    scores = {"loss": float(losses.astype(np.float64).mean())}
    scores |= metrics.compute(names, labels, probabilities.argmax(axis=1), probabilities)
    return Scored(made, losses, scores)


def report(task: Any, scored: Scored, labels: np.ndarray, names: list[str], resamples: int) -> dict[str, Any]:
    """The long form of a final score: every metric, intervals of the headline ones, confusion matrix, per class."""
    probabilities = task.probabilities(scored.outputs)
    predicted = probabilities.argmax(axis=1)
    every = [n for n in metrics.CLASSIFICATION if len(task.labels) == 2 or n not in ("precision", "recall", "f1")]
    return {
        "scores": scored.scores | metrics.compute(every, labels, predicted, probabilities),
        "intervals": metrics.intervals(names, labels, predicted, probabilities, resamples) if resamples else {},
        "detail": metrics.detail(task.labels, labels, predicted),
    }
